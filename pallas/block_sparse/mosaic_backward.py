"""Partial gradients of attention to chosen blocks, in Mosaic GPU for Hopper.

As forward, a tile of 64 rows, the G heads of some queries, meets one block, and tiles
are in order of their block. Each of a thread block's two consumers does as many
adjacent tiles as any other, whatever blocks they are of, and has two warps of its own.
One loads a block once, and queries and the output's gradient by rows of G heads from
wherever they are; the other one stores the queries' gradient. Of the tile's
probabilities P and the gradient dS of its logits,

    dV += P' dO    dK += dS' Q    dQ = dS K

dK and dV stay in registers as long as the block does, and leave as those of a unit of
work. P and dS are transposed, so that they enter these products from registers. dQ
leaves from where dO was.

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
from jattn.pallas._mosaic import MATRIX, div_rem
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.block_sparse.mosaic_backward_work import (
    CONSUMERS,
    SLOTS,
    Block,
    Memory,
    Work,
    memory_types,
    work_of,
)
from jattn.pallas.block_sparse.mosaic_chunk import BLOCK, ROWS, Sizes

# Columns of dQ that are written while the product for others goes on.
COLUMNS = 64

# How a consumer's threads share a number per row, all of which are columns here.
BY_ROW = MATRIX.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      programs: Thread blocks.
    """

    programs: int


def partial_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out_gradient: jax.Array,
    statistics: jax.Array,
    pairs: jax.Array,
    pair_starts: jax.Array,
    tile_starts: jax.Array,
    ranges: jax.Array,
    step: jax.Array,
    *,
    units: int,
    sizes: Sizes,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What each pair gives to its query, and each unit of work to its block.

    In the interpreter P and dS are not operands in registers, which it does not know,
    but pass through shared memory, and products are not added to; all else is the same.

    Args:
      query: [B, T, N, H], bf16 or fp16.
      key: [B, S, K, H], S a multiple of BLOCK.
      value: [B, S, K, H].
      out_gradient: [B, T, N, H].
      statistics: What `statistics` gives.
      pairs: int32 [D C M, P].
      pair_starts: int32 [D C M, blocks + 1], where each block's pairs start.
      tile_starts: int32 [D C M, blocks + 1], where each block's tiles start.
      ranges: int32 [D C M, CONSUMERS programs, 5]: of each consumer the first tile, one
        past the last, the first block, one past the last, and its first unit.
      step: int32 [1], which chunk of which portion.
      units: U.
      sizes: Those of the arguments.

    Returns:
      [L, M, 1, n, G, H] in the dtype of query, and in fp32 [M, U, BLOCK, H], but for
      the factor of the logits, for key and value.
    """
    operands = query, key, value, out_gradient, statistics
    operands = *operands, pairs, pair_starts, tile_starts, ranges, step
    shape = sizes.length, sizes.rows, 1, sizes.slots, sizes.group, sizes.width
    of_units = jax.ShapeDtypeStruct(
        (sizes.rows, units, BLOCK, sizes.width), jnp.float32
    )
    interpreted = _mosaic.interpretation() is not None
    of_pairs, of_keys, of_values = _mosaic.call(
        functools.partial(_kernel, sizes=sizes, interpreted=interpreted),
        *operands,
        outputs=[
            jax.ShapeDtypeStruct((math.prod(shape[:-2]), *shape[-2:]), query.dtype),
            of_units,
            of_units,
        ],
        memory=memory_types(sizes, query.dtype),
        grid={"program": ranges.shape[1] // CONSUMERS, "kv_row": sizes.rows},
        consumers=CONSUMERS,
        name="block_sparse_backward",
        # Threads wait for each other in commit_smem: after storing dS and their last
        # products with dO, and after those with dS and storing dQ over dO. All else is
        # written by copies, which wait for all threads by a barrier.
        automatic_barriers=False,
    )
    return of_pairs.reshape(shape), of_keys, of_values


def statistics(lse: jax.Array, delta: jax.Array, sizes: Sizes) -> jax.Array:
    """What the products for each row's logits and dP are added to, in this order.

    Args:
      lse: fp32 [B, T, N], in base 2, +inf where nothing is seen.
      delta: fp32 [B, T, N].
      sizes: Those of the arguments.

    Returns:
      fp32 [B, T, K, 2 G]: minus lse, in units of the logits before their factor, and
      minus delta.
    """
    # Or XLA fuses the sums that delta is with what follows, and reads slowly.
    delta = lax.optimization_barrier(delta)
    shape = *lse.shape[:2], sizes.kv_heads, sizes.group
    parts = [x.reshape(shape) for x in (lse * (-1 / sizes.scale_log2), -delta)]
    return jnp.concatenate(parts, axis=-1)


def _kernel(*refs, sizes: Sizes, interpreted: bool, **memory):
    """A thread block: two ranges of one kv head's tiles."""
    query, key, value, out_gradient, statistics, *plan = refs[:10]
    of_pairs, of_keys, of_values = refs[10:]
    memory = Memory(**memory)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        @plgpu.warp_map
        def _(warp):
            task, consumer = div_rem(warp, CONSUMERS)
            work = work_of(*plan, consumer=consumer, sizes=sizes)
            rows = query, out_gradient, statistics
            loader = _Loader(*rows, key, value, consumer, memory, work)
            pl.when(task == 0)(loader.run)
            pl.when(task == 1)(_Storer(of_pairs, consumer, memory, work).run)

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        work = work_of(*plan, consumer=warpgroup, sizes=sizes)
        _Consumer(of_keys, of_values, warpgroup, memory, work, interpreted).run()


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Loads everything in the order in which its consumer needs it."""

    query: Any
    out_gradient: Any
    statistics: Any
    key: Any
    value: Any
    consumer: jax.Array
    memory: Memory
    work: Work

    def run(self):
        """Loads all, and waits until the consumer has emptied everything."""
        self.work.run(self._load_block)
        memory = self.memory
        plgpu.barrier_wait(memory.block_empty.at[self.consumer])
        for slot in range(SLOTS):
            barrier = self.consumer * SLOTS + slot
            plgpu.barrier_wait(memory.query_empty.at[barrier])
            plgpu.barrier_wait(memory.out_gradient_empty.at[barrier])

    def _load_block(self, block: Block):
        memory, chunk, me = self.memory, self.work.chunk, self.consumer
        plgpu.barrier_wait(memory.block_empty.at[me])
        keys = pl.ds(block.index * BLOCK, BLOCK)
        for source, target in ((self.key, memory.key), (self.value, memory.value)):
            plgpu.copy_gmem_to_smem(
                source.at[chunk.batch, keys, chunk.kv_head],
                target.at[me],
                memory.block_full.at[me],
            )

        def load_tile(turn, _):
            _, pairs = self.work.pairs_of(block, block.tile(turn))
            self._load_rows(block.before + turn, [token for token, _ in pairs])

        lax.fori_loop(0, block.tiles, load_tile, None)

    def _load_rows(self, number, tokens):
        """Loads what a tile needs of its queries, numbered from the chunk's first."""
        memory, chunk, me = self.memory, self.work.chunk, self.consumer
        slot = div_rem(number, SLOTS)[1]
        barrier = me * SLOTS + slot
        full = memory.rows_full.at[barrier]
        plgpu.barrier_wait(memory.query_empty.at[barrier])
        chunk.load_rows(self.query, memory.query.at[me, slot], full, tokens)
        for i, token in enumerate(tokens):
            plgpu.copy_gmem_to_smem(
                self.statistics.at[chunk.batch, chunk.existing(token), chunk.kv_head],
                memory.statistics.at[me, slot, i],
                full,
            )
        plgpu.barrier_wait(memory.out_gradient_empty.at[barrier])
        target = memory.out_gradient.at[me, slot]
        chunk.load_rows(self.out_gradient, target, full, tokens)


@dataclasses.dataclass(frozen=True)
class _Storer:
    """Stores dQ from where dO was, which is then empty."""

    of_pairs: Any
    consumer: jax.Array
    memory: Memory
    work: Work

    def run(self):
        """Stores all."""
        for slot in range(SLOTS):
            self._release(slot)
        self.work.run(self._store_block)

    def _release(self, slot):
        barrier = self.consumer * SLOTS + slot
        plgpu.barrier_arrive(self.memory.out_gradient_empty.at[barrier])

    def _store_block(self, block: Block):
        memory, chunk, sizes = self.memory, self.work.chunk, self.work.sizes

        def store_tile(turn, _):
            first, pairs = self.work.pairs_of(block, block.tile(turn))
            slot = div_rem(block.before + turn, SLOTS)[1]
            barrier = self.consumer * SLOTS + slot
            staged = memory.out_gradient.at[self.consumer, slot]
            plgpu.barrier_wait(memory.query_gradient_full.at[barrier])
            for i, (token, place) in enumerate(pairs):
                target = (token * sizes.rows + chunk.kv_row) * sizes.slots + place

                @pl.when(first + i < block.end)
                def _(i=i, target=target):
                    rows = staged.at[pl.ds(i * sizes.group, sizes.group)]
                    plgpu.copy_smem_to_gmem(rows, self.of_pairs.at[target])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self._release(slot)

        lax.fori_loop(0, block.tiles, store_tile, None)


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """Adds up what its tiles give to their blocks, and makes what they give to rows.

    Attributes:
      of_keys: [M, U, BLOCK, H].
      of_values: [M, U, BLOCK, H].
      me: Which of the thread block's consumers.
      memory: Shared memory and barriers.
      work: Its own.
      interpreted: Whether the kernel is.
    """

    of_keys: Any
    of_values: Any
    me: jax.Array
    memory: Memory
    work: Work
    interpreted: bool

    def run(self):
        """Writes the results of its tiles."""
        memory = self.memory
        plgpu.barrier_arrive(memory.block_empty.at[self.me])
        for slot in range(SLOTS):
            plgpu.barrier_arrive(memory.query_empty.at[self._barrier(slot)])
        self.work.run(self._attend_block)

    def _barrier(self, slot):
        return self.me * SLOTS + slot

    def _attend_block(self, block: Block):
        memory, work, tokens = self.memory, self.work, self.work.sizes.tokens
        # Queries in the block itself see it only up to themselves. They come first, at
        # most one pair each.
        first_key = block.index * BLOCK
        position = work.chunk.first_token + work.sizes.offset
        partly = first_key + BLOCK - 1 - jnp.maximum(position, first_key)
        partly = block.begin + jnp.maximum(partly, 0) - block.first_pair
        whole = _mosaic.ceil_div(jnp.maximum(partly, 0), tokens)
        # And the last tile may be of fewer rows.
        whole_end = div_rem(block.end - block.first_pair, tokens)[0]
        attend = functools.partial(self._attend, block, (whole, whole_end))
        carry = (_mosaic.zeros((BLOCK, work.sizes.width)),) * 2
        plgpu.barrier_wait(memory.block_full.at[self.me])
        carry = lax.fori_loop(0, block.tiles, attend, carry)
        plgpu.barrier_arrive(memory.block_empty.at[self.me])
        for target, total in zip((self.of_keys, self.of_values), carry, strict=True):
            _mosaic.store(target.at[work.chunk.kv_row, block.unit], total)

    def _attend(self, block: Block, whole, turn, carry):
        """Adds what a tile gives to dK and dV, and stages what its rows get."""
        tile = block.tile(turn)
        slot = div_rem(block.before + turn, SLOTS)[1]
        plgpu.barrier_wait(self.memory.rows_full.at[self._barrier(slot)])
        logits, gradient = (self._per_row(slot, i) for i in range(2))
        logits = lax.cond(
            (tile < whole[0]) | (tile >= whole[1]),
            functools.partial(self._mask, block, tile),
            lambda x: x,
            logits,
        )
        multiply = self._multiply_interpreted if self.interpreted else self._multiply
        carry = multiply(slot, logits, gradient, *carry)
        full = self.memory.query_gradient_full.at[self._barrier(slot)]
        plgpu.barrier_arrive(full)
        return carry

    def _per_row(self, slot, which):
        """One of the two numbers of each row, for each key."""
        group = self.work.sizes.group
        part = pl.ds(which * group, group)
        parts = [
            plgpu.load(self.memory.statistics.at[self.me, slot, i, part], layout=BY_ROW)
            for i in range(self.work.sizes.tokens)
        ]
        return lax.broadcast_in_dim(jnp.concatenate(parts), (BLOCK, ROWS), [1])

    def _mask(self, block: Block, tile, logits):
        """Replaces logits of a tile by minus infinity where rows do not see keys."""
        work, sizes = self.work, self.work.sizes
        first, pairs = work.pairs_of(block, tile)
        first_key = block.index * BLOCK - work.chunk.first_token - sizes.offset
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW)
        last = jnp.full_like(row, -1)
        for i, (token, _) in enumerate(pairs):
            of_pair = jnp.where(first + i < block.end, token - first_key, -1)
            last = jnp.where(row >= i * sizes.group, jnp.full_like(row, of_pair), last)
        key = plgpu.broadcasted_iota(jnp.int32, (BLOCK, ROWS), 0, layout=MATRIX)
        seen = key <= lax.broadcast_in_dim(last, key.shape, [1])
        return jnp.where(seen, logits, -jnp.inf)

    def _multiply(self, slot, *totals):
        """Adds what a tile gives to dK and dV, and stages its dQ.

        Args:
          slot: The tile's.
          *totals: What the tile's logits and dP are added to, dK and dV.

        Returns:
          dK and dV.
        """
        memory, me = self.memory, self.me
        key, value, query, out_gradient = self._operands(slot)

        def multiply(references):
            logits, gradient, key_gradient, value_gradient = references
            plgpu.wgmma(logits, key, query.transpose((1, 0)))
            plgpu.wgmma(gradient, value, out_gradient.transpose((1, 0)))
            weights = self._weigh(plgpu.wgmma_accumulator_load(logits, wait_n=1))
            # Both only now: there are no registers for what a product still reads.
            gradient = weights * plgpu.wgmma_accumulator_load(gradient)
            gradient = gradient.astype(query.dtype)
            plgpu.wgmma(value_gradient, weights.astype(query.dtype), out_gradient)
            plgpu.wgmma(key_gradient, gradient, query)
            memory.weights[me] = gradient
            # So that all threads have done with dO when any goes on from commit_smem.
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(memory.query_empty.at[self._barrier(slot)])
            plgpu.commit_smem()
            self._multiply_keys(slot)

        _, _, *totals = pl.run_state(multiply)(
            tuple(map(plgpu.WGMMAAccumulatorRef.init, totals))
        )
        return tuple(totals)

    def _multiply_interpreted(
        self, slot, logits, gradient, key_gradient, value_gradient
    ):
        """_multiply, by what the interpreter knows."""
        memory, me = self.memory, self.me
        key, value, query, out_gradient = self._operands(slot)
        logits += _mosaic.product(key, query.transpose((1, 0)))
        gradient += _mosaic.product(value, out_gradient.transpose((1, 0)))
        weights = self._weigh(logits)
        staged = memory.weights.at[me]
        staged[...] = weights.astype(staged.dtype)
        plgpu.commit_smem()
        value_gradient += _mosaic.product(staged, out_gradient)
        staged[...] = (weights * gradient).astype(staged.dtype)
        plgpu.commit_smem()
        key_gradient += _mosaic.product(staged, query)
        plgpu.barrier_arrive(memory.query_empty.at[self._barrier(slot)])
        self._multiply_keys(slot)
        return key_gradient, value_gradient

    def _loaded(self, total, after):
        """A product, while so many after it go on."""
        if self.interpreted:
            return total[...]
        return plgpu.wgmma_accumulator_load(total, wait_n=after)

    def _operands(self, slot):
        """K, V, Q and dO."""
        memory, me = self.memory, self.me
        rows = memory.query.at[me, slot], memory.out_gradient.at[me, slot]
        return memory.key.at[me], memory.value.at[me], *rows

    def _weigh(self, logits):
        """P, given the logits less the log-sum-exp."""
        return jnp.exp2(logits * self.work.sizes.scale_log2)

    def _multiply_keys(self, slot):
        """Stages a tile's dQ where its dO was, given dS."""
        memory, sizes = self.memory, self.work.sizes
        weights, key = memory.weights.at[self.me], memory.key.at[self.me]
        staged = memory.out_gradient.at[self.me, slot]
        parts = [pl.ds(i, COLUMNS) for i in range(0, sizes.width, COLUMNS)]

        def multiply(*totals):
            for part, total in zip(parts, totals, strict=True):
                plgpu.wgmma(total, weights.transpose((1, 0)), key.at[:, part])
            for i, (part, total) in enumerate(zip(parts, totals, strict=True), 1):
                gradient = self._loaded(total, len(parts) - i)
                gradient *= sizes.scale_log2 / LOG2_E
                staged[:, part] = gradient.astype(staged.dtype)

        pl.run_scoped(
            multiply, *[plgpu.WGMMAAccumulatorRef((ROWS, COLUMNS)) for _ in parts]
        )
        plgpu.commit_smem()
