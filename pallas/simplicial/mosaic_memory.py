"""Tile sizes and shared memory of the forward kernel in Mosaic GPU.

Letters as in `jattn.pallas.simplicial.mosaic`.
"""

import dataclasses
import functools
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jattn.pallas import _mosaic
from jattn.pallas.simplicial import ROWS
from jattn.pallas.simplicial import mosaic_items as items

CONSUMERS = 2

# Slots of the rings of few keys and values.
FEW_SLOTS = 2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      columns: Keys of the larger window in a block, which fills a slot of the ring: 64,
        128 or 256.
      blocks: Blocks of K', and as many of V', in a step, of at most 256 keys.
      slots: Slots of the ring, at least those of a step.
      few: Keys of the smaller window in a slot of their ring, an even number.
      programs: Thread blocks.
      turns: Whether the consumers take turns at the tensor cores.
    """

    columns: int
    blocks: int
    slots: int
    few: int
    programs: int
    turns: bool = True

    @property
    def step(self) -> int:
        """Keys of the larger window in a step."""
        return self.columns * self.blocks


@dataclasses.dataclass(frozen=True)
class Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      query: [ROWS, H] of the item.
      ring: [slots, columns, H], blocks of K' and V' in turns of a step.
      few_key: [FEW_SLOTS, rows, at least H], those that the tile's rows need for so
        many keys.
      few_value: As few_key.
      expanded_or_half: A union of the consumers' expanded queries [CONSUMERS, ROWS, H]
        and of the halves of O that they hand over, fp32 [CONSUMERS, ROWS, H / 2].
      statistics: fp32 [CONSUMERS, 2, ROWS], the consumers' m and l.
      weights: [CONSUMERS, ROWS, step], P in the interpreter, else None.
      query_full: The query has been loaded.
      query_empty: The consumers are done with it; so are the others.
      ring_full: Of each slot.
      ring_empty: Of each slot.
      few_full: Of each slot.
      few_empty: Of each slot.
      turn: Of each product and consumer, that it may be issued.
      together: That both consumers have come here.
    """

    query: Any
    ring: Any
    few_key: Any
    few_value: Any
    expanded_or_half: Any
    statistics: Any
    weights: Any
    query_full: Any
    query_empty: Any
    ring_full: Any
    ring_empty: Any
    few_full: Any
    few_empty: Any
    turn: Any
    together: Any


def memory_types(
    tiling: Tiling,
    sizes: items.Sizes,
    dtype: Any,
    key_dtype: Any,
    value_dtype: Any,
    pitch: int,
) -> dict[str, Any]:
    """The types of Memory's attributes; the last two dtypes are the few keys'."""
    matrix = functools.partial(_mosaic.matrix, dtype=dtype)
    width = sizes.width
    few = FEW_SLOTS, items.chunk_rows(sizes, tiling.few)
    return {
        "query": matrix(ROWS, width),
        "ring": matrix(tiling.slots, tiling.columns, width),
        "few_key": plgpu.SMEM((*few, pitch), key_dtype),
        "few_value": plgpu.SMEM((*few, pitch), value_dtype),
        "expanded_or_half": plgpu.RefUnion(
            matrix(CONSUMERS, ROWS, width),
            matrix(CONSUMERS, ROWS, width // 2, dtype=jnp.float32),
        ),
        "statistics": plgpu.SMEM((CONSUMERS, 2, ROWS), jnp.float32),
        "weights": matrix(CONSUMERS, ROWS, tiling.step)
        if _mosaic.interpretation()
        else None,
        "query_full": _mosaic.barriers(1, 1),
        "query_empty": _mosaic.barriers(1, CONSUMERS),
        "ring_full": _mosaic.barriers(tiling.slots, 1),
        "ring_empty": _mosaic.barriers(tiling.slots, CONSUMERS),
        "few_full": _mosaic.barriers(FEW_SLOTS, 2),
        "few_empty": _mosaic.barriers(FEW_SLOTS, CONSUMERS),
        "turn": _mosaic.barriers(2 * CONSUMERS, 1),
        "together": _mosaic.barriers(1, CONSUMERS),
    }
