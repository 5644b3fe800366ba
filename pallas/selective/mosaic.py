"""Selective Attention for a given F, forward, in Mosaic GPU for Hopper.

F enters as a bias of the raw products q·k, ``-F / scale``, which is the same for all
heads. A thread block has two consumers (warpgroups) of ROWS queries in one head each,
and one producer, which loads everything into shared memory. The consumers are two heads
of one kv head, or two tiles of queries of one head: they share keys and values. Thread
blocks of a cluster have different heads: they share the bias, and also keys and values
where their heads do. What is shared each of them loads a part of, for all.

A thread block stays on its multiprocessor and takes one item of work (adjacent queries
in the heads of its cluster) after the other, those with the most keys first. A consumer
has two products at a time on its way, across the border of two items as well:

    S_i = B_i + Q K_i'     O = O + P_{i - 1} V_{i - 1}
    P_i = exp(S_i - m)     O = exp(m_before - m) O

Of an item's steps those that need a mask come first, the last one of them at the very
beginning, and then the others in order, but for those that are skipped.

Letters: B batch, T queries, S keys, N query heads, K kv heads, G = N / K, H width,
CHUNK queries of one call.
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

from jattn.pallas import _device, _mosaic
from jattn.pallas._mosaic import COLUMN, LOWEST, MATRIX, div_rem
from jattn.pallas.selective import mosaic_fragments as fragments
from jattn.pallas.selective.mosaic_items import (
    CONSUMERS,
    ROWS,
    Schedule,
    Sizes,
    place,
)

LOG2_E = math.log2(math.e)

# Columns of the partial sums of a row's weights.
PARTIAL = 8

# The axis of the thread blocks that share the bias.
CLUSTER = "cluster"


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      heads: Heads of a thread block, 1 or 2, of one kv head.
      cluster: Thread blocks that share the bias, 1, 2 or 4.
      keys: Keys of a step, 64 or 128.
      query_slots: Tiles of queries of a consumer, 1 or 2.
      slots: Slots of the ring of keys and values, at least 3.
      bias_slots: Slots of the ring of the bias, at least 2.
      programs: Thread blocks.
    """

    heads: int
    cluster: int
    keys: int
    query_slots: int
    slots: int
    bias_slots: int
    programs: int


def tiling(width: int, heads: int, group: int) -> Tiling:
    """The tiling that is used where nothing was measured.

    Args:
      width: H.
      heads: N.
      group: G.
    """
    programs = _device.multiprocessors()
    if group % 2 == 0:
        slots, bias_slots = (4, 2) if width > 64 else (6, 3)
        return Tiling(2, 1, 128, 1, slots, bias_slots, programs)
    if width > 64:
        return Tiling(1, 1 if heads % 2 else 2, 64, 1, 8, 2, programs)
    return Tiling(1, 1, 128, 1, 5, 2, programs)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    first: jax.Array,
    live: tuple[jax.Array, jax.Array] | None,
    *,
    queries: int,
    offset: int,
    scale: float,
    tiling: Tiling,
) -> tuple[jax.Array, jax.Array]:
    """Attention of a chunk of queries, not differentiable.

    In the interpreter P is not an operand in registers, which it does not know, but
    passes through shared memory, and neither O nor B is what a product adds to; all
    else is the same.

    Args:
      query: [B, T, N, H] in bf16 or fp16, filled up to whole blocks, where H is 64 or
        128.
      key: [B, S, K, H], filled up to whole blocks with anything finite.
      value: [B, S, K, H], likewise.
      bias: fp32 [B, CHUNK, S], ``-F / scale`` of a whole number of blocks, in
        fragments; `mask.OTHER_DOCUMENT` for keys of other documents.
      first: int32 [2], the chunk's first query, which begins a block, and 0.
      live: None, or what is not skipped: of each block of queries the list of its tiles
        of `tiling.keys` keys, those skipped at the end, int32 [B, blocks, S / keys],
        and how many are not skipped, int32 [B, blocks].
      queries: How many there are, not counting what fills the last block.
      offset: Position of the first query of all.
      scale: Factor of the logits, positive.
      tiling: Tile sizes.

    Returns:
      Output [B, CHUNK, N, H] and log-sum-exp [B, N, CHUNK] in fp32 (natural log);
      undefined from the last query on.
    """
    batch, chunk, keys = bias.shape
    heads, width = query.shape[2:]
    sizes = Sizes(
        batch=batch,
        queries=queries,
        chunk=chunk,
        keys=keys,
        heads=heads,
        group=heads // key.shape[2],
        width=width,
        offset=offset,
        scale=scale,
        members=tiling.heads,
        cluster=tiling.cluster,
        step=tiling.keys,
        block=query.shape[1] // live[0].shape[1] if live else chunk,
    )
    folded = chunk // fragments.ROWS, keys // fragments.COLUMNS, fragments.NUMBERS
    bias = bias.reshape(batch, *folded)
    operands = query, key, value, bias, first, *(live or ())
    clusters = min(tiling.programs // tiling.cluster, sizes.items)
    shared = tiling.cluster > 1
    out, lse = _mosaic.call(
        functools.partial(_kernel, sizes=sizes, tiling=tiling, clusters=clusters),
        *operands,
        outputs=[
            jax.ShapeDtypeStruct((batch, chunk, heads, width), value.dtype),
            jax.ShapeDtypeStruct((batch, heads, chunk), jnp.float32),
        ],
        memory=_memory_types(tiling, sizes, query.dtype),
        grid={"program": clusters},
        consumers=CONSUMERS,
        name="selective_forward",
        cluster={CLUSTER: tiling.cluster} if shared else {},
    )
    return out, lse


@dataclasses.dataclass(frozen=True)
class _Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      query: [query_slots, CONSUMERS, ROWS, H].
      ring: [slots, keys, H], keys and values.
      bias: fp32 [bias_slots, queries of an item / 16, keys / 8, NUMBERS], in fragments.
      weights: [CONSUMERS, ROWS, keys], P in the interpreter, else None.
      query_full: Of each slot.
      query_empty: Of each slot.
      ring_full: Of each slot.
      ring_empty: Of each slot, in all thread blocks that share keys and values.
      bias_full: Of each slot.
      bias_empty: Of each slot, in all thread blocks of the cluster.
    """

    query: Any
    ring: Any
    bias: Any
    weights: Any
    query_full: Any
    query_empty: Any
    ring_full: Any
    ring_empty: Any
    bias_full: Any
    bias_empty: Any

    def empty(self, tiling: Tiling):
        """Barriers of empty slots, and how many of them."""
        return (
            (self.query_empty, tiling.query_slots),
            (self.ring_empty, tiling.slots),
            (self.bias_empty, tiling.bias_slots),
        )


def _memory_types(tiling: Tiling, sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """The types of _Memory's attributes."""
    matrix = functools.partial(_mosaic.matrix, dtype=dtype)

    def full(slots, copies):
        return plgpu.Barrier(num_barriers=slots, num_arrivals=copies)

    def empty(slots, shared):
        if not shared:
            return plgpu.Barrier(num_barriers=slots, num_arrivals=CONSUMERS)
        return plgpu.ClusterBarrier(
            collective_axes=(CLUSTER,), num_barriers=slots, num_arrivals=CONSUMERS
        )

    return {
        "query": matrix(tiling.query_slots, CONSUMERS, ROWS, sizes.width),
        "ring": matrix(tiling.slots, tiling.keys, sizes.width),
        "bias": plgpu.SMEM((tiling.bias_slots, *sizes.bias_shape), jnp.float32),
        "weights": matrix(CONSUMERS, ROWS, tiling.keys)
        if _mosaic.interpretation()
        else None,
        "query_full": full(tiling.query_slots, CONSUMERS),
        "query_empty": empty(tiling.query_slots, shared=False),
        "ring_full": full(tiling.slots, 1),
        "ring_empty": empty(tiling.slots, shared=sizes.keys_shared),
        "bias_full": full(tiling.bias_slots, 1),
        "bias_empty": empty(tiling.bias_slots, shared=sizes.cluster > 1),
    }


def _kernel(*refs, sizes: Sizes, tiling: Tiling, clusters: int, **memory):
    """A thread block."""
    query, key, value, bias, region, *live, out, lse = refs
    memory = _Memory(**memory)
    warpgroup = lax.axis_index("warpgroup")
    rank = lax.axis_index(CLUSTER) if sizes.cluster > 1 else jnp.int32(0)
    cluster = lax.axis_index("program")
    schedule = Schedule(cluster, clusters, region[0], live, sizes)
    rounds = schedule.rounds

    @pl.when((warpgroup == CONSUMERS) & (rounds > 0))
    def _():
        plgpu.set_max_registers(24, action="decrease")
        arrays = query, key, value, bias
        _Producer(*arrays, rank, schedule, memory, sizes, tiling).run(rounds)

    @pl.when((warpgroup < CONSUMERS) & (rounds > 0))
    def _():
        plgpu.set_max_registers(240, action="increase")
        consumer = _Consumer(warpgroup, rank, out, lse, schedule, memory, sizes, tiling)
        consumer.run(rounds)


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Loads everything in the order in which the consumers need it."""

    query: Any
    key: Any
    value: Any
    bias: Any
    rank: jax.Array
    schedule: Schedule
    memory: _Memory
    sizes: Sizes
    tiling: Tiling

    def run(self, rounds):
        """Loads as many items; the first keys of one precede the last values before."""
        schedule = self.schedule
        first = schedule.item(0)
        self._load_query(first, jnp.int32(0))
        tile = first.masked_tile(0)
        bias_slot = self._load_bias(first, tile, jnp.int32(0))
        slot = self._load(self.key, first, tile, jnp.int32(0))

        def load_item(i, carry):
            item, following = schedule.item(i), schedule.item(i + 1)

            def load_step(step, carry):
                slot, bias_slot, before = carry
                tile = schedule.tile_of_keys(item, step)
                bias_slot = self._load_bias(item, tile, bias_slot)
                slot = self._load(self.key, item, tile, slot)
                return self._load(self.value, item, before, slot), bias_slot, tile

            carry = *carry, item.masked_tile(0)
            slot, bias_slot, last = lax.fori_loop(1, item.steps, load_step, carry)
            tile = following.masked_tile(0)
            goes_on = i + 1 < rounds

            @pl.when(goes_on)
            def _():
                self._load_bias(following, tile, bias_slot)
                self._load(self.key, following, tile, slot)

            def advanced(slot, slots):
                return jnp.where(goes_on, _mosaic.following(slot, slots), slot)

            bias_slot = advanced(bias_slot, self.tiling.bias_slots)
            slot = advanced(slot, self.tiling.slots)
            slot = self._load(self.value, item, last, slot)
            # A single slot is in use until the last logits are there.
            pl.when(goes_on)(lambda: self._load_query(following, i + 1))
            return slot, bias_slot

        lax.fori_loop(0, rounds, load_item, (slot, bias_slot))
        # Until the consumers have emptied everything.
        for barriers, slots in self.memory.empty(self.tiling):
            for slot in range(slots):
                plgpu.barrier_wait(barriers.at[slot])

    def _load_query(self, item, i):
        memory, sizes = self.memory, self.sizes
        slot = div_rem(i, self.tiling.query_slots)[1]
        plgpu.barrier_wait(memory.query_empty.at[slot])
        for consumer in range(CONSUMERS):
            head, token = place(item, self.rank, jnp.int32(consumer), sizes)
            token = pl.multiple_of(self.schedule.first + token, ROWS)
            plgpu.copy_gmem_to_smem(
                self.query.at[item.batch, pl.ds(token, ROWS), head],
                memory.query.at[slot, consumer],
                memory.query_full.at[slot],
            )

    def _load(self, array, item, tile, slot):
        """Loads a tile of keys or values into a slot, and returns the next one."""
        sizes, memory = self.sizes, self.memory
        head = div_rem(item.head + self.rank * sizes.members, sizes.group)[0]
        first = pl.multiple_of(tile * sizes.step, sizes.step)
        plgpu.barrier_wait(memory.ring_empty.at[slot])
        plgpu.copy_gmem_to_smem(
            array.at[item.batch, pl.ds(first, sizes.step), head],
            memory.ring.at[slot],
            memory.ring_full.at[slot],
            collective_axes=CLUSTER if sizes.keys_shared else None,
        )
        return _mosaic.following(slot, self.tiling.slots)

    def _load_bias(self, item, tile, slot):
        """Loads the bias of a tile of keys into a slot, and returns the next one."""
        sizes, memory = self.sizes, self.memory
        rows, columns, _ = sizes.bias_shape
        plgpu.barrier_wait(memory.bias_empty.at[slot])
        plgpu.copy_gmem_to_smem(
            self.bias.at[
                item.batch,
                pl.ds(item.tile * rows, rows),
                pl.ds(tile * columns, columns),
            ],
            memory.bias.at[slot],
            memory.bias_full.at[slot],
            collective_axes=CLUSTER if sizes.cluster > 1 else None,
        )
        return _mosaic.following(slot, self.tiling.bias_slots)


@dataclasses.dataclass(frozen=True)
class _Consumer:
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
    memory: _Memory
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
        _, weights, *softmax = self._softmax(logits, *self._nothing())
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
        attended = _filled(0, (ROWS, self.sizes.width), MATRIX)

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
                return self._softmax(logits, *softmax)

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
            return self._softmax(self._mask(logits, following, 0), *self._nothing())

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

    def _nothing(self):
        """Peak and total of a softmax over nothing."""
        return _filled(LOWEST, (ROWS,), COLUMN), _filled(0, (ROWS, PARTIAL), MATRIX)

    def _mask(self, logits, item, step):
        """Replaces logits of keys in the future by minus infinity."""
        # Of the consumer's first query, relative to the first key.
        position = item.position + div_rem(self.me, self.sizes.members)[0] * ROWS
        position -= item.masked_tile(step) * self.sizes.step
        row = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=MATRIX)
        column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=MATRIX)
        return jnp.where(column - row <= position, logits, -jnp.inf)

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


def _filled(value, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
