"""Attention to chosen blocks of keys in Triton, organised by block of keys.

A query with a list of n blocks makes n pairs (query, block). Pairs are sorted by block,
so that one program loads a block once and meets the queries that chose it: a matrix
tile holds the G heads of as many queries as fit, whatever G is. Every pair leaves a
partial result in memory, and the n of a query are added in order; so are those of the
units of work into which a block chosen by many queries is split. Nothing is added
atomically: same input, same bits.

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

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jattn.pallas import _triton, tuning
from jattn.pallas._tiles import _load_rows, _store_rows
from jattn.pallas.block_sparse.pairs import (
    Pairs,
    kernel_block,
    portions,
    sort_pairs,
    split_blocks,
    split_units,
)

LOG2_E = math.log2(math.e)

_FORWARD, _BACKWARD = 0, 1


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


def tilings(
    query: jax.Array, value: jax.Array, block: int, group: int
) -> tuple[Tiling, Tiling]:
    """The tilings of the forward and of the backward kernel.

    Args:
      query: [B, T, N, H].
      value: [B, S, K, V].
      block: Keys in a block of the kernels.
      group: Query heads that share a list.
    """
    if query.dtype.itemsize > 2:
        forward = Tiling(rows=32, tiles=32, warps=4, stages=1)
        backward = Tiling(rows=32, tiles=32, warps=8, stages=1)
    elif max(query.shape[-1], value.shape[-1]) > 128:
        forward = Tiling(rows=64, tiles=16, warps=4, stages=1)
        backward = Tiling(rows=64, tiles=64, warps=8, stages=1)
    else:
        forward = Tiling(rows=64, tiles=16, warps=4, stages=1, registers=128)
        backward = Tiling(rows=64, tiles=64, warps=4, stages=2)
    shape = {
        "group": group,
        "block": block,
        "key_width": query.shape[-1],
        "value_width": value.shape[-1],
        "dtype": str(query.dtype),
    }
    return (
        tuning.choose("block_sparse_forward", shape, forward),
        tuning.choose("block_sparse_backward", shape, backward),
    )


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
    return _attend_forward(
        query, key, value, block_indices, segment_ids, block_size, scale
    )[0]


def _attend_forward(query, key, value, block_indices, segment_ids, block_size, scale):
    b, t, kv_heads = *query.shape[:2], key.shape[2]
    lists = block_indices.reshape(b, t, kv_heads, -1, block_indices.shape[-1])
    out, lse, pairs = forward(
        query, key, value, lists, segment_ids, block_size=block_size, scale=scale
    )
    return (out, lse), (query, key, value, segment_ids, out, lse, pairs)


def _attend_backward(block_size, scale, residuals, gradients):
    gradients = backward(*residuals, *gradients, block_size=block_size, scale=scale)
    return *gradients, None, None


attend.defvjp(_attend_forward, _attend_backward)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lists: jax.Array,
    segment_ids: jax.Array | None,
    *,
    block_size: int,
    scale: float,
) -> tuple[jax.Array, jax.Array, Pairs]:
    """The value of attend, and what its gradient needs.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, V].
      lists: int [B, T, K, R, n].
      segment_ids: int [B, S] or None.
      block_size: Keys in a block.
      scale: Factor of the logits.

    Returns:
      Output [B, T, N, V], log-sum-exp [B, T, N] in fp32, and the pairs for backward.
    """
    block = kernel_block(query, value, block_size)
    lists = split_blocks(lists, block_size // block)
    width = max(query.shape[-1], value.shape[-1])
    pairs = sort_pairs(lists, key.shape[1], block, *portions(query, lists.shape, width))
    parts, chunks = pairs.live.shape[:2]
    launch = _Launch(query, value, pairs, segment_ids, block, _FORWARD)
    partial_shape = (*pairs.live.shape[2:], launch.group)

    every = jax.tree.map(
        lambda x: x.reshape(parts * chunks, *x.shape[2:]), (pairs, launch.units)
    )

    def chunk(index, results):
        pairs, units = jax.tree.map(lambda x: x[index], every)
        partial_out, partial_lse = launch(
            _forward_kernel,
            (query, key, value),
            pairs,
            units,
            outputs=[
                jax.ShapeDtypeStruct((*partial_shape, launch.value_width), value.dtype),
                jax.ShapeDtypeStruct(partial_shape, jnp.float32),
            ],
            scale=scale,
            width=launch.key_width + launch.value_width,
        )
        # A pair without a block has no partial result: its memory may hold anything.
        live = pairs.live[..., None]  # [L, M, R, n, 1]
        lse = jnp.where(live, partial_lse, -jnp.inf)
        peak = jnp.max(lse, axis=-2, keepdims=True)
        peak = jnp.where(jnp.isneginf(peak), 0, peak)
        weights = jnp.exp(lse - peak)
        total = jnp.sum(weights, axis=-2, keepdims=True)
        weights /= jnp.where(total > 0, total, 1)
        partial_out = jnp.where(live[..., None], partial_out.astype(jnp.float32), 0)
        out = jnp.sum(partial_out * weights[..., None], axis=-3)
        lse = (peak + jnp.log(total)).squeeze(-2)
        return [
            _put_chunk(x, mine, index // chunks, index % chunks)
            for x, mine in zip(results, (out.astype(value.dtype), lse), strict=True)
        ]

    results = [
        launch.empty_rows(pairs, (launch.value_width,), value.dtype),
        launch.empty_rows(pairs, (), jnp.float32),
    ]
    results = _triton.vary_like(results, (query, key, value, lists))
    out, lse = jax.lax.fori_loop(0, parts * chunks, chunk, results)
    out = _join_heads(out, (*query.shape[:3], launch.value_width), key.shape[2])
    return out, _join_heads(lse, query.shape[:3], key.shape[2]), pairs


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    pairs: Pairs,
    out_gradient: jax.Array,
    lse_gradient: jax.Array,
    *,
    block_size: int,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of forward's output and log-sum-exp for query, key and value."""
    block = kernel_block(query, value, block_size)
    launch = _Launch(query, value, pairs, segment_ids, block, _BACKWARD)
    # A query that sees nothing gets probabilities exp2(-inf - inf) = 0.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2_E)
    # The kernel sees the gradient as rounded to its dtype: delta has to be of that one,
    # and not of one that XLA knows in higher precision, for the two to cancel.
    out_gradient = jax.lax.optimization_barrier(out_gradient)
    delta = out.astype(jnp.float32) * out_gradient.astype(jnp.float32)
    delta = jnp.sum(delta, axis=-1) - lse_gradient
    partial_shape = (*pairs.live.shape[2:], launch.group, launch.key_width)
    unit_shape = (*launch.units.blocks.shape[2:], block)
    sum_shape = (pairs.starts.shape[2], launch.blocks, block)
    parts, chunks = pairs.live.shape[:2]
    every = pairs, launch.units

    def chunk(part, index, carry):
        query_gradient, sums = carry
        pairs, units = jax.tree.map(lambda x: x[part, index], every)
        partial_query, partial_key, partial_value = launch(
            _backward_kernel,
            (query, key, value, out_gradient, lse, delta),
            pairs,
            units,
            outputs=[
                jax.ShapeDtypeStruct(partial_shape, query.dtype),
                jax.ShapeDtypeStruct((*unit_shape, launch.key_width), jnp.float32),
                jax.ShapeDtypeStruct((*unit_shape, launch.value_width), jnp.float32),
            ],
            scale=scale,
            width=3 * launch.key_width + 2 * launch.value_width,
        )
        partial_query = jnp.where(
            pairs.live[..., None, None], partial_query.astype(jnp.float32), 0
        )
        partial_query = jnp.sum(partial_query, axis=-3).astype(query.dtype)
        sums = [
            _add_units(x, partial, units.starts)
            for x, partial in zip(sums, (partial_key, partial_value), strict=True)
        ]
        return _put_chunk(query_gradient, partial_query, part, index), sums

    zeros = [
        jnp.zeros((*sum_shape, width), jnp.float32)
        for width in (launch.key_width, launch.value_width)
    ]
    query_gradient = launch.empty_rows(pairs, (launch.key_width,), query.dtype)
    query_gradient, *zeros = _triton.vary_like(
        [query_gradient, *zeros], (query, key, value, out_gradient)
    )

    def portion(query_gradient, part):
        mine = functools.partial(chunk, part)
        return jax.lax.fori_loop(0, chunks, mine, (query_gradient, zeros))

    query_gradient, (key_gradient, value_gradient) = jax.lax.scan(
        portion, query_gradient, jnp.arange(parts)
    )

    def join_blocks(x, like):  # [D, M, blocks, block, W] -> [B, S, K, W]
        b, s, k, width = like.shape
        x = x.reshape(b, k, -1, width)[:, :, :s]
        return jnp.moveaxis(x, 1, 2).astype(like.dtype)

    return (
        _join_heads(query_gradient, query.shape, key.shape[2]),
        join_blocks(scale * key_gradient, key),
        join_blocks(value_gradient, value),
    )


def _put_chunk(rows, chunk, part, index):
    """Writes a chunk [L, M, ..] of a portion to its place among rows [C L, B K, ..]."""
    start = index * chunk.shape[0], part * chunk.shape[1], *[0] * (chunk.ndim - 2)
    return jax.lax.dynamic_update_slice(rows, chunk, start)


def _join_heads(rows, shape, kv_heads):
    """[C L, B K, R, G, ..] -> shape [B, T, N, ..]."""
    b, t = shape[:2]
    rows = rows[:t].reshape(t, b, kv_heads, *rows.shape[2:])
    return jnp.moveaxis(rows, 1, 0).reshape(shape)


def _add_units(sums, partials, starts):
    """Adds each block's units of partials [M, U, ...] to sums [M, blocks, ...]."""
    rows, blocks = sums.shape[:2]
    size = math.prod(sums.shape[2:])
    step = min(2048, triton.next_power_of_2(size))
    [total] = _triton.call(
        _add_units_kernel,
        sums,
        partials,
        starts,
        partials.shape[1],
        outputs=[jax.ShapeDtypeStruct(sums.shape, sums.dtype)],
        grid=(triton.cdiv(size, step), blocks, rows),
        num_warps=4,
        SIZE=size,
        STEP=step,
    )
    return total


class _Launch:
    """What the launches of one kernel share: one for each chunk of each portion."""

    def __init__(self, query, value, pairs, segment_ids, block, direction):
        self.queries, heads, self.key_width = query.shape[1:]
        self.keys, self.kv_heads, self.value_width = value.shape[1:]
        self.lists, self.slots = pairs.live.shape[4:]
        self.group = heads // (self.kv_heads * self.lists)
        self.blocks = pairs.starts.shape[-1] - 1
        self.block = block
        self.tiling = tilings(query, value, block, self.group)[direction]
        unit = self.tiling.tiles * (self.tiling.rows // self.group)
        self.units = split_units(pairs, unit)
        self.packed = segment_ids is not None
        if segment_ids is None:
            segment_ids = jnp.zeros((1, 1), jnp.int32)
        self.segment_ids = segment_ids.astype(jnp.int32)

    def empty_rows(self, pairs, widths, dtype):
        """What _put_chunk fills: an array [C L, B K, R, G, *widths]."""
        parts, chunks, length, rows, lists, _ = pairs.live.shape
        shape = chunks * length, parts * rows, lists, self.group, *widths
        return jnp.empty(shape, dtype)

    def __call__(self, kernel, arrays, pairs, units, *, outputs, scale, width):
        """Launches the kernel on one chunk, a program for each unit of each kv head.

        Args:
          kernel: One of the two below.
          arrays: What it reads.
          pairs: Those of the chunk.
          units: Those of the chunk.
          outputs: Shapes and dtypes of what it writes.
          scale: Factor of the logits.
          width: That of its matrix products, all together.
        """
        return _triton.call(
            kernel,
            *arrays,
            self.segment_ids,
            pairs.pairs,
            units.blocks,
            units.firsts,
            units.lasts,
            pairs.firsts,
            float(scale) * LOG2_E,
            self.queries,
            self.keys,
            pairs.pairs.shape[-1],
            units.blocks.shape[-1],
            outputs=outputs,
            grid=(units.blocks.shape[-1], pairs.pairs.shape[0]),
            num_warps=self.tiling.warps,
            num_stages=self.tiling.stages,
            max_registers=self.tiling.registers,
            flops=2 * pairs.live.size * self.group * self.block * width,
            KV_HEADS=self.kv_heads,
            LISTS=self.lists,
            SLOTS=self.slots,
            GROUP=self.group,
            H=self.key_width,
            V=self.value_width,
            H_PAD=max(16, triton.next_power_of_2(self.key_width)),
            V_PAD=max(16, triton.next_power_of_2(self.value_width)),
            BLOCK=self.block,
            ROWS=self.tiling.rows,
            PACKED=self.packed,
        )


@triton.jit
def _load_pairs(
    pairs_ptr,  # [P], of this chunk and kv head
    start,
    last,
    kv_row,
    kv_head,
    KV_HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Where the rows of a tile come from and go to.

    Returns which of them hold anything, their query, counted from the chunk's first,
    their row in arrays [L, N, ..] and their row in partial results [L, M, R, n, G, ..].
    """
    row = tl.arange(0, ROWS)
    index = start + row // GROUP
    live = (index < last) & (row < ROWS // GROUP * GROUP)
    pair = tl.load(pairs_ptr + index, mask=live, other=0)
    entry = pair // SLOTS
    token = entry // LISTS
    member = entry % LISTS
    source = ((token * KV_HEADS + kv_head) * LISTS + member) * GROUP + row % GROUP
    target = (token * tl.num_programs(1) + kv_row) * LISTS + member
    target = target * SLOTS + pair % SLOTS
    return live, token, source, target * GROUP + row % GROUP


@triton.jit
def _forward_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, V]
    segment_ptr,  # [B, S] if PACKED
    pairs_ptr,  # [M, P]
    unit_blocks_ptr,  # [M, U]
    unit_firsts_ptr,  # [M, U]
    unit_lasts_ptr,  # [M, U]
    firsts_ptr,  # [2]
    scale_log2,
    queries,
    keys,
    pairs,
    units,
    partial_out_ptr,  # [L, M, R, n, G, V]
    partial_lse_ptr,  # [L, M, R, n, G]
    KV_HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """One unit: attention of its queries to its block alone."""
    kv_row = tl.program_id(1)  # of the portion
    unit = kv_row * units + tl.program_id(0)
    block = tl.load(unit_blocks_ptr + unit)
    if block < 0:
        return
    first = tl.load(unit_firsts_ptr + unit)
    last = tl.load(unit_lasts_ptr + unit)
    batch = (tl.load(firsts_ptr) + kv_row) // KV_HEADS
    kv_head = (tl.load(firsts_ptr) + kv_row) % KV_HEADS
    # Queries of the chunk, so that offsets from here on fit 32 bits.
    first_token = tl.load(firsts_ptr + 1)
    first_row = (batch * queries + first_token).to(tl.int64) * KV_HEADS * LISTS * GROUP
    query_ptr += first_row * H
    position = block * BLOCK + tl.arange(0, BLOCK)
    exists = position < keys
    key_row = (batch * keys + position).to(tl.int64) * KV_HEADS + kv_head
    key = _load_rows(key_ptr, key_row, exists, H, H_PAD)  # [BLOCK, H]
    value = _load_rows(value_ptr, key_row, exists, V, V_PAD)  # [BLOCK, V]
    segment_ptr += batch.to(tl.int64) * keys
    if PACKED:
        key_segment = tl.load(segment_ptr + position, mask=exists, other=0)
    pairs_ptr += kv_row.to(tl.int64) * pairs
    # Pairs are in order of the query: whether the first one sees the whole block.
    first_query = tl.load(pairs_ptr + first) // (LISTS * SLOTS) + first_token
    masked = PACKED or first_query + keys - queries < block * BLOCK + BLOCK - 1

    for start in range(first, last, ROWS // GROUP):
        live, token, source, target = _load_pairs(
            pairs_ptr,
            start,
            last,
            kv_row,
            kv_head,
            KV_HEADS,
            LISTS,
            SLOTS,
            GROUP,
            ROWS,
        )
        query = _load_rows(query_ptr, source, live, H, H_PAD)  # [ROWS, H]
        logits = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        if masked:
            query_position = first_token + token + keys - queries
            seen = exists[None, :] & (position[None, :] <= query_position[:, None])
            if PACKED:
                segment = tl.load(segment_ptr + query_position, mask=live, other=0)
                seen &= key_segment[None, :] == segment[:, None]
            logits = tl.where(seen, logits, -float("inf"))  # [ROWS, BLOCK]
        peak = tl.max(logits, axis=1) * scale_log2
        peak = tl.where(peak == -float("inf"), 0.0, peak)
        weights = tl.exp2(logits * scale_log2 - peak[:, None])
        total = tl.sum(weights, axis=1)
        out = tl.dot(weights.to(value.dtype), value, input_precision="tf32x3")
        out *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        _store_rows(partial_out_ptr, target, live, out, V, V_PAD)
        # log2(0) = -inf where nothing is seen; times log(2) for the natural logarithm.
        lse = (peak + tl.log2(total)) * 0.6931471805599453
        tl.store(partial_lse_ptr + target, lse, mask=live)


@triton.jit
def _backward_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, V]
    out_gradient_ptr,  # [B, T, N, V]
    lse_ptr,  # [B, T, N], in base 2, +inf where nothing is seen
    delta_ptr,  # [B, T, N]
    segment_ptr,  # [B, S] if PACKED
    pairs_ptr,  # [M, P]
    unit_blocks_ptr,  # [M, U]
    unit_firsts_ptr,  # [M, U]
    unit_lasts_ptr,  # [M, U]
    firsts_ptr,  # [2]
    scale_log2,
    queries,
    keys,
    pairs,
    units,
    partial_query_ptr,  # [L, M, R, n, G, H]
    partial_key_ptr,  # [M, U, BLOCK, H], without the factor scale
    partial_value_ptr,  # [M, U, BLOCK, V]
    KV_HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """One unit: what its block gives the gradients of its queries, and they to it."""
    kv_row = tl.program_id(1)  # of the portion
    unit = kv_row * units + tl.program_id(0)
    block = tl.load(unit_blocks_ptr + unit)
    if block < 0:
        return
    first = tl.load(unit_firsts_ptr + unit)
    last = tl.load(unit_lasts_ptr + unit)
    batch = (tl.load(firsts_ptr) + kv_row) // KV_HEADS
    kv_head = (tl.load(firsts_ptr) + kv_row) % KV_HEADS
    # Queries of the chunk, so that offsets from here on fit 32 bits.
    first_token = tl.load(firsts_ptr + 1)
    first_row = (batch * queries + first_token).to(tl.int64) * KV_HEADS * LISTS * GROUP
    query_ptr += first_row * H
    out_gradient_ptr += first_row * V
    lse_ptr += first_row
    delta_ptr += first_row
    slot = tl.arange(0, BLOCK)
    position = block * BLOCK + slot
    exists = position < keys
    key_row = (batch * keys + position).to(tl.int64) * KV_HEADS + kv_head
    key = _load_rows(key_ptr, key_row, exists, H, H_PAD)  # [BLOCK, H]
    value = _load_rows(value_ptr, key_row, exists, V, V_PAD)  # [BLOCK, V]
    segment_ptr += batch.to(tl.int64) * keys
    if PACKED:
        key_segment = tl.load(segment_ptr + position, mask=exists, other=0)
    pairs_ptr += kv_row.to(tl.int64) * pairs
    first_query = tl.load(pairs_ptr + first) // (LISTS * SLOTS) + first_token
    masked = PACKED or first_query + keys - queries < block * BLOCK + BLOCK - 1
    key_gradient = tl.zeros([BLOCK, H_PAD], tl.float32)
    value_gradient = tl.zeros([BLOCK, V_PAD], tl.float32)

    for start in range(first, last, ROWS // GROUP):
        live, token, source, target = _load_pairs(
            pairs_ptr,
            start,
            last,
            kv_row,
            kv_head,
            KV_HEADS,
            LISTS,
            SLOTS,
            GROUP,
            ROWS,
        )
        query = _load_rows(query_ptr, source, live, H, H_PAD)  # [ROWS, H]
        out_gradient = _load_rows(out_gradient_ptr, source, live, V, V_PAD)
        lse = tl.load(lse_ptr + source, mask=live, other=float("inf"))
        delta = tl.load(delta_ptr + source, mask=live, other=0.0)
        # Transposed: weights and gradient then enter the products for key and value
        # from registers.
        logits = tl.dot(key, tl.trans(query), input_precision="tf32x3")
        if masked:
            query_position = first_token + token + keys - queries
            seen = exists[:, None] & (position[:, None] <= query_position[None, :])
            if PACKED:
                segment = tl.load(segment_ptr + query_position, mask=live, other=0)
                seen &= key_segment[:, None] == segment[None, :]
            logits = tl.where(seen, logits, -float("inf"))  # [BLOCK, ROWS]
        weights = tl.exp2(logits * scale_log2 - lse[None, :])
        value_gradient = tl.dot(
            weights.to(value.dtype),
            out_gradient,
            value_gradient,
            input_precision="tf32x3",
        )
        gradient = tl.dot(value, tl.trans(out_gradient), input_precision="tf32x3")
        gradient = (weights * (gradient - delta[None, :])).to(query.dtype)  # of logits
        key_gradient = tl.dot(gradient, query, key_gradient, input_precision="tf32x3")
        query_gradient = tl.dot(tl.trans(gradient), key, input_precision="tf32x3")
        query_gradient *= scale_log2 * 0.6931471805599453
        _store_rows(partial_query_ptr, target, live, query_gradient, H, H_PAD)

    unit_row = unit.to(tl.int64) * BLOCK + slot
    everywhere = slot >= 0
    _store_rows(partial_key_ptr, unit_row, everywhere, key_gradient, H, H_PAD)
    _store_rows(partial_value_ptr, unit_row, everywhere, value_gradient, V, V_PAD)


@triton.jit
def _add_units_kernel(
    sums_ptr,  # [M, blocks, SIZE]
    partials_ptr,  # [M, U, SIZE]
    starts_ptr,  # [M, blocks + 1]
    units,
    totals_ptr,  # [M, blocks, SIZE]
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
):
    element = tl.program_id(0) * STEP + tl.arange(0, STEP)
    inside = element < SIZE
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    kv_row = tl.program_id(2)
    row = kv_row * (blocks + 1) + block
    first = tl.load(starts_ptr + row)
    last = tl.load(starts_ptr + row + 1)
    offset = (kv_row * blocks + block).to(tl.int64) * SIZE + element
    total = tl.load(sums_ptr + offset, mask=inside)
    for unit in range(first, last):
        partial = (kv_row * units + unit).to(tl.int64) * SIZE + element
        total += tl.load(partials_ptr + partial, mask=inside)
    tl.store(totals_ptr + offset, total, mask=inside)
