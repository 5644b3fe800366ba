"""2-simplicial attention, forward, in Pallas' Mosaic GPU backend for Hopper.

For one position, one kv head and one key j of the set with the smaller window, what is
left is plain attention by the expanded queries ``q ∘ k_j`` to the set with the larger
window, whose output is multiplied by v_j. The softmax goes over all pairs, so one
maximum m and one sum l per head serve every j. Rows of a matrix tile are ROWS query
heads that share a kv head (see mosaic_items); columns are keys of the larger window, a
step at a time:

    S = (q ∘ k_j) K'^T    P = exp(S - m)    O = exp(m_before - m) O + v_j ∘ (P V')

Where fewer heads share a kv head, the rows are those of several positions. j is then
counted back from each row's own position, so that every row has another k_j and v_j,
and the windows of the rows begin and end at different keys.

A thread block stays on its multiprocessor and takes one item of work, a tile of rows,
after the other. Of its three warpgroups one is the producer: it loads
blocks of K' and V', rows of k and v, and queries into rings of shared memory. The
other two are consumers, which take every second j each and keep m, l and O to
themselves in registers; after the last j they hand each other one half of O, and each
writes the other half of the output. A step of K' and V' stays where it is until all j
have met it, so that a byte from the L2 cache feeds thousands of operations. The
consumers take turns at the tensor cores: when one has issued a product, the other one
may, and they compute their exponentials in each other's shade.

Letters: B batch, T queries, F and M keys of the set with the smaller and the larger
window, N query heads, K kv heads, H width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jattn.pallas import _device, _mosaic, tuning
from jattn.pallas.simplicial import ROWS
from jattn.pallas.simplicial import mosaic_items as items
from jattn.pallas.simplicial.mosaic_consumer import Consumer
from jattn.pallas.simplicial.mosaic_items import ALIGNMENT
from jattn.pallas.simplicial.mosaic_memory import (
    CONSUMERS,
    FEW_SLOTS,
    Memory,
    Tiling,
    memory_types,
)


def forward(
    query: jax.Array,
    few_key: jax.Array,
    few_value: jax.Array,
    many_key: jax.Array,
    many_value: jax.Array,
    visible: jax.Array | None,
    *,
    few_window: int,
    many_window: int,
    scale: float,
    out_dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """2-simplicial attention, not differentiable.

    In the interpreter P and the expanded queries are not operands in registers, which
    it does not know, but pass through shared memory; all else is the same.

    Args:
      query: [B, T, N, H], bf16 or fp16, where H is 64 or 128 and N / K is a multiple
        of ROWS or divides 8.
      few_key: [B, F, K, H], the keys with the smaller window, in the queries' dtype or
        in fp32 if N / K is at least ROWS; the last T of them stand at the positions
        of the queries.
      few_value: [B, F, K, H], as few_key.
      many_key: [B, M, K, H], as few_key.
      many_value: [B, M, K, H].
      visible: int32 [B, T], how many keys before and at its own position a query may
        see at most, or None for no such limit.
      few_window: Keys that a query sees of the one set, itself included.
      many_window: Of the other.
      scale: Factor of the logits, positive.
      out_dtype: That of the output; the one of many_value if None.

    Returns:
      Output [B, T, N, H] and log-sum-exp [B, T, N] in fp32 (natural log).
    """
    batch, queries, heads, width = query.shape
    kv_heads = few_key.shape[2]
    sizes = items.Sizes(
        batch=batch,
        queries=queries,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        width=width,
        few=few_key.shape[1],
        many=many_key.shape[1],
        few_window=min(few_window, few_key.shape[1]),
        many_window=min(many_window, many_key.shape[1]),
        scale=scale,
    )
    shape = {
        "positions": sizes.positions,
        "H": width,
        "few_window": few_window,
        "many_window": many_window,
        "dtype": query.dtype.name,
    }
    tiling = tuning.choose(
        "simplicial_forward_mosaic",
        shape,
        _tiling(width, many_window, sizes.positions),
    )
    # Where each row of a tile has its own value, threads read from eight rows at once:
    # 16 bytes more than 128 or 256 put these into different banks.
    pitch = width + (8 if sizes.positions > 1 else 0)
    limits = ()
    if visible is not None:
        visible = visible.astype(jnp.int32)
        few_key, few_value = (
            items.blanked(x, visible, sizes) for x in (few_key, few_value)
        )
        limits = items.limits(visible, sizes)
    operands = (
        items.in_rows(query, sizes),
        items.repeated(few_key, sizes, tiling.few, pitch),
        items.repeated(few_value, sizes, tiling.few, pitch),
        *(items.shifted(x, sizes, tiling.step) for x in (many_key, many_value)),
        *limits,
    )
    rows = operands[0].shape
    out, lse = _mosaic.call(
        functools.partial(_kernel, sizes=sizes, tiling=tiling),
        *operands,
        outputs=[
            jax.ShapeDtypeStruct(rows, out_dtype or many_value.dtype),
            jax.ShapeDtypeStruct(rows[:3], jnp.float32),
        ],
        memory=memory_types(
            tiling,
            sizes,
            query.dtype,
            operands[1].dtype,
            operands[2].dtype,
            pitch,
        ),
        grid={"program": min(tiling.programs, sizes.items)},
        consumers=CONSUMERS,
        name="two_simplicial_forward",
    )
    return items.from_rows(out, sizes), items.from_rows(lse, sizes)


def _tiling(width: int, many_window: int, positions: int) -> Tiling:
    """Long steps, unless shorter ones leave fewer keys beyond the window."""
    if positions > 1:
        return Tiling(
            columns=192,
            blocks=1,
            slots=4 if width <= 64 else 2,
            few={64: 8, 32: 4}.get(positions, 2),
            programs=_device.multiprocessors(),
        )
    columns = 128 if many_window > 64 else 64
    blocks = -(-many_window // columns)
    halves = -(-blocks // 2)
    return Tiling(
        columns=columns,
        blocks=2 if 2 * halves <= 1.1 * blocks else 1,
        slots=8 if width <= 64 else 4,
        few=16,
        programs=_device.multiprocessors(),
    )


def _kernel(*refs, sizes: items.Sizes, tiling: Tiling, **memory):
    """A thread block: items program, program + programs, and so on."""
    query, few_key, few_value, many_key, many_value, *limits, out, lse = refs
    memory = Memory(**memory)
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    programs = min(tiling.programs, sizes.items)
    rounds = _mosaic.ceil_div(sizes.items - program, programs)

    def for_items(function, carry):
        def call(i, carry):
            item = items.item(program + i * programs, sizes, tiling.step, limits)
            return function(item, carry)

        lax.fori_loop(0, rounds, call, carry)

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        producer = _Producer(
            query, few_key, few_value, many_key, many_value, memory, sizes, tiling
        )
        for_items(producer.load_item, (jnp.int32(0), jnp.int32(0)))
        producer.finish()

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        visible = limits[0] if limits else None
        consumer = Consumer(warpgroup, out, lse, visible, memory, sizes, tiling)
        consumer.start()
        for_items(consumer.attend_item, (jnp.int32(0), jnp.int32(0)))
        consumer.finish()


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Loads everything in the order in which the consumers need it."""

    query: Any
    few_key: Any
    few_value: Any
    many_key: Any
    many_value: Any
    memory: Memory
    sizes: items.Sizes
    tiling: Tiling

    def load_item(self, item: items.Item, slots):
        """Loads an item's queries, keys and values into the slots from these on."""
        memory, tiling = self.memory, self.tiling
        plgpu.barrier_wait(memory.query_empty)
        plgpu.copy_gmem_to_smem(
            self.query.at[item.batch, item.kv_head, pl.ds(item.row, ROWS)],
            memory.query,
            memory.query_full,
        )
        chunks = _mosaic.ceil_div(item.few_reach, tiling.few)

        def load_step(turn, slots):
            slot, few_slot = slots
            few_slot = self._load_few(item, 0, few_slot)
            index = item.step(turn) if self.sizes.positions > 1 else turn
            first = items.many_first(item, index, tiling.step)
            shift = _mosaic.div_rem(first, ALIGNMENT)[1]
            for array in (self.many_key, self.many_value):
                for i in range(tiling.blocks):
                    row = pl.multiple_of(first - shift + i * tiling.columns, ALIGNMENT)
                    rows = pl.ds(row, tiling.columns)
                    plgpu.barrier_wait(memory.ring_empty.at[slot])
                    plgpu.copy_gmem_to_smem(
                        array.at[shift, item.batch, rows, item.kv_head],
                        memory.ring.at[slot],
                        memory.ring_full.at[slot],
                    )
                    slot = _mosaic.following(slot, tiling.slots)
            load_few = functools.partial(self._load_few, item)
            return slot, lax.fori_loop(1, chunks, load_few, few_slot)

        return lax.fori_loop(0, item.steps(tiling.step), load_step, slots)

    def _load_few(self, item, chunk, slot):
        memory, sizes, few = self.memory, self.sizes, self.tiling.few
        # Keys are counted back from a position; a chunk begins with the furthest.
        first = item.few_first + items.front(sizes, few) - (chunk + 1) * few + 1
        if sizes.positions > 1:
            first *= sizes.heads
        rows = pl.ds(first, items.chunk_rows(sizes, few))
        source = item.batch, item.kv_head, rows
        plgpu.barrier_wait(memory.few_empty.at[slot])
        for array, rows in (
            (self.few_key, memory.few_key),
            (self.few_value, memory.few_value),
        ):
            plgpu.copy_gmem_to_smem(
                array.at[source], rows.at[slot], memory.few_full.at[slot]
            )
        return _mosaic.following(slot, FEW_SLOTS)

    def finish(self):
        """Waits until the consumers have emptied everything."""
        plgpu.barrier_wait(self.memory.query_empty)
        for slot in range(FEW_SLOTS):
            plgpu.barrier_wait(self.memory.few_empty.at[slot])
        for slot in range(self.tiling.slots):
            plgpu.barrier_wait(self.memory.ring_empty.at[slot])
