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

from jattn.pallas import _steps
from jattn.pallas.block_sparse import (
    kernels,
    mosaic,
    mosaic_chunk,
    unsupported_mosaic,
)
from jattn.pallas.block_sparse.backward import backward
from jattn.pallas.block_sparse.launch import (
    SHARED,
    Launch,
    forward_tiling,
    merge_tiling,
    mosaic_tiling,
)
from jattn.pallas.block_sparse.mosaic_work import SHARERS
from jattn.pallas.block_sparse.pairs import sort_pairs, split_tiles


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
    # In longer chunks a block meets more queries each time it is loaded.
    launch = Launch(*arguments, times=2)
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
    launch = Launch(*arguments, tiling=tiling, sharers=SHARERS)
    blocks, shared = launch.plan(share=True)
    pairs, starts = sort_pairs(blocks, launch.blocks)
    sizes = launch.mosaic_sizes()
    tiling = mosaic_tiling(query, value, mosaic_chunk.BLOCK, group)
    programs = max(1, tiling.programs // sizes.rows)
    tile_starts, ranges = split_tiles(starts, sizes.tokens, programs)
    pairs, starts, tile_starts, ranges = (
        x.reshape(-1, *x.shape[3:])  # [D C M, ..]
        for x in (pairs, starts, tile_starts, ranges)
    )
    key, value = (launch.whole_blocks(x) for x in (key, value))
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
