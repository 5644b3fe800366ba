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
import numpy as np
from jax import lax

from jattn.pallas import _mosaic
from jattn.pallas._mosaic import COLUMN, MATRIX, ceil_div, div_rem
from jattn.pallas.selection import COLUMNS, ROWS

# Copies into the tiles of matrix instructions begin at every eighth row only.
ALIGNMENT = 8

# Windows that may have columns with a block.
MAX_CELLS = COLUMNS // ALIGNMENT


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      consumers: Warpgroups of a thread block that compute, 2 or 3.
      tiles: Tiles of queries of an item.
      slots: Tiles of queries in flight.
      key_slots: Items whose keys are in shared memory, 1 or 2.
      programs: Thread blocks.
      turns: Whether all consumers but one may have a product under way at a time, so
        that they do not first all wait for products and then all compute weights.
    """

    consumers: int
    tiles: int
    slots: int
    key_slots: int
    programs: int
    turns: bool


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the kernel knows of its arguments when it is compiled.

    Attributes:
      queries: T.
      windows: M.
      kv_rows: B K.
      kv_heads: K.
      group: G.
      width: H.
      offset: Position of the first query.
      kernel_size: Tokens in a window.
      stride: Tokens between the starts of windows.
      cells: Windows that start in a block.
      before: Windows of the block before that have columns with a block.
      chunk: L.
      scale_log2: Factor of the logits in units of log 2.
    """

    queries: int
    windows: int
    kv_rows: int
    kv_heads: int
    group: int
    width: int
    offset: int
    kernel_size: int
    stride: int
    cells: int
    before: int
    chunk: int
    scale_log2: float

    @property
    def blocks(self) -> int:
        """Of a consumer's tile."""
        return tile_blocks(self.cells, self.before)

    @property
    def columns(self) -> int:
        """Of a consumer's tile."""
        return self.blocks * (self.cells + self.before)

    @property
    def span(self) -> int:
        """Tokens of a consumer's blocks."""
        return self.blocks * self.cells * self.stride


def tile_blocks(cells: int, before: int) -> int:
    """Blocks of a consumer's tile that have so many columns each."""
    blocks = COLUMNS // (cells + before)
    return blocks - blocks % ALIGNMENT


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
    key = _multiple(key, 1, ALIGNMENT * cells)
    key = key.reshape(batch, -1, cells, kv_heads, width)
    if before:
        shifted = jnp.pad(key[:, :-1, -before:], [(0, 0), (1, 0)] + [(0, 0)] * 3)
        key = jnp.concatenate([key, shifted], axis=2)
    operands = (
        _multiple(query, 1, ALIGNMENT),
        key,
        _multiple(lse, 2, ROWS),
        step,
        *(() if after is None else (after,)),
    )
    [result] = _mosaic.call(
        functools.partial(_kernel, sizes=sizes, tiling=tiling),
        *operands,
        outputs=[scores],
        memory=_memory_types(tiling, sizes, query.dtype),
        grid={"program": tiling.programs},
        consumers=tiling.consumers,
        name="block_scores",
    )
    return result


def _multiple(x: jax.Array, axis: int, divisor: int) -> jax.Array:
    """Fills x up to a multiple along an axis with zeros."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % divisor)
    return jnp.pad(x, padding) if padding[axis][1] else x


@dataclasses.dataclass(frozen=True)
class _Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      query: [slots, ROWS, H].
      key: [key slots * consumers, columns, H].
      query_full: Of each slot.
      query_empty: Of each slot.
      key_full: Of each slot and consumer.
      key_empty: Of each slot and consumer.
      product_done: Of every other product and consumer.
    """

    query: Any
    key: Any
    query_full: Any
    query_empty: Any
    key_full: Any
    key_empty: Any
    product_done: Any


def _memory_types(tiling: Tiling, sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """The types of _Memory's attributes."""
    slots, key_slots = tiling.slots, tiling.key_slots * tiling.consumers

    matrix = functools.partial(_mosaic.matrix, dtype=dtype)
    return {
        "query": matrix(slots, ROWS, sizes.width),
        "key": matrix(key_slots, sizes.columns, sizes.width),
        "query_full": _mosaic.barriers(slots, 1),
        "query_empty": _mosaic.barriers(slots, tiling.consumers),
        "key_full": _mosaic.barriers(key_slots, sizes.cells + sizes.before),
        "key_empty": _mosaic.barriers(key_slots, 1),
        "product_done": _mosaic.barriers(2 * tiling.consumers, 1),
    }


@dataclasses.dataclass(frozen=True)
class _Item:
    """The windows of all consumers, and some tiles of queries.

    Attributes:
      batch: Row of the batch.
      kv_head: Of the keys.
      first_tile: Of the queries, the first tile in the chunk.
      tiles: How many there are.
      first_block: Of the first consumer.
      first_position: Of the chunk's first query.
    """

    batch: jax.Array
    kv_head: jax.Array
    first_tile: jax.Array
    tiles: jax.Array
    first_block: jax.Array
    first_position: jax.Array

    def tokens(self, tile, sizes: Sizes):
        """The queries of a tile."""
        first = self.first_position - sizes.offset + tile * ROWS
        return pl.ds(pl.multiple_of(first, ROWS), ROWS)

    def unreached(self, first_block, sizes: Sizes):
        """How many tiles, the first ones, have no query that has reached a block."""
        begin = first_block * (sizes.cells * sizes.stride) - self.first_position
        tile = div_rem(jnp.maximum(begin, 0), ROWS)[0]
        return jnp.clip(tile - self.first_tile, 0, self.tiles)


def _for_items(step, sizes: Sizes, tiling: Tiling, function, carry):
    """Calls function(item, carry) -> carry for each item; returns the last carry.

    The latest queries come first, and of one run of tiles first all windows of one kv
    head: thread blocks that are at work at the same time need the same queries.
    """
    first_token = step[0] * sizes.chunk
    rows = jnp.minimum(sizes.queries - first_token, sizes.chunk)
    all_tiles = ceil_div(rows, ROWS)
    span = sizes.span * tiling.consumers
    first_position = first_token + sizes.offset

    def groups(run):
        # Of windows, that the last query of a run has reached.
        end = jnp.minimum((run + 1) * tiling.tiles, all_tiles) * ROWS
        return ceil_div(first_position + end, span)

    def settle(run, index):
        def is_beyond(state):
            run, index = state
            return (run >= 0) & (index >= groups(run) * sizes.kv_rows)

        def skip(state):
            run, index = state
            return run - 1, index - groups(run) * sizes.kv_rows

        return lax.while_loop(is_beyond, skip, (run, index))

    def body(state):
        run, index, carry = state
        kv_row, group = _div_rem(index, groups(run))
        batch, kv_head = div_rem(kv_row, sizes.kv_heads)
        first_tile = run * tiling.tiles
        item = _Item(
            batch=batch,
            kv_head=kv_head,
            first_tile=first_tile,
            tiles=jnp.minimum(all_tiles - first_tile, tiling.tiles),
            first_block=group * (sizes.blocks * tiling.consumers),
            first_position=first_position,
        )
        carry = function(item, carry)
        return *settle(run, index + tiling.programs), carry

    last_run = ceil_div(all_tiles, tiling.tiles) - 1
    state = *settle(last_run, lax.axis_index("program")), carry
    return lax.while_loop(lambda state: state[0] >= 0, body, state)[2]


def _div_rem(x, divisor):
    return lax.div(x, divisor), lax.rem(x, divisor)


def _kernel(*refs, sizes: Sizes, tiling: Tiling, **memory):
    """A thread block: its items program, program + programs, and so on."""
    query, key, lse, step, *_after, scores = refs
    memory = _Memory(**memory)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == tiling.consumers)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _Producer(query, key, memory, sizes, tiling).run(step)

    @pl.when(warpgroup < tiling.consumers)
    def _():
        registers = 240 if tiling.consumers == 2 else 160
        plgpu.set_max_registers(registers, action="increase")
        _Consumer(warpgroup, lse, scores, memory, sizes, tiling).run(step)


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Loads everything in the order in which the consumers need it."""

    query: Any
    key: Any
    memory: _Memory
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

        _for_items(step, self.sizes, tiling, load_item, (jnp.int32(0), jnp.int32(0)))
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


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """Scores the blocks of its columns.

    Attributes:
      me: Which of the thread block's consumers.
      lse: [B, N, T].
      scores: [B, K, L, P, W].
      memory: Shared memory and barriers.
      sizes: Those of the arguments.
      tiling: Tile sizes.
    """

    me: jax.Array
    lse: Any
    scores: Any
    memory: _Memory
    sizes: Sizes
    tiling: Tiling

    def run(self, step):
        """Writes the scores of all items."""
        memory, tiling = self.memory, self.tiling
        for slot in range(tiling.slots):
            plgpu.barrier_arrive(memory.query_empty.at[slot])
        for slot in range(tiling.key_slots):
            key_slot = slot * tiling.consumers + self.me
            plgpu.barrier_arrive(memory.key_empty.at[key_slot])

        # As if it had had a product before.
        @pl.when(self.me > 0)
        def _():
            self._end_product(1)

        def score_item(item, carry):
            slot, turn, key_slot = carry
            mine = key_slot * tiling.consumers + self.me
            first_block = item.first_block + self.me * self.sizes.blocks
            unreached = item.unreached(first_block, self.sizes)
            is_reached = unreached < item.tiles
            heads = unreached * self.sizes.group
            carry = lax.fori_loop(0, heads, self._skip_head, (slot, turn))

            @pl.when(is_reached)
            def _():
                plgpu.barrier_wait(memory.key_full.at[mine])

            def score_tile(i, carry):
                return self._score_tile(
                    item, item.first_tile + i, first_block, mine, carry
                )

            carry = lax.fori_loop(unreached, item.tiles, score_tile, carry)

            @pl.when(is_reached)
            def _():
                plgpu.barrier_arrive(memory.key_empty.at[mine])

            return *carry, _mosaic.following(key_slot, tiling.key_slots)

        carry = (jnp.int32(0),) * 3
        _, turn, _ = _for_items(step, self.sizes, tiling, score_item, carry)

        @pl.when(self.me < tiling.consumers - 1)
        def _():
            self._begin_product(turn)

    def _begin_product(self, turn):
        """Waits until another consumer has its product.

        That is the following consumer's last one, or for the last consumer the first
        one's, of the same turn. Turns are numbered 0 and 1 by turns.
        """
        if self.tiling.turns:
            is_last = self.me == self.tiling.consumers - 1
            turn = jnp.where(is_last, turn, 1 - turn)
            consumer = jnp.where(is_last, 0, self.me + 1)
            index = turn * self.tiling.consumers + consumer
            plgpu.barrier_wait(self.memory.product_done.at[index])

    def _end_product(self, turn):
        if self.tiling.turns:
            index = turn * self.tiling.consumers + self.me
            plgpu.barrier_arrive(self.memory.product_done.at[index])

    def _skip_head(self, _, carry):
        """Releases the queries of a head."""
        slot, turn = carry
        plgpu.barrier_wait(self.memory.query_full.at[slot])
        self._begin_product(turn)
        self._end_product(turn)
        plgpu.barrier_arrive(self.memory.query_empty.at[slot])
        return _mosaic.following(slot, self.tiling.slots), 1 - turn

    def _score_tile(self, item, tile, first_block, key_slot, carry):
        """Writes the scores of a tile of queries."""
        memory, sizes = self.memory, self.sizes
        key = memory.key.at[key_slot].transpose((1, 0))
        tokens = item.tokens(tile, sizes)
        columns = sizes.columns
        first_head = item.kv_head * sizes.group

        def add_head(head, carry):
            total, slot, turn = carry
            # On its way while the product is.
            base = plgpu.load(
                self.lse.at[item.batch, first_head + head, tokens],
                layout=COLUMN,
                optimized=False,
            )
            plgpu.barrier_wait(memory.query_full.at[slot])
            self._begin_product(turn)

            def multiply(logits):
                plgpu.wgmma(logits, memory.query.at[slot], key)
                return logits[...]

            accumulator = plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32)
            logits = pl.run_scoped(multiply, accumulator)
            self._end_product(turn)
            plgpu.barrier_arrive(memory.query_empty.at[slot])
            base = lax.broadcast_in_dim(base, logits.shape, [0])
            weights = jnp.exp2(logits * sizes.scale_log2 - base)
            total = weights if sizes.group == 1 else total + weights
            return total, _mosaic.following(slot, self.tiling.slots), 1 - turn

        if sizes.group == 1:
            total, *carry = add_head(0, (None, *carry))
        else:
            total = plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), MATRIX)
            total, *carry = lax.fori_loop(0, sizes.group, add_head, (total, *carry))
        self._write(item, tile, first_block, total)
        return tuple(carry)

    def _write(self, item, tile, first_block, weights):
        """Writes a tile's scores, given the sums over heads of its weights."""
        sizes, blocks = self.sizes, self.sizes.blocks
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=COLUMN)
        position = row + (item.first_position + tile * ROWS)
        # Windows that have ended.
        begun = jnp.maximum(position + (sizes.stride - sizes.kernel_size + 1), 0)
        seen = lax.div(begun, jnp.full_like(begun, sizes.stride))
        seen = jnp.minimum(seen, sizes.windows) - first_block * sizes.cells
        block = plgpu.broadcasted_iota(jnp.int32, (ROWS, blocks), 1, layout=MATRIX)
        shared = sizes.kernel_size // sizes.stride
        planes = [None] * self.scores.shape[3]
        for column in range(sizes.cells + sizes.before):
            # The last columns are of windows that start before their block.
            is_before = column >= sizes.cells
            cell = column - sizes.cells - sizes.before if is_before else column
            # What is out of sight may have become anything, NaN included.
            part = weights[:, column * blocks : (column + 1) * blocks]
            last = lax.broadcast_in_dim(seen - cell, part.shape, [0])
            visible = block * sizes.cells < last
            if is_before:
                visible &= block + first_block > 0
            part = jnp.where(visible, part, jnp.zeros_like(part))
            # Strides that a window shares with its block, and with the next one.
            inside = shared + cell if is_before else min(sizes.cells - cell, shared)
            for plane, factor in enumerate((inside, shared - inside)[: len(planes)]):
                if factor:
                    term = part * np.float32(factor)
                    before = planes[plane]
                    planes[plane] = term if before is None else before + term
        rows = pl.ds(tile * ROWS, ROWS)
        columns = pl.ds(first_block, blocks)
        for plane, x in enumerate(planes):
            target = self.scores.at[item.batch, item.kv_head, rows, plane, columns]
            _mosaic.store(target, x)
