"""Items of work of the forward kernel in Mosaic: their rows, their keys, their steps.

An item is tiles of rows of all consumers in a cluster of thread blocks. ROWS rows are
the G query heads of a kv head at some adjacent tokens. The keys that some row of an
item sees are cut into blocks, each for a step, and only those at the ends of what its
rows see need a mask.

Letters: B batch, T queries, M keys, N query heads, K kv heads, G = N / K, H width.
"""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.pallas._mosaic import ceil_div, div_rem
from jattn.pallas.flash import ROWS

# Copies into the tiles of matrix instructions begin at every eighth row only.
ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the kernel knows of its arguments when it is compiled.

    Attributes:
      queries: T.
      kv_rows: B K.
      kv_heads: K.
      group: G.
      width: H.
      keys: M.
      offset: Position of the first query; key 0 stands for the tokens from 0 on.
      kernel_size: Tokens that a key stands for.
      stride: Tokens between the first ones of two keys.
      window: Tokens back from the query, itself counted, among which a key's first has
        to be; None for no limit.
      scale: Factor of the logits.
      tiles: Consumers' tiles in an item.
      step: Keys of a step, but for the first.
      edge: Keys of the first step.
    """

    queries: int
    kv_rows: int
    kv_heads: int
    group: int
    width: int
    keys: int
    offset: int
    kernel_size: int
    stride: int
    window: int | None
    scale: float
    tiles: int
    step: int
    edge: int

    @property
    def tokens(self) -> int:
        """Of a consumer's tile."""
        return ROWS // self.group

    @property
    def heads_first(self) -> bool:
        """Whether a tile's rows go by heads, then tokens, instead of the opposite."""
        return self.group < ALIGNMENT

    @property
    def parts(self) -> int:
        """Stretches of a tile's rows that are adjacent in memory."""
        return self.group if self.heads_first else self.tokens

    @property
    def row_tiles(self) -> int:
        """Items of a kv head."""
        return -(-self.queries // (self.tokens * self.tiles))

    @property
    def items(self) -> int:
        """Of all kv heads."""
        return self.row_tiles * self.kv_rows

    def first_key(self, position):
        """The first key that a query at that position sees, or more than it sees."""
        if self.window is None:
            return position * 0
        return self._in_strides(position + (self.stride - self.window))

    def end_key(self, position):
        """One past the last one."""
        end = self._in_strides(position + (self.stride - self.kernel_size + 1))
        return jnp.minimum(end, self.keys)

    def _in_strides(self, x):
        return divide(jnp.maximum(x, 0), self.stride)


@dataclasses.dataclass(frozen=True)
class Item:
    """Tiles of all consumers of a cluster, of one kv head.

    The keys that some row sees are in blocks, each for a step. The first step's is the
    last one, and may be smaller. Of the others those that all rows see, one run, come
    last.

    Attributes:
      batch: Row of the batch.
      kv_head: Of the keys.
      tile: Which of the kv head's items it is.
      begin: First key of the first block.
      blocks: Blocks but for the last one.
      whole: The first block that all rows see.
      whole_end: One past the last one.
    """

    batch: jax.Array
    kv_head: jax.Array
    tile: jax.Array
    begin: jax.Array
    blocks: jax.Array
    whole: jax.Array
    whole_end: jax.Array

    @property
    def steps(self):
        """How many there are."""
        return self.blocks + 1

    @property
    def masked(self):
        """Steps with a mask, which come first."""
        return self.steps - self.whole_end + self.whole

    def first_key(self, step, keys: int):
        """The first key of a step, where so many are in a block."""
        block = self.whole_end + step - 1
        block = jnp.where(block >= self.blocks, block - self.blocks, block)
        return self.begin + jnp.where(step == 0, self.blocks, block) * keys


def item_at(index, sizes: Sizes) -> Item:
    """The item of that index; neighbours in time have keys in common."""
    tile, kv_row = div_rem(index, sizes.kv_rows)
    batch, kv_head = div_rem(kv_row, sizes.kv_heads)
    tile = sizes.row_tiles - 1 - tile
    tokens = sizes.tokens * sizes.tiles
    first = tile * tokens
    last = jnp.minimum(first + tokens, sizes.queries) - 1
    first, last = first + sizes.offset, last + sizes.offset
    begin = div_rem(sizes.first_key(first), ALIGNMENT)[0] * ALIGNMENT
    rest = jnp.maximum(sizes.end_key(last) - begin - sizes.edge, 0)
    blocks = jnp.maximum(
        ceil_div(rest, sizes.step), 0 if sizes.edge == sizes.step else 1
    )
    whole = jnp.minimum(ceil_div(sizes.first_key(last) - begin, sizes.step), blocks)
    whole_end = div_rem(jnp.maximum(sizes.end_key(first) - begin, 0), sizes.step)[0]
    return Item(
        batch=batch,
        kv_head=kv_head,
        tile=tile,
        begin=begin,
        blocks=blocks,
        whole=whole,
        whole_end=jnp.clip(whole_end, whole, blocks),
    )


def stretches(array, item: Item, tile, sizes: Sizes):
    """The stretches of the rows of an item's tile in an array [B, T, N, H].

    Each comes with its rows in the tile and whether it exists.
    """
    tokens, group = sizes.tokens, sizes.group
    token = (item.tile * sizes.tiles + tile) * tokens
    head = item.kv_head * group
    size = ROWS // sizes.parts
    for i in range(sizes.parts):
        rows = pl.ds(i * size, size)
        if sizes.heads_first:
            stretch = pl.ds(pl.multiple_of(token, ALIGNMENT), tokens)
            yield array.at[item.batch, stretch, head + i], rows, True
        else:
            exists = token + i < sizes.queries
            there = jnp.minimum(token + i, sizes.queries - 1)
            yield array.at[item.batch, there, pl.ds(head, group)], rows, exists


def divide(x, divisor: int):
    """Quotient, rounded down, of x that are not negative."""
    return lax.div(x, np.int32(divisor) if x.ndim == 0 else jnp.full_like(x, divisor))
