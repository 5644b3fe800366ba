"""What a consumer of the forward kernel in Mosaic does.

See `jattn.pallas.selective.mosaic`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jattn.pallas import _mosaic, _mosaic_softmax
from jattn.pallas._mosaic import MATRIX, div_rem
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.selective import mosaic_fragments as fragments
from jattn.pallas.selective.mosaic_items import ROWS, Schedule, Sizes, place
from jattn.pallas.selective.mosaic_memory import Memory, Tiling


@dataclasses.dataclass(frozen=True)
class Consumer:
    """Attends from its tiles of queries.

    Attributes:
      me: Which of the thread block's consumers.
      rank: Which of the cluster's thread blocks.
      out: [B, CHUNK, N, H].
      lse: [B, N, CHUNK].
      schedule: Items.
      memory: Shared memory and barriers.
      sizes: Those of the arguments.
      tiling: Tile sizes.
    """

    me: jax.Array
    rank: jax.Array
    out: Any
    lse: Any
    schedule: Schedule
    memory: Memory
    sizes: Sizes
    tiling: Tiling

    def run(self, rounds):
        """Writes the output of as many items."""
        memory, item = self.memory, self.schedule.item(0)
        for barriers, slots in memory.empty(self.tiling):
            for slot in range(slots):
                plgpu.barrier_arrive(barriers.at[slot])
        plgpu.barrier_wait(memory.query_full.at[0])
        plgpu.barrier_wait(memory.ring_full.at[0])
        plgpu.barrier_wait(memory.bias_full.at[0])

        def multiply_keys(logits):
            plgpu.wgmma(logits, memory.query.at[0, self.me], self._keys(0))
            return logits[...]

        logits = pl.run_scoped(multiply_keys, self._accumulator(self.sizes.step))
        logits += self._bias(0)
        self._release(0, 0)
        pl.when(item.steps == 1)(lambda: self._release_query(0))
        logits = self._mask(logits, item, 0)
        _, weights, *softmax = _mosaic_softmax.add(
            self.sizes.scale, logits, *_mosaic_softmax.begin(ROWS)
        )
        weights = weights.astype(memory.ring.dtype)
        one = jnp.int32(1)

        def attend_item(i, carry):
            item, *carry = carry
            # Part of it may have to come from global memory, which takes a while.
            following = self.schedule.item(i + 1)
            carry = self._attend_item(i, item, following, i + 1 < rounds, carry)
            return following, *carry

        carry = item, one, one, weights, *softmax
        lax.fori_loop(0, rounds, attend_item, carry)

    def _attend_item(self, i, item, following, goes_on, carry):
        """Writes an item's output and begins the following one."""
        memory = self.memory
        slot, bias_slot, *softmax = carry
        query_slot = div_rem(i, self.tiling.query_slots)[1]
        attended = _mosaic.zeros((ROWS, self.sizes.width))
        add_to_softmax = functools.partial(_mosaic_softmax.add, self.sizes.scale)

        def attend_step(step, carry, masked):
            key_slot, bias_slot, attended, weights, *softmax = carry
            value_slot = _mosaic.following(key_slot, self.tiling.slots)
            plgpu.barrier_wait(memory.bias_full.at[bias_slot])
            plgpu.barrier_wait(memory.ring_full.at[key_slot])

            def release():
                self._release(key_slot, bias_slot)
                is_last = step == item.steps - 1
                pl.when(is_last)(lambda: self._release_query(query_slot))

            def next_softmax(logits):
                if masked:
                    logits = self._mask(logits, item, step)
                return add_to_softmax(logits, *softmax)

            slots = query_slot, key_slot, value_slot, bias_slot
            decay, *softmax, attended = self._multiply(
                slots, weights, attended, next_softmax, release
            )
            attended *= lax.broadcast_in_dim(decay, attended.shape, [0])
            bias_slot = _mosaic.following(bias_slot, self.tiling.bias_slots)
            slot = _mosaic.following(value_slot, self.tiling.slots)
            return slot, bias_slot, attended, *softmax

        carry = slot, bias_slot, attended, *softmax
        for first, end, is_masked in (
            (1, item.masked, True),
            (item.masked, item.steps, False),
        ):
            step = functools.partial(attend_step, masked=is_masked)
            carry = lax.fori_loop(first, end, step, carry)
        slot, bias_slot, attended, weights, peak, total = carry

        # After the last item, logits are computed from what there is, for nobody.
        count = self.tiling.slots
        key_slot = jnp.where(goes_on, slot, jnp.where(slot == 0, count, slot) - 1)
        value_slot = jnp.where(goes_on, _mosaic.following(slot, count), slot)
        next_slot = div_rem(i + 1, self.tiling.query_slots)[1]
        query_slot = jnp.where(goes_on, next_slot, query_slot)

        @pl.when(goes_on)
        def _():
            plgpu.barrier_wait(memory.query_full.at[query_slot])
            plgpu.barrier_wait(memory.bias_full.at[bias_slot])
            plgpu.barrier_wait(memory.ring_full.at[key_slot])

        def release():
            pl.when(goes_on)(lambda: self._release(key_slot, bias_slot))
            is_last = goes_on & (following.steps == 1)
            pl.when(is_last)(lambda: self._release_query(query_slot))

        def first_softmax(logits):
            logits = self._mask(logits, following, 0)
            return add_to_softmax(logits, *_mosaic_softmax.begin(ROWS))

        slots = query_slot, key_slot, value_slot, bias_slot
        _, *softmax, attended = self._multiply(
            slots, weights, attended, first_softmax, release
        )
        self._write(item, attended, peak, total)
        bias_slot = _mosaic.following(bias_slot, self.tiling.bias_slots)
        return _mosaic.following(value_slot, count), bias_slot, *softmax

    def _multiply(self, slots, weights, attended, get_softmax, release):
        """Multiplies query and keys, and adds the product of weights and values.

        Returns what get_softmax returns for the former with the bias, and the latter.
        Calls release, which branches, between the products.
        """
        memory = self.memory
        query_slot, key_slot, value_slot, bias_slot = slots
        interpreted = memory.weights is not None
        if interpreted:
            staged = memory.weights.at[self.me]
            staged[...] = weights
            plgpu.commit_smem()
            weights = staged

        def multiply(logits, update):
            if not interpreted:
                # Added afterwards, it would take registers of its own.
                logits[...] = self._bias(bias_slot)
                update[...] = attended
            plgpu.barrier_wait(memory.ring_full.at[value_slot])
            query = memory.query.at[query_slot, self.me]
            plgpu.wgmma(logits, query, self._keys(key_slot))
            plgpu.wgmma(update, weights, memory.ring.at[value_slot])
            logits = plgpu.wgmma_accumulator_load(logits, wait_n=1)
            if interpreted:
                logits += self._bias(bias_slot)
            # Branches, which no instruction crosses. After the softmax it would keep
            # the wait for the second product there, which is slower.
            release()
            softmax = get_softmax(logits)
            result = update[...]
            plgpu.barrier_arrive(memory.ring_empty.at[value_slot])
            return softmax, result

        (decay, weights, peak, total), result = pl.run_scoped(
            multiply,
            self._accumulator(self.sizes.step),
            self._accumulator(self.sizes.width),
        )
        if interpreted:
            result += attended
        # The registers of the weights that are being multiplied must not change before.
        weights, result = lax.optimization_barrier((weights, result))
        return decay, weights.astype(memory.ring.dtype), peak, total, result

    def _release(self, key_slot, bias_slot):
        """Lets the producer overwrite keys and bias, which have become logits."""
        # The next copy must not overtake the loads from shared memory.
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.memory.ring_empty.at[key_slot])
        plgpu.barrier_arrive(self.memory.bias_empty.at[bias_slot])

    def _bias(self, slot):
        """The consumer's rows of the bias in a slot."""
        rows = ROWS // fragments.ROWS
        tile = div_rem(self.me, self.sizes.members)[0]
        bias = self.memory.bias.at[slot, pl.ds(tile * rows, rows)]
        return fragments.load(bias, self.sizes.step)

    def _keys(self, slot):
        return self.memory.ring.at[slot].transpose((1, 0))

    def _accumulator(self, columns):
        return plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32)

    def _mask(self, logits, item, step):
        """Replaces logits of keys in the future by minus infinity."""
        # Of the consumer's first query, relative to the first key.
        position = item.position + div_rem(self.me, self.sizes.members)[0] * ROWS
        position -= item.masked_tile(step) * self.sizes.step
        row = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=MATRIX)
        column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=MATRIX)
        return jnp.where(column - row <= position, logits, -jnp.inf)

    def _write(self, item, attended, peak, total):
        """Writes an item's results. Every query sees itself."""
        total = jnp.sum(total, axis=1)
        attended *= lax.broadcast_in_dim(1 / total, attended.shape, [0])
        head, token = place(item, self.rank, self.me, self.sizes)
        rows = pl.ds(token, ROWS)
        out = attended.astype(self.out.dtype)
        _mosaic.store(self.out.at[item.batch, rows, head], out)
        lse = peak / LOG2_E + jnp.log(total)
        _mosaic.store(self.lse.at[item.batch, head, rows], lse)

    def _release_query(self, slot):
        plgpu.barrier_arrive(self.memory.query_empty.at[slot])
