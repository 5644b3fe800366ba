"""What a consumer of the kernel of query gradients does.

See `jattn.pallas.selective.mosaic_query_gradient`.
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
from jattn.pallas._mosaic import MATRIX
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.flash.mosaic_backward import KEYS, ROWS
from jattn.pallas.selective import mosaic_fragments as fragments
from jattn.pallas.selective.mosaic_query_items import Item, Memory, Sizes, for_members

# How a consumer's threads share a number per row.
BY_ROW = MATRIX.reduce(1)


@dataclasses.dataclass(frozen=True)
class Consumer:
    """Adds up the gradient of its tiles of rows.

    Attributes:
      me: Which of the consumers.
      target: Where the gradient goes.
      memory: Shared memory and barriers.
      sizes: Those of the arguments.
    """

    me: jax.Array
    target: Any
    memory: Memory
    sizes: Sizes

    def start(self):
        """Declares all memory empty."""
        plgpu.barrier_arrive(self.memory.rows_empty.at[self.me])
        for slot in range(self.sizes.tiling.slots):
            plgpu.barrier_arrive(self.memory.empty.at[slot])

    def attend(self, get_item, index, slot):
        """Writes the gradient of an item's rows, and returns the next slot."""
        memory, sizes, me = self.memory, self.sizes, self.me
        item = get_item(index)
        plgpu.barrier_wait(memory.rows_full.at[me])
        kv_heads = range(sizes.tiling.kv_heads)
        rows = [
            [
                plgpu.load(x.at[me, i], layout=MATRIX)
                for x in (memory.query, memory.out_gradient)
            ]
            for i in kv_heads
        ]
        per_row = [
            [
                plgpu.load(memory.statistics.at[me, i, j], layout=BY_ROW)
                for j in range(2)
            ]
            for i in kv_heads
        ]
        if memory.weights is None:
            # The next copy to these must not overtake the loads from them.
            plgpu.commit_smem()
            plgpu.barrier_arrive(memory.rows_empty.at[me])

        def attend_step(step, carry, edge):
            slot, totals = carry
            plgpu.barrier_wait(memory.full.at[slot])
            seen = self._seen(item, step) if edge else None
            totals = tuple(
                self._attend_step(slot, i, rows[i], per_row[i], totals[i], seen)
                for i in kv_heads
            )
            plgpu.barrier_arrive(memory.empty.at[slot])
            return _mosaic.following(slot, sizes.tiling.slots), totals

        carry = slot, tuple(_mosaic.zeros((ROWS, sizes.width)) for _ in kv_heads)
        plain, edge = (functools.partial(attend_step, edge=x) for x in (False, True))
        carry = lax.fori_loop(0, item.whole, plain, carry)
        slot, totals = lax.fori_loop(item.whole, item.steps, edge, carry)
        if memory.weights is not None:
            plgpu.commit_smem()
            plgpu.barrier_arrive(memory.rows_empty.at[me])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i in kv_heads:
            tile = memory.result.at[me, i]
            tile[...] = (totals[i] * sizes.scale).astype(tile.dtype)
        plgpu.commit_smem()
        item = get_item(index)
        first = pl.multiple_of(item.chunk_token + me * sizes.tokens, sizes.tokens)

        def store_member(member, kv_head, rows):
            head = item.part * sizes.tiling.members + member
            target = self.target.at[item.batch, pl.ds(first, sizes.tokens), head]
            plgpu.copy_smem_to_gmem(memory.result.at[me, kv_head, rows], target)

        for_members(sizes, store_member)
        return slot

    def _seen(self, item: Item, step):
        """Which keys of a step each row sees; its tile is not in the past."""
        tokens = self.sizes.tokens
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW)
        first_key = (step + item.skipped) * KEYS
        first = item.first_token + self.me * tokens + self.sizes.offset - first_key
        last = (row & (tokens - 1)) + first
        column = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=MATRIX)
        return column <= lax.broadcast_in_dim(last, column.shape, [0])

    def _attend_step(self, slot, kv_head, rows, per_row, total, seen):
        """Adds what a step contributes in one kv head."""
        memory, sizes = self.memory, self.sizes
        high = sizes.tokens // fragments.ROWS
        first = pl.multiple_of(self.me * high, high)
        bias = fragments.load(memory.bias.at[slot, pl.ds(first, high)], KEYS)

        # Made where they are used: a constant index must not enter run_state from
        # outside.
        def key():
            return memory.key.at[slot, kv_head]

        def value():
            return memory.value.at[slot, kv_head]

        def by_row(which):
            return lax.broadcast_in_dim(per_row[which], (ROWS, KEYS), [0])

        def weigh(logits):
            if seen is not None:
                logits = jnp.where(seen, logits, -jnp.inf)
            return jnp.exp2(logits * (sizes.scale * LOG2_E) - by_row(0))

        if memory.weights is not None:
            me = self.me
            query = memory.query.at[me, kv_head]
            logits = _mosaic.product(query, key().transpose((1, 0))) + bias
            out_gradient = memory.out_gradient.at[me, kv_head]
            gradient = _mosaic.product(out_gradient, value().transpose((1, 0)))
            gradient = weigh(logits) * (gradient + by_row(1))
            memory.weights[me] = gradient.astype(memory.key.dtype)
            plgpu.commit_smem()
            return total + _mosaic.product(memory.weights.at[me], key())

        def multiply(references):
            total, logits, gradient = references
            plgpu.wgmma(logits, rows[0], key().transpose((1, 0)))
            plgpu.wgmma(gradient, rows[1], value().transpose((1, 0)))
            weights = weigh(plgpu.wgmma_accumulator_load(logits, wait_n=1))
            gradient = weights * plgpu.wgmma_accumulator_load(gradient, wait_n=0)
            plgpu.wgmma(total, gradient.astype(memory.key.dtype), key())

        initial = total, bias, by_row(1)
        total, _, _ = pl.run_state(multiply)(
            tuple(plgpu.WGMMAAccumulatorRef.init(x) for x in initial)
        )
        return total
