"""What Mosaic's kernels for chosen blocks share: sizes, and the pairs of a chunk.

Letters as in `jattn.pallas.block_sparse.triton`.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jattn.pallas._mosaic import div_rem

# Rows of a tile, and keys of a block.
ROWS = 64
BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a kernel knows of its arguments.

    Attributes:
      queries: T.
      kv_heads: K.
      slots: n, blocks of the kernels in a list.
      group: G.
      width: H.
      offset: Position of the first query.
      length: L, queries in a chunk.
      chunks: C.
      rows: M, kv heads in a portion.
      scale_log2: Factor of the logits, in units of log 2.
    """

    queries: int
    kv_heads: int
    slots: int
    group: int
    width: int
    offset: int
    length: int
    chunks: int
    rows: int
    scale_log2: float

    @property
    def tokens(self) -> int:
        """Queries of a tile."""
        return ROWS // self.group


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A thread block's chunk of one kv head, and its pairs.

    Attributes:
      row: Of arrays [D C M, ..].
      place: Row of the batch and kv head in one number.
      batch: Row of the batch.
      kv_head: Of the keys.
      kv_row: Of the portion.
      number: Which chunk of the queries.
      pairs: [P].
      pair_starts: [blocks + 1], where each block's pairs start.
      tile_starts: [blocks + 1], where each block's tiles start.
      sizes: Those of the arguments.
    """

    row: jax.Array
    place: jax.Array
    batch: jax.Array
    kv_head: jax.Array
    kv_row: jax.Array
    number: jax.Array
    pairs: Any
    pair_starts: Any
    tile_starts: Any
    sizes: Sizes

    @property
    def first_token(self):
        """First query."""
        return self.number * self.sizes.length

    def pairs_from(self, first):
        """Queries and slots of a tile's pairs, given the number of the first one.

        Past the last pair they are any others.
        """
        last = self.pairs.shape[0] - 1
        pairs = [
            self.pairs[jnp.minimum(first + i, last)] for i in range(self.sizes.tokens)
        ]
        return [div_rem(pair, self.sizes.slots) for pair in pairs]

    def load_rows(self, source, target, barrier, tokens):
        """Loads a tile's rows [B, T, N, H] into [ROWS, H].

        Args:
          source: Where from.
          target: Where to.
          barrier: What to arrive at, once for each query.
          tokens: Its queries, numbered from the chunk's first.
        """
        group = self.sizes.group
        heads = pl.ds(self.kv_head * group, group)
        for i, token in enumerate(tokens):
            plgpu.copy_gmem_to_smem(
                source.at[self.batch, self.existing(token), heads],
                target.at[pl.ds(i * group, group)],
                barrier,
            )

    def existing(self, token):
        """A query of the chunk as one of all, or if there is none, the last one."""
        return jnp.minimum(self.first_token + token, self.sizes.queries - 1)


def chunk(pairs, pair_starts, tile_starts, step, sizes: Sizes) -> Chunk:
    """The chunk of this thread block.

    Args:
      pairs: int32 [D C M, P].
      pair_starts: int32 [D C M, blocks + 1].
      tile_starts: int32 [D C M, blocks + 1].
      step: int32 [1], which chunk of which portion.
      sizes: Those of the arguments.
    """
    kv_row = lax.axis_index("kv_row")
    step = step[0]
    row = step * sizes.rows + kv_row
    portion, number = div_rem(step, sizes.chunks)
    place = portion * sizes.rows + kv_row
    batch, kv_head = div_rem(place, sizes.kv_heads)
    return Chunk(
        row=row,
        place=place,
        batch=batch,
        kv_head=kv_head,
        kv_row=kv_row,
        number=number,
        pairs=pairs.at[row],
        pair_starts=pair_starts.at[row],
        tile_starts=tile_starts.at[row],
        sizes=sizes,
    )
