"""Attention over strided windows of tokens, forward, in Mosaic GPU for Hopper.

The G query heads of a kv head at some adjacent tokens are the 64 rows of a consumer's
tile. A thread block has a few consumers (warpgroups), whose tiles are adjacent and
attend to the same keys, and one producer, which loads queries, keys and values into
shared memory. It stays on its multiprocessor and takes one item of work (a tile for
each consumer) after the other, those with the most keys first. Two thread blocks may
share an item: each then loads half of the keys and values, for both.

A consumer has two products at a time on its way: the logits of one step's keys, and
the output of those before. While the second is computed, the softmax of the first is,
and so on across the border of two items, so that the tensor cores never wait:

    S_i = Q K_i'     O = O + P_{i - 1} V_{i - 1}
    P_i = exp(S_i - m)     O = exp(m_before - m) O

Of an item's steps those that need a mask come first, then those in the middle of what
its rows see.

Letters: B batch, T queries, M keys, N query heads, K kv heads, G = N / K, H width.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jattn.pallas import _device, _mosaic, tuning
from jattn.pallas._mosaic import COLUMN, LOWEST, MATRIX, ceil_div, div_rem
from jattn.pallas.flash import ROWS
from jattn.pallas.flash.mosaic_items import (
    ALIGNMENT,
    Sizes,
    divide,
    item_at,
    stretches,
)

LOG2_E = math.log2(math.e)

# Tiles of queries of a consumer: the one at work, and the next one.
QUERY_SLOTS = 2

# Keys up to which small steps are faster.
FEW_KEYS = 1024

# Columns of the partial sums of a row's weights.
PARTIAL = 8

# The axis of the thread blocks that share keys and values.
PAIR = "pair"


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      consumers: Warpgroups of a thread block that compute, 2 or 3.
      cluster: Thread blocks that share keys and values, 1 or 2.
      keys: Keys of a step, a multiple of 64.
      edge: Keys of an item's first step, a multiple of 64 and no more than the others.
      slots: Slots of the ring of keys and values, at least 3.
      programs: Thread blocks.
    """

    consumers: int
    cluster: int
    keys: int
    edge: int
    slots: int
    programs: int


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    kernel_size: int,
    stride: int,
    window: int | None,
    length: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention over windows of tokens without documents, not differentiable.

    In the interpreter P is not an operand in registers, which it does not know, but
    passes through shared memory, and O is not added to by the product; all else is the
    same.

    Args:
      query: [B, T, N, H], the last T of `length` positions, in bf16 or fp16, where H is
        64 or 128 and N / K a power of two of at most ROWS.
      key: [B, M, K, H]. Some query sees some key.
      value: [B, M, K, H].
      kernel_size: Tokens that a key stands for.
      stride: Tokens between the first ones of two keys.
      window: Tokens back from the query, itself counted, among which a key's first has
        to be; None for no limit.
      length: Tokens of the sequence.
      scale: Factor of the logits, positive.

    Returns:
      Output [B, T, N, H] and log-sum-exp [B, T, N] in fp32 (natural log).
    """
    batch, queries, heads, width = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    shape: dict[str, int | str] = {
        "group": group,
        "width": width,
        "stride": stride,
        "window": window or 0,
        "dtype": query.dtype.name,
    }
    heuristic = _tiling(width, group, key.shape[1], kernel_size, stride, window)
    tiling = tuning.choose("flash_forward_mosaic", shape, heuristic)
    # Keys that no query sees may hold NaN.
    offset = length - queries
    first = 0 if window is None else max(offset + stride - window, 0) // stride
    end = min((length - kernel_size) // stride + 1, key.shape[1])
    sizes = Sizes(
        queries=queries,
        kv_rows=batch * kv_heads,
        kv_heads=kv_heads,
        group=group,
        width=width,
        keys=end - first,
        offset=offset - first * stride,
        kernel_size=kernel_size,
        stride=stride,
        window=window,
        scale=scale,
        tiles=tiling.consumers * tiling.cluster,
        step=tiling.keys,
        edge=tiling.edge,
    )
    key, value = (_multiple(x[:, first:end], tiling.keys) for x in (key, value))
    # Only heads of a group smaller than the alignment are loaded by stretches of it.
    padded = _multiple(query, 0) if sizes.heads_first else query
    operands = padded, key, value
    rows = sizes.row_tiles * sizes.tiles * ROWS
    clusters = min(tiling.programs // tiling.cluster, sizes.items)
    paired = tiling.cluster > 1
    out, lse = _mosaic.call(
        functools.partial(_kernel, sizes=sizes, tiling=tiling),
        *operands,
        outputs=[
            jax.ShapeDtypeStruct(padded.shape, value.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, rows), jnp.float32),
        ],
        memory=_memory_types(tiling, sizes, query.dtype),
        grid={"program": clusters},
        consumers=tiling.consumers,
        name="flash_forward",
        cluster={PAIR: tiling.cluster} if paired else {},
    )
    if sizes.heads_first:
        lse = lse.reshape(batch, kv_heads, -1, group, sizes.tokens)
        lse = jnp.transpose(lse, (0, 2, 4, 1, 3))
    else:
        lse = jnp.swapaxes(lse.reshape(batch, kv_heads, -1, group), 1, 2)
    return out[:, :queries], lse.reshape(batch, -1, heads)[:, :queries]


def _tiling(
    width: int, group: int, keys: int, kernel_size: int, stride: int, window: int | None
) -> Tiling:
    if window is None and keys <= FEW_KEYS and group >= ALIGNMENT and width > 64:
        # Of few keys, those past the last that a row sees are a large part.
        return Tiling(
            consumers=3,
            cluster=1,
            keys=64,
            edge=64,
            slots=7,
            programs=_device.multiprocessors(),
        )
    # Of larger groups, the rows of two thread blocks see nearly the same keys.
    cluster = 2 if group >= ALIGNMENT else 1
    step = edge = 128
    if window is not None:
        # Where half a step more than whole ones is enough for what an item's rows see.
        tokens = 2 * cluster * ROWS // group
        seen = (window - kernel_size + tokens) // stride + ALIGNMENT
        edge = step // 2 if 0 < seen % step <= step // 2 else step
    return Tiling(
        consumers=2,
        cluster=cluster,
        keys=step,
        edge=edge,
        slots=5 if width > 64 else 10,
        programs=_device.multiprocessors(),
    )


def _multiple(x: jax.Array, least: int) -> jax.Array:
    """Fills x [B, S, ..] up to a multiple of ALIGNMENT, and that length, with zeros."""
    length = -(-max(x.shape[1], least) // ALIGNMENT) * ALIGNMENT
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)])


@dataclasses.dataclass(frozen=True)
class _Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      query: [QUERY_SLOTS, consumers, ROWS, H], queries, and then the output.
      ring: [slots, keys, H], keys and values.
      weights: [consumers, ROWS, keys], P in the interpreter, else None.
      query_full: Of each slot.
      query_empty: Of each slot.
      ring_full: Of each slot.
      ring_empty: Of each slot, in all thread blocks that share keys and values.
    """

    query: Any
    ring: Any
    weights: Any
    query_full: Any
    query_empty: Any
    ring_full: Any
    ring_empty: Any


def _memory_types(tiling: Tiling, sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """The types of _Memory's attributes."""
    consumers = tiling.consumers

    matrix = functools.partial(_mosaic.matrix, dtype=dtype)
    return {
        "query": matrix(QUERY_SLOTS, consumers, ROWS, sizes.width),
        "ring": matrix(tiling.slots, tiling.keys, sizes.width),
        "weights": matrix(consumers, ROWS, tiling.keys)
        if _mosaic.interpretation()
        else None,
        "query_full": _mosaic.barriers(QUERY_SLOTS, consumers * sizes.parts),
        "query_empty": _mosaic.barriers(QUERY_SLOTS, consumers),
        "ring_full": _mosaic.barriers(tiling.slots, 1),
        "ring_empty": _mosaic.barriers(tiling.slots, consumers)
        if tiling.cluster == 1
        else plgpu.ClusterBarrier(
            collective_axes=(PAIR,),
            num_barriers=tiling.slots,
            num_arrivals=consumers,
        ),
    }


def _kernel(*refs, sizes: Sizes, tiling: Tiling, **memory):
    """A thread block: its cluster's items program, program + programs, and so on."""
    query, key, value, out, lse = refs
    memory = _Memory(**memory)
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    first_tile = jnp.int32(0)
    if tiling.cluster > 1:
        first_tile = lax.axis_index(PAIR) * tiling.consumers
    programs = min(tiling.programs // tiling.cluster, sizes.items)
    rounds = ceil_div(sizes.items - program, programs)

    def item(i):
        return item_at(program + jnp.minimum(i, rounds - 1) * programs, sizes)

    @pl.when(warpgroup == tiling.consumers)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        producer = _Producer(query, key, value, first_tile, memory, sizes, tiling)
        producer.run(item, rounds)

    @pl.when(warpgroup < tiling.consumers)
    def _():
        registers = 240 if tiling.consumers == 2 else 160
        plgpu.set_max_registers(registers, action="increase")
        tile = first_tile + warpgroup
        consumer = _Consumer(warpgroup, tile, out, lse, memory, sizes, tiling)
        consumer.run(item, rounds)


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Loads everything in the order in which the consumers need it."""

    query: Any
    key: Any
    value: Any
    first_tile: jax.Array
    memory: _Memory
    sizes: Sizes
    tiling: Tiling

    def run(self, get_item, rounds):
        """Loads as many items; the first keys of one precede the last values before."""
        first = get_item(0)
        self._load_query(first, 0)
        slot = self._load(self.key, first, 0, jnp.int32(0))

        def load_item(i, slot):
            item, following = get_item(i), get_item(i + 1)

            def load_step(step, slot, before=None):
                slot = self._load(self.key, item, step, slot)
                before = step - 1 if before is None else before
                return self._load(self.value, item, before, slot)

            if self.sizes.edge < self.sizes.step:
                slot = load_step(jnp.int32(1), slot, 0)
                slot = lax.fori_loop(2, item.steps, load_step, slot)
            else:
                slot = lax.fori_loop(1, item.steps, load_step, slot)

            @pl.when(i + 1 < rounds)
            def _():
                self._load_query(following, div_rem(i + 1, QUERY_SLOTS)[1])
                self._load(self.key, following, 0, slot)

            following_slot = _mosaic.following(slot, self.tiling.slots)
            slot = jnp.where(i + 1 < rounds, following_slot, slot)
            return self._load(self.value, item, item.steps - 1, slot)

        lax.fori_loop(0, rounds, load_item, slot)
        # Until the consumers have emptied everything.
        for slot in range(QUERY_SLOTS):
            plgpu.barrier_wait(self.memory.query_empty.at[slot])
        for slot in range(self.tiling.slots):
            plgpu.barrier_wait(self.memory.ring_empty.at[slot])

    def _load_query(self, item, slot):
        memory = self.memory
        plgpu.barrier_wait(memory.query_empty.at[slot])
        for i in range(self.tiling.consumers):
            parts = stretches(self.query, item, self.first_tile + i, self.sizes)
            for part, rows, _ in parts:
                target = memory.query.at[slot, i, rows]
                plgpu.copy_gmem_to_smem(part, target, memory.query_full.at[slot])

    def _load(self, array, item, step, slot):
        """Loads a step's keys or values into a slot, and returns the next one."""
        sizes, memory = self.sizes, self.memory
        first = pl.multiple_of(item.first_key(step, sizes.step), ALIGNMENT)
        keys = sizes.edge if isinstance(step, int) else sizes.step
        plgpu.barrier_wait(memory.ring_empty.at[slot])
        plgpu.copy_gmem_to_smem(
            array.at[item.batch, pl.ds(first, keys), item.kv_head],
            memory.ring.at[slot, pl.ds(0, keys)],
            memory.ring_full.at[slot],
            collective_axes=PAIR if self.tiling.cluster > 1 else None,
        )
        return _mosaic.following(slot, self.tiling.slots)


@dataclasses.dataclass(frozen=True)
class _Consumer:
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
    memory: _Memory
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
        _, weights, *softmax = self._softmax(logits, *self._nothing())
        weights = weights.astype(memory.ring.dtype)

        def attend_item(i, carry):
            return self._attend_item(i, get_item(i), get_item(i + 1), rounds, carry)

        lax.fori_loop(0, rounds, attend_item, (jnp.int32(1), weights, *softmax))
        self._release_query(rounds - 1)

    def _attend_item(self, i, item, following, rounds, carry):
        """Writes an item's output and begins the following one."""
        slot, *softmax = carry
        query_slot = div_rem(i, QUERY_SLOTS)[1]
        attended = _filled(0, (ROWS, self.sizes.width), MATRIX)
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
                return self._softmax(logits, *softmax)

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
            return self._softmax(self._mask(logits, following, 0), *self._nothing())

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

    def _nothing(self):
        """Peak and total of a softmax over nothing."""
        return _filled(LOWEST, (ROWS,), COLUMN), _filled(0, (ROWS, PARTIAL), MATRIX)

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

    def _softmax(self, logits, peak, total):
        """Adds logits to a softmax.

        Returns what this multiplies earlier results by, the logits' weights, and the
        new peak, in units of log 2, and total.
        """
        factor, keys = self.sizes.scale * LOG2_E, logits.shape[1]
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1) * factor)
        decay = jnp.exp2(peak - new_peak)
        base = lax.broadcast_in_dim(new_peak, logits.shape, [0])
        weights = jnp.exp2(logits * factor - base)
        # A thread adds up its own columns; the last of an item's steps is followed by
        # the sum over threads.
        columns = [weights[:, i : i + PARTIAL] for i in range(0, keys, PARTIAL)]
        decays = lax.broadcast_in_dim(decay, total.shape, [0])
        total = total * decays + functools.reduce(operator.add, columns)
        return decay, weights, new_peak, total

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


def _filled(value, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
