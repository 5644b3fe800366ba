"""What a consumer of the kernel of key gradients does.

See `jattn.pallas.selective.mosaic_key_gradient`.
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
from jattn.pallas._mosaic import MATRIX
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.flash.mosaic_backward import KEYS
from jattn.pallas.selective import mosaic_fragments as fragments
from jattn.pallas.selective.mosaic_key_items import Memory, Sizes, Unit

# How a consumer's threads share a number per key, and one per row.
BY_KEY = MATRIX.reduce(1)
BY_ROW = MATRIX.reduce(0)

# Columns that sums over tokens are kept in until the end of a strip, so that threads
# add up theirs without each other.
SUMMED = fragments.COLUMNS


@dataclasses.dataclass(frozen=True)
class Consumer:
    """Adds up the gradients of KEYS keys and values.

    Attributes:
      me: Which of the consumers.
      get_unit: Returns the thread block's work.
      memory: Shared memory and barriers.
      sizes: Those of the arguments.
    """

    me: jax.Array
    get_unit: Any
    memory: Memory
    sizes: Sizes

    def run(self, key_target, value_target, logits_target, sums_target):
        """Writes the gradients of key, value and logits, and sums of these, there."""
        gradients = self._add_up(logits_target, sums_target)
        unit = self.get_unit()
        keys = pl.ds(unit.tile_key + self.me * KEYS, KEYS)
        for i, (key_gradient, value_gradient) in enumerate(gradients):
            part = unit.part * len(gradients) + i
            for target, gradient in (
                (key_target, key_gradient * self.sizes.scale),
                (value_target, value_gradient),
            ):
                place = target.at[unit.slice, unit.batch, keys, part]
                _mosaic.store(place, gradient.astype(target.dtype))

    def _add_up(self, logits_target, sums_target):
        """Gradients of key, but for the factor scale, and value, for each kv head."""
        memory, sizes = self.memory, self.sizes
        slots, ahead = sizes.tiling.slots, sizes.tiling.ahead
        # Ahead, a slot is emptied by the step after its own, and the last one is
        # declared empty by the first step.
        for slot in range(slots - ahead):
            plgpu.barrier_arrive(memory.empty.at[slot])
        unit = self.get_unit()
        first_key = unit.first_key + self.me * KEYS
        # The first token that sees the first key, and that sees all of them.
        tokens = (jnp.maximum(first_key + x - sizes.offset, 0) for x in (0, KEYS - 1))
        unseen, whole = tokens
        unseen = _mosaic.div_rem(unseen, sizes.tokens)[0]
        unseen = jnp.clip(unseen, unit.begin, unit.end)
        whole = jnp.clip(_mosaic.ceil_div(whole, sizes.tokens), unseen, unit.end)

        def preceding(slot):
            return jnp.where(slot == 0, slots, slot) - 1

        def release(slot):
            emptied = preceding(slot) if ahead else slot
            plgpu.barrier_arrive(memory.empty.at[emptied])

        def skip(_, carry):
            slot, *others = carry
            plgpu.barrier_wait(memory.full.at[slot])
            release(slot)
            return _mosaic.following(slot, slots), *others

        def step(i, carry, edge):
            slot, gradients, pending, sums = carry
            plgpu.barrier_wait(memory.full.at[slot])
            seen = self._seen(first_key, i) if edge else None
            if ahead:
                # What is pending at first is 0, and multiplied by what there is.
                before = jnp.where(i == unseen, slot, preceding(slot))
                gradients, pending, gradient = self._step_ahead(
                    slot, before, gradients, pending, seen, lambda: release(slot)
                )
            else:
                gradients, gradient = self._step(slot, gradients, seen)
                release(slot)
            self._keep(unit, i, gradient, logits_target)
            sums += _folded([gradient], SUMMED)
            return _mosaic.following(slot, slots), gradients, pending, sums

        edge, plain = (functools.partial(step, edge=x) for x in (True, False))

        def strip(i, carry):
            begin = i * sizes.strip_tiles
            end = jnp.minimum(begin + sizes.strip_tiles, unit.end)
            carry = *carry, _mosaic.zeros((KEYS, SUMMED))
            for until, body in ((unseen, skip), (whole, edge), (end, plain)):
                until = jnp.clip(until, begin, end)
                carry = lax.fori_loop(begin, until, body, carry)
                begin = until
            *carry, sums = carry
            keys = pl.ds(unit.tile_key + self.me * KEYS, KEYS)
            target = sums_target.at[unit.part, unit.batch, i, keys]
            _mosaic.store(target, jnp.sum(sums, axis=1))
            return tuple(carry)

        def finish(_, carry):
            slot, gradients, pending = carry
            return slot, self._add(preceding(slot), gradients, pending), pending

        zeros = _mosaic.zeros((KEYS, sizes.width))
        gradients = ((zeros, zeros),) * sizes.tiling.kv_heads
        pending = ()
        if ahead:
            pending = (_mosaic.zeros((KEYS, sizes.rows)).astype(self.dtype),) * 2
        carry = jnp.int32(0), gradients, pending
        plgpu.barrier_wait(memory.keys_full)
        begin = _mosaic.div_rem(unit.begin, sizes.strip_tiles)[0]
        end = _mosaic.ceil_div(unit.end, sizes.strip_tiles)
        carry = lax.fori_loop(begin, end, strip, carry)
        if ahead:
            some = jnp.minimum(unit.end - unseen, 1)
            carry = lax.fori_loop(np.int32(0), some, finish, carry)
            release(carry[0])
        return carry[1]

    @property
    def dtype(self):
        """That of keys and queries."""
        return self.memory.query.dtype

    def _seen(self, first_key, tile):
        """Which rows of a tile see which key."""
        tokens = self.sizes.tokens
        shape = KEYS, self.sizes.rows
        row = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
        token = (row & (tokens - 1)) + (tile * tokens + self.sizes.offset)
        key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
        return key + first_key <= token

    def _keep(self, unit: Unit, tile, gradient, target):
        """Writes the gradient of logits of a tile, summed over the members."""
        high = KEYS // fragments.ROWS
        wide = self.sizes.tokens // fragments.COLUMNS
        first = _mosaic.div_rem(unit.tile_key, fragments.ROWS)[0] + self.me * high
        rows, columns = pl.ds(first, high), pl.ds(tile * wide, wide)
        target = target.at[unit.part, unit.batch, rows, columns]
        fragments.store(target, gradient.astype(target.dtype))

    def _step(self, slot, gradients, seen):
        """Adds what a tile of rows contributes, of which these are seen, or all.

        Also returns the gradient of logits, summed over the members.
        """
        memory, sizes = self.memory, self.sizes
        kv_heads = range(sizes.tiling.kv_heads)
        bias = self._bias(slot)
        if memory.weights is not None:
            sums, of_logits = [], []
            for i, pair in enumerate(gradients):
                weights, gradient = self._interpreted(slot, i, seen)
                of_logits.append(gradient)
                sums.append(self._interpreted_sums(slot, i, pair, weights, gradient))
            return tuple(sums), _folded(of_logits, sizes.tokens)

        def multiply(references):
            gradients, logits, gradient, total = references
            ahead = 2 * len(kv_heads) - 1
            for i in kv_heads:
                plgpu.wgmma(logits[i], self._key(i), self._query(slot, i, True))
            for i in kv_heads:
                plgpu.wgmma(gradient[i], self._value(i), self._out(slot, i, True))
            weights, of_logits = [], []
            for i in kv_heads:
                x = plgpu.wgmma_accumulator_load(logits[i], wait_n=ahead)
                weights.append(self._weigh(slot, i, x, seen))
                x = weights[i].astype(self.dtype)
                plgpu.wgmma(gradients[i][1], x, self._out(slot, i))
            for i in kv_heads:
                x = plgpu.wgmma_accumulator_load(gradient[i], wait_n=ahead)
                of_logits.append(weights[i] * (x + self._per_row(slot, i, 1)))
                x = of_logits[i].astype(self.dtype)
                plgpu.wgmma(gradients[i][0], x, self._query(slot, i))
            total[...] = _folded(of_logits, sizes.tokens)

        accumulators = (
            gradients,
            [bias for _ in kv_heads],
            [_mosaic.zeros((KEYS, sizes.rows)) for _ in kv_heads],
        )
        accumulators = jax.tree.map(plgpu.WGMMAAccumulatorRef.init, accumulators)
        total = _mosaic.zeros((KEYS, sizes.tokens))
        gradients, _, _, total = pl.run_state(multiply)((*accumulators, total))
        return gradients, total

    def _step_ahead(self, slot, before, gradients, pending, seen, release):
        """Begins what a tile of rows contributes, and adds what is pending.

        That are the weights and gradients of logits of the last kv head in the slot
        before, which is then released. Those of this slot are returned with the sums,
        and the gradient of logits, summed over the members.
        """
        gradients, of_logits = list(gradients), []
        for i in range(len(gradients)):
            source = slot if i else before
            pair, weights, gradient = self._multiply(
                slot, i, source, gradients[i - 1], pending, seen
            )
            gradients[i - 1] = pair
            pending = weights.astype(self.dtype), gradient.astype(self.dtype)
            of_logits.append(gradient)
            if i == 0:
                release()
        return tuple(gradients), pending, _folded(of_logits, self.sizes.tokens)

    def _multiply(self, slot, i, before, pair, pending, seen):
        """The weights and gradient of the logits of a tile of rows in a kv head.

        Those of the kv head before it, in the slot `before`, are meanwhile multiplied
        and added to the pair of gradients, which is returned first.
        """
        last = (i or self.sizes.tiling.kv_heads) - 1
        if self.memory.weights is not None:
            pair = self._interpreted_sums(before, last, pair, *pending)
            return pair, *self._interpreted(slot, i, seen)

        def multiply(logits, gradient, *sums):
            logits[...] = self._bias(slot)
            for target, x in zip(sums, pair, strict=True):
                target[...] = x
            plgpu.wgmma(logits, self._key(i), self._query(slot, i, True))
            gradient[...] = self._per_row(slot, i, 1)
            plgpu.wgmma(gradient, self._value(i), self._out(slot, i, True))
            self._wgmma_pending(sums, before, last, pending)
            x = plgpu.wgmma_accumulator_load(logits, wait_n=3)
            weights = self._weigh(slot, i, x, seen)
            x = weights * plgpu.wgmma_accumulator_load(gradient, wait_n=2)
            return weights, x, *(target[...] for target in sums)

        square = [plgpu.WGMMAAccumulatorRef((KEYS, self.sizes.rows), jnp.float32)] * 2
        wide = [plgpu.WGMMAAccumulatorRef(x.shape, jnp.float32) for x in pair]
        results = pl.run_scoped(multiply, *square, *wide)
        # The registers of what is being multiplied must not change before.
        weights, gradient, *pair = lax.optimization_barrier(results)
        return tuple(pair), weights, gradient

    def _add(self, slot, gradients, pending):
        """Adds what is pending, of a slot."""
        last, pair = len(gradients) - 1, gradients[-1]
        if self.memory.weights is not None:
            pair = self._interpreted_sums(slot, last, pair, *pending)
        else:
            accumulators = tuple(plgpu.WGMMAAccumulatorRef.init(x) for x in pair)
            pair = pl.run_state(
                lambda sums: self._wgmma_pending(sums, slot, last, pending)
            )(accumulators)
        return *gradients[:-1], tuple(pair)

    def _wgmma_pending(self, sums, slot, i, pending):
        """Adds products of weights and gradients of logits of a slot in a kv head."""
        weights, gradient = pending
        plgpu.wgmma(sums[1], weights, self._out(slot, i))
        plgpu.wgmma(sums[0], gradient, self._query(slot, i))

    def _interpreted(self, slot, i, seen):
        """Weights and gradient of the logits of a slot in a kv head."""
        logits = _mosaic.product(self._key(i), self._query(slot, i, True))
        weights = self._weigh(slot, i, logits + self._bias(slot), seen)
        gradient = _mosaic.product(self._value(i), self._out(slot, i, True))
        return weights, weights * (gradient + self._per_row(slot, i, 1))

    def _interpreted_sums(self, slot, i, pair, weights, gradient):
        """Adds their products to the gradients of key and value."""
        staged = self.memory.weights.at[self.me]
        sums = []
        for total, x, rows in (
            (pair[1], weights, self._out(slot, i)),
            (pair[0], gradient, self._query(slot, i)),
        ):
            staged[...] = x.astype(staged.dtype)
            plgpu.commit_smem()
            sums.append(total + _mosaic.product(staged, rows))
        return sums[1], sums[0]

    # Made where they are used: a constant index must not enter run_state from outside.
    def _key(self, i):
        return self.memory.key.at[i, self.me]

    def _value(self, i):
        return self.memory.value.at[i, self.me]

    def _query(self, slot, i, transposed=False):
        query = self.memory.query.at[slot, i]
        return query.transpose((1, 0)) if transposed else query

    def _out(self, slot, i, transposed=False):
        out_gradient = self.memory.out_gradient.at[slot, i]
        return out_gradient.transpose((1, 0)) if transposed else out_gradient

    def _bias(self, slot):
        high = KEYS // fragments.ROWS
        first = pl.multiple_of(self.me * high, high)
        bias = self.memory.bias.at[slot, pl.ds(first, high)]
        return fragments.load(bias, self.sizes.rows)

    def _weigh(self, slot, i, logits, seen):
        """P, of which these are seen, or all."""
        if seen is not None:
            logits = jnp.where(seen, logits, -jnp.inf)
        shift = self._per_row(slot, i, 0)
        return jnp.exp2(logits * (self.sizes.scale * LOG2_E) - shift)

    def _per_row(self, slot, kv_head, which):
        """One of the two numbers of each row in a kv head, for each key."""
        x = self.memory.statistics.at[slot, kv_head, which]
        x = plgpu.load(x, layout=BY_ROW)
        return lax.broadcast_in_dim(x, (KEYS, self.sizes.rows), [1])


def _folded(tiles, columns):
    """The sum of tiles, cut into pieces of so many columns: [KEYS, columns]."""
    pieces = [
        lax.slice(x, (0, i), (KEYS, i + columns))
        for x in tiles
        for i in range(0, x.shape[1], columns)
    ]
    return functools.reduce(jnp.add, pieces)
