"""Partial gradients of attention to chosen blocks, in Mosaic GPU for Hopper.

As forward, a tile of 64 rows, the G heads of some queries, meets one block, and tiles
are in order of their block. Each of a thread block's two consumers does as many
adjacent tiles as any other, whatever blocks they are of, and has a producer of its own:
that loads a block once, and queries and the output's gradient by rows of G heads from
wherever they are. Of the tile's probabilities P and the gradient dS of its logits,

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
from jattn.pallas.block_sparse.mosaic import BLOCK, LOG2_E, ROWS, Sizes

# Warpgroups that compute; as many load.
CONSUMERS = 2

# How a consumer's threads share a number per row, all of which are columns here.
BY_ROW = MATRIX.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      slots: Tiles that each consumer has in flight.
      programs: Thread blocks.
    """

    slots: int
    programs: int


# Compiled once for all steps of a call.
@functools.partial(jax.jit, static_argnames=("units", "sizes", "tiling"))
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
    tiling: Tiling,
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
      tiling: Tile sizes.

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
    of_pairs, *of_blocks = _mosaic.call(
        functools.partial(_kernel, sizes=sizes, interpreted=interpreted),
        *operands,
        outputs=[
            jax.ShapeDtypeStruct((math.prod(shape[:-2]), *shape[-2:]), query.dtype),
            of_units,
            of_units,
        ],
        memory=_memory_types(tiling, sizes, query.dtype),
        grid={"program": ranges.shape[1] // CONSUMERS, "kv_row": sizes.rows},
        consumers=2 * CONSUMERS - 1,
        name="block_sparse_backward",
    )
    return of_pairs.reshape(shape), *of_blocks


def statistics(lse: jax.Array, delta: jax.Array, kv_heads: int) -> jax.Array:
    """Two numbers for each row, adjacent for the rows of a query.

    Args:
      lse: fp32 [B, T, N], in base 2, +inf where nothing is seen.
      delta: fp32 [B, T, N].
      kv_heads: K.

    Returns:
      fp32 [B, T, K, 2 G].
    """
    shape = *lse.shape[:2], kv_heads, -1
    return jnp.concatenate([lse.reshape(shape), delta.reshape(shape)], axis=-1)


@dataclasses.dataclass(frozen=True)
class _Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      key: [CONSUMERS, BLOCK, H].
      value: [CONSUMERS, BLOCK, H].
      query: [CONSUMERS, slots, ROWS, H].
      out_gradient: [CONSUMERS, slots, ROWS, H], and then the queries' gradient.
      statistics: fp32 [CONSUMERS, slots, queries of a tile, 2 G].
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

    @property
    def slots(self) -> int:
        """Tiles that a consumer has in flight."""
        return self.query.shape[1]


def _memory_types(tiling: Tiling, sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """The types of _Memory's attributes."""
    matrix = functools.partial(_mosaic.matrix, dtype=dtype)
    slots = CONSUMERS, tiling.slots
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
class _Work:
    """What a consumer has to do: a range of tiles.

    Attributes:
      pairs: [P] of its chunk and kv head.
      pair_starts: [blocks + 1].
      tile_starts: [blocks + 1].
      range: [5], an item of ranges.
      batch: Row of the batch.
      kv_head: Of the keys.
      kv_row: Of the portion.
      first_token: First query of the chunk.
      sizes: Those of the arguments.
    """

    pairs: Any
    pair_starts: Any
    tile_starts: Any
    range: Any
    batch: jax.Array
    kv_head: jax.Array
    kv_row: jax.Array
    first_token: jax.Array
    sizes: Sizes

    def run(self, run_block):
        """Runs over its blocks.

        Args:
          run_block: Of the block, its first tile, one past the last, the number of
            tiles before, and the unit of work that it is.
        """
        first, last, first_block, last_block, unit = (self.range[i] for i in range(5))

        def block_step(block, unit):
            begin = jnp.maximum(self.tile_starts[block], first)
            end = jnp.minimum(self.tile_starts[block + 1], last)

            @pl.when(end > begin)
            def _():
                run_block(block, begin, end, begin - first, unit)

            return jnp.where(end > begin, unit + 1, unit)

        lax.fori_loop(first_block, last_block, block_step, unit)

    @property
    def tiles(self):
        """How many tiles it has."""
        return self.range[1] - self.range[0]

    def pairs_of(self, block, tile):
        """The number of a tile's first pair, and the queries and slots of all.

        Past the block's last pair they are any others.
        """
        first = tile - self.tile_starts[block]
        first = self.pair_starts[block] + first * self.sizes.tokens
        last = self.pairs.shape[0] - 1
        pairs = [
            self.pairs[jnp.minimum(first + i, last)] for i in range(self.sizes.tokens)
        ]
        return first, [div_rem(pair, self.sizes.slots) for pair in pairs]


def _work(pairs, pair_starts, tile_starts, ranges, step, *, consumer, sizes) -> _Work:
    program, kv_row = lax.axis_index("program"), lax.axis_index("kv_row")
    step = step[0]
    row = step * sizes.rows + kv_row
    portion, chunk = div_rem(step, sizes.chunks)
    batch, kv_head = div_rem(portion * sizes.rows + kv_row, sizes.kv_heads)
    return _Work(
        pairs=pairs.at[row],
        pair_starts=pair_starts.at[row],
        tile_starts=tile_starts.at[row],
        range=ranges.at[row, program * CONSUMERS + consumer],
        batch=batch,
        kv_head=kv_head,
        kv_row=kv_row,
        first_token=chunk * sizes.length,
        sizes=sizes,
    )


def _kernel(*refs, sizes: Sizes, interpreted: bool, **memory):
    """A thread block: two ranges of one kv head's tiles."""
    sources, plan, targets = refs[:5], refs[5:10], refs[10:]
    memory = _Memory(**memory)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup >= CONSUMERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        consumer = warpgroup - CONSUMERS
        work = _work(*plan, consumer=consumer, sizes=sizes)
        _Producer(*sources, consumer, memory, work).run()

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        work = _work(*plan, consumer=warpgroup, sizes=sizes)
        _Consumer(*targets, warpgroup, memory, work, interpreted).run()


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Loads everything in the order in which its consumer needs it."""

    query: Any
    key: Any
    value: Any
    out_gradient: Any
    statistics: Any
    consumer: jax.Array
    memory: _Memory
    work: _Work

    def run(self):
        """Loads all, and waits until the consumer has emptied everything."""
        self.work.run(self._load_block)
        memory = self.memory
        plgpu.barrier_wait(memory.block_empty.at[self.consumer])
        for slot in range(memory.slots):
            barrier = self.consumer * memory.slots + slot
            plgpu.barrier_wait(memory.query_empty.at[barrier])
            plgpu.barrier_wait(memory.out_gradient_empty.at[barrier])

    def _load_block(self, block, begin, end, before, unit):
        del unit
        memory, work, me = self.memory, self.work, self.consumer
        plgpu.barrier_wait(memory.block_empty.at[me])
        keys = pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)
        for source, target in ((self.key, memory.key), (self.value, memory.value)):
            plgpu.copy_gmem_to_smem(
                source.at[work.batch, keys, work.kv_head],
                target.at[me],
                memory.block_full.at[me],
            )

        def load_tile(tile, _):
            _, pairs = work.pairs_of(block, tile)
            self._load_rows(before + tile - begin, [token for token, _ in pairs])

        lax.fori_loop(begin, end, load_tile, None)

    def _load_rows(self, number, tokens):
        """Loads what a tile needs of its queries, numbered from the chunk's first."""
        memory, work, sizes = self.memory, self.work, self.work.sizes
        slot = div_rem(number, memory.slots)[1]
        barrier = self.consumer * memory.slots + slot
        full = memory.rows_full.at[barrier]
        last = sizes.queries - 1
        tokens = [jnp.minimum(work.first_token + token, last) for token in tokens]
        heads = pl.ds(work.kv_head * sizes.group, sizes.group)

        def load(source, target):
            for i, token in enumerate(tokens):
                rows = pl.ds(i * sizes.group, sizes.group)
                plgpu.copy_gmem_to_smem(
                    source.at[work.batch, token, heads],
                    target.at[self.consumer, slot, rows],
                    full,
                )

        plgpu.barrier_wait(memory.query_empty.at[barrier])
        load(self.query, memory.query)
        for i, token in enumerate(tokens):
            plgpu.copy_gmem_to_smem(
                self.statistics.at[work.batch, token, work.kv_head],
                memory.statistics.at[self.consumer, slot, i],
                full,
            )
        plgpu.barrier_wait(memory.out_gradient_empty.at[barrier])
        load(self.out_gradient, memory.out_gradient)


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """Adds up what its tiles give to their blocks, and writes what they give to rows.

    Attributes:
      of_pairs: [L M R n, G, H].
      of_keys: [M, U, BLOCK, H].
      of_values: [M, U, BLOCK, H].
      me: Which of the thread block's consumers.
      memory: Shared memory and barriers.
      work: Its own.
      interpreted: Whether the kernel is.
    """

    of_pairs: Any
    of_keys: Any
    of_values: Any
    me: jax.Array
    memory: _Memory
    work: _Work
    interpreted: bool

    def run(self):
        """Writes the results of its tiles."""
        memory = self.memory
        plgpu.barrier_arrive(memory.block_empty.at[self.me])
        for slot in range(memory.slots):
            plgpu.barrier_arrive(memory.query_empty.at[self._barrier(slot)])
            plgpu.barrier_arrive(memory.out_gradient_empty.at[self._barrier(slot)])
        self.work.run(self._attend_block)
        self._release(self.work.tiles)

    def _barrier(self, number):
        slots = self.memory.slots
        slot = number if isinstance(number, int) else div_rem(number, slots)[1]
        return self.me * slots + slot

    def _release(self, number):
        """Lets the producer overwrite what the tile before this one has written."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(number > 0)
        def _():
            barrier = self._barrier(number - 1)
            plgpu.barrier_arrive(self.memory.out_gradient_empty.at[barrier])

    def _attend_block(self, block, begin, end, before, unit):
        memory, work, tokens = self.memory, self.work, self.work.sizes.tokens
        first_tile, first_pair = work.tile_starts[block], work.pair_starts[block]
        # Queries in the block itself see it only up to themselves. They come first, at
        # most one pair each.
        first_key = block * BLOCK
        position = work.first_token + work.sizes.offset
        partly = first_key + BLOCK - 1 - jnp.maximum(position, first_key)
        whole = first_tile + _mosaic.ceil_div(jnp.maximum(partly, 0), tokens)
        whole = jnp.clip(whole, begin, end)
        # And the last tile may be of fewer rows.
        count = work.pair_starts[block + 1] - first_pair
        whole_end = jnp.clip(first_tile + div_rem(count, tokens)[0], whole, end)

        def attend_tile(tile, carry, masked):
            return self._attend(block, tile, before + tile - begin, masked, carry)

        def part_step(part, carry):
            bounds = begin, begin, whole
            if_last = whole, whole_end, end
            bounds = [
                jnp.where(part == 0, *x) for x in zip(bounds, if_last, strict=True)
            ]
            for i, masked in enumerate((False, True)):
                step = functools.partial(attend_tile, masked=masked)
                carry = lax.fori_loop(bounds[i], bounds[i + 1], step, carry)
            return carry

        carry = (_mosaic.zeros((BLOCK, work.sizes.width)),) * 2
        plgpu.barrier_wait(memory.block_full.at[self.me])
        carry = lax.fori_loop(0, 2, part_step, carry)
        plgpu.barrier_arrive(memory.block_empty.at[self.me])
        for target, total in zip((self.of_keys, self.of_values), carry, strict=True):
            _mosaic.store(target.at[work.kv_row, unit], total)

    def _attend(self, block, tile, number, masked, carry):
        """Adds what a tile gives to dK and dV, and writes what its rows get."""
        memory, work, sizes = self.memory, self.work, self.work.sizes
        first, pairs = work.pairs_of(block, tile)
        last_pair = work.pair_starts[block + 1]
        exists = [first + i < last_pair for i in range(sizes.tokens)]
        seen = None
        if masked:
            here = block * BLOCK - work.first_token - sizes.offset
            seen = self._seen(
                [
                    jnp.where(there, token - here, -1)
                    for (token, _), there in zip(pairs, exists, strict=True)
                ]
            )
        barrier = self._barrier(number)
        slot = div_rem(number, memory.slots)[1]
        plgpu.barrier_wait(memory.rows_full.at[barrier])
        multiply = self._multiply_interpreted if self.interpreted else self._multiply
        carry = multiply(slot, number, seen, *carry)
        plgpu.barrier_arrive(memory.query_empty.at[barrier])
        for i, (token, place) in enumerate(pairs):
            target = (token * sizes.rows + work.kv_row) * sizes.slots + place

            @pl.when(exists[i])
            def _(i=i, target=target):
                rows = pl.ds(i * sizes.group, sizes.group)
                plgpu.copy_smem_to_gmem(
                    memory.out_gradient.at[self.me, slot, rows],
                    self.of_pairs.at[target],
                )

        return carry

    def _seen(self, last_keys):
        """Which keys each row sees, if its query does those up to that one."""
        group = self.work.sizes.group
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW)
        last = jnp.full_like(row, last_keys[0])
        for i, x in enumerate(last_keys[1:], 1):
            last = jnp.where(row >= i * group, jnp.full_like(row, x), last)
        key = plgpu.broadcasted_iota(jnp.int32, (BLOCK, ROWS), 0, layout=MATRIX)
        return key <= lax.broadcast_in_dim(last, key.shape, [1])

    def _weigh(self, slot, logits, seen):
        """P, given the logits."""
        if seen is not None:
            logits = jnp.where(seen, logits, -jnp.inf)
        lse = self._per_row(slot, 0)
        return jnp.exp2(logits * self.work.sizes.scale_log2 - lse)

    def _differentiate(self, slot, weights, gradient):
        """dS, given P and its gradient."""
        gradient = weights * (gradient - self._per_row(slot, 1))
        return gradient.astype(self.memory.weights.dtype)

    def _per_row(self, slot, which):
        """One of the two numbers of each row, for each key."""
        group = self.work.sizes.group
        part = pl.ds(which * group, group)
        parts = [
            plgpu.load(
                self.memory.statistics.at[self.me, slot, i, part], layout=BY_ROW
            )
            for i in range(self.work.sizes.tokens)
        ]
        return lax.broadcast_in_dim(jnp.concatenate(parts), (BLOCK, ROWS), [1])

    def _multiply(self, slot, number, seen, key_gradient, value_gradient):
        """Adds what a tile gives to dK and dV, and replaces its dO by its dQ."""
        memory, me = self.memory, self.me
        key, value, weights = (
            x.at[me] for x in (memory.key, memory.value, memory.weights)
        )
        query, out_gradient = memory.query.at[me, slot], memory.out_gradient.at[me, slot]

        def multiply(references):
            key_gradient, value_gradient, logits, gradient = references
            plgpu.wgmma(logits, key, query.transpose((1, 0)))
            plgpu.wgmma(gradient, value, out_gradient.transpose((1, 0)))
            self._release(number)
            logits = plgpu.wgmma_accumulator_load(logits, wait_n=1)
            probabilities = self._weigh(slot, logits, seen)
            plgpu.wgmma(value_gradient, probabilities.astype(query.dtype), out_gradient)
            gradient = plgpu.wgmma_accumulator_load(gradient, wait_n=1)
            gradient = self._differentiate(slot, probabilities, gradient)
            plgpu.wgmma(key_gradient, gradient, query)
            weights[...] = gradient
            # All threads have done with dO when any goes on.
            plgpu.wgmma_wait(1)
            plgpu.commit_smem()
            self._multiply_keys(slot)

        square = _mosaic.zeros((BLOCK, ROWS))
        key_gradient, value_gradient, _, _ = pl.run_state(multiply)(
            tuple(
                plgpu.WGMMAAccumulatorRef.init(x)
                for x in (key_gradient, value_gradient, square, square)
            )
        )
        return key_gradient, value_gradient

    def _multiply_interpreted(self, slot, number, seen, key_gradient, value_gradient):
        """_multiply, by what the interpreter knows."""
        memory, me = self.memory, self.me
        key, value, staged = (
            x.at[me] for x in (memory.key, memory.value, memory.weights)
        )
        query, out_gradient = memory.query.at[me, slot], memory.out_gradient.at[me, slot]
        logits = _mosaic.product(key, query.transpose((1, 0)))
        gradient = _mosaic.product(value, out_gradient.transpose((1, 0)))
        self._release(number)
        weights = self._weigh(slot, logits, seen)
        staged[...] = weights.astype(staged.dtype)
        plgpu.commit_smem()
        value_gradient += _mosaic.product(staged, out_gradient)
        staged[...] = self._differentiate(slot, weights, gradient)
        plgpu.commit_smem()
        key_gradient += _mosaic.product(staged, query)
        self._multiply_keys(slot)
        return key_gradient, value_gradient

    def _multiply_keys(self, slot):
        """Puts a tile's dQ where its dO was, given dS."""
        memory, sizes = self.memory, self.work.sizes
        weights, key = memory.weights.at[self.me], memory.key.at[self.me]
        gradient = _mosaic.product(weights.transpose((1, 0)), key)
        gradient *= sizes.scale_log2 / LOG2_E
        staged = memory.out_gradient.at[self.me, slot]
        staged[...] = gradient.astype(staged.dtype)
        plgpu.commit_smem()
