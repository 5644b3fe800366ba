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
import numpy as np
from jax import lax

from jattn.pallas import _device, _mosaic
from jattn.pallas._mosaic import MATRIX
from jattn.pallas.flash.mosaic_backward import CONSUMERS, KEYS, LOG2_E, ROWS
from jattn.pallas.selective import mosaic_fragments as fragments

# How a consumer's threads share a number per row.
BY_ROW = MATRIX.reduce(1)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      pack: Query heads of a kv head in a thread block; 1, 2 or 4.
      kv_heads: Kv heads of a thread block, 1 or 2.
      slots: Tiles of keys in flight.
      programs: Thread blocks.
    """

    pack: int
    kv_heads: int
    slots: int
    programs: int

    @property
    def members(self) -> int:
        """Query heads of a thread block, M."""
        return self.pack * self.kv_heads


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
    sizes = _Sizes(
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
        memory=_memory_types(sizes, query.dtype),
        grid={"program": min(tiling.programs, sizes.items)},
        consumers=CONSUMERS,
        name="selective_query_gradient",
    )
    return gradient


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the kernel knows of its arguments when it is compiled.

    Attributes:
      queries: T.
      offset: Position of the first query.
      batch: B.
      parts: N / M.
      group: Query heads of a kv head.
      tiles: Items of work of one row of the batch and one part.
      block: Queries that share a list of tiles of keys.
      width: Of keys and values.
      scale: Factor of the logits.
      tiling: Tile sizes.
    """

    queries: int
    offset: int
    batch: int
    parts: int
    group: int
    tiles: int
    block: int
    width: int
    scale: float
    tiling: Tiling

    @property
    def tokens(self) -> int:
        """Tokens of a consumer."""
        return ROWS // self.tiling.pack

    @property
    def item_tokens(self) -> int:
        """Tokens of an item of work."""
        return CONSUMERS * self.tokens

    @property
    def items(self) -> int:
        """Items of work."""
        return self.tiles * self.parts * self.batch


@dataclasses.dataclass(frozen=True)
class _Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      query: [CONSUMERS, kv heads, ROWS, H].
      out_gradient: [CONSUMERS, kv heads, ROWS, H].
      statistics: fp32 [CONSUMERS, kv heads, 2, ROWS].
      key: [slots, kv heads, KEYS, H].
      value: [slots, kv heads, KEYS, H].
      bias: fp32 [slots, CONSUMERS TOKENS, KEYS], in fragments.
      result: [CONSUMERS, kv heads, ROWS, H].
      weights: [CONSUMERS, ROWS, KEYS], dS in the interpreter, else None.
      rows_full: The rows have been loaded.
      rows_empty: The consumers have them in registers.
      full: Of each slot.
      empty: Of each slot.
    """

    query: Any
    out_gradient: Any
    statistics: Any
    key: Any
    value: Any
    bias: Any
    result: Any
    weights: Any
    rows_full: Any
    rows_empty: Any
    full: Any
    empty: Any


def _memory_types(sizes: _Sizes, dtype: Any) -> dict[str, Any]:
    """The types of _Memory's attributes."""
    matrix = functools.partial(_mosaic.matrix, dtype=dtype)
    kv_heads, slots = sizes.tiling.kv_heads, sizes.tiling.slots
    rows = matrix(CONSUMERS, kv_heads, ROWS, sizes.width)
    keys = matrix(slots, kv_heads, KEYS, sizes.width)
    bias = (
        slots,
        sizes.item_tokens // fragments.ROWS,
        KEYS // fragments.COLUMNS,
        fragments.NUMBERS,
    )
    return {
        "query": rows,
        "out_gradient": rows,
        "statistics": plgpu.SMEM((CONSUMERS, kv_heads, 2, ROWS), jnp.float32),
        "key": keys,
        "value": keys,
        "bias": plgpu.SMEM(bias, jnp.float32),
        "result": rows,
        "weights": matrix(CONSUMERS, ROWS, KEYS) if _mosaic.interpretation() else None,
        "rows_full": _mosaic.barriers(
            CONSUMERS, (2 * sizes.tiling.pack + 1) * kv_heads
        ),
        "rows_empty": _mosaic.barriers(CONSUMERS, 1),
        "full": _mosaic.barriers(slots, 2 * kv_heads + 1),
        "empty": _mosaic.barriers(slots, CONSUMERS),
    }


@dataclasses.dataclass(frozen=True)
class _Item:
    """An item of work: adjacent tokens of the members of one part.

    Attributes:
      batch: Row of the batch.
      part: Of the query heads.
      chunk_token: First token, in the chunk.
      first_token: The same, of all queries.
      block: Of queries.
      skipped: Tiles of keys in the past that are skipped.
      whole: Tiles of keys not skipped and seen by all tokens.
      steps: Tiles of keys not skipped and seen by any.
    """

    batch: jax.Array
    part: jax.Array
    chunk_token: jax.Array
    first_token: jax.Array
    block: jax.Array
    skipped: Any
    whole: jax.Array
    steps: jax.Array


def _item(index, region, live, sizes: _Sizes) -> _Item:
    """The item of that index; late tokens, which see most keys, come first.

    Those of the same tokens are neighbours: they read the same F.
    """
    # Found out where it is needed, rather than kept in registers all along.
    index = lax.optimization_barrier(index)
    index, part = _mosaic.div_rem(index, sizes.parts)
    index, batch = _mosaic.div_rem(index, sizes.batch)
    chunk_token = (sizes.tiles - 1 - index) * sizes.item_tokens
    first_token = region[0] + chunk_token
    whole = _mosaic.div_rem(first_token + (sizes.offset + 1), KEYS)[0]
    end = jnp.minimum(first_token + sizes.item_tokens, sizes.queries) + sizes.offset
    end = _mosaic.ceil_div(end, KEYS)
    block, skipped = jnp.int32(0), 0
    if live:
        tiles, counts = live
        block = _mosaic.div_rem(first_token, sizes.block)[0]
        block = jnp.minimum(block, counts.shape[1] - 1)
        skipped = tiles.shape[2] - counts[batch, block]
    end = jnp.where(first_token < sizes.queries, end - skipped, 0)
    return _Item(
        batch=batch,
        part=part,
        chunk_token=chunk_token,
        first_token=first_token,
        block=block,
        skipped=skipped,
        whole=jnp.minimum(whole - skipped, end),
        steps=end,
    )


def _kernel(*refs, sizes: _Sizes, **memory):
    """A thread block: items program, program + programs, and so on."""
    query, key, value, bias, statistics, out_gradient, region, *live, gradient = refs
    memory = _Memory(**memory)
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    programs = lax.axis_size("program")
    rounds = _mosaic.ceil_div(sizes.items - program, programs)

    def item(i):
        return _item(program + i * programs, region, live, sizes)

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
        consumer = _Consumer(warpgroup, gradient, memory, sizes)
        consumer.start()
        lax.fori_loop(0, rounds, functools.partial(consumer.attend, item), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _for_members(sizes: _Sizes, function) -> None:
    """Calls a function with each member, its kv head, and its rows of a tile."""

    # Unrolled, it would take more registers than a producer has.
    @pl.loop(np.int32(0), np.int32(sizes.tiling.members))
    def _(member):
        kv_head, i = _mosaic.div_rem(member, sizes.tiling.pack)
        first = pl.multiple_of(i * sizes.tokens, sizes.tokens)
        function(member, kv_head, pl.ds(first, sizes.tokens))


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
    memory: _Memory
    sizes: _Sizes

    def load(self, item: _Item, slot):
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

            _for_members(sizes, load_member)
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


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """Adds up the gradient of its tiles of rows.

    Attributes:
      me: Which of the consumers.
      target: Where the gradient goes.
      memory: Shared memory and barriers.
      sizes: Those of the arguments.
    """

    me: jax.Array
    target: Any
    memory: _Memory
    sizes: _Sizes

    def start(self):
        """Declares all memory empty."""
        plgpu.barrier_arrive(self.memory.rows_empty.at[self.me])
        for slot in range(self.sizes.tiling.slots):
            plgpu.barrier_arrive(self.memory.empty.at[slot])

    def attend(self, get_item, index, slot):
        """Writes the gradient of an item's rows, and returns the next slot."""
        memory, sizes, me = self.memory, self.sizes, self.me
        item = get_item(index)
        plgpu.barrier_wait(memory.rows_full.at[me])
        kv_heads = range(sizes.tiling.kv_heads)
        rows = [
            [
                plgpu.load(x.at[me, i], layout=MATRIX)
                for x in (memory.query, memory.out_gradient)
            ]
            for i in kv_heads
        ]
        per_row = [
            [
                plgpu.load(memory.statistics.at[me, i, j], layout=BY_ROW)
                for j in range(2)
            ]
            for i in kv_heads
        ]
        if memory.weights is None:
            # The next copy to these must not overtake the loads from them.
            plgpu.commit_smem()
            plgpu.barrier_arrive(memory.rows_empty.at[me])

        def attend_step(step, carry, edge):
            slot, totals = carry
            plgpu.barrier_wait(memory.full.at[slot])
            seen = self._seen(item, step) if edge else None
            totals = tuple(
                self._attend_step(slot, i, rows[i], per_row[i], totals[i], seen)
                for i in kv_heads
            )
            plgpu.barrier_arrive(memory.empty.at[slot])
            return _mosaic.following(slot, sizes.tiling.slots), totals

        carry = slot, tuple(_mosaic.zeros((ROWS, sizes.width)) for _ in kv_heads)
        plain, edge = (functools.partial(attend_step, edge=x) for x in (False, True))
        carry = lax.fori_loop(0, item.whole, plain, carry)
        slot, totals = lax.fori_loop(item.whole, item.steps, edge, carry)
        if memory.weights is not None:
            plgpu.commit_smem()
            plgpu.barrier_arrive(memory.rows_empty.at[me])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i in kv_heads:
            tile = memory.result.at[me, i]
            tile[...] = (totals[i] * sizes.scale).astype(tile.dtype)
        plgpu.commit_smem()
        item = get_item(index)
        first = pl.multiple_of(item.chunk_token + me * sizes.tokens, sizes.tokens)

        def store_member(member, kv_head, rows):
            head = item.part * sizes.tiling.members + member
            target = self.target.at[item.batch, pl.ds(first, sizes.tokens), head]
            plgpu.copy_smem_to_gmem(memory.result.at[me, kv_head, rows], target)

        _for_members(sizes, store_member)
        return slot

    def _seen(self, item: _Item, step):
        """Which keys of a step each row sees; its tile is not in the past."""
        tokens = self.sizes.tokens
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW)
        first_key = (step + item.skipped) * KEYS
        first = item.first_token + self.me * tokens + self.sizes.offset - first_key
        last = (row & (tokens - 1)) + first
        column = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=MATRIX)
        return column <= lax.broadcast_in_dim(last, column.shape, [0])

    def _attend_step(self, slot, kv_head, rows, per_row, total, seen):
        """Adds what a step contributes in one kv head."""
        memory, sizes = self.memory, self.sizes
        high = sizes.tokens // fragments.ROWS
        first = pl.multiple_of(self.me * high, high)
        bias = fragments.load(memory.bias.at[slot, pl.ds(first, high)], KEYS)

        # Made where they are used: a constant index must not enter run_state from
        # outside.
        def key():
            return memory.key.at[slot, kv_head]

        def value():
            return memory.value.at[slot, kv_head]

        def by_row(which):
            return lax.broadcast_in_dim(per_row[which], (ROWS, KEYS), [0])

        def weigh(logits):
            if seen is not None:
                logits = jnp.where(seen, logits, -jnp.inf)
            return jnp.exp2(logits * (sizes.scale * LOG2_E) - by_row(0))

        if memory.weights is not None:
            me = self.me
            query = memory.query.at[me, kv_head]
            logits = _mosaic.product(query, key().transpose((1, 0))) + bias
            out_gradient = memory.out_gradient.at[me, kv_head]
            gradient = _mosaic.product(out_gradient, value().transpose((1, 0)))
            gradient = weigh(logits) * (gradient + by_row(1))
            memory.weights[me] = gradient.astype(memory.key.dtype)
            plgpu.commit_smem()
            return total + _mosaic.product(memory.weights.at[me], key())

        def multiply(references):
            total, logits, gradient = references
            plgpu.wgmma(logits, rows[0], key().transpose((1, 0)))
            plgpu.wgmma(gradient, rows[1], value().transpose((1, 0)))
            weights = weigh(plgpu.wgmma_accumulator_load(logits, wait_n=1))
            gradient = weights * plgpu.wgmma_accumulator_load(gradient, wait_n=0)
            plgpu.wgmma(total, gradient.astype(memory.key.dtype), key())

        initial = total, bias, by_row(1)
        total, _, _ = pl.run_state(multiply)(
            tuple(plgpu.WGMMAAccumulatorRef.init(x) for x in initial)
        )
        return total
