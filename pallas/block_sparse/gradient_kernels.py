"""The kernels of the gradients of attention to chosen blocks; see `triton.py`."""

import triton
import triton.language as tl

from jattn.pallas._tiles import _load_rows, _store_rows
from jattn.pallas.block_sparse.kernels import (
    LOG_2,
    _load_pairs,
    _pair_rows,
    _step_place,
)


@triton.jit
def backward_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, V]
    out_gradient_ptr,  # [B, T, N, V]
    lse_ptr,  # [B, T, N], in base 2, +inf where nothing is seen
    delta_ptr,  # [B, T, N]
    segment_ptr,  # [B, S] if PACKED
    pairs_ptr,  # [D, C, M, P]
    unit_blocks_ptr,  # [D, C, M, U]
    unit_firsts_ptr,  # [D, C, M, U]
    unit_lasts_ptr,  # [D, C, M, U]
    step_ptr,  # [1]
    scale_log2,
    queries,
    keys,
    length,
    chunks,
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
    row, batch, kv_head, first_token = _step_place(
        step_ptr, kv_row, length, chunks, KV_HEADS
    )
    unit = row.to(tl.int64) * units + tl.program_id(0)
    block = tl.load(unit_blocks_ptr + unit)
    if block < 0:
        return
    first = tl.load(unit_firsts_ptr + unit)
    last = tl.load(unit_lasts_ptr + unit)
    # Queries of the chunk, so that offsets from here on fit 32 bits.
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
    pairs_ptr += row.to(tl.int64) * pairs
    first_query = tl.load(pairs_ptr + first) // (LISTS * SLOTS) + first_token
    masked = PACKED or first_query + keys - queries < block * BLOCK + BLOCK - 1
    key_gradient = tl.zeros([BLOCK, H_PAD], tl.float32)
    value_gradient = tl.zeros([BLOCK, V_PAD], tl.float32)

    for start in range(first, last, ROWS // GROUP):
        live, pair = _load_pairs(pairs_ptr, start, last, GROUP, ROWS)
        token, source, target = _pair_rows(
            pair, kv_row, kv_head, KV_HEADS, LISTS, SLOTS, GROUP, ROWS
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
        query_gradient *= scale_log2 * LOG_2
        _store_rows(partial_query_ptr, target, live, query_gradient, H, H_PAD)

    unit_row = (kv_row * units + tl.program_id(0)).to(tl.int64) * BLOCK + slot
    everywhere = slot >= 0
    _store_rows(partial_key_ptr, unit_row, everywhere, key_gradient, H, H_PAD)
    _store_rows(partial_value_ptr, unit_row, everywhere, value_gradient, V, V_PAD)


@triton.jit
def add_units_kernel(
    unit_starts_ptr,  # [D, C, M, blocks + 1]
    step_ptr,  # [1]
    length,
    chunks,
    units,
    partial_key_ptr,  # [M, U, KEY_SIZE]
    partial_value_ptr,  # [M, U, VALUE_SIZE]
    key_sums_ptr,  # [B K, blocks, KEY_SIZE]
    value_sums_ptr,  # [B K, blocks, VALUE_SIZE]
    KV_HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    STEP: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Adds what a block's units give its gradients to what earlier steps did."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    kv_row = tl.program_id(1)
    row, batch, kv_head, _ = _step_place(step_ptr, kv_row, length, chunks, KV_HEADS)
    unit_starts_ptr += row * (blocks + 1) + block
    first = tl.load(unit_starts_ptr)
    last = tl.load(unit_starts_ptr + 1)
    if first >= last:
        return
    sum_row = ((batch * KV_HEADS + kv_head) * blocks + block).to(tl.int64)
    unit_row = (kv_row * units).to(tl.int64)
    _add_range(
        key_sums_ptr + sum_row * KEY_SIZE,
        partial_key_ptr + unit_row * KEY_SIZE,
        first,
        last,
        KEY_SIZE,
        STEP,
        DEPTH,
    )
    _add_range(
        value_sums_ptr + sum_row * VALUE_SIZE,
        partial_value_ptr + unit_row * VALUE_SIZE,
        first,
        last,
        VALUE_SIZE,
        STEP,
        DEPTH,
    )


@triton.jit
def _add_range(
    sums_ptr,
    partials_ptr,
    first,
    last,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Adds partials [first:last, SIZE] to sums [SIZE]: this program's STEP of them."""
    element = tl.program_id(2) * STEP + tl.arange(0, STEP)
    inside = element < SIZE
    total = tl.load(sums_ptr + element, mask=inside)
    partials_ptr += first.to(tl.int64) * SIZE + element[None, :]
    depth = tl.arange(0, DEPTH)[:, None]
    for start in range(first, last, DEPTH):
        there = (start + depth < last) & inside[None, :]
        partials = tl.load(partials_ptr + depth * SIZE, mask=there, other=0.0)
        total += tl.sum(partials, axis=0)
        partials_ptr += DEPTH * SIZE
    tl.store(sums_ptr + element, total, mask=inside)


@triton.jit
def add_queries_kernel(
    blocks_ptr,  # [D, C, M, L, R, n]
    step_ptr,  # [1]
    queries,
    keys,
    length,
    chunks,
    partial_query_ptr,  # [L, M, R, n, G, H]
    query_gradient_ptr,  # [B, T, N, H]
    KV_HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds what the blocks of some queries give to their gradient."""
    kv_row = tl.program_id(1)  # of the portion
    member = tl.program_id(0) % LISTS
    step_row, batch, kv_head, first_token = _step_place(
        step_ptr, kv_row, length, chunks, KV_HEADS
    )
    tile_token = tl.program_id(0) // LISTS * TOKENS  # of the chunk
    first_token += tile_token
    if first_token >= queries:
        return
    row = tl.arange(0, ROWS)
    token = row // GROUP  # of the tile
    live = (row < TOKENS * GROUP) & (first_token + token < queries)
    blocks = tl.cdiv(keys, BLOCK)
    list_row = (step_row.to(tl.int64) * length + tile_token + token) * LISTS + member
    blocks_ptr += list_row * SLOTS
    first_target = (tile_token * tl.num_programs(1) + kv_row) * LISTS + member
    partial_query_ptr += first_target.to(tl.int64) * (SLOTS * GROUP * H)
    target = token * (tl.num_programs(1) * LISTS * SLOTS * GROUP) + row % GROUP
    gradient = tl.zeros([ROWS, H_PAD], tl.float32)
    block = tl.load(blocks_ptr, mask=live, other=blocks)
    for slot in range(SLOTS):
        partial = block < blocks
        # The next one arrives while this one's partial result does.
        more = live & (slot + 1 < SLOTS)
        block = tl.load(blocks_ptr + slot + 1, mask=more, other=blocks)
        place = target + slot * GROUP
        gradient += _load_rows(partial_query_ptr, place, partial, H, H_PAD)
    first_row = (batch * queries + first_token).to(tl.int64)
    query_gradient_ptr += first_row * (KV_HEADS * LISTS * GROUP * H)
    head = (kv_head * LISTS + member) * GROUP + row % GROUP
    source = token * (KV_HEADS * LISTS * GROUP) + head
    _store_rows(query_gradient_ptr, source, live, gradient, H, H_PAD)
