"""The shared memory of the forward kernel in Mosaic, and its tiling.

See `jattn.pallas.flash.mosaic`.
"""

import dataclasses
import functools
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu

from jattn.pallas import _mosaic
from jattn.pallas.flash import ROWS
from jattn.pallas.flash.mosaic_items import Sizes

# Tiles of queries of a consumer: the one at work, and the next one.
QUERY_SLOTS = 2

# The axis of the thread blocks that share keys and values.
PAIR = "pair"


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      consumers: Warpgroups of a thread block that compute, 2 or 3.
      cluster: Thread blocks that share keys and values, 1 or 2.
      keys: Keys of a step, a multiple of 64.
      edge: Keys of an item's first step, a multiple of 64 and no more than the others.
      slots: Slots of the ring of keys and values, at least 3.
      programs: Thread blocks.
    """

    consumers: int
    cluster: int
    keys: int
    edge: int
    slots: int
    programs: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      query: [QUERY_SLOTS, consumers, ROWS, H], queries, and then the output.
      ring: [slots, keys, H], keys and values.
      weights: [consumers, ROWS, keys], P in the interpreter, else None.
      query_full: Of each slot.
      query_empty: Of each slot.
      ring_full: Of each slot.
      ring_empty: Of each slot, in all thread blocks that share keys and values.
    """

    query: Any
    ring: Any
    weights: Any
    query_full: Any
    query_empty: Any
    ring_full: Any
    ring_empty: Any


def memory_types(tiling: Tiling, sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """The types of Memory's attributes."""
    consumers = tiling.consumers

    matrix = functools.partial(_mosaic.matrix, dtype=dtype)
    return {
        "query": matrix(QUERY_SLOTS, consumers, ROWS, sizes.width),
        "ring": matrix(tiling.slots, tiling.keys, sizes.width),
        "weights": matrix(consumers, ROWS, tiling.keys)
        if _mosaic.interpretation()
        else None,
        "query_full": _mosaic.barriers(QUERY_SLOTS, consumers * sizes.parts),
        "query_empty": _mosaic.barriers(QUERY_SLOTS, consumers),
        "ring_full": _mosaic.barriers(tiling.slots, 1),
        "ring_empty": _mosaic.barriers(tiling.slots, consumers)
        if tiling.cluster == 1
        else plgpu.ClusterBarrier(
            collective_axes=(PAIR,),
            num_barriers=tiling.slots,
            num_arrivals=consumers,
        ),
    }
