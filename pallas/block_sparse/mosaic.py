"""Partial outputs of attention to chosen blocks, in Mosaic GPU for Hopper.

A tile of 64 rows, the G heads of some queries, meets one block. Tiles are in order of
their block, and a thread block does as many adjacent ones as any other, whatever blocks
they are of: its producer loads a block once, and the queries of each tile by rows of G
heads from wherever they are. Its consumers take tiles in turn; their results leave from
where the queries were. Nothing but the bytes that this moves through the second-level
cache bounds it.

In between, a thread block does its share of items: SHARERS adjacent queries and the
blocks that all of these chose. Their tiles meet all of them, for one partial result.

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
from jattn.pallas.block_sparse.mosaic_chunk import BLOCK, Sizes
from jattn.pallas.block_sparse.mosaic_consumer import Consumer
from jattn.pallas.block_sparse.mosaic_work import (
    BLOCK_SLOTS,
    SHARERS,
    Memory,
    Tiling,
    Work,
    memory_types,
    work_of,
)


def partial_outputs(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    shared: jax.Array,
    pairs: jax.Array,
    pair_starts: jax.Array,
    tile_starts: jax.Array,
    ranges: jax.Array,
    step: jax.Array,
    *,
    sizes: Sizes,
    tiling: Tiling,
) -> tuple[jax.Array, jax.Array]:
    """Attention of each pair's query to its block alone, and of all to shared blocks.

    In the interpreter P is not an operand in registers, which it does not know, but
    passes through shared memory, and O is not added to by the product; all else is the
    same.

    Args:
      query: [B, T, N, H], bf16 or fp16.
      key: [B, S, K, H], S a multiple of BLOCK.
      value: [B, S, K, H].
      shared: int32 [B K, C L / SHARERS, 1, 1 + SHARED]: how many blocks so many queries
        share, and which.
      pairs: int32 [D C M, P].
      pair_starts: int32 [D C M, blocks + 1], where each block's pairs start.
      tile_starts: int32 [D C M, blocks + 1], where each block's tiles start.
      ranges: int32 [D C M, programs, 4]: of each thread block the first tile, one past
        the last, the first block, and one past the last.
      step: int32 [1], which chunk of which portion.
      sizes: Those of the arguments; a chunk's length is a multiple of SHARERS.
      tiling: Tile sizes.

    Returns:
      Partial outputs [L, M, 1, 1 + n, G, H] and log-sum-exps [L, M, 1, 1 + n, G] in
      base 2: those of shared blocks, undefined if there are none, and of each slot.
    """
    operands = query, key, value, shared, pairs, pair_starts, tile_starts, ranges, step
    shape = sizes.length, sizes.rows, 1, 1 + sizes.slots, sizes.group
    targets = math.prod(shape[:-1]), sizes.group
    out, lse = _mosaic.call(
        functools.partial(_kernel, sizes=sizes, tiling=tiling),
        *operands,
        outputs=[
            jax.ShapeDtypeStruct((*targets, sizes.width), value.dtype),
            jax.ShapeDtypeStruct(targets, jnp.float32),
        ],
        memory=memory_types(tiling, sizes, query.dtype),
        grid={"program": ranges.shape[1], "kv_row": sizes.rows},
        consumers=tiling.consumers,
        name="block_sparse_forward",
    )
    return out.reshape(*shape, sizes.width), lse.reshape(shape)


def _kernel(*refs, sizes: Sizes, tiling: Tiling, **memory):
    """A thread block: items of shared blocks, and a range of one kv head's tiles."""
    query, key, value, *plan, out, lse = refs
    memory = Memory(**memory)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == tiling.consumers)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _Producer(query, key, value, memory, work_of(*plan, sizes=sizes), tiling).run()

    @pl.when(warpgroup < tiling.consumers)
    def _():
        registers = 240 if tiling.consumers == 2 else 160
        plgpu.set_max_registers(registers, action="increase")
        Consumer(warpgroup, out, lse, memory, work_of(*plan, sizes=sizes), tiling).run()


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Loads everything in the order in which the consumers need it."""

    query: Any
    key: Any
    value: Any
    memory: Memory
    work: Work
    tiling: Tiling

    def run(self):
        """Loads all, and waits until the consumers have emptied everything."""
        self.work.run(self._load_item, self._load_block)
        memory = self.memory
        for slot in range(BLOCK_SLOTS):
            plgpu.barrier_wait(memory.block_empty.at[slot])
        for slot in range(self.tiling.consumers * self.tiling.slots):
            plgpu.barrier_wait(memory.query_empty.at[slot])

    def _load_item(self, first_token, count, shared, blocks, tiles):
        sizes = self.work.sizes

        def load_block(i, _):
            self._load_keys(shared[1 + i], blocks + i)

        lax.fori_loop(0, count, load_block, None)

        def load_tile(i, _):
            token = first_token + i * sizes.tokens
            tokens = [token + j for j in range(sizes.tokens)]
            self._load_queries(tiles + i, tokens)

        lax.fori_loop(0, SHARERS // sizes.tokens, load_tile, None)

    def _load_block(self, block, begin, end, blocks, tiles):
        self._load_keys(block, blocks)

        def load_tile(tile, _):
            _, pairs = self.work.pairs_of(block, tile)
            tokens = [token for token, _ in pairs]
            self._load_queries(tiles + tile - begin, tokens)

        lax.fori_loop(begin, end, load_tile, None)

    def _load_keys(self, block, number):
        memory, chunk = self.memory, self.work.chunk
        slot = div_rem(number, BLOCK_SLOTS)[1]
        plgpu.barrier_wait(memory.block_empty.at[slot])
        keys = pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)
        for source, target in ((self.key, memory.key), (self.value, memory.value)):
            plgpu.copy_gmem_to_smem(
                source.at[chunk.batch, keys, chunk.kv_head],
                target.at[slot],
                memory.block_full.at[slot],
            )

    def _load_queries(self, number, tokens):
        """Loads a tile's queries, numbered from the chunk's first."""
        memory = self.memory
        turn, consumer = div_rem(number, self.tiling.consumers)
        slot = div_rem(turn, self.tiling.slots)[1]
        barrier = consumer * self.tiling.slots + slot
        plgpu.barrier_wait(memory.query_empty.at[barrier])
        self.work.chunk.load_rows(
            self.query,
            memory.query.at[consumer, slot],
            memory.query_full.at[barrier],
            tokens,
        )
