"""What a consumer of the kernel in `mosaic` does.

Letters as in `jattn.pallas.block_sparse.triton`.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jattn.pallas._mosaic import COLUMN, LOWEST, MATRIX, div_rem
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.block_sparse.mosaic_chunk import BLOCK, ROWS
from jattn.pallas.block_sparse.mosaic_work import (
    BLOCK_SLOTS,
    SHARERS,
    Memory,
    Tiling,
    Work,
)


@dataclasses.dataclass(frozen=True)
class Consumer:
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
    memory: Memory
    work: Work
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
