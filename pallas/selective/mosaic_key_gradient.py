"""Gradients of keys, values and logits in Mosaic GPU for Hopper.

A thread block has a tile of keys in some kv heads, most often one, and some query heads
of each: the members. It goes through the tokens that see the keys, a few at a time;
these times the query heads of a kv head are the rows of a tile, heads first:

    S = Q K' - F / scale    P = exp(scale S - lse)    dV += P' dO
    D = dO V' - delta    dS = P ∘ D    dK += dS' Q    dF -= Σ_members dS

Each of two consumers (warpgroups that compute) has half of the keys, and keeps dK and
dV in registers; a producer loads a ring of tiles of rows, and of F, into shared memory.
All is transposed: P and dS enter their products from registers, and a thread has all
members of a token, so that it adds up their dS by itself.

Letters as in `jattn.pallas.selective.triton`; M members, R rows of a tile in a kv head.
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
from jattn.pallas.flash.mosaic_backward import CONSUMERS, KEYS, LOG2_E
from jattn.pallas.selective import mosaic_fragments as fragments

# Rows of a tile in all kv heads, and keys. More would not fit into registers.
ROWS = 64
TILE_KEYS = CONSUMERS * KEYS

# How a consumer's threads share a number per key, and one per row.
BY_KEY = MATRIX.reduce(1)
BY_ROW = MATRIX.reduce(0)

# What one more slice costs, as a part of the whole: its results are to be added.
SLICE_COST = 0.01


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      pack: Query heads of a kv head in a thread block; a power of two, at most 8.
      kv_heads: Kv heads of a thread block, 1 or 2.
      slots: Tiles of rows in flight.
      programs: Thread blocks that the tokens are divided among, at most, unless there
        are more tiles.
      ahead: Whether the first products of some rows are under way before the last ones
        of the rows before, which takes registers.
    """

    pack: int
    kv_heads: int
    slots: int
    programs: int
    ahead: bool

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return TILE_KEYS

    @property
    def members(self) -> int:
        """Query heads of a thread block, M."""
        return self.pack * self.kv_heads

    @property
    def rows(self) -> int:
        """Rows of a tile in a kv head, R."""
        return ROWS // self.kv_heads


def tiling(width: int, heads: int, group: int) -> Tiling:
    """The heuristic one, for so many query heads, of which a group shares a kv head."""
    pack = math.gcd(group, 8)
    kv_heads = math.gcd(heads // group, 2) if pack == 1 and width <= 64 else 1
    tokens = ROWS // (pack * kv_heads)
    keys = 4 * TILE_KEYS * width * kv_heads
    slot = 4 * ROWS * width + 4 * TILE_KEYS * tokens + 8 * ROWS
    return Tiling(
        pack=pack,
        kv_heads=kv_heads,
        slots=min((_mosaic.SHARED_MEMORY - keys) // slot, 6),
        programs=_device.multiprocessors(),
        ahead=width <= 64,
    )


def key_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    per_row: jax.Array,
    out_gradient: jax.Array,
    ends: jax.Array,
    region: jax.Array,
    *,
    queries: int,
    offset: int,
    scale: float,
    keep: bool,
    tiling: Tiling,
) -> tuple[jax.Array, ...]:
    """What some query heads at a time give the gradients of a chunk of keys.

    In the interpreter P and dS are not operands in registers, which it does not know,
    but pass through shared memory, and products are not added to; all else is the same.

    Args:
      query: [B, rows, N, H], bf16 or fp16, where H is 64 or 128, and rows is T as of
        whole blocks.
      key: [B, columns, K, H], of all chunks.
      value: [B, columns, K, H].
      bias: -F / scale, [B, chunk, rows] in fragments.
      per_row: `Cotangents.statistics` by tiles of `tiling.rows`.
      out_gradient: [B, rows, N, H].
      ends: int32 [B, columns / TILE_KEYS], one past the last query that needs a tile.
      region: int32 [2], where the second is the first key of the chunk.
      queries: T.
      offset: Position of the first query.
      scale: Factor of the logits.
      keep: Whether the gradient of S is wanted.
      tiling: Tile sizes.

    Returns:
      Gradients of key and value [slices, B, chunk, N / pack, H], partial sums of them
      in fp32 or, if there is but one for each kv head, of their dtype. If it is kept
      also that of S, summed over the members in fp32, [N / M, B, chunk, rows] in
      fragments. Ahead, this is rounded as for its products, and its sums over the
      tokens of each tile follow, fp32 [N / M, B, rows / tokens, chunk]. Both are
      written where any token of a tile sees one of KEYS keys and comes before their
      end.

    Raises:
      ValueError: The tiling's heads do not divide those of the arguments.
    """
    batch, chunk, rows = bias.shape
    heads, width = query.shape[2:]
    group = heads // key.shape[2]
    if group % tiling.pack or (tiling.kv_heads > 1 and group > tiling.pack):
        raise ValueError(f"{tiling} does not fit {group} query heads of a kv head")
    parts, tiles = heads // tiling.members, chunk // TILE_KEYS
    sizes = _Sizes(
        offset=offset,
        parts=parts,
        group=group,
        tiles=tiles,
        slices=_slices(batch * parts * tiles, queries, tiling),
        width=width,
        scale=scale,
        keep=keep,
        tiling=tiling,
    )
    folded = chunk // fragments.ROWS, rows // fragments.COLUMNS, fragments.NUMBERS
    operands = (
        query,
        key,
        value,
        bias.reshape(batch, *folded),
        per_row,
        out_gradient,
        ends,
        region,
    )
    shape = sizes.slices, batch, chunk, heads // tiling.pack, width
    whole = sizes.slices == 1 and tiling.pack == group
    types = [jax.ShapeDtypeStruct(shape, key.dtype if whole else jnp.float32)] * 2
    if keep:
        dtype = query.dtype if tiling.ahead else jnp.float32
        types.append(jax.ShapeDtypeStruct((parts, batch, *folded), dtype))
    if keep and tiling.ahead:
        shape = parts, batch, rows // sizes.tokens, chunk
        types.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    key_gradient, value_gradient, *kept = _mosaic.call(
        functools.partial(_kernel, sizes=sizes),
        *operands,
        outputs=types,
        memory=_memory_types(sizes, query.dtype),
        grid={"program": tiles * parts * sizes.slices * batch},
        consumers=CONSUMERS,
        name="selective_key_gradient",
    )
    if keep:
        kept[0] = kept[0].reshape(parts, batch, chunk, rows)
    return key_gradient, value_gradient, *kept


def _slices(tiles, queries, tiling):
    """Among how many thread blocks to divide the tokens of each of so many tiles."""

    def cost(slices):
        waves = -(-tiles * slices // tiling.programs)
        return waves / slices * (1 + SLICE_COST * slices)

    most = max(1, min(tiling.programs, queries * tiling.members // (8 * ROWS)))
    return min(range(1, most + 1), key=cost)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the kernel knows of its arguments when it is compiled.

    Attributes:
      offset: Position of the first query.
      parts: N / M.
      group: Query heads of a kv head.
      tiles: Tiles of keys of the chunk.
      slices: Thread blocks that share the tokens of a tile.
      width: Of keys and values.
      scale: Factor of the logits.
      keep: Whether the gradient of S is wanted.
      tiling: Tile sizes.
    """

    offset: int
    parts: int
    group: int
    tiles: int
    slices: int
    width: int
    scale: float
    keep: bool
    tiling: Tiling

    @property
    def rows(self) -> int:
        """Rows of a tile in a kv head, R."""
        return self.tiling.rows

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return ROWS // self.tiling.members


@dataclasses.dataclass(frozen=True)
class _Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      key: [kv heads, CONSUMERS, KEYS, H].
      value: [kv heads, CONSUMERS, KEYS, H].
      query: [slots, kv heads, R, H].
      out_gradient: [slots, kv heads, R, H].
      bias: fp32 [slots, TILE_KEYS, tokens], in fragments.
      statistics: fp32 [slots, kv heads, 2, R].
      weights: [CONSUMERS, KEYS, R], P and dS in the interpreter, else None.
      keys_full: Keys and values have been loaded.
      full: Of each slot.
      empty: Of each slot.
    """

    key: Any
    value: Any
    query: Any
    out_gradient: Any
    bias: Any
    statistics: Any
    weights: Any
    keys_full: Any
    full: Any
    empty: Any


def _memory_types(sizes: _Sizes, dtype: Any) -> dict[str, Any]:
    """The types of _Memory's attributes."""
    tiling = sizes.tiling
    kv_heads, slots = tiling.kv_heads, tiling.slots

    def matrix(*shape):
        # The rows of a tile have to be whole units of the swizzle.
        swizzle = sizes.rows * jnp.dtype(dtype).itemsize
        tile = plgpu.TilingTransform((8, sizes.rows))  # pyright: ignore
        swizzle = plgpu.SwizzleTransform(swizzle)  # pyright: ignore
        return plgpu.SMEM(shape, dtype, transforms=(tile, swizzle))

    keys = matrix(kv_heads, CONSUMERS, KEYS, sizes.width)
    rows = matrix(slots, kv_heads, sizes.rows, sizes.width)
    bias = (
        slots,
        TILE_KEYS // fragments.ROWS,
        sizes.tokens // fragments.COLUMNS,
        fragments.NUMBERS,
    )
    return {
        "key": keys,
        "value": keys,
        "query": rows,
        "out_gradient": rows,
        "bias": plgpu.SMEM(bias, jnp.float32),
        "statistics": plgpu.SMEM((slots, kv_heads, 2, sizes.rows), jnp.float32),
        "weights": matrix(CONSUMERS, KEYS, sizes.rows)
        if _mosaic.interpretation()
        else None,
        "keys_full": _mosaic.barriers(1, 2 * CONSUMERS * kv_heads),
        "full": _mosaic.barriers(slots, 2 * tiling.members + kv_heads + 1),
        "empty": _mosaic.barriers(slots, CONSUMERS),
    }


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What a thread block does.

    Attributes:
      batch: Row of the batch.
      part: Of the query heads.
      slice: Of the tokens.
      tile_key: First key of the tile, in the chunk.
      first_key: The same, of all keys.
      begin: First tile of tokens.
      end: One past the last.
    """

    batch: jax.Array
    part: jax.Array
    slice: jax.Array
    tile_key: jax.Array
    first_key: jax.Array
    begin: jax.Array
    end: jax.Array


def _unit(ends, region, sizes: _Sizes) -> _Unit:
    """The work of this thread block.

    Those of the same tokens are neighbours: they read the same rows, or the same F.
    """
    # Found out where it is needed, rather than kept in registers all along.
    program = lax.optimization_barrier(lax.axis_index("program"))
    program, part = _mosaic.div_rem(program, sizes.parts)
    program, tile = _mosaic.div_rem(program, sizes.tiles)
    batch, index = _mosaic.div_rem(program, sizes.slices)
    first_key = region[1] + tile * TILE_KEYS
    begin = jnp.maximum(first_key - sizes.offset, 0)
    begin = _mosaic.div_rem(begin, sizes.tokens)[0]
    end = ends[batch, _mosaic.div_rem(first_key, TILE_KEYS)[0]]
    end = _mosaic.ceil_div(end, sizes.tokens)
    size = _mosaic.ceil_div(jnp.maximum(end - begin, 0), sizes.slices)
    begin += index * size
    return _Unit(
        batch=batch,
        part=part,
        slice=index,
        tile_key=tile * TILE_KEYS,
        first_key=first_key,
        begin=begin,
        end=jnp.maximum(jnp.minimum(begin + size, end), begin),
    )


def _kernel(*refs, sizes: _Sizes, **memory):
    """A thread block: some tokens of one tile of keys in some query heads."""
    query, key, value, bias, statistics, out_gradient, ends, region, *results = refs
    memory = _Memory(**memory)
    warpgroup = lax.axis_index("warpgroup")
    get_unit = functools.partial(_unit, ends, region, sizes)

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        producer = _Producer(query, out_gradient, bias, statistics, memory, sizes)
        unit = get_unit()
        producer.load_keys(unit, key, value)
        producer.load_rows(unit)

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _Consumer(warpgroup, get_unit, memory, sizes).run(*results)


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Loads everything in the order in which the consumers need it."""

    query: Any
    out_gradient: Any
    bias: Any
    statistics: Any
    memory: _Memory
    sizes: _Sizes

    def load_keys(self, unit: _Unit, key, value):
        """Loads keys and values."""
        tiling = self.sizes.tiling
        for i in range(tiling.kv_heads):
            head = unit.part * tiling.members + i * tiling.pack
            kv_head = _mosaic.div_rem(head, self.sizes.group)[0]
            for source, target in ((key, self.memory.key), (value, self.memory.value)):
                for j in range(CONSUMERS):
                    first = pl.multiple_of(unit.first_key + j * KEYS, KEYS)
                    plgpu.copy_gmem_to_smem(
                        source.at[unit.batch, pl.ds(first, KEYS), kv_head],
                        target.at[i, j],
                        self.memory.keys_full,
                    )

    def load_rows(self, unit: _Unit):
        """Loads tiles of rows, and waits until the consumers have emptied all."""
        memory, sizes, tiling = self.memory, self.sizes, self.sizes.tiling
        tokens = sizes.tokens
        high = TILE_KEYS // fragments.ROWS
        wide = tokens // fragments.COLUMNS
        first_fragment = _mosaic.div_rem(unit.tile_key, fragments.ROWS)[0]
        fragment_rows = pl.ds(pl.multiple_of(first_fragment, high), high)

        def load_tile(i, slot):
            full = memory.full.at[slot]
            plgpu.barrier_wait(memory.empty.at[slot])
            rows = pl.ds(pl.multiple_of(i * sizes.rows, sizes.rows), sizes.rows)
            for kv_head in range(tiling.kv_heads):
                part = unit.part * tiling.kv_heads + kv_head
                plgpu.copy_gmem_to_smem(
                    self.statistics.at[unit.batch, part, :, rows],
                    memory.statistics.at[slot, kv_head],
                    full,
                )
            columns = pl.ds(pl.multiple_of(i * wide, wide), wide)
            plgpu.copy_gmem_to_smem(
                self.bias.at[unit.batch, fragment_rows, columns],
                memory.bias.at[slot],
                full,
            )
            first_token = pl.multiple_of(i * tokens, tokens)

            # Unrolled, it would take more registers than a producer has.
            @pl.loop(np.int32(0), np.int32(tiling.members))
            def _(member):
                kv_head, i = _mosaic.div_rem(member, tiling.pack)
                rows = pl.ds(pl.multiple_of(i * tokens, tokens), tokens)
                head = unit.part * tiling.members + member
                for source, target in (
                    (self.query, memory.query),
                    (self.out_gradient, memory.out_gradient),
                ):
                    plgpu.copy_gmem_to_smem(
                        source.at[unit.batch, pl.ds(first_token, tokens), head],
                        target.at[slot, kv_head, rows],
                        full,
                    )

            return _mosaic.following(slot, sizes.tiling.slots)

        lax.fori_loop(unit.begin, unit.end, load_tile, jnp.int32(0))
        for slot in range(sizes.tiling.slots):
            plgpu.barrier_wait(memory.empty.at[slot])


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """Adds up the gradients of KEYS keys and values.

    Attributes:
      me: Which of the consumers.
      get_unit: Returns the thread block's work.
      memory: Shared memory and barriers.
      sizes: Those of the arguments.
    """

    me: jax.Array
    get_unit: Any
    memory: _Memory
    sizes: _Sizes

    def run(self, key_target, value_target, *kept):
        """Writes the gradients of key, value and logits there."""
        gradients = self._add_up(kept)
        unit = self.get_unit()
        keys = pl.ds(unit.tile_key + self.me * KEYS, KEYS)
        for i, (key_gradient, value_gradient) in enumerate(gradients):
            part = unit.part * len(gradients) + i
            for target, gradient in (
                (key_target, key_gradient * self.sizes.scale),
                (value_target, value_gradient),
            ):
                place = target.at[unit.slice, unit.batch, keys, part]
                _mosaic.store(place, gradient.astype(target.dtype))

    def _add_up(self, kept):
        """Gradients of key, but for the factor scale, and value, for each kv head."""
        memory, sizes = self.memory, self.sizes
        slots, ahead = sizes.tiling.slots, sizes.tiling.ahead
        # Ahead, a slot is emptied by the step after its own, and the last one is
        # declared empty by the first step.
        for slot in range(slots - ahead):
            plgpu.barrier_arrive(memory.empty.at[slot])
        unit = self.get_unit()
        first_key = unit.first_key + self.me * KEYS
        # The first token that sees the first key, and that sees all of them.
        tokens = (jnp.maximum(first_key + x - sizes.offset, 0) for x in (0, KEYS - 1))
        unseen, whole = tokens
        unseen = _mosaic.div_rem(unseen, sizes.tokens)[0]
        unseen = jnp.clip(unseen, unit.begin, unit.end)
        whole = jnp.clip(_mosaic.ceil_div(whole, sizes.tokens), unseen, unit.end)

        def preceding(slot):
            return jnp.where(slot == 0, slots, slot) - 1

        def release(slot):
            emptied = preceding(slot) if ahead else slot
            plgpu.barrier_arrive(memory.empty.at[emptied])

        def skip(_, carry):
            slot, *sums = carry
            plgpu.barrier_wait(memory.full.at[slot])
            release(slot)
            return _mosaic.following(slot, slots), *sums

        def step(i, carry, edge):
            slot, gradients, pending = carry
            plgpu.barrier_wait(memory.full.at[slot])
            seen = self._seen(first_key, i) if edge else None
            if ahead:
                # What is pending at first is 0, and multiplied by what there is.
                before = jnp.where(i == unseen, slot, preceding(slot))
                gradients, pending, gradient = self._step_ahead(
                    slot, before, gradients, pending, seen, lambda: release(slot)
                )
            else:
                gradients, gradient = self._step(slot, gradients, seen)
                release(slot)
            if kept:
                self._keep(unit, i, gradient, *kept)
            return _mosaic.following(slot, slots), gradients, pending

        def finish(_, carry):
            slot, gradients, pending = carry
            return slot, self._add(preceding(slot), gradients, pending), pending

        zeros = _mosaic.zeros((KEYS, sizes.width))
        gradients = ((zeros, zeros),) * sizes.tiling.kv_heads
        pending = ()
        if ahead:
            pending = (_mosaic.zeros((KEYS, sizes.rows)).astype(self.dtype),) * 2
        carry = jnp.int32(0), gradients, pending
        plgpu.barrier_wait(memory.keys_full)
        carry = lax.fori_loop(unit.begin, unseen, skip, carry)
        edge, plain = (functools.partial(step, edge=x) for x in (True, False))
        carry = lax.fori_loop(unseen, whole, edge, carry)
        carry = lax.fori_loop(whole, unit.end, plain, carry)
        if ahead:
            some = jnp.minimum(unit.end - unseen, 1)
            carry = lax.fori_loop(np.int32(0), some, finish, carry)
            release(carry[0])
        return carry[1]

    @property
    def dtype(self):
        """That of keys and queries."""
        return self.memory.query.dtype

    def _seen(self, first_key, tile):
        """Which rows of a tile see which key."""
        tokens = self.sizes.tokens
        shape = KEYS, self.sizes.rows
        row = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
        token = (row & (tokens - 1)) + (tile * tokens + self.sizes.offset)
        key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
        return key + first_key <= token

    def _keep(self, unit: _Unit, tile, gradient, kept, sums=None):
        """Writes the gradient of logits, summed over the members, and its sums."""
        high = KEYS // fragments.ROWS
        wide = self.sizes.tokens // fragments.COLUMNS
        first = _mosaic.div_rem(unit.tile_key, fragments.ROWS)[0] + self.me * high
        rows, columns = pl.ds(first, high), pl.ds(tile * wide, wide)
        target = kept.at[unit.part, unit.batch, rows, columns]
        fragments.store(target, gradient.astype(target.dtype))
        if sums is not None:
            keys = pl.ds(unit.tile_key + self.me * KEYS, KEYS)
            place = sums.at[unit.part, unit.batch, tile, keys]
            _mosaic.store(place, jnp.sum(gradient, axis=1))

    def _step(self, slot, gradients, seen):
        """Adds what a tile of rows contributes, of which these are seen, or all.

        Also returns the gradient of logits, summed over the members, if it is kept.
        """
        memory, sizes = self.memory, self.sizes
        kv_heads = range(sizes.tiling.kv_heads)
        bias = self._bias(slot)
        if memory.weights is not None:
            sums, of_logits = [], []
            for i, pair in enumerate(gradients):
                weights, gradient = self._interpreted(slot, i, seen)
                of_logits.append(gradient)
                sums.append(self._interpreted_sums(slot, i, pair, weights, gradient))
            return tuple(sums), self._total(of_logits)

        def multiply(references):
            gradients, logits, gradient, kept = references
            ahead = 2 * len(kv_heads) - 1
            for i in kv_heads:
                plgpu.wgmma(logits[i], self._key(i), self._query(slot, i, True))
            for i in kv_heads:
                plgpu.wgmma(gradient[i], self._value(i), self._out(slot, i, True))
            weights, of_logits = [], []
            for i in kv_heads:
                x = plgpu.wgmma_accumulator_load(logits[i], wait_n=ahead)
                weights.append(self._weigh(slot, i, x, seen))
                x = weights[i].astype(self.dtype)
                plgpu.wgmma(gradients[i][1], x, self._out(slot, i))
            for i in kv_heads:
                x = plgpu.wgmma_accumulator_load(gradient[i], wait_n=ahead)
                of_logits.append(weights[i] * (x + self._per_row(slot, i, 1)))
                x = of_logits[i].astype(self.dtype)
                plgpu.wgmma(gradients[i][0], x, self._query(slot, i))
            for reference in kept:
                reference[...] = self._total(of_logits)

        accumulators = (
            gradients,
            [bias for _ in kv_heads],
            [_mosaic.zeros((KEYS, sizes.rows)) for _ in kv_heads],
        )
        accumulators = jax.tree.map(plgpu.WGMMAAccumulatorRef.init, accumulators)
        kept = [_mosaic.zeros((KEYS, sizes.tokens))] if sizes.keep else []
        gradients, _, _, kept = pl.run_state(multiply)((*accumulators, kept))
        return gradients, kept[0] if kept else None

    def _step_ahead(self, slot, before, gradients, pending, seen, release):
        """Begins what a tile of rows contributes, and adds what is pending.

        That are the weights and gradients of logits of the last kv head in the slot
        before, which is then released. Those of this slot are returned with the sums,
        and the gradient of logits, summed over the members.
        """
        gradients, of_logits = list(gradients), []
        for i in range(len(gradients)):
            source = slot if i else before
            pair, weights, gradient = self._multiply(
                slot, i, source, gradients[i - 1], pending, seen
            )
            gradients[i - 1] = pair
            pending = weights.astype(self.dtype), gradient.astype(self.dtype)
            of_logits.append(gradient)
            if i == 0:
                release()
        return tuple(gradients), pending, self._total(of_logits)

    def _multiply(self, slot, i, before, pair, pending, seen):
        """The weights and gradient of the logits of a tile of rows in a kv head.

        Those of the kv head before it, in the slot `before`, are meanwhile multiplied
        and added to the pair of gradients, which is returned first.
        """
        last = (i or self.sizes.tiling.kv_heads) - 1
        if self.memory.weights is not None:
            pair = self._interpreted_sums(before, last, pair, *pending)
            return pair, *self._interpreted(slot, i, seen)

        def multiply(logits, gradient, *sums):
            logits[...] = self._bias(slot)
            for target, x in zip(sums, pair, strict=True):
                target[...] = x
            plgpu.wgmma(logits, self._key(i), self._query(slot, i, True))
            gradient[...] = self._per_row(slot, i, 1)
            plgpu.wgmma(gradient, self._value(i), self._out(slot, i, True))
            self._wgmma_pending(sums, before, last, pending)
            x = plgpu.wgmma_accumulator_load(logits, wait_n=3)
            weights = self._weigh(slot, i, x, seen)
            x = weights * plgpu.wgmma_accumulator_load(gradient, wait_n=2)
            return weights, x, *(target[...] for target in sums)

        square = [plgpu.WGMMAAccumulatorRef((KEYS, self.sizes.rows), jnp.float32)] * 2
        wide = [plgpu.WGMMAAccumulatorRef(x.shape, jnp.float32) for x in pair]
        results = pl.run_scoped(multiply, *square, *wide)
        # The registers of what is being multiplied must not change before.
        weights, gradient, *pair = lax.optimization_barrier(results)
        return tuple(pair), weights, gradient

    def _add(self, slot, gradients, pending):
        """Adds what is pending, of a slot."""
        last, pair = len(gradients) - 1, gradients[-1]
        if self.memory.weights is not None:
            pair = self._interpreted_sums(slot, last, pair, *pending)
        else:
            accumulators = tuple(plgpu.WGMMAAccumulatorRef.init(x) for x in pair)
            pair = pl.run_state(
                lambda sums: self._wgmma_pending(sums, slot, last, pending)
            )(accumulators)
        return *gradients[:-1], tuple(pair)

    def _wgmma_pending(self, sums, slot, i, pending):
        """Adds products of weights and gradients of logits of a slot in a kv head."""
        weights, gradient = pending
        plgpu.wgmma(sums[1], weights, self._out(slot, i))
        plgpu.wgmma(sums[0], gradient, self._query(slot, i))

    def _interpreted(self, slot, i, seen):
        """Weights and gradient of the logits of a slot in a kv head."""
        logits = _mosaic.product(self._key(i), self._query(slot, i, True))
        weights = self._weigh(slot, i, logits + self._bias(slot), seen)
        gradient = _mosaic.product(self._value(i), self._out(slot, i, True))
        return weights, weights * (gradient + self._per_row(slot, i, 1))

    def _interpreted_sums(self, slot, i, pair, weights, gradient):
        """Adds their products to the gradients of key and value."""
        staged = self.memory.weights.at[self.me]
        sums = []
        for total, x, rows in (
            (pair[1], weights, self._out(slot, i)),
            (pair[0], gradient, self._query(slot, i)),
        ):
            staged[...] = x.astype(staged.dtype)
            plgpu.commit_smem()
            sums.append(total + _mosaic.product(staged, rows))
        return sums[1], sums[0]

    # Made where they are used: a constant index must not enter run_state from outside.
    def _key(self, i):
        return self.memory.key.at[i, self.me]

    def _value(self, i):
        return self.memory.value.at[i, self.me]

    def _query(self, slot, i, transposed=False):
        query = self.memory.query.at[slot, i]
        return query.transpose((1, 0)) if transposed else query

    def _out(self, slot, i, transposed=False):
        out_gradient = self.memory.out_gradient.at[slot, i]
        return out_gradient.transpose((1, 0)) if transposed else out_gradient

    def _bias(self, slot):
        high = KEYS // fragments.ROWS
        first = pl.multiple_of(self.me * high, high)
        bias = self.memory.bias.at[slot, pl.ds(first, high)]
        return fragments.load(bias, self.sizes.rows)

    def _weigh(self, slot, i, logits, seen):
        """P, of which these are seen, or all."""
        if seen is not None:
            logits = jnp.where(seen, logits, -jnp.inf)
        shift = self._per_row(slot, i, 0)
        return jnp.exp2(logits * (self.sizes.scale * LOG2_E) - shift)

    def _total(self, gradients):
        """The gradients of logits of kv heads, summed over the members."""
        step = self.sizes.tokens
        parts = [
            lax.slice(x, (0, i), (KEYS, i + step))
            for x in gradients
            for i in range(0, self.sizes.rows, step)
        ]
        return functools.reduce(jnp.add, parts)

    def _per_row(self, slot, kv_head, which):
        """One of the two numbers of each row in a kv head, for each key."""
        x = self.memory.statistics.at[slot, kv_head, which]
        x = plgpu.load(x, layout=BY_ROW)
        return lax.broadcast_in_dim(x, (KEYS, self.sizes.rows), [1])
