"""Items of work of the forward kernel in Mosaic: their heads, queries and keys.

An item is adjacent queries in the heads of a cluster of thread blocks. The keys that
they see are cut into tiles, each for a step. Those at the end of what they see need a
mask, and of the others those that are skipped are left out.

Letters: B batch, T queries, S keys, N query heads, K kv heads, G = N / K, H width,
CHUNK queries of one call.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from jattn.pallas._mosaic import ceil_div, div_rem
from jattn.pallas.selective import mosaic_fragments as fragments

# Queries of a consumer's tile, and consumers of a thread block.
ROWS = 64
CONSUMERS = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the kernel knows of its arguments when it is compiled.

    Attributes:
      batch: B.
      queries: T.
      chunk: CHUNK.
      keys: S.
      heads: N.
      group: G.
      width: H.
      offset: Position of the first query.
      scale: Factor of the logits.
      members: Heads of a thread block.
      cluster: Thread blocks that share the bias.
      step: Keys of a step.
      block: Queries that skip the same tiles.
    """

    batch: int
    queries: int
    chunk: int
    keys: int
    heads: int
    group: int
    width: int
    offset: int
    scale: float
    members: int
    cluster: int
    step: int
    block: int

    @property
    def tokens(self) -> int:
        """Queries of an item."""
        return ROWS * CONSUMERS // self.members

    @property
    def head_sets(self) -> int:
        """Clusters that share a tile of queries."""
        return self.heads // (self.members * self.cluster)

    @property
    def items(self) -> int:
        """Of a chunk."""
        return self.batch * self.head_sets * (self.chunk // self.tokens)

    @property
    def bias_shape(self) -> tuple[int, int, int]:
        """Of an item's tile of the bias."""
        rows, columns = self.tokens // fragments.ROWS, self.step // fragments.COLUMNS
        return rows, columns, fragments.NUMBERS

    @property
    def keys_shared(self) -> bool:
        """Whether the thread blocks of a cluster have keys and values in common."""
        return self.cluster > 1 and self.group % (self.members * self.cluster) == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Item:
    """A tile of queries in the heads of a cluster.

    Attributes:
      batch: Row of the batch.
      head: First head.
      tile: Which of the chunk's tiles of queries it is.
      position: Of its first query.
      full: Tiles of keys that all queries see, not counting the last one.
      masked: Steps with a mask, which come first; at least 1.
      steps: How many there are.
    """

    batch: jax.Array
    head: jax.Array
    tile: jax.Array
    position: jax.Array
    full: jax.Array
    masked: jax.Array
    steps: jax.Array

    def masked_tile(self, step):
        """The tile of keys of a step with a mask."""
        place = self.full + step - 1
        return jnp.where(step == 0, self.full + self.masked - 1, place)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The items of a cluster: one of its own, and then every so many further.

    Attributes:
      cluster: Which one.
      clusters: How many there are.
      first: The chunk's first query.
      live: References to the lists of what is not skipped, or empty.
      sizes: Those of the arguments.
    """

    cluster: jax.Array
    clusters: int
    first: jax.Array
    live: Any
    sizes: Sizes

    @property
    def tiles(self):
        """Tiles of queries of the chunk with a query that exists."""
        sizes = self.sizes
        left = jnp.minimum(sizes.queries - self.first, sizes.chunk)
        return ceil_div(left, sizes.tokens)

    @property
    def rounds(self):
        """How many items there are."""
        items = self.tiles * (self.sizes.batch * self.sizes.head_sets)
        return div_rem(items - self.cluster + self.clusters - 1, self.clusters)[0]

    def item(self, i) -> Item:
        """One of them, or the last one for a larger i."""
        sizes = self.sizes
        index = self.cluster + jnp.minimum(i, self.rounds - 1) * self.clusters
        tile, row = div_rem(index, sizes.batch * sizes.head_sets)
        batch, head_set = div_rem(row, sizes.head_sets)
        tile = self.tiles - 1 - tile
        token = self.first + tile * sizes.tokens
        position = token + sizes.offset
        last = jnp.minimum(token + sizes.tokens, sizes.queries) - 1 + sizes.offset
        end = div_rem(last, sizes.step)[0] + 1
        full = jnp.minimum(div_rem(position + 1, sizes.step)[0], end - 1)
        item = Item(
            batch=batch,
            head=head_set * (sizes.members * sizes.cluster),
            tile=tile,
            position=position,
            full=full,
            masked=end - full,
            steps=end,
        )
        if not self.live:
            return item
        _, counts = self.live
        # Skipped tiles are all in the past of the block.
        skipped = sizes.keys // sizes.step - counts[batch, self._block(item)]
        return dataclasses.replace(item, steps=end - skipped)

    def tile_of_keys(self, item: Item, step):
        """The tile of keys of an item's step."""
        place = step - item.masked
        tile = place
        if self.live:
            tiles, _ = self.live
            tile = tiles[item.batch, self._block(item), jnp.maximum(place, 0)]
        return jnp.where(place < 0, item.masked_tile(step), tile)

    def _block(self, item):
        token = item.position - self.sizes.offset
        return div_rem(token, self.sizes.block)[0]


def place(item: Item, rank, consumer, sizes: Sizes):
    """The head of a consumer, and its first query, counted from that of the chunk."""
    tile, member = div_rem(consumer, sizes.members)
    head = item.head + rank * sizes.members + member
    token = item.tile * sizes.tokens + tile * ROWS
    return head, pl.multiple_of(token, ROWS)
