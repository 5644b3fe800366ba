"""Tiles of rows of the Mosaic kernel of 2-simplicial attention.

A row is a query head of a position. The ROWS rows of a tile share a kv head: heads of
one position, or, if fewer than ROWS heads share it, all of them at adjacent positions.
The rows of a kv head lie one after the other, positions first.

Letters: B batch, T queries, F and M keys of the set with the smaller and the larger
window, N query heads, K kv heads, G query heads of a kv head, H width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jattn.pallas import _mosaic
from jattn.pallas.simplicial import ROWS

# Copies into the tiles of matrix instructions begin at every eighth key only.
ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the kernel knows of its arguments when it is compiled."""

    batch: int
    queries: int
    kv_heads: int
    group: int
    width: int
    few: int
    many: int
    few_window: int
    many_window: int
    scale: float

    @property
    def positions(self) -> int:
        """Positions in a tile."""
        return max(1, ROWS // self.group)

    @property
    def heads(self) -> int:
        """Heads of each of them."""
        return ROWS // self.positions

    @property
    def tiles(self) -> int:
        """Tiles of a kv head of a batch row."""
        return -(-self.queries // self.positions) * self.group // self.heads

    @property
    def items(self) -> int:
        """Tiles in all."""
        return self.batch * self.kv_heads * self.tiles


def in_rows(x: jax.Array, sizes: Sizes) -> jax.Array:
    """[B, T, N, ...] -> [B, K, rows, ...]: positions, then heads of a kv head.

    Zeros fill the last tile.
    """
    tail = -sizes.queries % sizes.positions
    x = x.reshape(*x.shape[:2], sizes.kv_heads, sizes.group, *x.shape[3:])
    x = jnp.moveaxis(x, 2, 1)  # [B, K, T, G, ...]
    x = jnp.pad(x, [(0, 0), (0, 0), (0, tail)] + [(0, 0)] * (x.ndim - 3))
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def from_rows(x: jax.Array, sizes: Sizes) -> jax.Array:
    """The inverse of in_rows."""
    x = x.reshape(*x.shape[:2], -1, sizes.group, *x.shape[3:])
    x = jnp.moveaxis(x[:, :, : sizes.queries], 1, 2)  # [B, T, K, G, ...]
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def front(sizes: Sizes, few: int) -> int:
    """Zeros in front of the few keys, so that each position has a window of chunks."""
    return -(-sizes.few_window // few) * few - 1


def chunk_rows(sizes: Sizes, few: int) -> int:
    """Rows in a slot of few keys: those of all positions of a tile."""
    if sizes.positions == 1:
        return few
    rows = (few + sizes.positions - 1) * sizes.heads
    return -(-rows // 8) * 8


def repeated(x: jax.Array, sizes: Sizes, few: int, pitch: int) -> jax.Array:
    """Few keys [B, F, K, H] -> [B, K, rows, pitch], for slots of so many keys.

    Where a tile has several positions, each key fills the rows of a position.
    """
    x = jnp.moveaxis(x, 2, 1)
    tail = -sizes.queries % sizes.positions
    if sizes.positions > 1:
        tail += 8
    x = jnp.pad(
        x,
        [
            (0, 0),
            (0, 0),
            (front(sizes, few), tail),
            (0, pitch - sizes.width),
        ],
    )
    return jnp.repeat(x, sizes.heads, axis=2) if sizes.positions > 1 else x


def shifted(x: jax.Array, sizes: Sizes, length: int) -> jax.Array:
    """Copies of x [B, M, K, H], the i-th without the first i keys.

    Where a window begins at any key, ALIGNMENT copies let any key be the first of a
    tile in one of them; beside the queries, of which ROWS or more share a kv head, they
    are small. They end with zeros, at a multiple of ALIGNMENT of at least length.
    """
    copies = ALIGNMENT if sizes.positions == 1 else 1
    length = -(-max(length, sizes.many) // ALIGNMENT) * ALIGNMENT
    tail = length + copies - 1 - sizes.many
    x = jnp.pad(x, [(0, 0), (0, tail), (0, 0), (0, 0)])
    return jnp.stack([x[:, i : i + length] for i in range(copies)])


def _begins(visible: jax.Array, sizes: Sizes, keys: int, window: int) -> jax.Array:
    """The first of so many keys that each query sees, int32 [B, T]."""
    ends = jnp.arange(1, sizes.queries + 1, dtype=jnp.int32) + keys - sizes.queries
    return ends - jnp.minimum(jnp.minimum(ends, window), visible)


def blanked(x: jax.Array, visible: jax.Array, sizes: Sizes) -> jax.Array:
    """Few keys [B, F, K, H], 0 where no query sees them: 0 times NaN is NaN."""
    begins = _begins(visible, sizes, sizes.few, sizes.few_window)
    # Of the first query that is not before the key, or a later one.
    first = jax.lax.cummin(begins, axis=1, reverse=True)
    first = jnp.pad(first, [(0, 0), (sizes.few - sizes.queries, 0)], mode="edge")
    seen = first <= jnp.arange(sizes.few)
    return jnp.where(seen[..., None, None], x, 0)


def limits(visible: jax.Array, sizes: Sizes) -> tuple[jax.Array, ...]:
    """What `visible` means for rows and for tiles.

    Returns:
      How many keys each row may see [B, rows]; of each tile's rows together the first
      of the many keys they see, and how many of the few keys one of them sees at most,
      both [B, tiles of positions].
    """
    tail = -sizes.queries % sizes.positions
    rows = jnp.pad(visible, [(0, 0), (0, tail)])
    rows = jnp.repeat(rows, sizes.heads, axis=1)
    begins = _begins(visible, sizes, sizes.many, sizes.many_window)
    begins = jnp.where(visible > 0, begins, sizes.many)
    begins = jnp.pad(begins, [(0, 0), (0, tail)], constant_values=sizes.many)
    reaches = jnp.pad(visible, [(0, 0), (0, tail)])
    by_tile = (sizes.batch, -1, sizes.positions)
    return (
        rows,
        jnp.min(begins.reshape(by_tile), axis=2),
        jnp.max(reaches.reshape(by_tile), axis=2),
    )


@dataclasses.dataclass(frozen=True)
class Item:
    """A tile: adjacent positions with heads of theirs that share a kv head.

    Attributes:
      batch: Row of the batch.
      kv_head: What they attend to.
      row: The first of the rows among those of the kv head.
      position: The first of the positions.
      few_first: Its own key in the set with the smaller window.
      few_reach: How many of these keys one of the positions sees at most.
      many_begin: The first key they see of the other set.
      many_end: One past the last one.
      many_top: That, or more so that steps begin where copies may.
      whole: Steps, all of whose keys all of them see.
    """

    batch: jax.Array
    kv_head: jax.Array
    row: jax.Array
    position: jax.Array
    few_first: jax.Array
    few_reach: jax.Array
    many_begin: jax.Array
    many_end: jax.Array
    many_top: jax.Array
    whole: jax.Array

    def steps(self, step: int):
        """Steps from the last of the many keys to the first."""
        steps = _mosaic.ceil_div(self.many_top - self.many_begin, step)
        return jnp.where(self.many_begin < self.many_end, steps, 0)

    def step(self, turn):
        """Which step has its turn: the whole ones come first."""
        # The one with the positions' own keys, step 0, is never whole if there are
        # several positions.
        later = jnp.where(turn == self.whole, 0, turn)
        return jnp.where(turn < self.whole, turn + 1, later)


def item(index, sizes: Sizes, step: int, limits) -> Item:
    """The item of that index; neighbours in time have windows in common."""
    pair, tile = _mosaic.div_rem(index, sizes.tiles)
    batch, kv_head = _mosaic.div_rem(pair, sizes.kv_heads)
    row = tile * ROWS
    position = _mosaic.div_rem(row, sizes.group)[0]
    last = jnp.minimum(position + sizes.positions, sizes.queries) - 1
    few_first = position + (sizes.few - sizes.queries)
    few_end = last + (sizes.few - sizes.queries + 1)
    many_end = last + (sizes.many - sizes.queries + 1)
    first_end = position + (sizes.many - sizes.queries + 1)
    few_reach = jnp.minimum(few_end, sizes.few_window)
    many_begin = jnp.maximum(first_end - sizes.many_window, 0)
    all_begin = jnp.maximum(many_end - sizes.many_window, 0)
    many_top = many_end
    if limits:
        _, begins, reaches = limits
        place = _mosaic.div_rem(position, sizes.positions)[0]
        few_reach = jnp.minimum(few_reach, reaches[batch, place])
        many_begin = jnp.minimum(begins[batch, place], many_end)
        all_begin = many_begin if sizes.positions == 1 else many_end
    if sizes.positions == 1:
        whole = _mosaic.div_rem(many_end - all_begin, step)[0]
    else:
        many_top = _mosaic.ceil_div(many_end, ALIGNMENT) * ALIGNMENT
        # Without the step that the positions themselves are in.
        whole = jnp.maximum(_mosaic.div_rem(many_top - all_begin, step)[0] - 1, 0)
    return Item(
        batch=batch,
        kv_head=kv_head,
        row=row,
        position=position,
        few_first=few_first,
        few_reach=few_reach,
        many_begin=many_begin,
        many_end=many_end,
        many_top=many_top,
        whole=whole,
    )


def many_first(item: Item, index, step: int):
    """The first key in that step through the larger window, from its end."""
    return jnp.maximum(item.many_top - (index + 1) * step, 0)
