"""The shared memory and the work of the kernel in `mosaic`.

Letters as in `jattn.pallas.block_sparse.triton`.
"""

import dataclasses
import functools
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

# Blocks of keys in flight, as many as a tile of queries may share.
BLOCK_SLOTS = 3

# Copies to global memory start at multiples of so many fp32 numbers.
ALIGNMENT = 32

# Adjacent queries that may share blocks.
SHARERS = 64


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      consumers: Warpgroups of a thread block that compute, 2 or 3.
      slots: Tiles that each has in flight.
      programs: Thread blocks.
    """

    consumers: int
    slots: int
    programs: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      key: [BLOCK_SLOTS, BLOCK, H].
      value: [BLOCK_SLOTS, BLOCK, H].
      query: [consumers, slots, ROWS, H], queries, and then the output.
      lse: fp32 [consumers, slots, copies, ROWS + ALIGNMENT].
      weights: [consumers, ROWS, BLOCK], P in the interpreter, else None.
      block_full: Of each slot.
      block_empty: Of each slot.
      query_full: Of each slot of each consumer.
      query_empty: Of each slot of each consumer.
    """

    key: Any
    value: Any
    query: Any
    lse: Any
    weights: Any
    block_full: Any
    block_empty: Any
    query_full: Any
    query_empty: Any


def memory_types(tiling: Tiling, sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """The types of Memory's attributes."""
    matrix = functools.partial(_mosaic.matrix, dtype=dtype)
    consumers, slots = tiling.consumers, tiling.slots
    # What is copied has to start at a multiple of ALIGNMENT: of a smaller group's
    # numbers, it does in one of several arrays, each shifted by one group more.
    copies = max(1, ALIGNMENT // sizes.group)
    block = matrix(BLOCK_SLOTS, BLOCK, sizes.width)
    return {
        "key": block,
        "value": block,
        "query": matrix(consumers, slots, ROWS, sizes.width),
        "lse": plgpu.SMEM((consumers, slots, copies, ROWS + ALIGNMENT), jnp.float32),
        "weights": matrix(consumers, ROWS, BLOCK) if _mosaic.interpretation() else None,
        "block_full": _mosaic.barriers(BLOCK_SLOTS, 2),
        "block_empty": _mosaic.barriers(BLOCK_SLOTS, consumers),
        "query_full": _mosaic.barriers(consumers * slots, sizes.tokens),
        "query_empty": _mosaic.barriers(consumers * slots, 1),
    }


@dataclasses.dataclass(frozen=True)
class Work:
    """What a thread block has to do: items of shared blocks, amid a range of tiles.

    An item are the tiles of queries that share blocks. Producer and consumers count
    blocks and tiles alike, and so agree on their slots.

    Attributes:
      shared: [C L / SHARERS, 1, 1 + SHARED] of its kv head.
      chunk: Its own.
      first: First tile.
      last: One past the last one.
      first_block: Block of the first tile.
      last_block: One past that of the last tile.
      program: Which of its kv head's thread blocks it is.
      programs: Thread blocks of a kv head.
    """

    shared: Any
    chunk: mosaic_chunk.Chunk
    first: jax.Array
    last: jax.Array
    first_block: jax.Array
    last_block: jax.Array
    program: jax.Array
    programs: int

    @property
    def sizes(self) -> Sizes:
        """Those of the arguments."""
        return self.chunk.sizes

    @property
    def middle(self):
        """The tile before which it does its items, another one in each thread block.

        Items need the tensor cores and other tiles the second-level cache: at all times
        some thread blocks should be at the former, and the others at the latter.
        """
        done = div_rem((self.last - self.first) * self.program, self.programs)[0]
        return self.first + done

    def run(self, run_item, run_block):
        """Runs over all its work, and returns how many tiles it was.

        Args:
          run_item: Of the item's first query, the number of its blocks, a reference to
            that and them, and how many blocks and tiles were before.
          run_block: Of the block, its first tile, one past the last, and how many
            blocks and tiles were before.
        """
        sizes = self.sizes
        items = sizes.length // SHARERS

        def item_step(i, carry):
            blocks, tiles = carry
            item = self.program + i * self.programs
            shared = self.shared.at[self.chunk.number * items + item, 0]
            count = shared[0]

            @pl.when(count > 0)
            def _():
                run_item(item * SHARERS, count, shared, blocks, tiles)

            more = jnp.where(count > 0, SHARERS // sizes.tokens, 0)
            return blocks + count, tiles + more

        rounds = div_rem(items - self.program + self.programs - 1, self.programs)[0]

        def part_step(part, carry):
            carry = lax.fori_loop(0, rounds * part, item_step, carry)
            first = jnp.where(part == 0, self.first, self.middle)
            last = jnp.where(part == 0, self.middle, self.last)

            def block_step(block, carry):
                blocks, tiles = carry
                begin = jnp.maximum(self.chunk.tile_starts[block], first)
                end = jnp.minimum(self.chunk.tile_starts[block + 1], last)

                @pl.when(end > begin)
                def _():
                    run_block(block, begin, end, blocks, tiles)

                blocks = jnp.where(end > begin, blocks + 1, blocks)
                return blocks, tiles + jnp.maximum(end - begin, 0)

            return lax.fori_loop(self.first_block, self.last_block, block_step, carry)

        return lax.fori_loop(0, 2, part_step, (jnp.int32(0), jnp.int32(0)))[1]

    def pairs_of(self, block, tile):
        """The number of a tile's first pair, and the queries and slots of all.

        Past the block's last pair they are any others.
        """
        first = tile - self.chunk.tile_starts[block]
        first = self.chunk.pair_starts[block] + first * self.sizes.tokens
        return first, self.chunk.pairs_from(first)


def work_of(shared, pairs, pair_starts, tile_starts, ranges, step, *, sizes) -> Work:
    """What a thread block has to do, given the plan of all."""
    chunk = mosaic_chunk.chunk(pairs, pair_starts, tile_starts, step, sizes)
    program = lax.axis_index("program")
    first, last, first_block, last_block = (
        ranges[chunk.row, program, i] for i in range(4)
    )
    return Work(
        shared=shared.at[chunk.place],
        chunk=chunk,
        first=first,
        last=last,
        first_block=first_block,
        last_block=last_block,
        program=program,
        programs=ranges.shape[1],
    )
