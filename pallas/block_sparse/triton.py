"""Attention to chosen blocks of keys, organised by block of keys.

A query with a list of n blocks makes n pairs (query, block). Pairs are sorted by block,
so that one program loads a block once and meets the queries that chose it: a matrix
tile holds the G heads of as many queries as fit, whatever G is. Every pair leaves a
partial result in memory, and the n of a query are added in order; so are those of the
units of work into which a block chosen by many queries is split. Nothing is added
atomically: same input, same bits.

Neighbouring queries often share their own block, the one before and the first. Where a
whole tile of them does, forward attends to these at once, and they make no pairs: in
Triton while it adds up the partial results, in Mosaic, which makes the partial outputs
of larger groups, for one more of these.

The B K kv heads go through in portions, and the queries in chunks if one kv head is too
much, so that partial results take bounded memory.

Letters: B batch, T queries, S keys, N query heads, K kv heads, H key width, V value
width; R lists per kv head, n blocks per list, G = N / (K R) query heads per list;
D portions of M kv heads (of any batch row), C chunks of L queries, P = L R n pairs of a
chunk and kv head, U units of work.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton

from jattn.pallas import _mosaic, _softmax, _steps, _triton
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.block_sparse import (
    gradient_kernels,
    kernels,
    mosaic,
    mosaic_backward,
    mosaic_chunk,
    unsupported_mosaic,
)
from jattn.pallas.block_sparse.launch import (
    SHARED,
    Launch,
    backward_tiling,
    forward_tiling,
    merge_tiling,
    mosaic_backward_tiling,
    mosaic_tiling,
    query_sums_tiling,
)
from jattn.pallas.block_sparse.pairs import (
    kernel_block,
    sort_pairs,
    split_tiles,
    split_units_of_ranges,
)

# Numbers that a program adds up, and how many of each it loads at a time.
SUM_STEP = 512
SUM_DEPTH = 8


class Addends(NamedTuple):
    """The other terms of ``gates_0 before + gates_1 attended + gates_2 after``.

    Attributes:
      before: [B, T, N, V], in the values' dtype.
      after: [B, T, N, V], in the values' dtype.
      gates: [B, T, N, 3], of at most 32 bits.
    """

    before: jax.Array
    after: jax.Array
    gates: jax.Array


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
    arrays = query, key, value, block_indices, segment_ids
    out, lse, _ = forward(*arrays, None, block_size, scale, keep=False)
    return out, lse


def _attend_forward(query, key, value, block_indices, segment_ids, block_size, scale):
    arrays = query, key, value, block_indices, segment_ids
    out, lse, _ = forward(*arrays, None, block_size, scale, keep=False)
    return (out, lse), (*arrays, out, lse)


def _attend_backward(block_size, scale, residuals, gradients):
    gradients = backward(*residuals, *gradients, block_size=block_size, scale=scale)
    return *gradients, None, None


attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_and_add(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_indices: jax.Array,
    segment_ids: jax.Array | None,
    addends: Addends,
    block_size: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """A sum that attention is a term of, in fp32; differentiable in all of them.

    Args:
      query: See `attend`, as for all but the addends.
      key: Its argument.
      value: Its argument.
      block_indices: Its argument.
      segment_ids: Its argument.
      addends: The other terms of the sum.
      block_size: Its argument.
      scale: Its argument.

    Returns:
      The sum [B, T, N, V], and the log-sum-exp [B, T, N] of attention, in fp32.
    """
    arrays = query, key, value, block_indices, segment_ids
    total, lse, _ = forward(*arrays, addends, block_size, scale, keep=False)
    return total, lse


def _sum_forward(
    query, key, value, block_indices, segment_ids, addends, block_size, scale
):
    arrays = query, key, value, block_indices, segment_ids
    total, lse, out = forward(*arrays, addends, block_size, scale, keep=True)
    return (total, lse), ((*arrays, out, lse), addends)


def _sum_backward(block_size, scale, residuals, gradients):
    residuals, (before, after, gates) = residuals
    out = residuals[-2]
    total_gradient, lse_gradient = gradients
    wide = total_gradient.astype(jnp.float32)
    terms = before, out, after
    of_gates = [jnp.sum(x.astype(jnp.float32) * wide, axis=-1) for x in terms]
    # Or the sums become part of the stack below, and XLA reads the terms twice.
    of_gates = jax.lax.optimization_barrier(of_gates)
    of_terms = [
        (gates[..., i, None].astype(jnp.float32) * wide).astype(x.dtype)
        for i, x in enumerate(terms)
    ]
    own_gradients = [of_terms[1], lse_gradient]
    gradients = backward(*residuals, *own_gradients, block_size=block_size, scale=scale)
    of_gates = jnp.stack(of_gates, axis=-1).astype(gates.dtype)
    return *gradients, None, None, Addends(of_terms[0], of_terms[2], of_gates)


attend_and_add.defvjp(_sum_forward, _sum_backward)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_indices: jax.Array,
    segment_ids: jax.Array | None,
    addends: Addends | None,
    block_size: int,
    scale: float,
    *,
    keep: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The value of attend, or with addends that of attend_and_add.

    Returns:
      Output or sum [B, T, N, V], log-sum-exp [B, T, N] in fp32, and if keep is set
      the output [B, T, N, V] beside the sum.
    """
    arguments = query, key, value, block_indices, segment_ids, block_size, scale
    packed = segment_ids is not None
    in_triton = unsupported_mosaic(query, key, value, block_indices, block_size, packed)
    out = jax.ShapeDtypeStruct((*query.shape[:3], value.shape[-1]), value.dtype)
    lse = jax.ShapeDtypeStruct(query.shape[:3], jnp.float32)
    attended = out if keep else jax.ShapeDtypeStruct((1,), value.dtype)
    nothing = jnp.zeros(1, value.dtype)
    before, after, gates = addends or (nothing, nothing, nothing)
    if addends is not None and not keep:
        # The sum takes the place of its last term.
        out, after = after, nothing
    add_parts = _add_triton_parts if in_triton else _add_mosaic_parts
    out, lse, attended = add_parts(
        arguments,
        (before, after, gates),
        [out, lse, attended],
        ADD=addends is not None,
        KEEP=keep,
    )
    return out, lse, attended


def _add_triton_parts(arguments, addends, results, **constants):
    """Adds up partial results made in Triton.

    Args:
      arguments: Those of `Launch` that come from a call.
      addends: Arrays that kernels.combine_kernel reads.
      results: What it writes to, or shapes and dtypes.
      **constants: Of that kernel.

    Returns:
      The results.
    """
    query, key, value, *_ = arguments
    launch = Launch(*arguments)
    tiling = forward_tiling(query, value, launch.block, launch.group)
    blocks, shared = launch.plan(share=True)
    pairs, units = launch.units(blocks, tiling)
    _, _, rows, length, lists, slots = blocks.shape
    partial_shape = length, rows, lists, slots, launch.group
    new = [
        jax.ShapeDtypeStruct((*partial_shape, value.shape[-1]), value.dtype),
        jax.ShapeDtypeStruct(partial_shape, jnp.float32),
        *results,
    ]
    width = query.shape[-1] + value.shape[-1]

    def step(step, results):
        results = results or new
        partials = launch.by_units(
            kernels.forward_kernel,
            (query, key, value, launch.segment_ids, pairs, *units[:3], step),
            tiling,
            pairs.shape[-1],
            units.blocks.shape[-1],
            results=results[:2],
            width=width,
        )
        return launch.by_tiles(
            kernels.combine_kernel,
            query,
            key,
            value,
            launch.segment_ids,
            *addends,
            blocks,
            shared,
            step,
            launch.scale_log2,
            results=[*partials, *results[2:]],
            flops=2 * SHARED * math.prod(partial_shape) // slots * launch.block * width,
            WIDE=min(16, triton.next_power_of_2(slots)),
            AHEAD=launch.tiling.ahead,
            **launch.key_constants,
            **launch.value_constants,
            **constants,
        )

    return _steps.each_step(launch.portions.steps, step)[2:]


def _add_mosaic_parts(arguments, addends, results, **constants):
    """Adds up partial results made in Mosaic.

    Args:
      arguments: Those of `Launch` that come from a call.
      addends: Arrays that kernels.merge_kernel reads.
      results: What it writes to, or shapes and dtypes.
      **constants: Of that kernel.

    Returns:
      The results.
    """
    query, key, value, block_indices, *_ = arguments
    group = query.shape[2] // block_indices.shape[2]
    tiling = merge_tiling(query, value, mosaic_chunk.BLOCK, group)
    launch = Launch(*arguments, tiling=tiling, sharers=mosaic.SHARERS)
    blocks, shared = launch.plan(share=True)
    pairs, starts = sort_pairs(blocks, launch.blocks)
    sizes = _mosaic_sizes(launch, query)
    tiling = mosaic_tiling(query, value, mosaic_chunk.BLOCK, group)
    programs = max(1, tiling.programs // sizes.rows)
    tile_starts, ranges = split_tiles(starts, sizes.tokens, programs)
    pairs, starts, tile_starts, ranges = (
        x.reshape(-1, *x.shape[3:])  # [D C M, ..]
        for x in (pairs, starts, tile_starts, ranges)
    )
    key, value = (_whole_blocks(launch, x) for x in (key, value))
    new = results

    def step(step, results):
        if results is not None:
            # Only now, so that partial results take the place of the step's before.
            step, results = jax.lax.optimization_barrier((step, results))
        partials = mosaic.partial_outputs(
            query,
            key,
            value,
            shared,
            pairs,
            starts,
            tile_starts,
            ranges,
            step,
            sizes=sizes,
            tiling=tiling,
        )
        return launch.by_tiles(
            kernels.merge_kernel,
            *addends,
            blocks,
            shared,
            step,
            results=[*partials, *(results or new)],
            SLOTS_PAD=triton.next_power_of_2(1 + sizes.slots),
            SHARED=launch.sharers,
            AHEAD=launch.tiling.stages,
            V=launch.value_constants["V"],
            V_PAD=launch.value_constants["V_PAD"],
            **constants,
        )[2:]

    return _steps.each_step(launch.portions.steps, step)


def _mosaic_sizes(launch, query) -> mosaic_chunk.Sizes:
    """What Mosaic's kernels know of the arguments of a launch."""
    rows, _, length, chunks = launch.portions
    return mosaic_chunk.Sizes(
        queries=launch.queries,
        kv_heads=launch.kv_heads,
        slots=launch.slots,
        group=launch.group,
        width=query.shape[-1],
        offset=launch.keys - launch.queries,
        length=length,
        chunks=chunks,
        rows=rows,
        scale_log2=launch.scale_log2,
    )


def _whole_blocks(launch, x):
    """Keys or values [B, S, K, W], filled up to the end of the last block."""
    return _mosaic.padded(x, 1, launch.blocks * launch.block)


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
    arguments = query, key, value, block_indices, segment_ids, block_size, scale
    packed = segment_ids is not None
    in_triton = unsupported_mosaic(query, key, value, block_indices, block_size, packed)
    group = query.shape[2] // block_indices.shape[2]
    block = kernel_block(query, value, block_size)
    tiling = query_sums_tiling(query, value, block, group)
    # In longer chunks blocks have fewer units to add up.
    launch = Launch(*arguments, tiling=tiling, times=1 if in_triton else 2)
    blocks, _ = launch.plan(share=False)
    # A query that sees nothing gets probabilities exp2(-inf - inf) = 0.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2_E)
    delta = _softmax.delta(out, out_gradient, lse_gradient)
    arrays = query, key, value, out_gradient, lse, delta
    make_partials = _triton_gradients if in_triton else _mosaic_gradients
    make_partials, unit_starts, units = make_partials(launch, blocks, *arrays)

    sum_shape = key.shape[0] * key.shape[2], launch.blocks, launch.block
    sums = [jnp.zeros((*sum_shape, x.shape[-1]), jnp.float32) for x in (key, value)]
    sums = _triton.vary_like(sums, (query, key, value, out_gradient))
    new = None, *sums, jax.ShapeDtypeStruct(query.shape, query.dtype)

    def step(step, results):
        partials, key_sums, value_sums, query_gradient = results or new
        if results is not None and partials is None:
            # Only now, so that partial results take the place of the step's before.
            barrier = step, key_sums, value_sums, query_gradient
            barrier = jax.lax.optimization_barrier(barrier)
            step, key_sums, value_sums, query_gradient = barrier
        partial_query, *partials = make_partials(step, partials)
        sizes = [math.prod(x.shape[2:]) for x in sums]
        *partials, key_sums, value_sums = _steps.write(
            gradient_kernels.add_units_kernel,
            unit_starts,
            step,
            launch.portions.length,
            launch.portions.chunks,
            units,
            results=[*partials, key_sums, value_sums],
            grid=(
                launch.blocks,
                launch.portions.rows,
                triton.cdiv(max(sizes), SUM_STEP),
            ),
            KV_HEADS=launch.kv_heads,
            KEY_SIZE=sizes[0],
            VALUE_SIZE=sizes[1],
            STEP=SUM_STEP,
            DEPTH=SUM_DEPTH,
        )
        partial_query, query_gradient = launch.by_tiles(
            gradient_kernels.add_queries_kernel,
            blocks,
            step,
            results=[partial_query, query_gradient],
            **launch.key_constants,
        )
        partials = [partial_query, *partials] if in_triton else None
        return partials, key_sums, value_sums, query_gradient

    _, key_sums, value_sums, query_gradient = _steps.each_step(
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


def _triton_gradients(launch, blocks, query, key, value, out_gradient, lse, delta):
    """How Triton makes partial gradients.

    Args:
      launch: The one of the backward direction.
      blocks: int32 [D, C, M, L, R, n], of the pairs.
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, V].
      out_gradient: [B, T, N, V].
      lse: [B, T, N], in base 2, +inf where nothing is seen.
      delta: [B, T, N].

    Returns:
      A function of the step and what it wrote in the step before, if any, that gives
      partial gradients [L, M, R, n, G, H] of queries and fp32 [M, U, block, H] and
      [M, U, block, V] of keys, without the factor scale, and values; where each block's
      units start, int32 [D, C, M, blocks + 1]; and U.
    """
    tiling = backward_tiling(query, value, launch.block, launch.group)
    pairs, units = launch.units(blocks, tiling)
    _, _, rows, length, lists, slots = blocks.shape
    count = units.blocks.shape[-1]
    widths = query.shape[-1], value.shape[-1]
    of_pairs = length, rows, lists, slots, launch.group, widths[0]
    of_units = rows, count, launch.block
    new = [
        jax.ShapeDtypeStruct(of_pairs, query.dtype),
        *[jax.ShapeDtypeStruct((*of_units, x), jnp.float32) for x in widths],
    ]
    arrays = query, key, value, out_gradient, lse, delta, launch.segment_ids

    def make_partials(step, results):
        return launch.by_units(
            gradient_kernels.backward_kernel,
            (*arrays, pairs, *units[:3], step),
            tiling,
            pairs.shape[-1],
            count,
            results=results or new,
            width=3 * widths[0] + 2 * widths[1],
        )

    return make_partials, units.starts, count


def _mosaic_gradients(launch, blocks, query, key, value, out_gradient, lse, delta):
    """How Mosaic does, to new arrays in each step; see `_triton_gradients`."""
    tiling = mosaic_backward_tiling(query, value, launch.block, launch.group)
    sizes = _mosaic_sizes(launch, query)
    pairs, starts = sort_pairs(blocks, launch.blocks)
    programs = max(1, tiling.programs // sizes.rows) * mosaic_backward.CONSUMERS
    tile_starts, ranges = split_tiles(starts, sizes.tokens, programs)
    unit_starts, first_units = split_units_of_ranges(tile_starts, ranges)
    ranges = jnp.concatenate([ranges, first_units[..., None]], axis=-1)
    pairs, starts, tile_starts, ranges = (
        x.reshape(-1, *x.shape[3:])  # [D C M, ..]
        for x in (pairs, starts, tile_starts, ranges)
    )
    key, value = (_whole_blocks(launch, x) for x in (key, value))
    statistics = mosaic_backward.statistics(lse, delta, sizes)
    units = launch.blocks + programs

    def make_partials(step, _):
        return mosaic_backward.partial_gradients(
            query,
            key,
            value,
            out_gradient,
            statistics,
            pairs,
            starts,
            tile_starts,
            ranges,
            step,
            units=units,
            sizes=sizes,
        )

    return make_partials, unit_starts, units
