"""Gradients of keys and values, in Mosaic GPU for Hopper.

They go by tiles of keys. A unit of work is such a tile and some of the rows that see
it; a thread block does one unit of one kv head, and meets a tile of rows at a time:

    dV += P' dO    dK += dS' Q

Each consumer has half of the keys and keeps dK and dV in registers. P and dS are
transposed, so that they enter their products from registers.

Letters as in `jattn.pallas.flash.mosaic_backward`, and U units of work.
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
from jattn.pallas._mosaic import MATRIX
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.flash import mosaic_backward as shared
from jattn.pallas.flash.mosaic_backward import CONSUMERS, KEYS, ROWS

# How a consumer's threads share a number per key, and one per row.
BY_KEY = MATRIX.reduce(1)
BY_ROW = MATRIX.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      slots: Tiles of rows in flight.
      programs: Units of work that rows are split into, or fewer than there are tiles
        of keys to split none.
    """

    slots: int
    programs: int

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return ROWS

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return CONSUMERS * KEYS


def key_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    statistics: jax.Array,
    out_gradient: jax.Array,
    units: np.ndarray,
    *,
    sizes: shared.Sizes,
    tiling: Tiling,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of keys and values, or of each unit of work.

    In the interpreter P and dS are not operands in registers, which it does not know,
    but pass through shared memory, and products are not added to; all else is the same.

    Args:
      query: [B, T, N, H], bf16 or fp16, where H is 64 or 128.
      key: [B, M, K, H].
      value: [B, M, K, H].
      statistics: Those of the function of that name.
      out_gradient: [B, T, N, H].
      units: int32 [U, 4]: tile of keys, first row, one past the last, place among the
        results; the first rows are multiples of ALIGNMENT.
      sizes: Those of the arguments.
      tiling: Tile sizes.

    Returns:
      Two arrays like key and value, or if there are more units than tiles of keys, of
      fp32 [B K, U, keys of a tile, H].
    """
    tiles = -(-sizes.keys // tiling.keys)
    split = len(units) > tiles
    operands = (
        *(_mosaic.padded(x, 1, tiles * tiling.keys) for x in (key, value)),
        *(shared.rows(x, sizes) for x in (query, out_gradient)),
        statistics,
        jnp.asarray(units),
    )
    result = jax.ShapeDtypeStruct(operands[0].shape, key.dtype)
    if split:
        shape = sizes.kv_rows, len(units), tiling.keys, sizes.width
        result = jax.ShapeDtypeStruct(shape, jnp.float32)
    key_gradient, value_gradient = _mosaic.call(
        functools.partial(_kernel, sizes=sizes, split=split),
        *operands,
        outputs=[result, result],
        memory=_memory_types(tiling, sizes, query.dtype),
        grid={"program": len(units) * sizes.kv_rows},
        consumers=CONSUMERS,
        name="flash_key_gradient",
    )
    if split:
        return key_gradient, value_gradient
    return key_gradient[:, : sizes.keys], value_gradient[:, : sizes.keys]


@dataclasses.dataclass(frozen=True)
class _Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      key: [CONSUMERS, KEYS, H].
      value: [CONSUMERS, KEYS, H].
      query: [slots, ROWS, H].
      out_gradient: [slots, ROWS, H].
      statistics: fp32 [slots, 2, ROWS].
      weights: [CONSUMERS, KEYS, ROWS], P and dS in the interpreter, else None.
      keys_full: Keys and values have been loaded.
      full: Of each slot.
      empty: Of each slot.
    """

    key: Any
    value: Any
    query: Any
    out_gradient: Any
    statistics: Any
    weights: Any
    keys_full: Any
    full: Any
    empty: Any


def _memory_types(tiling: Tiling, sizes: shared.Sizes, dtype: Any) -> dict[str, Any]:
    """The types of _Memory's attributes."""
    matrix = functools.partial(_mosaic.matrix, dtype=dtype)
    keys = matrix(CONSUMERS, KEYS, sizes.width)
    rows = matrix(tiling.slots, ROWS, sizes.width)
    return {
        "key": keys,
        "value": keys,
        "query": rows,
        "out_gradient": rows,
        "statistics": plgpu.SMEM((tiling.slots, 2, ROWS), jnp.float32),
        "weights": matrix(CONSUMERS, KEYS, ROWS) if _mosaic.interpretation() else None,
        "keys_full": _mosaic.barriers(1, 2 * CONSUMERS),
        "full": _mosaic.barriers(tiling.slots, 2 * sizes.parts + 1),
        "empty": _mosaic.barriers(tiling.slots, CONSUMERS),
    }


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A unit of work of one kv head.

    Attributes:
      kv_row: Row of the batch and kv head in one number.
      batch: Row of the batch.
      kv_head: Of the keys.
      first_key: Of the tile.
      begin: First row.
      end: One past the last row.
      place: Among the results.
    """

    kv_row: jax.Array
    batch: jax.Array
    kv_head: jax.Array
    first_key: jax.Array
    begin: jax.Array
    end: jax.Array
    place: jax.Array

    @property
    def tiles(self):
        """Tiles of rows."""
        return _mosaic.ceil_div(self.end - self.begin, ROWS)


def _unit(units, sizes: shared.Sizes) -> _Unit:
    """The unit of work of this thread block."""
    # Found out where it is needed, rather than kept in registers all along.
    program = lax.optimization_barrier(lax.axis_index("program"))
    index, kv_row = _mosaic.div_rem(program, sizes.kv_rows)
    batch, kv_head = _mosaic.div_rem(kv_row, sizes.kv_heads)
    return _Unit(
        kv_row=kv_row,
        batch=batch,
        kv_head=kv_head,
        first_key=units[index, 0] * (CONSUMERS * KEYS),
        begin=units[index, 1],
        end=units[index, 2],
        place=units[index, 3],
    )


def _kernel(*refs, sizes: shared.Sizes, split: bool, **memory):
    """A thread block: one unit of work of one kv head."""
    key, value, query, out_gradient, statistics, units, *gradients = refs
    memory = _Memory(**memory)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        producer = _Producer(query, out_gradient, statistics, memory, sizes)
        unit = _unit(units, sizes)
        producer.load_keys(unit, key, value)
        producer.load_rows(unit)

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _Consumer(warpgroup, units, memory, sizes, split).run(*gradients)


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Loads everything in the order in which the consumers need it."""

    query: Any
    out_gradient: Any
    statistics: Any
    memory: _Memory
    sizes: shared.Sizes

    def load_keys(self, unit: _Unit, key, value):
        """Loads keys and values."""
        for source, target in ((key, self.memory.key), (value, self.memory.value)):
            for i in range(CONSUMERS):
                first = pl.multiple_of(unit.first_key + i * KEYS, KEYS)
                plgpu.copy_gmem_to_smem(
                    source.at[unit.batch, pl.ds(first, KEYS), unit.kv_head],
                    target.at[i],
                    self.memory.keys_full,
                )

    def load_rows(self, unit: _Unit):
        """Loads tiles of rows, and waits until the consumers have emptied all."""
        memory, slots = self.memory, self.memory.query.shape[0]

        def load_tile(i, slot):
            plgpu.barrier_wait(memory.empty.at[slot])
            first = unit.begin + i * ROWS
            full = memory.full.at[slot]
            plgpu.copy_gmem_to_smem(
                self.statistics.at[unit.batch, unit.kv_head, :, pl.ds(first, ROWS)],
                memory.statistics.at[slot],
                full,
            )

            # Rows past the end have a probability of 0, but need finite numbers.
            def load_part(index, rows, _):
                for source, target in (
                    (self.query, memory.query),
                    (self.out_gradient, memory.out_gradient),
                ):
                    tile = target.at[slot, rows]
                    plgpu.copy_gmem_to_smem(source.at[index], tile, full)

            shared.for_parts(unit.batch, unit.kv_head, first, self.sizes, load_part)
            return _mosaic.following(slot, slots)

        lax.fori_loop(0, unit.tiles, load_tile, jnp.int32(0))
        for slot in range(slots):
            plgpu.barrier_wait(memory.empty.at[slot])


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """Adds up the gradients of KEYS keys and values.

    Attributes:
      me: Which of the consumers.
      units: [U, 4].
      memory: Shared memory and barriers.
      sizes: Those of the arguments.
      split: Whether results are of units rather than tiles.
    """

    me: jax.Array
    units: Any
    memory: _Memory
    sizes: shared.Sizes
    split: bool

    def run(self, *targets):
        """Writes the gradients of key and value there."""
        gradients = self._add_up()
        unit = _unit(self.units, self.sizes)
        # What nobody sees may hold anything.
        begin, end = self._seen_by(unit)
        shape = KEYS, self.sizes.width
        seen = lax.broadcast_in_dim(begin < end, shape, [0])
        factors = self.sizes.scale, 1.0
        for target, gradient, factor in zip(targets, gradients, factors, strict=True):
            gradient = jnp.where(seen, gradient * factor, _mosaic.zeros(shape))
            keys = pl.ds(self._first_key(unit), KEYS)
            if self.split:
                part = target.at[unit.kv_row, unit.place, pl.ds(self.me * KEYS, KEYS)]
            else:
                part = target.at[unit.batch, keys, unit.kv_head]
            _mosaic.store(part, gradient.astype(target.dtype))

    def _first_key(self, unit: _Unit):
        return unit.first_key + self.me * KEYS

    def _add_up(self):
        """The gradients of key, but for the factor of the logits, and of value."""
        memory, sizes = self.memory, self.sizes
        slots = memory.query.shape[0]
        for slot in range(slots):
            plgpu.barrier_arrive(memory.empty.at[slot])
        unit = _unit(self.units, sizes)

        def skip(i, carry):
            slot = _mosaic.div_rem(i, slots)[1]
            plgpu.barrier_wait(memory.full.at[slot])
            plgpu.barrier_arrive(memory.empty.at[slot])
            return carry

        def step(i, carry, edges):
            slot = _mosaic.div_rem(i, slots)[1]
            plgpu.barrier_wait(memory.full.at[slot])
            seen = self._seen(unit, unit.begin + i * ROWS, edges)
            carry = self._step(slot, *carry, seen)
            plgpu.barrier_arrive(memory.empty.at[slot])
            return carry

        carry = (_mosaic.zeros((KEYS, sizes.width)),) * 2
        plgpu.barrier_wait(memory.keys_full)
        first, last = self._edges()
        steps = [functools.partial(step, edges=x) for x in (first, "", last)]
        begin = np.int32(0)
        for body, end in zip((skip, *steps), self._stretches(unit), strict=True):
            carry = lax.fori_loop(begin, end, body, carry)
            begin = end
        return lax.fori_loop(begin, _unit(self.units, sizes).tiles, skip, carry)

    def _edges(self) -> tuple[str, str]:
        """What to compare the rows of the first and of the last tiles with."""
        sizes = self.sizes
        if sizes.window is None:
            return "begin", ""
        overlap = sizes.window - (sizes.kernel_size - 1) - (KEYS - 1) * sizes.stride
        return ("begin", "end") if overlap * sizes.group >= ROWS else ("both", "both")

    def _seen(self, unit: _Unit, first_row, edges):
        """Which rows from this one on see which key, at these edges; None for all."""
        if not edges:
            return None
        row = plgpu.broadcasted_iota(jnp.int32, (KEYS, ROWS), 1, layout=MATRIX)
        begin, end = (x - first_row for x in self._seen_by(unit))
        if edges != "end":
            begin = lax.broadcast_in_dim(begin, row.shape, [0])
        if edges != "begin":
            end = lax.broadcast_in_dim(end, row.shape, [0])
        if edges == "begin":
            return row >= begin
        return row < end if edges == "end" else (row >= begin) & (row < end)

    def _seen_by(self, unit: _Unit):
        """For each key, the first row that sees it, and one past the last."""
        # Found out where it is needed, too.
        first_key = lax.optimization_barrier(self._first_key(unit))
        key = plgpu.broadcasted_iota(jnp.int32, (KEYS,), 0, layout=BY_KEY)
        return self.sizes.rows_of_key(key + first_key)

    def _stretches(self, unit: _Unit):
        """Where tiles end that are not seen, that are at an edge, whole, at an edge."""
        sizes, first_key = self.sizes, self._first_key(unit)
        last_key = jnp.minimum(first_key + KEYS, sizes.keys) - 1
        first_key = jnp.minimum(first_key, last_key)
        first_begin, first_end = (x - unit.begin for x in sizes.rows_of_key(first_key))
        last_begin, last_end = (x - unit.begin for x in sizes.rows_of_key(last_key))
        unseen = jnp.clip(_mosaic.div_rem(first_begin, ROWS)[0], 0, unit.tiles)
        if sizes.window is None:
            edge = jnp.clip(_mosaic.ceil_div(last_begin, ROWS), unseen, unit.tiles)
            return unseen, edge, unit.tiles, unit.tiles
        end = jnp.clip(_mosaic.ceil_div(last_end, ROWS), unseen, unit.tiles)
        edge = jnp.clip(_mosaic.ceil_div(last_begin, ROWS), unseen, end)
        whole = jnp.clip(_mosaic.div_rem(first_end, ROWS)[0], edge, end)
        return unseen, edge, whole, end

    def _step(self, slot, key_gradient, value_gradient, seen):
        """Adds what a tile of rows contributes, of which these are seen, or all."""
        memory = self.memory
        key, value = memory.key.at[self.me], memory.value.at[self.me]
        query, out_gradient = memory.query.at[slot], memory.out_gradient.at[slot]

        def weigh(logits):
            shift = self._per_row(slot, 0)
            if seen is not None:
                logits = jnp.where(seen, logits, -jnp.inf)
            return jnp.exp2(logits * (self.sizes.scale * LOG2_E) - shift)

        def differentiate(weights, gradient):
            return weights * (gradient - self._per_row(slot, 1))

        if memory.weights is not None:
            weights = weigh(_mosaic.product(key, query.transpose((1, 0))))
            gradient = _mosaic.product(value, out_gradient.transpose((1, 0)))
            gradient = differentiate(weights, gradient)
            staged = memory.weights.at[self.me]
            sums = []
            for x, y, total in (
                (weights, out_gradient, value_gradient),
                (gradient, query, key_gradient),
            ):
                staged[...] = x.astype(staged.dtype)
                plgpu.commit_smem()
                sums.append(total + _mosaic.product(staged, y))
            return sums[1], sums[0]

        def multiply(references):
            key_gradient, value_gradient, logits, gradient = references
            plgpu.wgmma(logits, key, query.transpose((1, 0)))
            plgpu.wgmma(gradient, value, out_gradient.transpose((1, 0)))
            logits = plgpu.wgmma_accumulator_load(logits, wait_n=1)
            weights = weigh(logits)
            plgpu.wgmma(value_gradient, weights.astype(query.dtype), out_gradient)
            gradient = plgpu.wgmma_accumulator_load(gradient, wait_n=1)
            gradient = differentiate(weights, gradient)
            plgpu.wgmma(key_gradient, gradient.astype(query.dtype), query)

        square = _mosaic.zeros((KEYS, ROWS))
        key_gradient, value_gradient, _, _ = pl.run_state(multiply)(
            tuple(
                plgpu.WGMMAAccumulatorRef.init(x)
                for x in (key_gradient, value_gradient, square, square)
            )
        )
        return key_gradient, value_gradient

    def _per_row(self, slot, which):
        """One of the two numbers of each row, for each key."""
        x = plgpu.load(self.memory.statistics.at[slot, which], layout=BY_ROW)
        return lax.broadcast_in_dim(x, (KEYS, ROWS), [1])
