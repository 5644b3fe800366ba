"""Attention to chosen blocks of keys in Triton, organised by block of keys.

A query with a list of n blocks makes n pairs (query, block). Pairs are sorted by block,
so that one program loads a block once and meets the queries that chose it: a matrix
tile holds the G heads of as many queries as fit, whatever G is. Every pair leaves a
partial result in memory, and the n of a query are added in order; so are those of the
units of work into which a block chosen by many queries is split. Nothing is added
atomically: same input, same bits.

Neighbouring queries often share their own block, the one before and the first. Where a
whole tile of them does, forward attends to these while it adds up the partial results,
and they make no pairs.

The B K kv heads go through in portions, and the queries in chunks if one kv head is too
much, so that partial results take bounded memory.

Letters: B batch, T queries, S keys, N query heads, K kv heads, H key width, V value
width; R lists per kv head, n blocks per list, G = N / (K R) query heads per list;
D portions of M kv heads (of any batch row), C chunks of L queries, P = L R n pairs of a
chunk and kv head, U units of work.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import triton

from jattn.pallas import _softmax, _steps, _triton, tuning
from jattn.pallas.block_sparse import kernels
from jattn.pallas.block_sparse.pairs import (
    Units,
    kernel_block,
    portions,
    sort_pairs,
    split_units,
)

LOG2_E = math.log2(math.e)

# Blocks that a tile of queries may share: its own, the one before, and the first.
SHARED = 3

# Numbers that a program adds up.
SUM_STEP = 2048


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel is cut up: speed, never results.

    Attributes:
      rows: Rows of a matrix tile.
      tiles: Tiles in a unit of work.
      warps: Warps of a program.
      stages: Tiles in flight.
      registers: What a thread may use at most, or None for no limit.
    """

    rows: int
    tiles: int
    warps: int
    stages: int
    registers: int | None = None


@dataclasses.dataclass(frozen=True)
class RowTiling:
    """How the kernels that add partial results are cut up: speed, never results.

    Attributes:
      rows: Rows of a tile, at most.
      warps: Warps of a program.
      stages: Shared blocks in flight.
      registers: What a thread may use at most, or None for no limit.
    """

    rows: int
    warps: int
    stages: int
    registers: int | None = None


def forward_tiling(
    query: jax.Array, value: jax.Array, block: int, group: int
) -> Tiling:
    """The tiling of the kernel that makes partial outputs.

    Args:
      query: [B, T, N, H].
      value: [B, S, K, V].
      block: Keys in a block of the kernels.
      group: Query heads that share a list.
    """
    if query.dtype.itemsize > 2:
        heuristic = Tiling(rows=32, tiles=32, warps=4, stages=1)
    elif max(query.shape[-1], value.shape[-1]) > 128:
        heuristic = Tiling(rows=64, tiles=16, warps=4, stages=1)
    else:
        # In smaller groups the rows of a thread are of more queries.
        registers = 128 if group > 8 else 168
        heuristic = Tiling(64, tiles=16, warps=4, stages=1, registers=registers)
    shape = _tuning_shape(query, value, block, group)
    return tuning.choose("block_sparse_forward", shape, heuristic)


def backward_tiling(
    query: jax.Array, value: jax.Array, block: int, group: int
) -> Tiling:
    """The tiling of the kernel that makes partial gradients; see `forward_tiling`."""
    if query.dtype.itemsize > 2:
        heuristic = Tiling(rows=32, tiles=32, warps=8, stages=1)
    elif max(query.shape[-1], value.shape[-1]) > 128:
        heuristic = Tiling(rows=64, tiles=64, warps=8, stages=1)
    else:
        heuristic = Tiling(rows=64, tiles=64, warps=4, stages=2)
    shape = _tuning_shape(query, value, block, group)
    return tuning.choose("block_sparse_backward", shape, heuristic)


def combine_tiling(
    query: jax.Array, value: jax.Array, block: int, group: int
) -> RowTiling:
    """The tiling of the kernel that adds partial outputs; see `forward_tiling`."""
    if query.dtype.itemsize > 2:
        heuristic = RowTiling(rows=32, warps=8, stages=1)
    elif max(query.shape[-1], value.shape[-1]) > 128:
        heuristic = RowTiling(rows=64, warps=8, stages=1)
    else:
        heuristic = RowTiling(rows=128, warps=8, stages=1, registers=128)
    shape = _tuning_shape(query, value, block, group)
    return tuning.choose("block_sparse_combine", shape, heuristic)


def _tuning_shape(query, value, block, group) -> dict[str, int | str]:
    return {
        "group": group,
        "block": block,
        "key_width": query.shape[-1],
        "value_width": value.shape[-1],
        "dtype": str(query.dtype),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_indices: jax.Array,
    segment_ids: jax.Array | None,
    block_size: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention to chosen blocks, differentiable in query, key and value.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, V].
      block_indices: int [B, T, K, n] or [B, T, N, n], negative for no block; one given
        twice counts once.
      segment_ids: int [B, S] or None.
      block_size: Keys in a block, a multiple of 16.
      scale: Factor of the logits.

    Returns:
      Output [B, T, N, V] and log-sum-exp [B, T, N] in fp32.
    """
    return forward(query, key, value, block_indices, segment_ids, block_size, scale)


def _attend_forward(query, key, value, block_indices, segment_ids, block_size, scale):
    arrays = query, key, value, block_indices, segment_ids
    results = forward(*arrays, block_size, scale)
    return results, (*arrays, *results)


def _attend_backward(block_size, scale, residuals, gradients):
    gradients = backward(*residuals, *gradients, block_size=block_size, scale=scale)
    return *gradients, None, None


attend.defvjp(_attend_forward, _attend_backward)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_indices: jax.Array,
    segment_ids: jax.Array | None,
    block_size: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """The value of attend, whose arguments these are."""
    launch = Launch(query, key, value, block_indices, segment_ids, block_size, scale)
    tiling = forward_tiling(query, value, launch.block, launch.group)
    blocks, shared = launch.plan(share=True)
    pairs, units = launch.units(blocks, tiling)
    _, _, rows, length, lists, slots = blocks.shape
    partial_shape = length, rows, lists, slots, launch.group
    new = [
        jax.ShapeDtypeStruct((*partial_shape, value.shape[-1]), value.dtype),
        jax.ShapeDtypeStruct(partial_shape, jnp.float32),
        jax.ShapeDtypeStruct((*query.shape[:3], value.shape[-1]), value.dtype),
        jax.ShapeDtypeStruct(query.shape[:3], jnp.float32),
    ]
    width = query.shape[-1] + value.shape[-1]

    def step(step, results):
        *partials, out, lse = results or new
        partials = launch.by_units(
            kernels.forward_kernel,
            (query, key, value, launch.segment_ids, pairs, *units[:3], step),
            tiling,
            pairs.shape[-1],
            units.blocks.shape[-1],
            results=partials,
            width=width,
        )
        return launch.by_tiles(
            kernels.combine_kernel,
            query,
            key,
            value,
            launch.segment_ids,
            blocks,
            shared,
            step,
            launch.scale_log2,
            results=[*partials, out, lse],
            flops=2 * SHARED * math.prod(partial_shape) // slots * launch.block * width,
            **launch.value_constants,
        )

    *_, out, lse = _steps.each_step(launch.portions.steps, step)
    return out, lse


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_indices: jax.Array,
    segment_ids: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    out_gradient: jax.Array,
    lse_gradient: jax.Array,
    *,
    block_size: int,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of forward's output and log-sum-exp for query, key and value."""
    launch = Launch(query, key, value, block_indices, segment_ids, block_size, scale)
    tiling = backward_tiling(query, value, launch.block, launch.group)
    blocks, _ = launch.plan(share=False)
    pairs, units = launch.units(blocks, tiling)
    # A query that sees nothing gets probabilities exp2(-inf - inf) = 0.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2_E)
    delta = _softmax.delta(out, out_gradient, lse_gradient)

    _, _, rows, length, lists, slots = blocks.shape
    widths = query.shape[-1], value.shape[-1]
    sum_shape = key.shape[0] * key.shape[2], launch.blocks, launch.block
    sums = [jnp.zeros((*sum_shape, width), jnp.float32) for width in widths]
    sums = _triton.vary_like(sums, (query, key, value, out_gradient))
    unit_shape = rows, units.blocks.shape[-1], launch.block
    new = [
        jax.ShapeDtypeStruct(
            (length, rows, lists, slots, launch.group, widths[0]), query.dtype
        ),
        *[jax.ShapeDtypeStruct((*unit_shape, x), jnp.float32) for x in widths],
        *sums,
        jax.ShapeDtypeStruct(query.shape, query.dtype),
    ]

    def step(step, results):
        *partials, key_sums, value_sums, query_gradient = results or new
        partial_query, *partials = launch.by_units(
            kernels.backward_kernel,
            (
                query,
                key,
                value,
                out_gradient,
                lse,
                delta,
                launch.segment_ids,
                pairs,
                *units[:3],
                step,
            ),
            tiling,
            pairs.shape[-1],
            units.blocks.shape[-1],
            results=partials,
            width=3 * widths[0] + 2 * widths[1],
        )
        sizes = [launch.block * width for width in widths]
        *partials, key_sums, value_sums = _steps.write(
            kernels.add_units_kernel,
            units.starts,
            step,
            launch.portions.length,
            launch.portions.chunks,
            units.blocks.shape[-1],
            results=[*partials, key_sums, value_sums],
            grid=(launch.blocks, rows, triton.cdiv(max(sizes), SUM_STEP)),
            KV_HEADS=launch.kv_heads,
            KEY_SIZE=sizes[0],
            VALUE_SIZE=sizes[1],
            STEP=SUM_STEP,
        )
        partial_query, query_gradient = launch.by_tiles(
            kernels.add_queries_kernel,
            blocks,
            step,
            results=[partial_query, query_gradient],
        )
        return [partial_query, *partials, key_sums, value_sums, query_gradient]

    *_, key_sums, value_sums, query_gradient = _steps.each_step(
        launch.portions.steps, step
    )

    def join_blocks(x, like):  # [B K, blocks, block, W] -> [B, S, K, W]
        b, s, k, width = like.shape
        x = x.reshape(b, k, -1, width)[:, :, :s]
        return jnp.moveaxis(x, 1, 2).astype(like.dtype)

    return (
        query_gradient,
        join_blocks(scale * key_sums, key),
        join_blocks(value_sums, value),
    )


class Launch:
    """What the launches of one direction share: some for each chunk of each portion."""

    def __init__(self, query, key, value, lists, segment_ids, block_size, scale):
        self.queries, heads, key_width = query.shape[1:]
        self.keys, self.kv_heads, value_width = value.shape[1:]
        self.block = kernel_block(query, value, block_size)
        self.blocks = triton.cdiv(self.keys, self.block)
        self.split = block_size // self.block
        self.members = lists.shape[2] // self.kv_heads
        self.group = heads // lists.shape[2]
        self.slots = lists.shape[3] * self.split
        if lists.dtype.itemsize > 4:
            lists = jnp.minimum(lists, 2**31 - 1)
        self.lists = lists.astype(jnp.int32)
        self.packed = segment_ids is not None
        if segment_ids is None:
            segment_ids = jnp.zeros((1, 1), jnp.int32)
        self.segment_ids = segment_ids.astype(jnp.int32)
        self.scale_log2 = float(scale) * LOG2_E
        self.tiling = combine_tiling(query, value, self.block, self.group)
        # Queries in a tile: all those of a tile may be in one block, and the kernel
        # that compares their lists holds these at once.
        most = min(self.block, self.tiling.rows // self.group, 8192 // self.slots)
        self.tokens = 1 << max(1, most).bit_length() - 1
        width = max(key_width, value_width)
        self.portions = portions(query, self.kv_heads, self.slots, width, self.tokens)
        self.constants: dict[str, Any] = {
            "KV_HEADS": self.kv_heads,
            "LISTS": self.members,
            "SLOTS": self.slots,
            "GROUP": self.group,
            "H": key_width,
            "H_PAD": max(16, triton.next_power_of_2(key_width)),
            "BLOCK": self.block,
        }
        self.value_constants: dict[str, Any] = {
            "V": value_width,
            "V_PAD": max(16, triton.next_power_of_2(value_width)),
            "PACKED": self.packed,
        }

    def plan(self, *, share: bool) -> tuple[jax.Array, jax.Array]:
        """Blocks int32 [D, C, M, L, R, n] of pairs, as many as there are for none.

        Returns:
          These, and with share int32 [B K, C L / tokens, R, 1 + SHARED]: how many of
          the blocks all queries of a tile have, and which; they make no pairs.
        """
        rows, count, length, chunks = self.portions
        shape = count, chunks, rows, length, self.members, self.slots
        tiles = chunks * length // self.tokens
        shared = (count * rows, tiles, self.members, 1 + SHARED) if share else (1,)
        blocks, shared = _triton.call(
            kernels.plan_kernel,
            self.lists,
            self.queries,
            self.keys,
            length,
            chunks,
            outputs=[
                jax.ShapeDtypeStruct(shape, jnp.int32),
                jax.ShapeDtypeStruct(shared, jnp.int32),
            ],
            grid=(tiles * self.members, count * rows),
            num_warps=4,
            KV_HEADS=self.kv_heads,
            LISTS=self.members,
            SLOTS=self.slots,
            SLOTS_PAD=triton.next_power_of_2(self.slots),
            SPLIT=self.split,
            BLOCK=self.block,
            TOKENS=self.tokens,
            PORTION=rows,
            SHARE=share,
        )
        return blocks, shared

    def units(self, blocks: jax.Array, tiling: Tiling) -> tuple[jax.Array, Units]:
        """Pairs sorted by block, and their units of work."""
        pairs, starts = sort_pairs(blocks, self.blocks)
        length = tiling.tiles * (tiling.rows // self.group)
        return pairs, split_units(starts, pairs.shape[-1], length)

    def by_units(self, kernel, operands, tiling, pairs, units, *, results, width):
        """Launches a kernel in one step, a program for each unit of each kv head.

        Args:
          kernel: The one of the partial results of one direction.
          operands: Its arrays.
          tiling: That of the kernel.
          pairs: P.
          units: U.
          results: What it writes.
          width: That of its matrix products, all together.
        """
        rows, _, length, chunks = self.portions
        return _steps.write(
            kernel,
            *operands,
            self.scale_log2,
            self.queries,
            self.keys,
            length,
            chunks,
            pairs,
            units,
            results=results,
            grid=(units, rows),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            max_registers=tiling.registers,
            flops=2 * rows * pairs * self.group * self.block * width,
            ROWS=tiling.rows,
            **self.constants,
            **self.value_constants,
        )

    def by_tiles(self, kernel, *operands, results, **options):
        """Launches a kernel in one step, a program for each tile of queries and list.

        Args:
          kernel: The one that adds the partial results of one direction.
          *operands: What it reads, but for numbers that it shares with others.
          results: What it writes.
          **options: Others of `_steps.write`, and constants of the kernel's own.
        """
        rows, _, length, chunks = self.portions
        return _steps.write(
            kernel,
            *operands,
            self.queries,
            self.keys,
            length,
            chunks,
            results=results,
            grid=(length // self.tokens * self.members, rows),
            num_warps=self.tiling.warps,
            num_stages=self.tiling.stages,
            max_registers=self.tiling.registers,
            TOKENS=self.tokens,
            ROWS=max(16, triton.next_power_of_2(self.tokens * self.group)),
            **self.constants,
            **options,
        )
