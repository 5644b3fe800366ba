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
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jattn.pallas import _device, _mosaic, tuning
from jattn.pallas._mosaic import ceil_div, div_rem
from jattn.pallas.flash import ROWS
from jattn.pallas.flash.mosaic_consumer import Consumer
from jattn.pallas.flash.mosaic_items import ALIGNMENT, Sizes, item_at, stretches
from jattn.pallas.flash.mosaic_memory import (
    PAIR,
    QUERY_SLOTS,
    Memory,
    Tiling,
    memory_types,
)

# Keys up to which small steps are faster.
FEW_KEYS = 1024


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
    # Keys that no query sees may hold NaN.
    offset = length - queries
    first = 0 if window is None else max(offset + stride - window, 0) // stride
    end = min((length - kernel_size) // stride + 1, key.shape[1])
    offset -= first * stride
    heuristic = _tiling(width, group, end - first, kernel_size, stride, window, offset)
    tiling = tuning.choose("flash_forward_mosaic", shape, heuristic)
    sizes = Sizes(
        queries=queries,
        kv_rows=batch * kv_heads,
        kv_heads=kv_heads,
        group=group,
        width=width,
        keys=end - first,
        offset=offset,
        kernel_size=kernel_size,
        stride=stride,
        window=window,
        scale=scale,
        tiles=tiling.consumers * tiling.cluster,
        step=tiling.keys,
        edge=tiling.edge,
    )
    key, value = (
        _mosaic.multiple(x[:, first:end], 1, ALIGNMENT, tiling.keys)
        for x in (key, value)
    )
    # Only heads of a group smaller than the alignment are loaded by stretches of it.
    padded = _mosaic.multiple(query, 1, ALIGNMENT) if sizes.heads_first else query
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
        memory=memory_types(tiling, sizes, query.dtype),
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
    width: int,
    group: int,
    keys: int,
    kernel_size: int,
    stride: int,
    window: int | None,
    offset: int,
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
        # Where half a step more than whole ones is enough for what an item's rows see,
        # and the keys before that the first step's alignment adds.
        tokens = 2 * cluster * ROWS // group
        seen = -(-(window - kernel_size + tokens) // stride)
        if tokens % (ALIGNMENT * stride) == 0:
            seen += (offset + stride - window) // stride % ALIGNMENT
        else:
            seen += ALIGNMENT - 1
        edge = step // 2 if 0 < seen % step <= step // 2 else step
    return Tiling(
        consumers=2,
        cluster=cluster,
        keys=step,
        edge=edge,
        slots=5 if width > 64 else 10,
        programs=_device.multiprocessors(),
    )


def _kernel(*refs, sizes: Sizes, tiling: Tiling, **memory):
    """A thread block: its cluster's items program, program + programs, and so on."""
    query, key, value, out, lse = refs
    memory = Memory(**memory)
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
        consumer = Consumer(warpgroup, tile, out, lse, memory, sizes, tiling)
        consumer.run(item, rounds)


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Loads everything in the order in which the consumers need it."""

    query: Any
    key: Any
    value: Any
    first_tile: jax.Array
    memory: Memory
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
