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
from jattn.pallas._mosaic import div_rem
from jattn.pallas.block_sparse import mosaic_chunk
from jattn.pallas.block_sparse.mosaic_chunk import BLOCK, ROWS, Sizes

# Warpgroups that compute. Of one more, a warp for each loads, and another one stores.
CONSUMERS = 2

# Tiles that each has in flight. A third one would not fit into shared memory.
SLOTS = 2

# Parts of a consumer's way through the queries that it tells apart.
PHASES = 256


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
      query_gradient_full: Of each slot of each consumer.
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
    query_gradient_full: Any


def memory_types(sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """The types of Memory's attributes."""
    matrix = functools.partial(_mosaic.matrix, dtype=dtype)
    slots = CONSUMERS, SLOTS
    block = matrix(CONSUMERS, BLOCK, sizes.width)
    rows = matrix(*slots, ROWS, sizes.width)
    of_slots = _mosaic.barriers(math.prod(slots), 1)
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
        "query_empty": of_slots,
        "out_gradient_empty": of_slots,
        "query_gradient_full": of_slots,
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
      start: Which of these tiles is done first. The next ones follow, and then those
        from the first one on.
    """

    index: jax.Array
    before: jax.Array
    tiles: jax.Array
    first_pair: jax.Array
    begin: jax.Array
    end: jax.Array
    unit: jax.Array
    start: jax.Array

    def tile(self, turn):
        """Which of the tiles is done in a turn."""
        tile = self.start + turn
        return jnp.where(tile >= self.tiles, tile - self.tiles, tile)


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
        """Calls a function for each Block.

        Consumers go through the queries together, each with blocks of its own: what one
        reads, others find in the second-level cache. So its first block, of which the
        consumer before often does the first tiles, is the last one here.
        """

        def block_step(turn, carry):
            unit, before = carry
            # Loaded here, rather than kept in registers all along.
            first, last, first_block, last_block, first_unit = (
                self.range[i] for i in range(5)
            )
            index = first_block + 1 + turn
            index = jnp.where(index == last_block, first_block, index)
            first_tile = self.chunk.tile_starts[index]
            last_tile = self.chunk.tile_starts[index + 1]
            begin = jnp.maximum(first_tile, first)
            tiles = jnp.maximum(jnp.minimum(last_tile, last) - begin, 0)

            @pl.when(tiles > 0)
            def _():
                first_pair = self.chunk.pair_starts[index]
                whole = tiles == last_tile - first_tile
                run_block(
                    Block(
                        index=index,
                        before=before,
                        tiles=tiles,
                        first_pair=first_pair
                        + (begin - first_tile) * self.sizes.tokens,
                        begin=first_pair,
                        end=self.chunk.pair_starts[index + 1],
                        unit=jnp.where(index == first_block, first_unit, unit),
                        start=jnp.where(whole, self._start(index, tiles, before), 0),
                    )
                )

            return jnp.where(tiles > 0, unit + 1, unit), before + tiles

        blocks = self.range[3] - self.range[2]
        carry = self.range[4] + 1, jnp.int32(0)
        lax.fori_loop(0, blocks, block_step, carry)

    def _start(self, index, tiles, before):
        """The tile of a whole block with the queries that other consumers are at.

        All start at the chunk's first one, and are there again after as many tiles as
        blocks before the chunk have on average, but for the first one, which many
        queries share.
        """
        own = self.chunk.first_token + self.sizes.offset
        own = jnp.maximum(div_rem(own, BLOCK)[0], 1)
        sweep = self.chunk.tile_starts[own] - self.chunk.tile_starts[1]
        sweep = jnp.maximum(lax.div(sweep, jnp.maximum(own - 1, 1)), 1)
        done = lax.div(lax.rem(before, sweep) * PHASES, sweep)
        # Queries of the chunk's own blocks are not spread over the chunk.
        return jnp.where(index < own, div_rem(tiles * done, PHASES)[0], 0)

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
