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
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.pallas import _device, _mosaic, _triton, tuning
from jattn.pallas.simplicial import ROWS
from jattn.pallas.simplicial import mosaic_items as items
from jattn.pallas.simplicial.mosaic_items import ALIGNMENT

LOG2_E = math.log2(math.e)

CONSUMERS = 2

# Slots of the rings of few keys and values.
FEW_SLOTS = 2

# Below every logit, yet two of them have a difference.
LOWEST = -1e30

# The products of a step: whose turn it is, is asked before each.
LOGITS, VALUES = 0, 1

# How a consumer's threads share a matrix, a number per row, and one per column.
MATRIX = plgpu.Layout.WGMMA
PER_ROW = MATRIX.reduce(1)


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
    interpret = _mosaic.interpretation()
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
    results = plgpu.kernel(
        functools.partial(_kernel, sizes=sizes, tiling=tiling),
        out_type=(
            jax.ShapeDtypeStruct(rows, out_dtype or many_value.dtype),
            jax.ShapeDtypeStruct(rows[:3], jnp.float32),
        ),
        scratch_types=_memory_types(
            tiling,
            sizes,
            query.dtype,
            operands[1].dtype,
            operands[2].dtype,
            pitch,
            interpret,
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


@dataclasses.dataclass(frozen=True)
class _Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      query: [ROWS, H] of the item.
      ring: [slots, columns, H], blocks of K' and V' in turns of a step.
      few_key: [FEW_SLOTS, rows, at least H], those that the tile's rows need for so
        many keys.
      few_value: As few_key.
      expanded_or_half: A union of the consumers' expanded queries [CONSUMERS, ROWS, H]
        and of the halves of O that they hand over, fp32 [CONSUMERS, ROWS, H / 2].
      statistics: fp32 [CONSUMERS, 2, ROWS], the consumers' m and l.
      weights: [CONSUMERS, ROWS, step], P in the interpreter, else None.
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
    tiling: Tiling,
    sizes: items.Sizes,
    dtype: Any,
    key_dtype: Any,
    value_dtype: Any,
    pitch: int,
    interpret,
) -> dict[str, Any]:
    """The types of _Memory's attributes; the last two dtypes are the few keys'."""

    def matrix(*shape, dtype=dtype):
        # Their base class is abstract by accident.
        tile = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # pyright: ignore
        swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore
        return plgpu.SMEM(shape, dtype, transforms=(tile, swizzle))

    def barrier(number, arrivals):
        return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals)

    width = sizes.width
    few = FEW_SLOTS, items.chunk_rows(sizes, tiling.few)
    return {
        "query": matrix(ROWS, width),
        "ring": matrix(tiling.slots, tiling.columns, width),
        "few_key": plgpu.SMEM((*few, pitch), key_dtype),
        "few_value": plgpu.SMEM((*few, pitch), value_dtype),
        "expanded_or_half": plgpu.RefUnion(
            matrix(CONSUMERS, ROWS, width),
            matrix(CONSUMERS, ROWS, width // 2, dtype=jnp.float32),
        ),
        "statistics": plgpu.SMEM((CONSUMERS, 2, ROWS), jnp.float32),
        "weights": matrix(CONSUMERS, ROWS, tiling.step) if interpret else None,
        "query_full": barrier(1, 1),
        "query_empty": barrier(1, CONSUMERS),
        "ring_full": barrier(tiling.slots, 1),
        "ring_empty": barrier(tiling.slots, CONSUMERS),
        "few_full": barrier(FEW_SLOTS, 2),
        "few_empty": barrier(FEW_SLOTS, CONSUMERS),
        "turn": barrier(2 * CONSUMERS, 1),
        "together": barrier(1, CONSUMERS),
    }


def _kernel(*refs, sizes: items.Sizes, tiling: Tiling, **memory):
    """A thread block: items program, program + programs, and so on."""
    query, few_key, few_value, many_key, many_value, *limits, out, lse = refs
    memory = _Memory(**memory)
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
        consumer = _Consumer(warpgroup, out, lse, visible, memory, sizes, tiling)
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
    memory: _Memory
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
class _Consumer:
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
    memory: _Memory
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
            _filled(0, (ROWS, width), MATRIX),
            _filled(LOWEST, (ROWS,), PER_ROW),
            _filled(0, (ROWS,), PER_ROW),
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
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW)
        position = item.position + lax.div(row, np.int32(sizes.heads))
        end = position + 1
        few = jnp.minimum(end + (sizes.few - sizes.queries), sizes.few_window)
        end += sizes.many - sizes.queries
        many = jnp.minimum(end, sizes.many_window)
        if self.visible is not None:
            visible = plgpu.load(
                self.visible.at[item.batch, pl.ds(item.row, ROWS)],
                layout=PER_ROW,
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
                _filled(0.0, (ROWS,), PER_ROW),
                _filled(LOWEST, (ROWS,), PER_ROW),
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
        their_peak = plgpu.load(statistics.at[1 - self.me, 0], layout=PER_ROW)
        their_total = plgpu.load(statistics.at[1 - self.me, 1], layout=PER_ROW)
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


def _filled(value, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
