"""What a consumer of the forward kernel in Mosaic does.

See `jattn.pallas.flash.mosaic`.
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
from jattn.pallas._mosaic import COLUMN, MATRIX, div_rem
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.flash import ROWS
from jattn.pallas.flash.mosaic_items import Sizes, divide, stretches
from jattn.pallas.flash.mosaic_memory import QUERY_SLOTS, Memory, Tiling


@dataclasses.dataclass(frozen=True)
class Consumer:
    """Attends from its tiles of rows.

    Attributes:
      me: Which of the thread block's consumers.
      tile: Which of an item's tiles is its.
      out: [B, T, N, H].
      lse: [B, K, rows], by tiles.
      memory: Shared memory and barriers.
      sizes: Those of the arguments.
      tiling: Tile sizes.
    """

    me: jax.Array
    tile: jax.Array
    out: Any
    lse: Any
    memory: Memory
    sizes: Sizes
    tiling: Tiling

    def run(self, get_item, rounds):
        """Writes the output of as many items."""
        memory, first = self.memory, get_item(0)
        for slot in range(QUERY_SLOTS):
            plgpu.barrier_arrive(memory.query_empty.at[slot])
        for slot in range(self.tiling.slots):
            plgpu.barrier_arrive(memory.ring_empty.at[slot])
        plgpu.barrier_wait(memory.query_full.at[0])
        plgpu.barrier_wait(memory.ring_full.at[0])

        def multiply_keys(logits):
            key = self._block(0, self.sizes.edge).transpose((1, 0))
            plgpu.wgmma(logits, memory.query.at[0, self.me], key)
            return logits[...]

        logits = pl.run_scoped(multiply_keys, self._accumulator(self.sizes.edge))
        plgpu.barrier_arrive(memory.ring_empty.at[0])
        logits = self._mask(logits, first, 0)
        _, weights, *softmax = _mosaic_softmax.add(
            self.sizes.scale, logits, *_mosaic_softmax.begin(ROWS)
        )
        weights = weights.astype(memory.ring.dtype)

        def attend_item(i, carry):
            return self._attend_item(i, get_item(i), get_item(i + 1), rounds, carry)

        lax.fori_loop(0, rounds, attend_item, (jnp.int32(1), weights, *softmax))
        self._release_query(rounds - 1)

    def _attend_item(self, i, item, following, rounds, carry):
        """Writes an item's output and begins the following one."""
        slot, *softmax = carry
        query_slot = div_rem(i, QUERY_SLOTS)[1]
        attended = _mosaic.zeros((ROWS, self.sizes.width))
        add_to_softmax = functools.partial(_mosaic_softmax.add, self.sizes.scale)
        # Copying the last item's output takes a while.
        release_step = jnp.minimum(item.blocks, 2)

        def attend_step(step, carry, masked):
            key_slot, attended, weights, *softmax = carry
            value_slot = _mosaic.following(key_slot, self.tiling.slots)
            plgpu.barrier_wait(self.memory.ring_full.at[key_slot])

            def next_softmax(logits):
                plgpu.barrier_arrive(self.memory.ring_empty.at[key_slot])
                if masked:
                    logits = self._mask(logits, item, step)
                return add_to_softmax(logits, *softmax)

            def release():
                is_now = (step == release_step) & (i > 0)
                pl.when(is_now)(lambda: self._release_query(i - 1))

            slots = query_slot, key_slot, value_slot
            decay, *softmax, attended = self._multiply(
                slots, self.sizes.step, weights, attended, next_softmax, release
            )
            attended *= lax.broadcast_in_dim(decay, attended.shape, [0])
            return _mosaic.following(value_slot, self.tiling.slots), attended, *softmax

        carry = slot, attended, *softmax
        begin = 1
        if self.sizes.edge < self.sizes.step:
            # The weights of the first step are fewer.
            carry = attend_step(jnp.int32(1), carry, True)
            begin = 2
        masked = jnp.maximum(item.masked, begin)
        for first, end, is_masked in (
            (begin, masked, True),
            (masked, item.steps, False),
        ):
            step = functools.partial(attend_step, masked=is_masked)
            carry = lax.fori_loop(first, end, step, carry)
        slot, attended, weights, peak, total = carry
        is_now = (release_step == 0) & (i > 0)
        pl.when(is_now)(lambda: self._release_query(i - 1))

        # After the last item, logits are computed from what there is, for nobody.
        goes_on = i + 1 < rounds
        count = self.tiling.slots
        key_slot = jnp.where(goes_on, slot, jnp.where(slot == 0, count, slot) - 1)
        value_slot = jnp.where(goes_on, _mosaic.following(slot, count), slot)
        following_slot = jnp.where(goes_on, 1 - query_slot, query_slot)

        @pl.when(goes_on)
        def _():
            plgpu.barrier_wait(self.memory.query_full.at[following_slot])
            plgpu.barrier_wait(self.memory.ring_full.at[key_slot])

        def first_softmax(logits):
            logits = self._mask(logits, following, 0)
            return add_to_softmax(logits, *_mosaic_softmax.begin(ROWS))

        def release():
            @pl.when(goes_on)
            def _():
                plgpu.barrier_arrive(self.memory.ring_empty.at[key_slot])

        slots = following_slot, key_slot, value_slot
        _, *softmax, attended = self._multiply(
            slots, self.sizes.edge, weights, attended, first_softmax, release
        )
        self._write(item, query_slot, attended, peak, total)
        return _mosaic.following(value_slot, count), *softmax

    def _multiply(self, slots, keys, weights, attended, get_softmax, release):
        """Multiplies query and keys, and adds the product of weights and values.

        Returns what get_softmax returns for the former, and the latter. Calls release,
        which branches, between the products.
        """
        memory = self.memory
        query_slot, key_slot, value_slot = slots
        values = weights.shape[1]
        if memory.weights is not None:
            staged = memory.weights.at[self.me, :, pl.ds(0, values)]
            staged[...] = weights
            plgpu.commit_smem()
            weights = staged

        def multiply(logits, update):
            if memory.weights is None:
                update[...] = attended
            plgpu.barrier_wait(memory.ring_full.at[value_slot])
            query = memory.query.at[query_slot, self.me]
            plgpu.wgmma(logits, query, self._block(key_slot, keys).transpose((1, 0)))
            plgpu.wgmma(update, weights, self._block(value_slot, values))
            logits = plgpu.wgmma_accumulator_load(logits, wait_n=1)
            # Branches, which no instruction crosses. After the softmax it would keep
            # the wait for the second product there, which is slower.
            release()
            softmax = get_softmax(logits)
            result = update[...]
            plgpu.barrier_arrive(memory.ring_empty.at[value_slot])
            return softmax, result

        (decay, weights, peak, total), result = pl.run_scoped(
            multiply,
            self._accumulator(keys),
            self._accumulator(self.sizes.width),
        )
        if memory.weights is not None:
            result += attended
        # The registers of the weights that are being multiplied must not change before.
        weights, result = lax.optimization_barrier((weights, result))
        return decay, weights.astype(memory.ring.dtype), peak, total, result

    def _block(self, slot, keys):
        """Keys or values in a slot of the ring."""
        return self.memory.ring.at[slot, pl.ds(0, keys)]

    def _accumulator(self, columns):
        return plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32)

    def _mask(self, logits, item, step):
        """Replaces logits of keys that are not seen by minus infinity."""
        sizes = self.sizes
        tokens = sizes.tokens
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=COLUMN)
        if sizes.heads_first:
            token = lax.rem(row, jnp.full_like(row, tokens))
        else:
            token = divide(row, sizes.group)
        first_token = (item.tile * sizes.tiles + self.tile) * tokens
        position = token + (first_token + sizes.offset)
        column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=MATRIX)
        first_key = item.first_key(step, sizes.step)
        end = sizes.end_key(position) - first_key
        seen = column < lax.broadcast_in_dim(end, logits.shape, [0])
        if sizes.window is not None:
            begin = sizes.first_key(position) - first_key
            seen &= column >= lax.broadcast_in_dim(begin, logits.shape, [0])
        return jnp.where(seen, logits, -jnp.inf)

    def _write(self, item, slot, attended, peak, total):
        """Writes an item's results, the output from where its queries were."""
        total = jnp.sum(total, axis=1)
        # Nothing was seen: 0 of 1, and minus infinity.
        seen = total > 0
        divisor = jnp.where(seen, total, jnp.ones_like(total))
        attended *= lax.broadcast_in_dim(1 / divisor, attended.shape, [0])
        rows_of_tile = self.memory.query.at[slot, self.me]
        rows_of_tile[...] = attended.astype(self.out.dtype)
        plgpu.commit_smem()
        for part, rows, exists in stretches(self.out, item, self.tile, self.sizes):

            def copy(part=part, rows=rows):
                plgpu.copy_smem_to_gmem(rows_of_tile.at[rows], part)

            copy() if exists is True else pl.when(exists)(copy)
        lse = jnp.where(seen, peak / LOG2_E + jnp.log(divisor), -jnp.inf)
        row = (item.tile * self.sizes.tiles + self.tile) * ROWS
        _mosaic.store(self.lse.at[item.batch, item.kv_head, pl.ds(row, ROWS)], lse)

    def _release_query(self, i):
        """Lets the producer overwrite what `_write` copies from."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.memory.query_empty.at[div_rem(i, QUERY_SLOTS)[1]])
