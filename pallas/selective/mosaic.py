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
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jattn.pallas import _device, _mosaic
from jattn.pallas._mosaic import div_rem
from jattn.pallas.selective import mosaic_fragments as fragments
from jattn.pallas.selective.mosaic_consumer import Consumer
from jattn.pallas.selective.mosaic_items import CONSUMERS, ROWS, Schedule, Sizes, place
from jattn.pallas.selective.mosaic_memory import CLUSTER, Memory, Tiling, memory_types


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
        fragments; `mask.UNSEEN` for keys of other documents and for dropped ones.
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
        memory=memory_types(tiling, sizes, query.dtype),
        grid={"program": clusters},
        consumers=CONSUMERS,
        name="selective_forward",
        cluster={CLUSTER: tiling.cluster} if shared else {},
    )
    return out, lse


def _kernel(*refs, sizes: Sizes, tiling: Tiling, clusters: int, **memory):
    """A thread block."""
    query, key, value, bias, region, *live, out, lse = refs
    memory = Memory(**memory)
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
        consumer = Consumer(warpgroup, rank, out, lse, schedule, memory, sizes, tiling)
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
    memory: Memory
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
