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
from jattn.pallas._mosaic import COLUMN, LOWEST, MATRIX, div_rem
from jattn.pallas._softmax import LOG2_E
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
        memory=_memory_types(tiling, sizes, query.dtype),
        grid={"program": ranges.shape[1], "kv_row": sizes.rows},
        consumers=tiling.consumers,
        name="block_sparse_forward",
    )
    return out.reshape(*shape, sizes.width), lse.reshape(shape)


@dataclasses.dataclass(frozen=True)
class _Memory:
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


def _memory_types(tiling: Tiling, sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """The types of _Memory's attributes."""
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
class _Work:
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


def _work(shared, pairs, pair_starts, tile_starts, ranges, step, *, sizes) -> _Work:
    chunk = mosaic_chunk.chunk(pairs, pair_starts, tile_starts, step, sizes)
    program = lax.axis_index("program")
    first, last, first_block, last_block = (
        ranges[chunk.row, program, i] for i in range(4)
    )
    return _Work(
        shared=shared.at[chunk.place],
        chunk=chunk,
        first=first,
        last=last,
        first_block=first_block,
        last_block=last_block,
        program=program,
        programs=ranges.shape[1],
    )


def _kernel(*refs, sizes: Sizes, tiling: Tiling, **memory):
    """A thread block: items of shared blocks, and a range of one kv head's tiles."""
    query, key, value, *plan, out, lse = refs
    memory = _Memory(**memory)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == tiling.consumers)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _Producer(query, key, value, memory, _work(*plan, sizes=sizes), tiling).run()

    @pl.when(warpgroup < tiling.consumers)
    def _():
        registers = 240 if tiling.consumers == 2 else 160
        plgpu.set_max_registers(registers, action="increase")
        _Consumer(warpgroup, out, lse, memory, _work(*plan, sizes=sizes), tiling).run()


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Loads everything in the order in which the consumers need it."""

    query: Any
    key: Any
    value: Any
    memory: _Memory
    work: _Work
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


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """Attends from its share of the tiles.

    Attributes:
      me: Which of the thread block's consumers.
      out: [L M R (1 + n), G, H].
      lse: [L M R (1 + n), G].
      memory: Shared memory and barriers.
      work: That of the thread block.
      tiling: Tile sizes.
    """

    me: jax.Array
    out: Any
    lse: Any
    memory: _Memory
    work: _Work
    tiling: Tiling

    def run(self):
        """Writes the results of its tiles."""
        memory = self.memory
        for slot in range(BLOCK_SLOTS):
            plgpu.barrier_arrive(memory.block_empty.at[slot])
        for slot in range(self.tiling.slots):
            plgpu.barrier_arrive(memory.query_empty.at[self._barrier(slot)])
        tiles = self.work.run(self._attend_item, self._attend_block)
        self._release(self._turns(tiles))

    def _barrier(self, turn):
        slots = self.tiling.slots
        slot = turn if isinstance(turn, int) else div_rem(turn, slots)[1]
        return self.me * slots + slot

    def _turns(self, tiles):
        """How many of so many tiles are its own."""
        consumers = self.tiling.consumers
        return div_rem(tiles + consumers - 1 - self.me, consumers)[0]

    def _release(self, turns):
        """Lets the producer overwrite what the last of so many turns has written."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(turns > 0)
        def _():
            plgpu.barrier_arrive(self.memory.query_empty.at[self._barrier(turns - 1)])

    def _attend_item(self, first_token, count, shared, blocks, tiles):
        memory, sizes = self.memory, self.work.sizes

        def wait(i, _):
            slot = div_rem(blocks + i, BLOCK_SLOTS)[1]
            plgpu.barrier_wait(memory.block_full.at[slot])

        lax.fori_loop(0, count, wait, None)

        def attend_tile(turn, _):
            tile = turn * self.tiling.consumers + self.me - tiles
            token = first_token + tile * sizes.tokens
            tokens = [token + j for j in range(sizes.tokens)]

            def attend(i, carry):
                slot = div_rem(blocks + i, BLOCK_SLOTS)[1]
                return self._attend(turn, tokens, shared[1 + i], slot, carry)

            plgpu.barrier_wait(memory.query_full.at[self._barrier(turn)])
            carry = self._attend(
                turn, tokens, shared[1], div_rem(blocks, BLOCK_SLOTS)[1], None
            )
            self._release(turn)
            carry = lax.fori_loop(1, count, attend, carry)
            self._write(turn, carry, [(self._target(x, 0), None) for x in tokens])

        last = tiles + SHARERS // sizes.tokens
        lax.fori_loop(self._turns(tiles), self._turns(last), attend_tile, None)

        def release(i, _):
            slot = div_rem(blocks + i, BLOCK_SLOTS)[1]
            plgpu.barrier_arrive(memory.block_empty.at[slot])

        lax.fori_loop(0, count, release, None)

    def _attend_block(self, block, begin, end, blocks, tiles):
        memory, work = self.memory, self.work
        slot = div_rem(blocks, BLOCK_SLOTS)[1]
        last_pair = work.chunk.pair_starts[block + 1]
        plgpu.barrier_wait(memory.block_full.at[slot])

        def attend_tile(turn, _):
            tile = begin + turn * self.tiling.consumers + self.me - tiles
            first, pairs = work.pairs_of(block, tile)
            tokens = [token for token, _ in pairs]
            plgpu.barrier_wait(memory.query_full.at[self._barrier(turn)])
            carry = self._attend(turn, tokens, block, slot, None)
            self._release(turn)
            targets = [
                (self._target(token, 1 + place), first + i < last_pair)
                for i, (token, place) in enumerate(pairs)
            ]
            self._write(turn, carry, targets)

        turns = self._turns(tiles), self._turns(tiles + end - begin)
        lax.fori_loop(*turns, attend_tile, None)
        plgpu.barrier_arrive(memory.block_empty.at[slot])

    def _target(self, token, place):
        """Where in the results those of a query and slot are."""
        sizes, kv_row = self.work.sizes, self.work.chunk.kv_row
        return (token * sizes.rows + kv_row) * (1 + sizes.slots) + place

    def _attend(self, turn, tokens, block, block_slot, carry):
        """Attends from a tile to one block, and to those of carry.

        Returns the output, still to be divided by the total of the weights, that
        total, and the peak of the logits, in units of log 2.
        """
        memory, sizes = self.memory, self.work.sizes
        query = memory.query.at[self.me, div_rem(turn, self.tiling.slots)[1]]

        def multiply_keys(logits):
            key = memory.key.at[block_slot].transpose((1, 0))
            plgpu.wgmma(logits, query, key)
            return logits[...]

        logits = pl.run_scoped(multiply_keys, _accumulator(BLOCK))
        logits = self._mask(logits, tokens, block)
        peak = jnp.maximum(jnp.max(logits, axis=1) * sizes.scale_log2, LOWEST)
        if carry is not None:
            attended, total, peak_before = carry
            peak = jnp.maximum(peak, peak_before)
            decay = jnp.exp2(peak_before - peak)
            attended *= lax.broadcast_in_dim(decay, attended.shape, [0])
            total *= decay
        base = lax.broadcast_in_dim(peak, logits.shape, [0])
        weights = jnp.exp2(logits * sizes.scale_log2 - base)
        here = jnp.sum(weights, axis=1)
        weights = weights.astype(memory.value.dtype)
        if memory.weights is not None:
            staged = memory.weights.at[self.me]
            staged[...] = weights
            plgpu.commit_smem()
            weights = staged

        def multiply_values(out):
            if carry is not None and memory.weights is None:
                out[...] = attended
            plgpu.wgmma(out, weights, memory.value.at[block_slot])
            return out[...]

        out = pl.run_scoped(multiply_values, _accumulator(sizes.width))
        if carry is not None:
            here += total
            if memory.weights is not None:
                out += attended
        return out, here, peak

    def _mask(self, logits, tokens, block):
        """Replaces logits of keys past a row's query by minus infinity."""
        chunk, group = self.work.chunk, self.work.sizes.group
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=COLUMN)
        first = chunk.first_token + chunk.sizes.offset - block * BLOCK
        last = jnp.full_like(row, tokens[0])
        for i, token in enumerate(tokens[1:], 1):
            last = jnp.where(row >= i * group, jnp.full_like(row, token), last)
        column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=MATRIX)
        seen = column <= lax.broadcast_in_dim(last + first, logits.shape, [0])
        return jnp.where(seen, logits, -jnp.inf)

    def _write(self, turn, carry, targets):
        """Writes a tile's results to the targets that exist, from its queries' slot."""
        memory, group = self.memory, self.work.sizes.group
        out, total, peak = carry
        slot = div_rem(turn, self.tiling.slots)[1]
        seen = total > 0
        divisor = jnp.where(seen, total, jnp.ones_like(total))
        out *= lax.broadcast_in_dim(1 / divisor, out.shape, [0])
        staged = memory.query.at[self.me, slot]
        staged[...] = out.astype(memory.query.dtype)
        lse = jnp.where(seen, peak + jnp.log(divisor) * LOG2_E, -jnp.inf)
        copies = memory.lse.shape[2]
        for i in range(copies):
            start = (copies - i) % copies * group
            memory.lse[self.me, slot, i, pl.ds(start, ROWS)] = lse
        plgpu.commit_smem()
        for i, (target, exists) in enumerate(targets):
            start = (copies - i % copies) % copies * group + i * group
            lse_rows = memory.lse.at[self.me, slot, i % copies, pl.ds(start, group)]

            def copy(i=i, target=target, lse_rows=lse_rows):
                rows = staged.at[pl.ds(i * group, group)]
                plgpu.copy_smem_to_gmem(rows, self.out.at[target])
                plgpu.copy_smem_to_gmem(lse_rows, self.lse.at[target])

            copy() if exists is None else pl.when(exists)(copy)


def _accumulator(columns: int):
    return plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32)
