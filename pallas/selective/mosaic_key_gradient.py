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
from jattn.pallas.flash.mosaic_backward import CONSUMERS, KEYS
from jattn.pallas.selective import mosaic_fragments as fragments
from jattn.pallas.selective.mosaic_key_consumer import Consumer
from jattn.pallas.selective.mosaic_key_items import (
    ROWS,
    STRIP,
    TILE_KEYS,
    Memory,
    Sizes,
    Tiling,
    Unit,
    memory_types,
    unit_of_work,
)

# What one more slice costs, as a part of the whole: its results are to be added.
SLICE_COST = 0.01


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
    tiling: Tiling,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
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
      tiling: Tile sizes.

    Returns:
      Gradients of key and value [slices, B, chunk, N / pack, H], partial sums of them
      in fp32 or, if there is but one for each kv head, of their dtype. That of S,
      summed over the members and rounded to their dtype, [N / M, B, chunk, rows] in
      fragments, which is written where any token of a tile sees one of KEYS keys and
      comes before their end. Its sums over the tokens of each strip, before it is
      rounded, fp32 [N / M, B, rows / STRIP, chunk], which are written where any token
      of a strip sees one of TILE_KEYS keys and comes before their end.

    Raises:
      ValueError: The tiling's heads do not divide those of the arguments.
    """
    batch, chunk, rows = bias.shape
    heads, width = query.shape[2:]
    group = heads // key.shape[2]
    if group % tiling.pack or (tiling.kv_heads > 1 and group > tiling.pack):
        raise ValueError(f"{tiling} does not fit {group} query heads of a kv head")
    parts, tiles = heads // tiling.members, chunk // TILE_KEYS
    sizes = Sizes(
        offset=offset,
        parts=parts,
        group=group,
        tiles=tiles,
        slices=_slices(batch * parts * tiles, queries, tiling),
        width=width,
        scale=scale,
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
    gradient = jax.ShapeDtypeStruct(shape, key.dtype if whole else jnp.float32)
    sums = parts, batch, rows // STRIP, chunk
    key_gradient, value_gradient, of_logits, sums = _mosaic.call(
        functools.partial(_kernel, sizes=sizes),
        *operands,
        outputs=[
            gradient,
            gradient,
            jax.ShapeDtypeStruct((parts, batch, *folded), query.dtype),
            jax.ShapeDtypeStruct(sums, jnp.float32),
        ],
        memory=memory_types(sizes, query.dtype),
        grid={"program": tiles * parts * sizes.slices * batch},
        consumers=CONSUMERS,
        name="selective_key_gradient",
        # Threads read what copies have written, once `full` tells each of them, and
        # all of them arrive at `empty`. They share nothing else.
        automatic_barriers=False,
    )
    of_logits = of_logits.reshape(parts, batch, chunk, rows)
    return key_gradient, value_gradient, of_logits, sums


def _slices(tiles, queries, tiling):
    """Among how many thread blocks to divide the tokens of each of so many tiles."""

    def cost(slices):
        waves = -(-tiles * slices // tiling.programs)
        return waves / slices * (1 + SLICE_COST * slices)

    most = min(tiling.programs, queries * tiling.members // (8 * ROWS))
    most = max(1, min(most, -(-queries // STRIP)))
    return min(range(1, most + 1), key=cost)


def _kernel(*refs, sizes: Sizes, **memory):
    """A thread block: some tokens of one tile of keys in some query heads."""
    query, key, value, bias, statistics, out_gradient, ends, region, *results = refs
    memory = Memory(**memory)
    warpgroup = lax.axis_index("warpgroup")
    get_unit = functools.partial(unit_of_work, ends, region, sizes)

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
        Consumer(warpgroup, get_unit, memory, sizes).run(*results)


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Loads everything in the order in which the consumers need it."""

    query: Any
    out_gradient: Any
    bias: Any
    statistics: Any
    memory: Memory
    sizes: Sizes

    def load_keys(self, unit: Unit, key, value):
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

    def load_rows(self, unit: Unit):
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
