"""The shared memory and the work of the kernel in `mosaic_backward`.

Letters as in `jattn.pallas.block_sparse.triton`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jattn.pallas import _mosaic
from jattn.pallas.block_sparse import mosaic_chunk
from jattn.pallas.block_sparse.mosaic_chunk import BLOCK, ROWS, Sizes

# Warpgroups that compute; as many load.
CONSUMERS = 2

# Tiles that each has in flight. A third one would not fit into shared memory.
SLOTS = 2


@dataclasses.dataclass(frozen=True)
class Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      key: [CONSUMERS, BLOCK, H].
      value: [CONSUMERS, BLOCK, H].
      query: [CONSUMERS, SLOTS, ROWS, H].
      out_gradient: [CONSUMERS, SLOTS, ROWS, H], and then the queries' gradient.
      statistics: fp32 [CONSUMERS, SLOTS, queries of a tile, 2 G].
      weights: [CONSUMERS, BLOCK, ROWS], dS, and in the interpreter P before.
      block_full: Of each consumer.
      block_empty: Of each consumer.
      rows_full: Of each slot of each consumer.
      query_empty: Of each slot of each consumer.
      out_gradient_empty: Of each slot of each consumer.
    """

    key: Any
    value: Any
    query: Any
    out_gradient: Any
    statistics: Any
    weights: Any
    block_full: Any
    block_empty: Any
    rows_full: Any
    query_empty: Any
    out_gradient_empty: Any


def memory_types(sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """The types of Memory's attributes."""
    matrix = functools.partial(_mosaic.matrix, dtype=dtype)
    slots = CONSUMERS, SLOTS
    block = matrix(CONSUMERS, BLOCK, sizes.width)
    rows = matrix(*slots, ROWS, sizes.width)
    empty = _mosaic.barriers(math.prod(slots), 1)
    return {
        "key": block,
        "value": block,
        "query": rows,
        "out_gradient": rows,
        "statistics": plgpu.SMEM((*slots, sizes.tokens, 2 * sizes.group), jnp.float32),
        "weights": matrix(CONSUMERS, BLOCK, ROWS),
        "block_full": _mosaic.barriers(CONSUMERS, 2),
        "block_empty": _mosaic.barriers(CONSUMERS, 1),
        "rows_full": _mosaic.barriers(math.prod(slots), 3 * sizes.tokens),
        "query_empty": empty,
        "out_gradient_empty": empty,
    }


@dataclasses.dataclass(frozen=True)
class Block:
    """A block, and the tiles of it that a consumer does.

    Attributes:
      index: Of the block.
      before: Tiles that the consumer does before.
      tiles: How many of the block it does.
      first_pair: Number of their first pair.
      begin: Number of the block's first pair.
      end: One past the number of the block's last pair.
      unit: Of work, which it is.
    """

    index: jax.Array
    before: jax.Array
    tiles: jax.Array
    first_pair: jax.Array
    begin: jax.Array
    end: jax.Array
    unit: jax.Array


@dataclasses.dataclass(frozen=True)
class Work:
    """What a consumer has to do: a range of tiles.

    Attributes:
      chunk: Its own.
      range: [5], an item of ranges.
    """

    chunk: mosaic_chunk.Chunk
    range: Any

    @property
    def sizes(self) -> Sizes:
        """Those of the arguments."""
        return self.chunk.sizes

    def run(self, run_block):
        """Calls a function for each Block."""

        def block_step(index, unit):
            # Loaded here, rather than kept in registers all along.
            first, last = self.range[0], self.range[1]
            first_tile = self.chunk.tile_starts[index]
            begin = jnp.maximum(first_tile, first)
            end = jnp.minimum(self.chunk.tile_starts[index + 1], last)

            @pl.when(end > begin)
            def _():
                first_pair = self.chunk.pair_starts[index]
                run_block(
                    Block(
                        index=index,
                        before=begin - first,
                        tiles=end - begin,
                        first_pair=first_pair
                        + (begin - first_tile) * self.sizes.tokens,
                        begin=first_pair,
                        end=self.chunk.pair_starts[index + 1],
                        unit=unit,
                    )
                )

            return jnp.where(end > begin, unit + 1, unit)

        lax.fori_loop(self.range[2], self.range[3], block_step, self.range[4])

    @property
    def tiles(self):
        """How many tiles it has."""
        return self.range[1] - self.range[0]

    def pairs_of(self, block: Block, tile):
        """The number of a tile's first pair, and the queries and slots of all.

        Past the block's last pair they are any others.
        """
        first = block.first_pair + tile * self.sizes.tokens
        return first, self.chunk.pairs_from(first)


def work_of(pairs, pair_starts, tile_starts, ranges, step, *, consumer, sizes) -> Work:
    """What a thread block's consumer has to do, given the plan of all."""
    chunk = mosaic_chunk.chunk(pairs, pair_starts, tile_starts, step, sizes)
    index = lax.axis_index("program") * CONSUMERS + consumer
    return Work(chunk, ranges.at[chunk.row, index])
