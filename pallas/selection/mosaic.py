"""Scores of blocks of keys, in Mosaic GPU for Hopper.

A consumer (warpgroup) has a tile of ROWS queries and COLUMNS windows, and adds up their
weights over the G query heads of a kv head in registers. The consumers of a thread
block have adjacent windows and the same queries, which a producer loads into shared
memory, one head after the other. Tensor cores and exponentials take about as long as
each other: while some consumers have a product under way, another one computes weights.

A thread block stays on its multiprocessor and takes one item of work after the other:
the windows of all its consumers and some adjacent tiles of queries. Items of the same
queries are adjacent in time.

A consumer's columns go by a window's place in its block, and then by blocks, so that
the windows of a block are all in the same thread. If the scores have one plane only,
windows of the block before that reach into a block have columns with it as well: for
few heads this costs less than to write and to read what they add apart.

Letters: B batch, T queries, M compressed keys, N query heads, K kv heads, G = N / K,
H width, L queries of a chunk, P planes of W scores.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jattn.pallas import _mosaic
from jattn.pallas._mosaic import div_rem
from jattn.pallas.selection import ROWS
from jattn.pallas.selection.mosaic_consumer import Consumer
from jattn.pallas.selection.mosaic_items import (
    ALIGNMENT,
    Memory,
    Sizes,
    Tiling,
    for_items,
    memory_types,
)


def block_scores(
    query: jax.Array,
    key: jax.Array,
    lse: jax.Array,
    step: jax.Array,
    after: jax.Array | None,
    *,
    scores: jax.ShapeDtypeStruct,
    length: int,
    kernel_size: int,
    stride: int,
    cells: int,
    scale_log2: float,
    tiling: Tiling,
) -> jax.Array:
    """Scores of blocks for the queries of a chunk, of one document.

    Args:
      query: [B, T, N, H], the last T of `length` positions, in bf16 or fp16, where H is
        64 or 128.
      key: [B, M, K, H], compressed.
      lse: fp32 [B, N, T], the log-sum-exp of the logits in base 2.
      step: int32 [1], the chunk's number.
      after: What has to be there before, or None.
      scores: fp32 [B, K, L, P, W], where L is a multiple of ROWS.
      length: Tokens of the sequence.
      kernel_size: Tokens in a window.
      stride: Tokens between the starts of windows.
      cells: Windows that start in a block.
      scale_log2: Factor of the logits, positive, in units of log 2.
      tiling: Tile sizes.

    Returns:
      Scores. If there are two planes, those of the first one are of the windows that
      start in a block; those of the second one are what these windows add to the block
      that follows. Blocks that no query of a tile has reached are not written.
    """
    batch, queries, heads, width = query.shape
    kv_heads = key.shape[2]
    before = kernel_size // stride - 1 if scores.shape[3] == 1 else 0
    sizes = Sizes(
        queries=queries,
        windows=key.shape[1],
        kv_rows=batch * kv_heads,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        width=width,
        offset=length - queries,
        kernel_size=kernel_size,
        stride=stride,
        cells=cells,
        before=before,
        chunk=scores.shape[2],
        scale_log2=scale_log2,
    )
    key = _mosaic.multiple(key, 1, ALIGNMENT * cells)
    key = key.reshape(batch, -1, cells, kv_heads, width)
    if before:
        shifted = jnp.pad(key[:, :-1, -before:], [(0, 0), (1, 0)] + [(0, 0)] * 3)
        key = jnp.concatenate([key, shifted], axis=2)
    operands = (
        _mosaic.multiple(query, 1, ALIGNMENT),
        key,
        _mosaic.multiple(lse, 2, ROWS),
        step,
        *(() if after is None else (after,)),
    )
    [result] = _mosaic.call(
        functools.partial(_kernel, sizes=sizes, tiling=tiling),
        *operands,
        outputs=[scores],
        memory=memory_types(tiling, sizes, query.dtype),
        grid={"program": tiling.programs},
        consumers=tiling.consumers,
        name="block_scores",
    )
    return result


def _kernel(*refs, sizes: Sizes, tiling: Tiling, **memory):
    """A thread block: its items program, program + programs, and so on."""
    query, key, lse, step, *_after, scores = refs
    memory = Memory(**memory)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == tiling.consumers)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _Producer(query, key, memory, sizes, tiling).run(step)

    @pl.when(warpgroup < tiling.consumers)
    def _():
        registers = 240 if tiling.consumers == 2 else 160
        plgpu.set_max_registers(registers, action="increase")
        Consumer(warpgroup, lse, scores, memory, sizes, tiling).run(step)


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Loads everything in the order in which the consumers need it."""

    query: Any
    key: Any
    memory: Memory
    sizes: Sizes
    tiling: Tiling

    def run(self, step):
        """Loads the keys and queries of all items."""
        memory, tiling, group = self.memory, self.tiling, self.sizes.group
        # The keys may have to wait for consumers that are behind.
        before = min(tiling.slots - 1, group)

        def load_item(item, carry):
            slot, key_slot = carry

            def load_head(index, slot):
                tile, head = div_rem(jnp.int32(index), group)
                return self._load_query(item, item.first_tile + tile, head, slot)

            slot = lax.fori_loop(0, before, load_head, slot)
            self._load_keys(item, key_slot)
            slot = lax.fori_loop(before, item.tiles * group, load_head, slot)
            return slot, _mosaic.following(key_slot, tiling.key_slots)

        for_items(step, self.sizes, tiling, load_item, (jnp.int32(0), jnp.int32(0)))
        # Until the consumers have emptied everything.
        for slot in range(tiling.slots):
            plgpu.barrier_wait(memory.query_empty.at[slot])
        for slot in range(tiling.key_slots * tiling.consumers):
            plgpu.barrier_wait(memory.key_empty.at[slot])

    def _load_query(self, item, tile, head, slot):
        """Loads a head's queries into a slot, and returns the next one."""
        memory, sizes = self.memory, self.sizes
        tokens = item.tokens(tile, sizes)
        head = item.kv_head * sizes.group + head
        plgpu.barrier_wait(memory.query_empty.at[slot])
        plgpu.copy_gmem_to_smem(
            self.query.at[item.batch, tokens, head],
            memory.query.at[slot],
            memory.query_full.at[slot],
        )
        return _mosaic.following(slot, self.tiling.slots)

    def _load_keys(self, item, key_slot):
        """Loads each consumer's keys, those that some query has reached."""
        memory, sizes = self.memory, self.sizes
        for consumer in range(self.tiling.consumers):
            first_block = item.first_block + consumer * sizes.blocks

            @pl.when(item.unreached(first_block, sizes) < item.tiles)
            def _(consumer=consumer, first_block=first_block):
                slot = key_slot * self.tiling.consumers + consumer
                plgpu.barrier_wait(memory.key_empty.at[slot])
                blocks = pl.ds(pl.multiple_of(first_block, ALIGNMENT), sizes.blocks)
                for cell in range(sizes.cells + sizes.before):
                    columns = pl.ds(cell * sizes.blocks, sizes.blocks)
                    plgpu.copy_gmem_to_smem(
                        self.key.at[item.batch, blocks, cell, item.kv_head],
                        memory.key.at[slot, columns],
                        memory.key_full.at[slot],
                    )
