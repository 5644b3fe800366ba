"""The queries' gradient of attention over strided windows, in Mosaic GPU for Hopper.

It goes by tiles of rows, and meets the keys that they see a step at a time:

    dQ += dS K

A thread block stays on its multiprocessor and takes one item of work, a tile of rows
for each of its two consumers, after the other, those with the most keys first. Its
producer loads the rows of an item while the consumers are busy with the one before:
they keep Q and dO in registers, like dQ.

Letters as in `jattn.pallas.flash.mosaic_backward`.
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
from jattn.pallas.flash import mosaic_backward as shared
from jattn.pallas.flash.mosaic_backward import ALIGNMENT, CONSUMERS, KEYS, ROWS

# How a consumer's threads share a number per row.
BY_ROW = MATRIX.reduce(1)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      slots: Steps of keys and values in flight.
      programs: Thread blocks.
    """

    slots: int
    programs: int


def query_gradient(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    statistics: jax.Array,
    out_gradient: jax.Array,
    *,
    sizes: shared.Sizes,
    tiling: Tiling,
) -> jax.Array:
    """The gradient of queries.

    In the interpreter Q, dO and dS are not operands in registers, which it does not
    know, but in shared memory, and products are not added to; all else is the same.

    Args:
      query: [B, T, N, H], bf16 or fp16, where H is 64 or 128.
      key: [B, M, K, H].
      value: [B, M, K, H].
      statistics: Those of `mosaic_backward.statistics`.
      out_gradient: [B, T, N, H].
      sizes: Those of the arguments.
      tiling: Tile sizes.

    Returns:
      [B, T, N, H].
    """
    items = -(-sizes.queries * sizes.group // (CONSUMERS * ROWS)) * sizes.kv_rows
    operands = (
        *(shared.rows(x, sizes) for x in (query, out_gradient)),
        *(_readable(x, sizes) for x in (key, value)),
        statistics,
    )
    [gradient] = _mosaic.call(
        functools.partial(_kernel, sizes=sizes, items=items),
        *operands,
        outputs=[jax.ShapeDtypeStruct(operands[0].shape, query.dtype)],
        memory=_memory_types(tiling, sizes, query.dtype),
        grid={"program": min(tiling.programs, items)},
        consumers=CONSUMERS,
        name="flash_query_gradient",
    )
    if not sizes.direct:
        batch, kv_heads, _, width = gradient.shape
        gradient = gradient[:, :, : sizes.queries * sizes.group]
        shape = batch, kv_heads, sizes.queries, sizes.group, width
        gradient = gradient.reshape(shape).swapaxes(1, 2)
    return gradient.reshape(query.shape)


def _readable(x: jax.Array, sizes: shared.Sizes) -> jax.Array:
    """Keys [B, M, K, H] with zeros where nobody sees them, and after them."""
    hidden = 0
    if sizes.window is not None:
        hidden = (sizes.offset - sizes.window) // sizes.stride + 1
        hidden = min(max(hidden, 0), sizes.keys)
    x = _mosaic.padded(x[:, hidden:], 1, -(-sizes.keys // KEYS) * KEYS + KEYS - hidden)
    return jnp.pad(x, [(0, 0), (hidden, 0), (0, 0), (0, 0)])


@dataclasses.dataclass(frozen=True)
class _Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      query: [CONSUMERS, ROWS, H].
      out_gradient: [CONSUMERS, ROWS, H].
      statistics: fp32 [CONSUMERS, 2, ROWS].
      key: [slots, KEYS, H].
      value: [slots, KEYS, H].
      result: [CONSUMERS, ROWS, H].
      weights: [CONSUMERS, ROWS, KEYS], dS in the interpreter, else None.
      rows_full: The rows have been loaded.
      rows_empty: The consumers have them in registers.
      full: Of each slot.
      empty: Of each slot.
    """

    query: Any
    out_gradient: Any
    statistics: Any
    key: Any
    value: Any
    result: Any
    weights: Any
    rows_full: Any
    rows_empty: Any
    full: Any
    empty: Any


def _memory_types(tiling: Tiling, sizes: shared.Sizes, dtype: Any) -> dict[str, Any]:
    """The types of _Memory's attributes."""
    matrix = functools.partial(_mosaic.matrix, dtype=dtype)
    rows = matrix(CONSUMERS, ROWS, sizes.width)
    keys = matrix(tiling.slots, KEYS, sizes.width)
    return {
        "query": rows,
        "out_gradient": rows,
        "statistics": plgpu.SMEM((CONSUMERS, 2, ROWS), jnp.float32),
        "key": keys,
        "value": keys,
        "result": rows,
        "weights": matrix(CONSUMERS, ROWS, KEYS) if _mosaic.interpretation() else None,
        "rows_full": _mosaic.barriers(CONSUMERS, 2 * sizes.parts + 1),
        "rows_empty": _mosaic.barriers(CONSUMERS, 1),
        "full": _mosaic.barriers(tiling.slots, 2),
        "empty": _mosaic.barriers(tiling.slots, CONSUMERS),
    }


@dataclasses.dataclass(frozen=True)
class _Item:
    """An item of work: adjacent tiles of rows of one kv head.

    Attributes:
      batch: Row of the batch.
      kv_head: Of the keys.
      first_row: Of the first consumer's tile.
      begin: First key of the first step.
      steps: Of all keys.
      whole: Where steps begin that need no mask.
      whole_end: Where they end.
    """

    batch: jax.Array
    kv_head: jax.Array
    first_row: jax.Array
    begin: jax.Array
    steps: jax.Array
    whole: jax.Array
    whole_end: jax.Array


def _item(index, sizes: shared.Sizes, items: int) -> _Item:
    """The item of that index; late rows, which see most keys, come first."""
    # Found out where it is needed, rather than kept in registers all along.
    index = lax.optimization_barrier(index)
    tile, kv_row = _mosaic.div_rem(index, sizes.kv_rows)
    batch, kv_head = _mosaic.div_rem(kv_row, sizes.kv_heads)
    first_row = (items // sizes.kv_rows - 1 - tile) * (CONSUMERS * ROWS)
    rows = sizes.queries * sizes.group
    first = _mosaic.div_rem(first_row, sizes.group)[0]
    last = jnp.minimum(first_row + CONSUMERS * ROWS, rows) - 1
    last = _mosaic.div_rem(last, sizes.group)[0]
    (begin, whole_end), (whole, end) = map(sizes.keys_of_token, (first, last))
    begin = _mosaic.div_rem(begin, ALIGNMENT)[0] * ALIGNMENT
    steps = jnp.maximum(_mosaic.ceil_div(end - begin, KEYS), 0)
    whole = jnp.minimum(_mosaic.ceil_div(whole - begin, KEYS), steps)
    whole_end = _mosaic.div_rem(jnp.maximum(whole_end - begin, 0), KEYS)[0]
    return _Item(
        batch=batch,
        kv_head=kv_head,
        first_row=first_row,
        begin=begin,
        steps=steps,
        whole=whole,
        whole_end=jnp.clip(whole_end, whole, steps),
    )


def _kernel(*refs, sizes: shared.Sizes, items: int, **memory):
    """A thread block: items program, program + programs, and so on."""
    query, out_gradient, key, value, statistics, gradient = refs
    memory = _Memory(**memory)
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    programs = lax.axis_size("program")
    rounds = _mosaic.ceil_div(items - program, programs)

    def item(i):
        return _item(program + i * programs, sizes, items)

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        producer = _Producer(query, out_gradient, key, value, statistics, memory, sizes)
        lax.fori_loop(
            0, rounds, lambda i, slot: producer.load(item(i), slot), jnp.int32(0)
        )
        producer.finish()

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        consumer = _Consumer(warpgroup, gradient, memory, sizes)
        consumer.start()
        lax.fori_loop(0, rounds, functools.partial(consumer.attend, item), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Loads everything in the order in which the consumers need it."""

    query: Any
    out_gradient: Any
    key: Any
    value: Any
    statistics: Any
    memory: _Memory
    sizes: shared.Sizes

    def load(self, item: _Item, slot):
        """Loads an item's rows and keys, and returns the next slot."""
        memory = self.memory
        for consumer in range(CONSUMERS):
            full = memory.rows_full.at[consumer]
            plgpu.barrier_wait(memory.rows_empty.at[consumer])

            def load_part(index, rows, _, consumer=consumer, full=full):
                for source, target in (
                    (self.query, memory.query),
                    (self.out_gradient, memory.out_gradient),
                ):
                    tile = target.at[consumer, rows]
                    plgpu.copy_gmem_to_smem(source.at[index], tile, full)

            row = item.first_row + consumer * ROWS
            shared.for_parts(item.batch, item.kv_head, row, self.sizes, load_part)
            rows = pl.ds(item.first_row + consumer * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(
                self.statistics.at[item.batch, item.kv_head, :, rows],
                memory.statistics.at[consumer],
                full,
            )

        def load_step(step, slot):
            first = pl.multiple_of(item.begin + step * KEYS, ALIGNMENT)
            plgpu.barrier_wait(memory.empty.at[slot])
            for source, target in (
                (self.key, memory.key),
                (self.value, memory.value),
            ):
                plgpu.copy_gmem_to_smem(
                    source.at[item.batch, pl.ds(first, KEYS), item.kv_head],
                    target.at[slot],
                    memory.full.at[slot],
                )
            return _mosaic.following(slot, memory.key.shape[0])

        return lax.fori_loop(0, item.steps, load_step, slot)

    def finish(self):
        """Waits until the consumers have emptied everything."""
        for consumer in range(CONSUMERS):
            plgpu.barrier_wait(self.memory.rows_empty.at[consumer])
        for slot in range(self.memory.key.shape[0]):
            plgpu.barrier_wait(self.memory.empty.at[slot])


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """Adds up the gradient of its tiles of rows.

    Attributes:
      me: Which of the consumers.
      target: Where the gradient goes.
      memory: Shared memory and barriers.
      sizes: Those of the arguments.
    """

    me: jax.Array
    target: Any
    memory: _Memory
    sizes: shared.Sizes

    def start(self):
        """Declares all memory empty."""
        plgpu.barrier_arrive(self.memory.rows_empty.at[self.me])
        for slot in range(self.memory.key.shape[0]):
            plgpu.barrier_arrive(self.memory.empty.at[slot])

    def attend(self, get_item, i, slot):
        """Writes the gradient of the i-th item's rows, and returns the next slot."""
        memory, sizes, me = self.memory, self.sizes, self.me
        item = get_item(i)
        plgpu.barrier_wait(memory.rows_full.at[me])
        rows = [
            plgpu.load(x.at[me], layout=MATRIX)
            for x in (memory.query, memory.out_gradient)
        ]
        shift, delta = (
            plgpu.load(memory.statistics.at[me, i], layout=BY_ROW) for i in range(2)
        )
        if memory.weights is None:
            # The next copy to these must not overtake the loads from them.
            plgpu.commit_smem()
            plgpu.barrier_arrive(memory.rows_empty.at[me])

        def attend_step(step, carry, edges):
            slot, total = carry
            plgpu.barrier_wait(memory.full.at[slot])
            seen = self._seen(item, step, edges)
            total = self._attend_step(slot, rows, shift, delta, total, seen)
            plgpu.barrier_arrive(memory.empty.at[slot])
            return _mosaic.following(slot, memory.key.shape[0]), total

        carry = slot, _mosaic.zeros((ROWS, sizes.width))
        begin = np.int32(0)
        stretches = [("", item.whole_end), ("end", item.steps)]
        if sizes.window is not None:
            stretches = [("both", item.whole), stretches[0], ("both", item.steps)]
        for edges, end in stretches:
            step = functools.partial(attend_step, edges=edges)
            carry = lax.fori_loop(begin, end, step, carry)
            begin = end
        slot, total = carry
        if memory.weights is not None:
            plgpu.barrier_arrive(memory.rows_empty.at[me])

        tile = memory.result.at[me]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tile[...] = (total * sizes.scale).astype(tile.dtype)
        plgpu.commit_smem()

        def store_part(index, rows, exists):
            @pl.when(exists)
            def _():
                plgpu.copy_smem_to_gmem(tile.at[rows], self.target.at[index])

        item = get_item(i)
        row = item.first_row + me * ROWS
        shared.for_parts(item.batch, item.kv_head, row, sizes, store_part)
        return slot

    def _seen(self, item, step, edges):
        """Which keys of a step each row sees, at these edges; None for all."""
        if not edges:
            return None
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW)
        row += item.first_row + self.me * ROWS
        token = lax.div(row, jnp.full_like(row, self.sizes.group))
        column = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=MATRIX)
        first_key = item.begin + step * KEYS
        begin, end = self.sizes.keys_of_token(token)
        seen = column < lax.broadcast_in_dim(end - first_key, column.shape, [0])
        if edges == "both":
            begin = lax.broadcast_in_dim(begin - first_key, column.shape, [0])
            seen &= column >= begin
        return seen

    def _attend_step(self, slot, rows, shift, delta, total, seen):
        """Adds what a step contributes."""
        memory = self.memory
        key, value = memory.key.at[slot], memory.value.at[slot]

        def weigh(logits):
            if seen is not None:
                logits = jnp.where(seen, logits, -jnp.inf)
            base = lax.broadcast_in_dim(shift, logits.shape, [0])
            return jnp.exp2(logits * (self.sizes.scale * LOG2_E) - base)

        def differentiate(weights, gradient):
            base = lax.broadcast_in_dim(delta, gradient.shape, [0])
            return (weights * (gradient - base)).astype(memory.key.dtype)

        if memory.weights is not None:
            me = self.me
            weights = weigh(_mosaic.product(memory.query.at[me], key.transpose((1, 0))))
            gradient = _mosaic.product(
                memory.out_gradient.at[me], value.transpose((1, 0))
            )
            memory.weights[me] = differentiate(weights, gradient)
            plgpu.commit_smem()
            return total + _mosaic.product(memory.weights.at[me], key)

        def multiply(references):
            total, logits, gradient = references
            plgpu.wgmma(logits, rows[0], key.transpose((1, 0)))
            plgpu.wgmma(gradient, rows[1], value.transpose((1, 0)))
            weights = weigh(plgpu.wgmma_accumulator_load(logits, wait_n=1))
            gradient = plgpu.wgmma_accumulator_load(gradient, wait_n=0)
            plgpu.wgmma(total, differentiate(weights, gradient), key)

        square = _mosaic.zeros((ROWS, KEYS))
        total, _, _ = pl.run_state(multiply)(
            tuple(plgpu.WGMMAAccumulatorRef.init(x) for x in (total, square, square))
        )
        return total
