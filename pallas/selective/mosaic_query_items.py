"""What a thread block of the kernel of query gradients does, and its memory.

See `jattn.pallas.selective.mosaic_query_gradient`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.pallas import _mosaic
from jattn.pallas.flash.mosaic_backward import CONSUMERS, KEYS, ROWS
from jattn.pallas.selective import mosaic_fragments as fragments


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      pack: Query heads of a kv head in a thread block; 1, 2 or 4.
      kv_heads: Kv heads of a thread block, 1 or 2.
      slots: Tiles of keys in flight.
      programs: Thread blocks.
    """

    pack: int
    kv_heads: int
    slots: int
    programs: int

    @property
    def members(self) -> int:
        """Query heads of a thread block, M."""
        return self.pack * self.kv_heads


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the kernel knows of its arguments when it is compiled.

    Attributes:
      queries: T.
      offset: Position of the first query.
      batch: B.
      parts: N / M.
      group: Query heads of a kv head.
      tiles: Items of work of one row of the batch and one part.
      block: Queries that share a list of tiles of keys.
      width: Of keys and values.
      scale: Factor of the logits.
      tiling: Tile sizes.
    """

    queries: int
    offset: int
    batch: int
    parts: int
    group: int
    tiles: int
    block: int
    width: int
    scale: float
    tiling: Tiling

    @property
    def tokens(self) -> int:
        """Tokens of a consumer."""
        return ROWS // self.tiling.pack

    @property
    def item_tokens(self) -> int:
        """Tokens of an item of work."""
        return CONSUMERS * self.tokens

    @property
    def items(self) -> int:
        """Items of work."""
        return self.tiles * self.parts * self.batch


@dataclasses.dataclass(frozen=True)
class Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      query: [CONSUMERS, kv heads, ROWS, H].
      out_gradient: [CONSUMERS, kv heads, ROWS, H].
      statistics: fp32 [CONSUMERS, kv heads, 2, ROWS].
      key: [slots, kv heads, KEYS, H].
      value: [slots, kv heads, KEYS, H].
      bias: fp32 [slots, CONSUMERS TOKENS, KEYS], in fragments.
      result: [CONSUMERS, kv heads, ROWS, H].
      weights: [CONSUMERS, ROWS, KEYS], dS in the interpreter, else None.
      rows_full: The rows have been loaded.
      rows_empty: The consumers have them in registers.
      full: Of each slot.
      empty: Of each slot.
    """

    query: Any
    out_gradient: Any
    statistics: Any
    key: Any
    value: Any
    bias: Any
    result: Any
    weights: Any
    rows_full: Any
    rows_empty: Any
    full: Any
    empty: Any


def memory_types(sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """The types of Memory's attributes."""
    matrix = functools.partial(_mosaic.matrix, dtype=dtype)
    kv_heads, slots = sizes.tiling.kv_heads, sizes.tiling.slots
    rows = matrix(CONSUMERS, kv_heads, ROWS, sizes.width)
    keys = matrix(slots, kv_heads, KEYS, sizes.width)
    bias = (
        slots,
        sizes.item_tokens // fragments.ROWS,
        KEYS // fragments.COLUMNS,
        fragments.NUMBERS,
    )
    return {
        "query": rows,
        "out_gradient": rows,
        "statistics": plgpu.SMEM((CONSUMERS, kv_heads, 2, ROWS), jnp.float32),
        "key": keys,
        "value": keys,
        "bias": plgpu.SMEM(bias, jnp.float32),
        "result": rows,
        "weights": matrix(CONSUMERS, ROWS, KEYS) if _mosaic.interpretation() else None,
        "rows_full": _mosaic.barriers(
            CONSUMERS, (2 * sizes.tiling.pack + 1) * kv_heads
        ),
        "rows_empty": _mosaic.barriers(CONSUMERS, 1),
        "full": _mosaic.barriers(slots, 2 * kv_heads + 1),
        "empty": _mosaic.barriers(slots, CONSUMERS),
    }


@dataclasses.dataclass(frozen=True)
class Item:
    """An item of work: adjacent tokens of the members of one part.

    Attributes:
      batch: Row of the batch.
      part: Of the query heads.
      chunk_token: First token, in the chunk.
      first_token: The same, of all queries.
      block: Of queries.
      skipped: Tiles of keys in the past that are skipped.
      whole: Tiles of keys not skipped and seen by all tokens.
      steps: Tiles of keys not skipped and seen by any.
    """

    batch: jax.Array
    part: jax.Array
    chunk_token: jax.Array
    first_token: jax.Array
    block: jax.Array
    skipped: Any
    whole: jax.Array
    steps: jax.Array


def item_of(index, region, live, sizes: Sizes) -> Item:
    """The item of that index; late tokens, which see most keys, come first.

    Those of the same tokens are neighbours: they read the same F.
    """
    # Found out where it is needed, rather than kept in registers all along.
    index = lax.optimization_barrier(index)
    index, part = _mosaic.div_rem(index, sizes.parts)
    index, batch = _mosaic.div_rem(index, sizes.batch)
    chunk_token = (sizes.tiles - 1 - index) * sizes.item_tokens
    first_token = region[0] + chunk_token
    whole = _mosaic.div_rem(first_token + (sizes.offset + 1), KEYS)[0]
    end = jnp.minimum(first_token + sizes.item_tokens, sizes.queries) + sizes.offset
    end = _mosaic.ceil_div(end, KEYS)
    block, skipped = jnp.int32(0), 0
    if live:
        tiles, counts = live
        block = _mosaic.div_rem(first_token, sizes.block)[0]
        block = jnp.minimum(block, counts.shape[1] - 1)
        skipped = tiles.shape[2] - counts[batch, block]
    end = jnp.where(first_token < sizes.queries, end - skipped, 0)
    return Item(
        batch=batch,
        part=part,
        chunk_token=chunk_token,
        first_token=first_token,
        block=block,
        skipped=skipped,
        whole=jnp.minimum(whole - skipped, end),
        steps=end,
    )


def for_members(sizes: Sizes, function) -> None:
    """Calls a function with each member, its kv head, and its rows of a tile."""

    # Unrolled, it would take more registers than a producer has.
    @pl.loop(np.int32(0), np.int32(sizes.tiling.members))
    def _(member):
        kv_head, i = _mosaic.div_rem(member, sizes.tiling.pack)
        first = pl.multiple_of(i * sizes.tokens, sizes.tokens)
        function(member, kv_head, pl.ds(first, sizes.tokens))
