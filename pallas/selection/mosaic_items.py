"""Items of work of the kernel of block scores in Mosaic, and its memory.

See `jattn.pallas.selection.mosaic`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from jattn.pallas import _mosaic
from jattn.pallas._mosaic import ceil_div, div_rem
from jattn.pallas.selection import COLUMNS, ROWS

# Copies into the tiles of matrix instructions begin at every eighth row only.
ALIGNMENT = 8

# Windows that may have columns with a block.
MAX_CELLS = COLUMNS // ALIGNMENT


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      consumers: Warpgroups of a thread block that compute, 2 or 3.
      tiles: Tiles of queries of an item.
      slots: Tiles of queries in flight.
      key_slots: Items whose keys are in shared memory, 1 or 2.
      programs: Thread blocks.
      turns: Whether all consumers but one may have a product under way at a time, so
        that they do not first all wait for products and then all compute weights.
    """

    consumers: int
    tiles: int
    slots: int
    key_slots: int
    programs: int
    turns: bool


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the kernel knows of its arguments when it is compiled.

    Attributes:
      queries: T.
      windows: M.
      kv_rows: B K.
      kv_heads: K.
      group: G.
      width: H.
      offset: Position of the first query.
      kernel_size: Tokens in a window.
      stride: Tokens between the starts of windows.
      cells: Windows that start in a block.
      before: Windows of the block before that have columns with a block.
      chunk: L.
      scale_log2: Factor of the logits in units of log 2.
    """

    queries: int
    windows: int
    kv_rows: int
    kv_heads: int
    group: int
    width: int
    offset: int
    kernel_size: int
    stride: int
    cells: int
    before: int
    chunk: int
    scale_log2: float

    @property
    def blocks(self) -> int:
        """Of a consumer's tile."""
        return tile_blocks(self.cells, self.before)

    @property
    def columns(self) -> int:
        """Of a consumer's tile."""
        return self.blocks * (self.cells + self.before)

    @property
    def span(self) -> int:
        """Tokens of a consumer's blocks."""
        return self.blocks * self.cells * self.stride


def tile_blocks(cells: int, before: int) -> int:
    """Blocks of a consumer's tile that have so many columns each."""
    blocks = COLUMNS // (cells + before)
    return blocks - blocks % ALIGNMENT


@dataclasses.dataclass(frozen=True)
class Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      query: [slots, ROWS, H].
      key: [key slots * consumers, columns, H].
      query_full: Of each slot.
      query_empty: Of each slot.
      key_full: Of each slot and consumer.
      key_empty: Of each slot and consumer.
      product_done: Of every other product and consumer.
    """

    query: Any
    key: Any
    query_full: Any
    query_empty: Any
    key_full: Any
    key_empty: Any
    product_done: Any


def memory_types(tiling: Tiling, sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """The types of Memory's attributes."""
    slots, key_slots = tiling.slots, tiling.key_slots * tiling.consumers

    matrix = functools.partial(_mosaic.matrix, dtype=dtype)
    return {
        "query": matrix(slots, ROWS, sizes.width),
        "key": matrix(key_slots, sizes.columns, sizes.width),
        "query_full": _mosaic.barriers(slots, 1),
        "query_empty": _mosaic.barriers(slots, tiling.consumers),
        "key_full": _mosaic.barriers(key_slots, sizes.cells + sizes.before),
        "key_empty": _mosaic.barriers(key_slots, 1),
        "product_done": _mosaic.barriers(2 * tiling.consumers, 1),
    }


@dataclasses.dataclass(frozen=True)
class Item:
    """The windows of all consumers, and some tiles of queries.

    Attributes:
      batch: Row of the batch.
      kv_head: Of the keys.
      first_tile: Of the queries, the first tile in the chunk.
      tiles: How many there are.
      first_block: Of the first consumer.
      first_position: Of the chunk's first query.
    """

    batch: jax.Array
    kv_head: jax.Array
    first_tile: jax.Array
    tiles: jax.Array
    first_block: jax.Array
    first_position: jax.Array

    def tokens(self, tile, sizes: Sizes):
        """The queries of a tile."""
        first = self.first_position - sizes.offset + tile * ROWS
        return pl.ds(pl.multiple_of(first, ROWS), ROWS)

    def unreached(self, first_block, sizes: Sizes):
        """How many tiles, the first ones, have no query that has reached a block."""
        begin = first_block * (sizes.cells * sizes.stride) - self.first_position
        tile = div_rem(jnp.maximum(begin, 0), ROWS)[0]
        return jnp.clip(tile - self.first_tile, 0, self.tiles)


def for_items(step, sizes: Sizes, tiling: Tiling, function, carry):
    """Calls function(item, carry) -> carry for each item; returns the last carry.

    The latest queries come first, and of one run of tiles first all windows of one kv
    head: thread blocks that are at work at the same time need the same queries.
    """
    first_token = step[0] * sizes.chunk
    rows = jnp.minimum(sizes.queries - first_token, sizes.chunk)
    all_tiles = ceil_div(rows, ROWS)
    span = sizes.span * tiling.consumers
    first_position = first_token + sizes.offset

    def groups(run):
        # Of windows, that the last query of a run has reached.
        end = jnp.minimum((run + 1) * tiling.tiles, all_tiles) * ROWS
        return ceil_div(first_position + end, span)

    def settle(run, index):
        def is_beyond(state):
            run, index = state
            return (run >= 0) & (index >= groups(run) * sizes.kv_rows)

        def skip(state):
            run, index = state
            return run - 1, index - groups(run) * sizes.kv_rows

        return lax.while_loop(is_beyond, skip, (run, index))

    def body(state):
        run, index, carry = state
        kv_row, group = _div_rem(index, groups(run))
        batch, kv_head = div_rem(kv_row, sizes.kv_heads)
        first_tile = run * tiling.tiles
        item = Item(
            batch=batch,
            kv_head=kv_head,
            first_tile=first_tile,
            tiles=jnp.minimum(all_tiles - first_tile, tiling.tiles),
            first_block=group * (sizes.blocks * tiling.consumers),
            first_position=first_position,
        )
        carry = function(item, carry)
        return *settle(run, index + tiling.programs), carry

    last_run = ceil_div(all_tiles, tiling.tiles) - 1
    state = *settle(last_run, lax.axis_index("program")), carry
    return lax.while_loop(lambda state: state[0] >= 0, body, state)[2]


def _div_rem(x, divisor):
    return lax.div(x, divisor), lax.rem(x, divisor)
