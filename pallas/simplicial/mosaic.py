"""2-simplicial attention, forward, in Pallas' Mosaic GPU backend for Hopper.

For one position, one kv head and one key j of the set with the smaller window, what is
left is plain attention by the expanded queries ``q ∘ k_j`` to the set with the larger
window, whose output is multiplied by v_j. The softmax goes over all pairs, so one
maximum m and one sum l per head serve every j. Rows of a matrix tile are HEADS query
heads that share a kv head; columns are keys of the larger window, a step at a time:

    S = (q ∘ k_j) K'^T    P = exp(S - m)    O = exp(m_before - m) O + v_j ∘ (P V')

A thread block stays on its multiprocessor and takes one item of work (a position and
HEADS heads) after the other. Of its three warpgroups one is the producer: it loads
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
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.pallas import _device, _mosaic, _triton, tuning
from jattn.pallas.simplicial import HEADS

LOG2_E = math.log2(math.e)

CONSUMERS = 2

# Copies into the tiles of matrix instructions begin at every eighth key only.
ALIGNMENT = 8

# Slots of the rings of few keys and values.
FEW_SLOTS = 2

# Below every logit, yet two of them have a difference.
LOWEST = -1e30

# The products of a step: whose turn it is, is asked before each.
LOGITS, VALUES = 0, 1

# How a consumer's threads share a matrix, a number per row, and one per column.
MATRIX = plgpu.Layout.WGMMA
ROWS = MATRIX.reduce(1)
COLUMNS = MATRIX.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      columns: Keys of the larger window in a block, which fills a slot of the ring: 64,
        128 or 256.
      blocks: Blocks of K', and as many of V', in a step, of at most 256 keys.
      slots: Slots of the ring, at least those of a step.
      few: Keys of the smaller window in a slot of their ring, an even number.
      programs: Thread blocks.
      turns: Whether the consumers take turns at the tensor cores.
    """

    columns: int
    blocks: int
    slots: int
    few: int
    programs: int
    turns: bool = True

    @property
    def step(self) -> int:
        """Keys of the larger window in a step."""
        return self.columns * self.blocks


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the kernel knows of its arguments when it is compiled."""

    items: int
    queries: int
    heads: int
    kv_heads: int
    width: int
    few: int
    many: int
    few_window: int
    many_window: int
    scale: float


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

    In the interpreter P is not an operand in registers, which it does not know, but
    passes through shared memory; all else is the same.

    Args:
      query: [B, T, N, H], bf16 or fp16, where H is 64 or 128 and HEADS divides N / K.
      few_key: [B, F, K, H], the keys with the smaller window, in the queries' dtype or
        in fp32; the last T of them stand at the positions of the queries.
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
    sizes = _Sizes(
        items=batch * queries * heads // HEADS,
        queries=queries,
        heads=heads,
        kv_heads=few_key.shape[2],
        width=width,
        few=few_key.shape[1],
        many=many_key.shape[1],
        few_window=min(few_window, few_key.shape[1]),
        many_window=min(many_window, many_key.shape[1]),
        scale=scale,
    )
    shape = {
        "H": width,
        "few_window": few_window,
        "many_window": many_window,
        "dtype": query.dtype.name,
    }
    tiling = tuning.choose(
        "simplicial_forward_mosaic", shape, _tiling(width, many_window)
    )
    interpret = _mosaic.interpretation()
    operands = (
        query,
        *(_lengthened(x, tiling.few) for x in (few_key, few_value)),
        *(_shifted(x, tiling.step) for x in (many_key, many_value)),
        *(() if visible is None else (visible.astype(jnp.int32),)),
    )
    results = plgpu.kernel(
        functools.partial(_kernel, sizes=sizes, tiling=tiling),
        out_type=(
            jax.ShapeDtypeStruct(query.shape, out_dtype or many_value.dtype),
            jax.ShapeDtypeStruct(query.shape[:3], jnp.float32),
        ),
        scratch_types=_memory_types(
            tiling, width, query.dtype, few_key.dtype, few_value.dtype, interpret
        ),
        grid=(min(tiling.programs, sizes.items),),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="two_simplicial_forward",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0
        ),
        interpret=interpret,
    )(*operands)
    out, lse = _triton.vary_like(results, operands)
    return out, lse


def _tiling(width: int, many_window: int) -> Tiling:
    """Steps of 256 keys, unless shorter ones leave fewer of them beyond the window."""
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


def _lengthened(x: jax.Array, length: int) -> jax.Array:
    """Fills x [B, S, K, H] up to that length with zeros, if S is less."""
    return jnp.pad(x, [(0, 0), (0, max(0, length - x.shape[1])), (0, 0), (0, 0)])


def _shifted(x: jax.Array, length: int) -> jax.Array:
    """ALIGNMENT copies of x [B, S, K, H], the i-th without the first i keys.

    Any key is then the first of a tile in one of them. They end with zeros, at a
    multiple of ALIGNMENT of at least length. Beside the queries, of which HEADS or more
    share a kv head, they are small.
    """
    length = -(-max(length, x.shape[1]) // ALIGNMENT) * ALIGNMENT
    x = _lengthened(x, length + ALIGNMENT - 1)
    return jnp.stack([x[:, i : i + length] for i in range(ALIGNMENT)])


@dataclasses.dataclass(frozen=True)
class _Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      query: [HEADS, H] of the item.
      ring: [slots, columns, H], blocks of K' and V' in turns of a step.
      few_key: [FEW_SLOTS, few, H].
      few_value: [FEW_SLOTS, few, H].
      expanded_or_half: A union of the consumers' expanded queries [CONSUMERS, HEADS, H]
        and of the halves of O that they hand over, fp32 [CONSUMERS, HEADS, H / 2].
      statistics: fp32 [CONSUMERS, 2, HEADS], the consumers' m and l.
      weights: [CONSUMERS, HEADS, step], P in the interpreter, else None.
      query_full: The query has been loaded.
      query_empty: The consumers are done with it; so are the others.
      ring_full: Of each slot.
      ring_empty: Of each slot.
      few_full: Of each slot.
      few_empty: Of each slot.
      turn: Of each product and consumer, that it may be issued.
      together: That both consumers have come here.
    """

    query: Any
    ring: Any
    few_key: Any
    few_value: Any
    expanded_or_half: Any
    statistics: Any
    weights: Any
    query_full: Any
    query_empty: Any
    ring_full: Any
    ring_empty: Any
    few_full: Any
    few_empty: Any
    turn: Any
    together: Any


def _memory_types(
    tiling: Tiling, width: int, dtype: Any, key_dtype: Any, value_dtype: Any, interpret
) -> dict[str, Any]:
    """The types of _Memory's attributes; the last two dtypes are the few keys'."""

    def matrix(*shape, dtype=dtype):
        # Their base class is abstract by accident.
        tile = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # pyright: ignore
        swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore
        return plgpu.SMEM(shape, dtype, transforms=(tile, swizzle))

    def barrier(number, arrivals):
        return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals)

    few = FEW_SLOTS, tiling.few, width
    return {
        "query": matrix(HEADS, width),
        "ring": matrix(tiling.slots, tiling.columns, width),
        "few_key": plgpu.SMEM(few, key_dtype),
        "few_value": plgpu.SMEM(few, value_dtype),
        "expanded_or_half": plgpu.RefUnion(
            matrix(CONSUMERS, HEADS, width),
            matrix(CONSUMERS, HEADS, width // 2, dtype=jnp.float32),
        ),
        "statistics": plgpu.SMEM((CONSUMERS, 2, HEADS), jnp.float32),
        "weights": matrix(CONSUMERS, HEADS, tiling.step) if interpret else None,
        "query_full": barrier(1, 1),
        "query_empty": barrier(1, CONSUMERS),
        "ring_full": barrier(tiling.slots, 1),
        "ring_empty": barrier(tiling.slots, CONSUMERS),
        "few_full": barrier(FEW_SLOTS, 2),
        "few_empty": barrier(FEW_SLOTS, CONSUMERS),
        "turn": barrier(2 * CONSUMERS, 1),
        "together": barrier(1, CONSUMERS),
    }


@dataclasses.dataclass(frozen=True)
class _Item:
    """One position and HEADS of its heads.

    Attributes:
      batch: Row of the batch.
      query: Position among the queries.
      head: First query head.
      kv_head: What they attend to.
      few_end: One past the last key it sees of the set with the smaller window.
      few_begin: The first one.
      many_end: One past the last key it sees of the other set.
      many_begin: The first one.
    """

    batch: jax.Array
    query: jax.Array
    head: jax.Array
    kv_head: jax.Array
    few_begin: jax.Array
    few_end: jax.Array
    many_begin: jax.Array
    many_end: jax.Array


def _item(index, sizes: _Sizes, visible) -> _Item:
    """The item of that index; neighbours in time have windows in common."""
    row, position = _mosaic.div_rem(index, sizes.queries)
    batch, head_tile = _mosaic.div_rem(row, sizes.heads // HEADS)
    kv_head = _mosaic.div_rem(head_tile, sizes.heads // sizes.kv_heads // HEADS)[0]
    few_end = position + (sizes.few - sizes.queries + 1)
    many_end = position + (sizes.many - sizes.queries + 1)

    def begin(end, window):
        seen = jnp.minimum(end, window)
        if visible is not None:
            seen = jnp.minimum(seen, visible[batch, position])
        return end - seen

    return _Item(
        batch=batch,
        query=position,
        head=head_tile * HEADS,
        kv_head=kv_head,
        few_begin=begin(few_end, sizes.few_window),
        few_end=few_end,
        many_begin=begin(many_end, sizes.many_window),
        many_end=many_end,
    )


def _kernel(*refs, sizes: _Sizes, tiling: Tiling, **memory):
    """A thread block: items program, program + programs, and so on."""
    query, few_key, few_value, many_key, many_value, *visible, out, lse = refs
    memory = _Memory(**memory)
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    programs = min(tiling.programs, sizes.items)
    rounds = _mosaic.ceil_div(sizes.items - program, programs)

    def for_items(function, carry):
        def call(i, carry):
            item = _item(program + i * programs, sizes, *visible or [None])
            return function(item, carry)

        lax.fori_loop(0, rounds, call, carry)

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        producer = _Producer(
            query, few_key, few_value, many_key, many_value, memory, tiling
        )
        for_items(producer.load_item, (jnp.int32(0), jnp.int32(0)))
        producer.finish()

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        consumer = _Consumer(
            warpgroup, out, lse, few_key.shape[1], memory, sizes, tiling
        )
        consumer.start()
        for_items(consumer.attend_item, (jnp.int32(0), jnp.int32(0)))
        consumer.finish()


def _few_first(item: _Item, chunk, few: int, length: int):
    """The first key in that chunk of the smaller window, which ends in the array."""
    return jnp.minimum(item.few_begin + chunk * few, length - few)


def _many_first(item: _Item, index, step: int):
    """The first key in that step through the larger window, from its end."""
    return jnp.maximum(item.many_end - (index + 1) * step, 0)


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Loads everything in the order in which the consumers need it."""

    query: Any
    few_key: Any
    few_value: Any
    many_key: Any
    many_value: Any
    memory: _Memory
    tiling: Tiling

    def load_item(self, item: _Item, slots):
        """Loads an item's queries, keys and values into the slots from these on."""
        memory, tiling = self.memory, self.tiling
        plgpu.barrier_wait(memory.query_empty)
        plgpu.copy_gmem_to_smem(
            self.query.at[item.batch, item.query, pl.ds(item.head, HEADS)],
            memory.query,
            memory.query_full,
        )
        chunks = _mosaic.ceil_div(item.few_end - item.few_begin, tiling.few)

        def load_step(index, slots):
            slot, few_slot = slots
            few_slot = self._load_few(item, 0, few_slot)
            first = _many_first(item, index, tiling.step)
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

        steps = _mosaic.ceil_div(item.many_end - item.many_begin, tiling.step)
        return lax.fori_loop(0, steps, load_step, slots)

    def _load_few(self, item, chunk, slot):
        memory, few = self.memory, self.tiling.few
        first = _few_first(item, chunk, few, self.few_key.shape[1])
        source = item.batch, pl.ds(first, few), item.kv_head
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


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """Attends to all pairs with every CONSUMERS-th key of the smaller window.

    Attributes:
      me: Which of the consumers.
      out: [B, T, N, H].
      lse: [B, T, N].
      few_length: Keys in the array of few keys.
      memory: Shared memory and barriers.
      sizes: Those of the arguments.
      tiling: Tile sizes.
    """

    me: jax.Array
    out: Any
    lse: Any
    few_length: int
    memory: _Memory
    sizes: _Sizes
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

    def attend_item(self, item: _Item, slots):
        """Writes an item's output, from what is in the slots from these on."""
        width = self.sizes.width
        plgpu.barrier_wait(self.memory.query_full)
        seen = item.many_end - item.many_begin
        steps = _mosaic.ceil_div(seen, self.tiling.step)

        def attend_step(index, carry, partial):
            return self._attend_step(item, index, index == steps - 1, carry, partial)

        whole = _mosaic.div_rem(seen, self.tiling.step)[0]
        carry = (
            *slots,
            _filled(0, (HEADS, width), MATRIX),
            _filled(LOWEST, (HEADS,), ROWS),
            _filled(0, (HEADS,), ROWS),
        )
        for begin, end, partial in ((0, whole, False), (whole, steps, True)):
            step = functools.partial(attend_step, partial=partial)
            carry = lax.fori_loop(begin, end, step, carry)
        *slots, attended, peak, total = carry

        @pl.when(steps == 0)
        def _():
            plgpu.barrier_arrive(self.memory.query_empty)

        self._write(item, attended, peak, total)
        return tuple(slots)

    def _attend_step(self, item, index, is_last, carry, partial):
        """Meets one step of K' and V' with all keys of the smaller window."""
        slot, *carry = carry
        first = _many_first(item, index, self.tiling.step)
        # Of the step's keys, those that the item sees and has not seen before.
        live = item.many_begin - first, item.many_end - index * self.tiling.step - first
        if partial:
            self._blank(self._slots(slot, VALUES), live)
        few_steps = _mosaic.ceil_div(item.few_end - item.few_begin, CONSUMERS)

        def attend_key(few_index, carry):
            return self._attend_key(
                item,
                few_index,
                few_index == few_steps - 1,
                is_last,
                slot,
                live if partial else None,
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
        shape = HEADS, self.sizes.width
        for i, slot in enumerate(slots):
            plgpu.barrier_wait(self.memory.ring_full.at[slot])

            @pl.loop(np.int32(0), np.int32(self.tiling.columns // HEADS))
            def _(tile, i=i, slot=slot):
                @pl.when(_mosaic.div_rem(tile, CONSUMERS)[1] == self.me)
                def _():
                    row = pl.multiple_of(tile * HEADS, HEADS)
                    part = self.memory.ring.at[slot, pl.ds(row, HEADS)]
                    value = plgpu.load(part, layout=MATRIX)
                    rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
                    rows += i * self.tiling.columns + row
                    seen = (rows >= live[0]) & (rows < live[1])
                    part[...] = jnp.where(seen, value, jnp.zeros_like(value))

        plgpu.commit_smem()
        self._meet()

    def _attend_key(self, item, few_index, is_last, is_last_step, slot, live, carry):
        """Meets one step of K' and V' with one key of the smaller window."""
        memory, tiling, sizes = self.memory, self.tiling, self.sizes
        few_slot, attended, peak, total = carry
        per_chunk = tiling.few // CONSUMERS
        chunk, place = _mosaic.div_rem(few_index, per_chunk)
        key = item.few_begin + few_index * CONSUMERS + self.me
        # If their number is odd, a consumer meets the last one again, without effect.
        handicap = jnp.where(key < item.few_end, 0.0, LOWEST)
        key = jnp.minimum(key, item.few_end - 1)
        row = key - _few_first(item, chunk, tiling.few, self.few_length)

        @pl.when(place == 0)
        def _():
            plgpu.barrier_wait(memory.few_full.at[few_slot])

        expanded_query, _ = memory.expanded_or_half
        expanded_query = expanded_query.at[self.me]
        copied = plgpu.Layout.SMEM_GMEM_COPY(
            (HEADS, sizes.width), memory.query.dtype, 128
        )
        few_key = plgpu.load(
            memory.few_key.at[few_slot, row], layout=copied.reduce(0), optimized=False
        )
        few_key = lax.broadcast_in_dim(few_key, (HEADS, sizes.width), [1])
        product = plgpu.load(memory.query, layout=copied) * few_key
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
            multiply_keys, plgpu.WGMMAAccumulatorRef((HEADS, tiling.step), jnp.float32)
        )
        self._release(slots, is_last)
        if live is not None:
            columns = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=MATRIX)
            seen = (columns >= live[0]) & (columns < live[1])
            logits = jnp.where(seen, logits, -jnp.inf)
        # In units of log 2.
        factor = sizes.scale * LOG2_E
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1) * factor + handicap)
        decay = jnp.exp2(peak - new_peak)
        base = lax.broadcast_in_dim(new_peak - handicap, logits.shape, [0])
        weights = jnp.exp2(logits * factor - base)
        total = total * decay + jnp.sum(weights, axis=1)
        weights = weights.astype(memory.ring.dtype)
        slots = self._slots(slot, VALUES)
        if live is None:
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
            plgpu.WGMMAAccumulatorRef((HEADS, sizes.width), jnp.float32),
        )
        self._release(slots, is_last)
        few_value = plgpu.load(memory.few_value.at[few_slot, row], layout=COLUMNS)
        ends_chunk = is_last | (place == per_chunk - 1)

        @pl.when(ends_chunk)
        def _():
            # The next copy into this slot must not overtake the loads from it.
            plgpu.commit_smem()
            plgpu.barrier_arrive(memory.few_empty.at[few_slot])

        following_slot = _mosaic.following(few_slot, FEW_SLOTS)
        few_slot = jnp.where(ends_chunk, following_slot, few_slot)
        few_value = few_value.astype(jnp.float32)
        few_value = lax.broadcast_in_dim(few_value, attended.shape, [1])
        decay = lax.broadcast_in_dim(decay, attended.shape, [0])
        return few_slot, attended * decay + update * few_value, new_peak, total

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
        is_first = lax.broadcast(self.me == 0, (HEADS, half))
        low, high = attended[:, :half], attended[:, half:]
        # Until both are done, their memory holds expanded queries.
        self._meet()
        halves[self.me] = jnp.where(is_first, high, low)
        statistics[self.me, 0] = peak
        statistics[self.me, 1] = total
        self._meet()
        their_peak = plgpu.load(statistics.at[1 - self.me, 0], layout=ROWS)
        their_total = plgpu.load(statistics.at[1 - self.me, 1], layout=ROWS)
        theirs = plgpu.load(halves.at[1 - self.me], layout=MATRIX)
        new_peak = jnp.maximum(peak, their_peak)
        my_weight = jnp.exp2(peak - new_peak)
        their_weight = jnp.exp2(their_peak - new_peak)
        total = total * my_weight + their_total * their_weight
        # Nothing was seen: 0 of 1, and minus infinity.
        seen = total > 0
        divisor = jnp.where(seen, total, jnp.ones_like(total))
        my_weight = lax.broadcast_in_dim(my_weight / divisor, (HEADS, half), [0])
        their_weight = lax.broadcast_in_dim(their_weight / divisor, (HEADS, half), [0])
        result = jnp.where(is_first, low, high) * my_weight + theirs * their_weight
        heads, columns = pl.ds(item.head, HEADS), pl.ds(self.me * half, half)
        result = result.astype(self.out.dtype)
        _mosaic.store(self.out.at[item.batch, item.query, heads, columns], result)

        @pl.when(self.me == 0)
        def _():
            lse = jnp.where(seen, new_peak / LOG2_E + jnp.log(divisor), -jnp.inf)
            _mosaic.store(self.lse.at[item.batch, item.query, heads], lse)

        # It is going to hold expanded queries again.
        self._meet()


def _filled(value, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
