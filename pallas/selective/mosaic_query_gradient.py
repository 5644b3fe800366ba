"""The gradient of queries of Selective Attention for a given F, in Mosaic GPU.

Two consumers (warpgroups that compute) have 64 rows each, which are some tokens of some
query heads of one kv head, the members: row ``m TOKENS + t``. They go through the keys,
which a producer loads into shared memory together with F:

    S = Q K' - F / scale    P = exp(scale S - lse)
    D = dO V' - delta    dS = P ∘ D    dQ += dS K

The members share their tokens' F. Thread blocks stay, and do one item of work after the
other.

Letters as in `jattn.pallas.selective.triton`; M members, R = 64 rows of a consumer.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jattn.pallas import _device, _mosaic
from jattn.pallas.flash.mosaic_backward import CONSUMERS, KEYS, ROWS
from jattn.pallas.selective import mosaic_fragments as fragments
from jattn.pallas.selective.mosaic_query_consumer import Consumer
from jattn.pallas.selective.mosaic_query_items import (
    Item,
    Memory,
    Sizes,
    Tiling,
    for_members,
    item_of,
    memory_types,
)


def tiling(width: int, heads: int, group: int) -> Tiling:
    """The heuristic one, for so many query heads, of which a group shares a kv head."""
    pack = math.gcd(group, 4)
    kv_heads = math.gcd(heads // group, 2) if pack == 1 and width <= 64 else 1
    tokens = CONSUMERS * ROWS // pack
    rows = CONSUMERS * ROWS * kv_heads * (6 * width + 8)
    slot = 4 * KEYS * width * kv_heads + 4 * KEYS * tokens
    return Tiling(
        pack=pack,
        kv_heads=kv_heads,
        slots=min((_mosaic.SHARED_MEMORY - rows) // slot, 6),
        programs=_device.multiprocessors(),
    )


def query_gradient(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    per_row: jax.Array,
    out_gradient: jax.Array,
    live: tuple[jax.Array, jax.Array] | None,
    region: jax.Array,
    *,
    queries: int,
    offset: int,
    block: int,
    scale: float,
    tiling: Tiling,
) -> jax.Array:
    """The gradient of a chunk of queries.

    In the interpreter Q, dO and dS are not operands in registers, which it does not
    know, but in shared memory, and products are not added to; all else is the same.

    Args:
      query: [B, rows, N, H], bf16 or fp16, where H is 64 or 128, of all chunks.
      key: [B, columns, K, H].
      value: [B, columns, K, H].
      bias: -F / scale, [B, chunk, columns] in fragments.
      per_row: `Cotangents.statistics` by tiles of ROWS.
      out_gradient: [B, rows, N, H].
      live: For each block of queries the tiles of KEYS keys that it does not skip in
        order, int32 [B, blocks, columns / KEYS], and how many these are, int32 [B,
        blocks]; those that it skips are all in its past. None if none is skipped.
      region: int32 [2], where the first is the first query of the chunk.
      queries: T.
      offset: Position of the first query.
      block: Queries of a block.
      scale: Factor of the logits.
      tiling: Tile sizes.

    Returns:
      [B, chunk, N, H].

    Raises:
      ValueError: The tiling's heads do not divide those of the arguments.
    """
    batch, chunk, columns = bias.shape
    heads, width = query.shape[2:]
    group = heads // key.shape[2]
    if group % tiling.pack or (tiling.kv_heads > 1 and group > tiling.pack):
        raise ValueError(f"{tiling} does not fit {group} query heads of a kv head")
    item_tokens = CONSUMERS * ROWS // tiling.pack
    parts = heads // tiling.members
    sizes = Sizes(
        queries=queries,
        offset=offset,
        batch=batch,
        parts=parts,
        group=group,
        tiles=chunk // item_tokens,
        block=block,
        width=width,
        scale=scale,
        tiling=tiling,
    )
    folded = chunk // fragments.ROWS, columns // fragments.COLUMNS, fragments.NUMBERS
    operands = (
        query,
        key,
        value,
        bias.reshape(batch, *folded),
        per_row,
        out_gradient,
        region,
        *(live or ()),
    )
    shape = batch, chunk, heads, width
    [gradient] = _mosaic.call(
        functools.partial(_kernel, sizes=sizes),
        *operands,
        outputs=[jax.ShapeDtypeStruct(shape, query.dtype)],
        memory=memory_types(sizes, query.dtype),
        grid={"program": min(tiling.programs, sizes.items)},
        consumers=CONSUMERS,
        name="selective_query_gradient",
    )
    return gradient


def _kernel(*refs, sizes: Sizes, **memory):
    """A thread block: items program, program + programs, and so on."""
    query, key, value, bias, statistics, out_gradient, region, *live, gradient = refs
    memory = Memory(**memory)
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    programs = lax.axis_size("program")
    rounds = _mosaic.ceil_div(sizes.items - program, programs)

    def item(i):
        return item_of(program + i * programs, region, live, sizes)

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        producer = _Producer(
            query, out_gradient, key, value, bias, statistics, live, memory, sizes
        )
        lax.fori_loop(
            0, rounds, lambda i, slot: producer.load(item(i), slot), jnp.int32(0)
        )
        producer.finish()

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        consumer = Consumer(warpgroup, gradient, memory, sizes)
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
    bias: Any
    statistics: Any
    live: Any
    memory: Memory
    sizes: Sizes

    def load(self, item: Item, slot):
        """Loads an item's rows and keys, and returns the next slot."""
        memory, sizes = self.memory, self.sizes
        for consumer in range(CONSUMERS):
            full = memory.rows_full.at[consumer]
            plgpu.barrier_wait(memory.rows_empty.at[consumer])
            first = item.first_token + consumer * sizes.tokens
            first = pl.multiple_of(first, sizes.tokens)

            def load_member(
                member, kv_head, rows, consumer=consumer, full=full, first=first
            ):
                head = item.part * sizes.tiling.members + member
                for source, target in (
                    (self.query, memory.query),
                    (self.out_gradient, memory.out_gradient),
                ):
                    plgpu.copy_gmem_to_smem(
                        source.at[item.batch, pl.ds(first, sizes.tokens), head],
                        target.at[consumer, kv_head, rows],
                        full,
                    )

            for_members(sizes, load_member)
            rows = pl.ds(pl.multiple_of(first * sizes.tiling.pack, ROWS), ROWS)
            for i in range(sizes.tiling.kv_heads):
                part = item.part * sizes.tiling.kv_heads + i
                plgpu.copy_gmem_to_smem(
                    self.statistics.at[item.batch, part, :, rows],
                    memory.statistics.at[consumer, i],
                    full,
                )

        kv_head = _mosaic.div_rem(item.part * sizes.tiling.members, sizes.group)[0]
        high = sizes.item_tokens // fragments.ROWS
        wide = KEYS // fragments.COLUMNS
        first = _mosaic.div_rem(item.chunk_token, fragments.ROWS)[0]
        fragment_rows = pl.ds(pl.multiple_of(first, high), high)

        def load_step(step, slot):
            tile = step
            if self.live:
                tile = self.live[0][item.batch, item.block, step]
            full = memory.full.at[slot]
            plgpu.barrier_wait(memory.empty.at[slot])
            keys = pl.ds(pl.multiple_of(tile * KEYS, KEYS), KEYS)
            for source, target in (
                (self.key, memory.key),
                (self.value, memory.value),
            ):
                for i in range(sizes.tiling.kv_heads):
                    plgpu.copy_gmem_to_smem(
                        source.at[item.batch, keys, kv_head + i],
                        target.at[slot, i],
                        full,
                    )
            columns = pl.ds(pl.multiple_of(tile * wide, wide), wide)
            plgpu.copy_gmem_to_smem(
                self.bias.at[item.batch, fragment_rows, columns],
                memory.bias.at[slot],
                full,
            )
            return _mosaic.following(slot, sizes.tiling.slots)

        return lax.fori_loop(0, item.steps, load_step, slot)

    def finish(self):
        """Waits until the consumers have emptied everything."""
        for consumer in range(CONSUMERS):
            plgpu.barrier_wait(self.memory.rows_empty.at[consumer])
        for slot in range(self.sizes.tiling.slots):
            plgpu.barrier_wait(self.memory.empty.at[slot])
