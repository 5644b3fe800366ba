"""Gradients of attention to chosen blocks; see `triton.py`."""

import math

import jax
import jax.numpy as jnp
import triton

from jattn.pallas import _sharding, _softmax, _steps
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.block_sparse import (
    gradient_kernels,
    mosaic_backward,
    unsupported_mosaic,
)
from jattn.pallas.block_sparse.launch import (
    Launch,
    backward_tiling,
    mosaic_backward_tiling,
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
    sums = _sharding.vary_like(sums, (query, key, value, out_gradient))
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
    sizes = launch.mosaic_sizes()
    pairs, starts = sort_pairs(blocks, launch.blocks)
    programs = max(1, tiling.programs // sizes.rows) * mosaic_backward.CONSUMERS
    tile_starts, ranges = split_tiles(starts, sizes.tokens, programs)
    unit_starts, first_units = split_units_of_ranges(tile_starts, ranges)
    ranges = jnp.concatenate([ranges, first_units[..., None]], axis=-1)
    pairs, starts, tile_starts, ranges = (
        x.reshape(-1, *x.shape[3:])  # [D C M, ..]
        for x in (pairs, starts, tile_starts, ranges)
    )
    key, value = (launch.whole_blocks(x) for x in (key, value))
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
