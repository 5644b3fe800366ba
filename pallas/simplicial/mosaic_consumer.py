"""A consumer of the forward kernel in Mosaic GPU: what it does with shared memory.

Letters as in `jattn.pallas.simplicial.mosaic`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.pallas import _mosaic
from jattn.pallas._mosaic import COLUMN, LOWEST, MATRIX
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.simplicial import ROWS
from jattn.pallas.simplicial import mosaic_items as items
from jattn.pallas.simplicial.mosaic_memory import CONSUMERS, FEW_SLOTS, Memory, Tiling

# The products of a step: whose turn it is, is asked before each.
LOGITS, VALUES = 0, 1


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """Where a step has keys that some row does not see.

    Attributes:
      begin: First of the columns with such keys.
      end: One past the last.
      before: Whether rows may not see a key because it is too far back.
      after: Whether because it comes after them, or has been in another step.
    """

    begin: int
    end: int
    before: bool
    after: bool

    def apply(self, logits, live):
        """Logits, minus infinity where not seen; a row sees columns from live[0] on."""
        part = logits[:, self.begin : self.end]
        columns = plgpu.broadcasted_iota(jnp.int32, part.shape, 1, layout=MATRIX)
        columns += self.begin
        if self.before and self.after:
            seen = (columns >= live[0]) & (columns < live[1])
        else:
            seen = columns >= live[0] if self.before else columns < live[1]
        part = jnp.where(seen, part, -jnp.inf)
        parts = [part]
        if self.begin > 0:
            parts.insert(0, logits[:, : self.begin])
        if self.end < logits.shape[1]:
            parts.append(logits[:, self.end :])
        return part if len(parts) == 1 else jnp.concatenate(parts, axis=1)


@dataclasses.dataclass(frozen=True)
class Consumer:
    """Attends to all pairs with every CONSUMERS-th key of the smaller window.

    Attributes:
      me: Which of the consumers.
      out: [B, K, rows, H].
      lse: [B, K, rows].
      visible: [B, rows], or None.
      memory: Shared memory and barriers.
      sizes: Those of the arguments.
      tiling: Tile sizes.
    """

    me: jax.Array
    out: Any
    lse: Any
    visible: Any
    memory: Memory
    sizes: items.Sizes
    tiling: Tiling

    def start(self):
        """Declares all memory empty and gives the first turn away."""
        plgpu.barrier_arrive(self.memory.query_empty)
        for slot in range(FEW_SLOTS):
            plgpu.barrier_arrive(self.memory.few_empty.at[slot])
        for slot in range(self.tiling.slots):
            plgpu.barrier_arrive(self.memory.ring_empty.at[slot])
        pl.when(self.me == 1)(lambda: self._pass_turn(VALUES))

    def finish(self):
        """Takes the turn that nobody needs any more."""
        pl.when(self.me == 0)(lambda: self._take_turn(LOGITS))

    # In order: logits of consumer 0, of 1, values of 0, of 1.

    def _take_turn(self, product):
        if self.tiling.turns:
            plgpu.barrier_wait(self.memory.turn.at[product * CONSUMERS + self.me])

    def _pass_turn(self, product):
        if self.tiling.turns:
            other = (1 - product) * CONSUMERS
            following = jnp.where(self.me == 0, product * CONSUMERS + 1, other)
            plgpu.barrier_arrive(self.memory.turn.at[following])

    def _meet(self):
        plgpu.barrier_arrive(self.memory.together)
        plgpu.barrier_wait(self.memory.together)

    def attend_item(self, item: items.Item, slots):
        """Writes an item's output, from what is in the slots from these on."""
        width = self.sizes.width
        plgpu.barrier_wait(self.memory.query_full)
        steps = item.steps(self.tiling.step)
        reaches = self._reaches(item)

        def attend_step(turn, carry, hidden):
            return self._attend_step(
                item, reaches, turn, turn == steps - 1, carry, hidden
            )

        carry = (
            *slots,
            _mosaic.zeros((ROWS, width)),
            _mosaic.filled(LOWEST, (ROWS,), COLUMN),
            _mosaic.filled(0, (ROWS,), COLUMN),
        )
        turn = 0
        for end, hidden in self._turns(item, steps):
            step = functools.partial(attend_step, hidden=hidden)
            carry = lax.fori_loop(turn, end, step, carry)
            turn = end
        *slots, attended, peak, total = carry

        @pl.when(steps == 0)
        def _():
            plgpu.barrier_arrive(self.memory.query_empty)

        self._write(item, attended, peak, total)
        return tuple(slots)

    def _turns(self, item, steps):
        """Where stretches of turns end, and the _Hidden they share, or None."""
        sizes, step = self.sizes, self.tiling.step
        anywhere = _Hidden(0, step, before=True, after=True)
        # Of a usual tile of positions, keys after some row are in the last columns of
        # the first step only, keys before some row's window in the first columns of the
        # last one: there is less to compare.
        count = -(-(sizes.many_window + sizes.positions - 1) // step)
        top = step - -(-sizes.positions // 8) * 8
        bottom = -(-(count * step - sizes.many_window) // 8) * 8
        fits = top >= 0 and bottom <= step <= sizes.many_window
        if sizes.positions == 1 or self.visible is not None or not fits:
            return (item.whole, None), (steps, anywhere)
        first_end = item.position + (1 + sizes.many - sizes.queries)
        usual = (steps == item.whole + 2) & (steps == count)
        usual &= (item.many_top == item.many_end) & (item.many_top >= count * step)
        usual &= first_end >= sizes.many_window
        usual = jnp.where(usual, 1, 0)
        return (
            (item.whole, None),
            (item.whole + usual, _Hidden(top, step, before=False, after=True)),
            (item.whole + 2 * usual, _Hidden(0, bottom, before=True, after=False)),
            (steps, anywhere),
        )

    def _reaches(self, item):
        """Of each row, how many few keys it sees, and the many from where to where.

        None if all rows see the same.
        """
        sizes = self.sizes
        if sizes.positions == 1:
            return None
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=COLUMN)
        position = item.position + lax.div(row, np.int32(sizes.heads))
        end = position + 1
        few = jnp.minimum(end + (sizes.few - sizes.queries), sizes.few_window)
        end += sizes.many - sizes.queries
        many = jnp.minimum(end, sizes.many_window)
        if self.visible is not None:
            visible = plgpu.load(
                self.visible.at[item.batch, pl.ds(item.row, ROWS)],
                layout=COLUMN,
                optimized=False,
            )
            few, many = jnp.minimum(few, visible), jnp.minimum(many, visible)
        return few, end - many, end

    def _attend_step(self, item, reaches, turn, is_last, carry, hidden):
        """Meets one step of K' and V' with all keys of the smaller window."""
        slot, *carry = carry
        sizes, step = self.sizes, self.tiling.step
        index = item.step(turn) if sizes.positions > 1 else turn
        first = items.many_first(item, index, step)
        # Of the step's keys, those that the item sees and has not seen before.
        top = item.many_top - index * step
        live = item.many_begin - first, jnp.minimum(item.many_end, top) - first
        if hidden is not None and hidden.before:
            self._blank(self._slots(slot, VALUES), live)
        if hidden is not None and sizes.positions > 1:
            _, begins, ends = reaches
            live = begins - first, jnp.minimum(ends, top) - first
            shape = ROWS, hidden.end - hidden.begin
            live = [lax.broadcast_in_dim(x, shape, [0]) for x in live]
        few_steps = _mosaic.ceil_div(item.few_reach, CONSUMERS)

        def attend_key(few_index, carry):
            return self._attend_key(
                item,
                few_index,
                few_index == few_steps - 1,
                is_last,
                slot,
                reaches,
                live,
                hidden,
                carry,
            )

        carry = lax.fori_loop(0, few_steps, attend_key, tuple(carry))
        return self._slot(slot, 2 * self.tiling.blocks), *carry

    def _slot(self, slot, count):
        """The slot of the ring that comes count slots later."""
        slot += count
        return jnp.where(slot >= self.tiling.slots, slot - self.tiling.slots, slot)

    def _slots(self, slot, product):
        """Slots of a product's blocks, if a step begins in this one."""
        # Computed for each key anew: the addresses of all operands are more than fit
        # in registers, and would come back from memory each time.
        slot = lax.optimization_barrier(slot)
        blocks = self.tiling.blocks
        return [self._slot(slot, product * blocks + i) for i in range(blocks)]

    def _blank(self, slots, live):
        """Overwrites values that are not to be seen: 0 times NaN is NaN."""
        shape = ROWS, self.sizes.width
        for i, slot in enumerate(slots):
            plgpu.barrier_wait(self.memory.ring_full.at[slot])

            @pl.loop(np.int32(0), np.int32(self.tiling.columns // ROWS))
            def _(tile, i=i, slot=slot):
                @pl.when(_mosaic.div_rem(tile, CONSUMERS)[1] == self.me)
                def _():
                    row = pl.multiple_of(tile * ROWS, ROWS)
                    part = self.memory.ring.at[slot, pl.ds(row, ROWS)]
                    value = plgpu.load(part, layout=MATRIX)
                    rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
                    rows += i * self.tiling.columns + row
                    seen = (rows >= live[0]) & (rows < live[1])
                    part[...] = jnp.where(seen, value, jnp.zeros_like(value))

        plgpu.commit_smem()
        self._meet()

    def _attend_key(
        self,
        item,
        few_index,
        is_last,
        is_last_step,
        slot,
        reaches,
        live,
        hidden,
        carry,
    ):
        """Meets one step of K' and V' with one key of the smaller window."""
        memory, tiling, sizes = self.memory, self.tiling, self.sizes
        few_slot, attended, peak, total = carry
        per_chunk = tiling.few // CONSUMERS
        chunk, place = _mosaic.div_rem(few_index, per_chunk)
        # Counted back from the position. If their number is odd, a consumer meets the
        # last one again, without effect.
        back = few_index * CONSUMERS + self.me
        if reaches is None:
            handicap = jnp.where(back < item.few_reach, 0.0, LOWEST)
        else:
            few_reach = reaches[0]
            handicap = jnp.where(
                lax.broadcast(back, (ROWS,)) < few_reach,
                _mosaic.filled(0.0, (ROWS,), COLUMN),
                _mosaic.filled(LOWEST, (ROWS,), COLUMN),
            )
        back = jnp.minimum(back, item.few_reach - 1)
        row = tiling.few - 1 - (back - chunk * tiling.few)
        if sizes.positions > 1:
            row *= sizes.heads

        @pl.when(place == 0)
        def _():
            plgpu.barrier_wait(memory.few_full.at[few_slot])

        # Rows of keys and values of their own are much to read. Expanded queries that
        # went through shared memory as well would keep it busier than the tensor cores.
        registers = sizes.positions > 1 and memory.weights is None
        if registers:
            layout = MATRIX
        else:
            layout = plgpu.Layout.SMEM_GMEM_COPY(
                (ROWS, sizes.width), memory.query.dtype, 128
            )
        few_key = self._load_few(memory.few_key.at[few_slot], row, layout)
        product = plgpu.load(memory.query, layout=layout) * few_key
        if registers:
            expanded_query = product

            @pl.when(is_last & is_last_step)
            def _():
                # The next queries must not overtake the loads of these.
                plgpu.commit_smem()
        else:
            expanded_query, _ = memory.expanded_or_half
            expanded_query = expanded_query.at[self.me]
            expanded_query[...] = product.astype(expanded_query.dtype)
            plgpu.commit_smem()

        @pl.when(is_last & is_last_step)
        def _():
            plgpu.barrier_arrive(memory.query_empty)

        slots = self._slots(slot, LOGITS)
        self._wait_for(slots, few_index == 0)
        self._take_turn(LOGITS)

        def multiply_keys(logits):
            for i, slot in enumerate(slots):
                part = logits.at[:, pl.ds(i * tiling.columns, tiling.columns)]
                block = memory.ring.at[slot].transpose((1, 0))
                plgpu.wgmma(part, expanded_query, block)
            self._pass_turn(LOGITS)
            return logits[...]

        logits = pl.run_scoped(
            multiply_keys, plgpu.WGMMAAccumulatorRef((ROWS, tiling.step), jnp.float32)
        )
        self._release(slots, is_last)
        if hidden is not None:
            logits = hidden.apply(logits, live)
        # In units of log 2.
        factor = sizes.scale * LOG2_E
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1) * factor + handicap)
        decay = jnp.exp2(peak - new_peak)
        # Twice, so that it outweighs a peak that is LOWEST itself.
        base = lax.broadcast_in_dim(new_peak - 2 * handicap, logits.shape, [0])
        weights = jnp.exp2(logits * factor - base)
        total = total * decay + jnp.sum(weights, axis=1)
        weights = weights.astype(memory.ring.dtype)
        slots = self._slots(slot, VALUES)
        if hidden is None or not hidden.before:
            self._wait_for(slots, few_index == 0)
        if memory.weights is not None:
            memory.weights[self.me] = weights
            plgpu.commit_smem()
        self._take_turn(VALUES)

        def multiply_values(update):
            for i, slot in enumerate(slots):
                begin = i * tiling.columns
                if memory.weights is None:
                    part = weights[:, begin : begin + tiling.columns]
                else:
                    columns = pl.ds(begin, tiling.columns)
                    part = memory.weights.at[self.me, :, columns]
                plgpu.wgmma(update, part, memory.ring.at[slot])
            self._pass_turn(VALUES)
            return update[...]

        update = pl.run_scoped(
            multiply_values,
            plgpu.WGMMAAccumulatorRef((ROWS, sizes.width), jnp.float32),
        )
        self._release(slots, is_last)
        few_value = self._load_few(memory.few_value.at[few_slot], row, MATRIX)
        ends_chunk = is_last | (place == per_chunk - 1)

        @pl.when(ends_chunk)
        def _():
            # The next copy into this slot must not overtake the loads from it.
            plgpu.commit_smem()
            plgpu.barrier_arrive(memory.few_empty.at[few_slot])

        following_slot = _mosaic.following(few_slot, FEW_SLOTS)
        few_slot = jnp.where(ends_chunk, following_slot, few_slot)
        few_value = few_value.astype(jnp.float32)
        decay = lax.broadcast_in_dim(decay, attended.shape, [0])
        return few_slot, attended * decay + update * few_value, new_peak, total

    def _load_few(self, slot, row, layout):
        """The few keys of all rows [ROWS, H], of which this is the first."""
        width = self.sizes.width
        if self.sizes.positions > 1:
            rows = slot.at[pl.ds(row, ROWS)]
            return plgpu.load(rows, layout=layout, optimized=False)[:, :width]
        same = plgpu.load(slot.at[row], layout=layout.reduce(0), optimized=False)
        return lax.broadcast_in_dim(same, (ROWS, width), [1])

    def _wait_for(self, slots, condition):
        @pl.when(condition)
        def _():
            for slot in slots:
                plgpu.barrier_wait(self.memory.ring_full.at[slot])

    def _release(self, slots, condition):
        @pl.when(condition)
        def _():
            for slot in slots:
                plgpu.barrier_arrive(self.memory.ring_empty.at[slot])

    def _write(self, item, attended, peak, total):
        """Adds up the results: each consumer gives one half away, writes the other."""
        half = self.sizes.width // 2
        statistics, (_, halves) = self.memory.statistics, self.memory.expanded_or_half
        is_first = lax.broadcast(self.me == 0, (ROWS, half))
        low, high = attended[:, :half], attended[:, half:]
        # Until both are done, their memory holds expanded queries.
        self._meet()
        halves[self.me] = jnp.where(is_first, high, low)
        statistics[self.me, 0] = peak
        statistics[self.me, 1] = total
        self._meet()
        their_peak = plgpu.load(statistics.at[1 - self.me, 0], layout=COLUMN)
        their_total = plgpu.load(statistics.at[1 - self.me, 1], layout=COLUMN)
        theirs = plgpu.load(halves.at[1 - self.me], layout=MATRIX)
        new_peak = jnp.maximum(peak, their_peak)
        my_weight = jnp.exp2(peak - new_peak)
        their_weight = jnp.exp2(their_peak - new_peak)
        total = total * my_weight + their_total * their_weight
        # Nothing was seen: 0 of 1, and minus infinity.
        seen = total > 0
        divisor = jnp.where(seen, total, jnp.ones_like(total))
        my_weight = lax.broadcast_in_dim(my_weight / divisor, (ROWS, half), [0])
        their_weight = lax.broadcast_in_dim(their_weight / divisor, (ROWS, half), [0])
        result = jnp.where(is_first, low, high) * my_weight + theirs * their_weight
        rows, columns = pl.ds(item.row, ROWS), pl.ds(self.me * half, half)
        result = result.astype(self.out.dtype)
        _mosaic.store(self.out.at[item.batch, item.kv_head, rows, columns], result)

        @pl.when(self.me == 0)
        def _():
            lse = jnp.where(seen, new_peak / LOG2_E + jnp.log(divisor), -jnp.inf)
            _mosaic.store(self.lse.at[item.batch, item.kv_head, rows], lse)

        # It is going to hold expanded queries again.
        self._meet()
