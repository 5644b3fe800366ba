"""Selective Attention in Triton for a given F: gradients of keys, values and logits.

See `jattn.pallas.selective.query_kernels` for how F enters.
"""

# A type checker sees neither that static_range unrolls nor what a constexpr stands for.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from jattn.pallas._tiles import _load_rows, _store_rows
from jattn.pallas.selective.mask import (
    _first_seen,
    _load_fragments,
    _nothing_seen,
    _store_fragments,
)


@triton.jit
def key_gradient_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, V]
    bias_ptr,  # [B, CHUNK, rows], in fragments
    starts_ptr,  # [B, S] if PACKED
    ends_ptr,  # [B, columns / KEYS]
    region_ptr,  # [2]
    out_gradient_ptr,  # [B, T, N, V]
    lse_ptr,  # [B, T, N], in base 2
    delta_ptr,  # [B, T, N]
    scale_log2,
    queries,
    keys,
    rows,
    columns,
    key_gradient_ptr,  # [SLICES, B, CHUNK, PARTS, H], without the factor scale
    value_gradient_ptr,  # [SLICES, B, CHUNK, PARTS, V]
    logits_gradient_ptr,  # [PARTS, B, CHUNK, rows] if KEEP, in fragments
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SLICES: tl.constexpr,
    AHEAD: tl.constexpr,
    KEEP: tl.constexpr,
    PACKED: tl.constexpr,
):
    """What MEMBERS query heads of one kv head give the gradients of a tile of keys.

    The queries that see the tile are divided among SLICES programs. With KEEP they also
    write the gradient of L - F, summed over these heads; not where nothing is seen.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    PARTS: tl.constexpr = HEADS // MEMBERS
    batch = tl.program_id(2).to(tl.int64)
    part = tl.program_id(0) % PARTS
    tile = tl.program_id(0) // PARTS
    head = part * MEMBERS
    first_key = tl.load(region_ptr + 1) + tile * KEYS
    column = tl.arange(0, KEYS)
    position = first_key + column
    exists = position < keys
    offset = keys - queries
    target = (tl.program_id(1) * tl.num_programs(2) + batch) * CHUNK + tile * KEYS
    target = (target + column) * PARTS + part
    everywhere = column >= 0

    key_row = (batch * keys + position) * KV_HEADS + head // GROUP
    key = _load_rows(key_ptr, key_row, exists, H, H_PAD)
    value = _load_rows(value_ptr, key_row, exists, V, V_PAD)
    key_gradient = tl.zeros([KEYS, H_PAD], tl.float32)
    value_gradient = tl.zeros([KEYS, V_PAD], tl.float32)

    # Tiles of queries: from the first that sees a key to the last, those that see all
    # of the keys from `full` on.
    begin = tl.maximum(first_key - offset, 0) // ROWS
    end = tl.cdiv(
        tl.load(ends_ptr + batch * (columns // KEYS) + first_key // KEYS), ROWS
    )
    size = tl.cdiv(tl.maximum(end - begin, 0), SLICES)
    begin += tl.program_id(1) * size
    end = tl.minimum(begin + size, end)
    full = tl.cdiv(tl.maximum(first_key + KEYS - 1 - offset, 0), ROWS)
    full = tl.minimum(tl.maximum(full, begin), tl.maximum(end, begin))
    if PACKED:
        full = end
    row = tl.arange(0, ROWS)
    bias_ptr += (batch * CHUNK + tile * KEYS) * rows
    if KEEP:
        part_row = (part * tl.num_programs(2) + batch) * CHUNK + tile * KEYS
        logits_gradient_ptr += part_row * rows
        total = tl.zeros([KEYS, ROWS], tl.float32)
    if AHEAD:
        bias = tl.zeros([KEYS, ROWS], tl.float32)
        if begin < end:
            bias = _load_fragments(bias_ptr + begin * (16 * ROWS), rows, KEYS, ROWS)

    for UNMASKED in tl.static_range(2):
        if UNMASKED:
            begin, full = full, end
        for n in range(begin * MEMBERS, full * MEMBERS):
            member = n % MEMBERS
            token = n // MEMBERS * ROWS + row
            live = token < queries
            source = (batch * queries + token) * HEADS + head + member
            query = _load_rows(query_ptr, source, live, H, H_PAD)
            out_gradient = _load_rows(out_gradient_ptr, source, live, V, V_PAD)
            lse = tl.load(lse_ptr + source, mask=live, other=float("inf"))
            delta = tl.load(delta_ptr + source, mask=live, other=0.0)
            place = n // MEMBERS * (16 * ROWS)
            if not AHEAD:
                bias = _load_fragments(bias_ptr + place, rows, KEYS, ROWS)
            # Transposed: weights and gradient then enter the products for value and
            # key from registers.
            logits = tl.dot(key, tl.trans(query), bias, input_precision="tf32x3")
            if AHEAD:
                following = tl.minimum((n + 1) // MEMBERS, end - 1) * (16 * ROWS)
                bias = _load_fragments(bias_ptr + following, rows, KEYS, ROWS)
            if not UNMASKED:
                seen = position[:, None] <= (token + offset)[None, :]
                if PACKED:
                    first = _first_seen(starts_ptr, batch, token, queries, keys, PACKED)
                    seen &= first[None, :] <= position[:, None]
                logits = tl.where(seen, logits, -float("inf"))
            weights = tl.exp2(logits * scale_log2 - lse[None, :])  # [KEYS, ROWS]
            value_gradient = tl.dot(
                weights.to(value.dtype),
                out_gradient,
                value_gradient,
                input_precision="tf32x3",
            )
            gradient = tl.dot(value, tl.trans(out_gradient), input_precision="tf32x3")
            gradient = weights * (gradient - delta[None, :])  # of logits
            if KEEP:
                total = tl.where(member == 0, gradient, total + gradient)
                _store_fragments(
                    logits_gradient_ptr + place,
                    total,
                    rows,
                    (member + 1) // MEMBERS,
                    KEYS,
                    ROWS,
                )
            key_gradient = tl.dot(
                gradient.to(query.dtype), query, key_gradient, input_precision="tf32x3"
            )

    _store_rows(key_gradient_ptr, target, everywhere, key_gradient, H, H_PAD)
    _store_rows(value_gradient_ptr, target, everywhere, value_gradient, V, V_PAD)


@triton.jit
def mask_gradient_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, V]
    bias_ptr,  # [B, CHUNK, rows], in fragments
    starts_ptr,  # [B, S] if PACKED
    ends_ptr,  # [B, columns / KEYS]
    region_ptr,  # [2]
    out_gradient_ptr,  # [B, T, N, V]
    lse_ptr,  # [B, T, N], in base 2
    delta_ptr,  # [B, T, N]
    logits_gradient_ptr,  # [PARTS, B, CHUNK, rows] if PARTS, in fragments
    kept_gradient_ptr,  # [B, T] if MEMORY
    scale_log2,
    limit,
    queries,
    keys,
    rows,
    columns,
    gradient_ptr,  # [B, rows, CHUNK]
    sums_ptr,  # [B, rows / ROWS, CHUNK]
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    AHEAD: tl.constexpr,
    PARTS: tl.constexpr,
    MEMORY: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The gradient of -F in one tile, and its sums over the queries of the tile.

    Where nobody needs a key of the tile, only the sums are written. Attention gives the
    gradient of L - F, summed over the heads one after the other, or over the PARTS that
    key_gradient_kernel has kept. With MEMORY there is also that of what bias_kernel
    counts as kept.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    batch = tl.program_id(2).to(tl.int64)
    first_token = tl.program_id(1) * ROWS
    first_key = tl.load(region_ptr + 1) + tl.program_id(0) * KEYS
    column, row = tl.arange(0, KEYS), tl.arange(0, ROWS)
    target = batch * tl.num_programs(1) + tl.program_id(1)
    sums_ptr += target * CHUNK + tl.program_id(0) * KEYS
    gradient_ptr += target * ROWS * CHUNK + tl.program_id(0) * KEYS
    total = tl.zeros([KEYS, ROWS], tl.float32)
    last = tl.load(ends_ptr + batch * (columns // KEYS) + first_key // KEYS)
    if (first_token < last) & (
        _nothing_seen(
            starts_ptr, batch, first_token, first_key, queries, keys, ROWS, KEYS, PACKED
        )
        == 0
    ):
        token, position = first_token + row, first_key + column
        live, exists = token < queries, position < keys
        first = _first_seen(starts_ptr, batch, token, queries, keys, PACKED)
        seen = position[:, None] <= (token + keys - queries)[None, :]
        seen &= (first[None, :] <= position[:, None]) & live[None, :]
        place = (batch * CHUNK + tl.program_id(0) * KEYS) * rows + first_token * 16
        bias_ptr += place
        if PARTS:
            logits_gradient_ptr += place
            size = tl.num_programs(2).to(tl.int64) * CHUNK * rows
            for part in range(PARTS):
                kept = _load_fragments(
                    logits_gradient_ptr + part * size, rows, KEYS, ROWS
                )
                total += kept.to(tl.float32)
        else:
            if AHEAD:
                bias = _load_fragments(bias_ptr, rows, KEYS, ROWS)
            for head in range(HEADS):
                source = (batch * queries + token) * HEADS + head
                key_row = (batch * keys + position) * KV_HEADS + head // GROUP
                query = _load_rows(query_ptr, source, live, H, H_PAD)
                key = _load_rows(key_ptr, key_row, exists, H, H_PAD)
                out_gradient = _load_rows(out_gradient_ptr, source, live, V, V_PAD)
                value = _load_rows(value_ptr, key_row, exists, V, V_PAD)
                lse = tl.load(lse_ptr + source, mask=live, other=float("inf"))
                delta = tl.load(delta_ptr + source, mask=live, other=0.0)
                if not AHEAD:
                    bias = _load_fragments(bias_ptr, rows, KEYS, ROWS)
                logits = tl.dot(key, tl.trans(query), bias, input_precision="tf32x3")
                gradient = tl.dot(
                    value, tl.trans(out_gradient), input_precision="tf32x3"
                )
                weights = tl.exp2(logits * scale_log2 - lse[None, :])
                total += weights * (gradient - delta[None, :])
        if MEMORY:
            bias = _load_fragments(bias_ptr, rows, KEYS, ROWS)
            kept_gradient = tl.load(
                kept_gradient_ptr + batch * queries + token, mask=live, other=0.0
            )
            # The derivative of a minimum of equals is divided between them.
            share = tl.where(bias == -limit, 0.5, 0.0)
            share = tl.where(bias > -limit, 1.0, share)
            total += share * kept_gradient[None, :]
        total = tl.where(seen, total, 0.0)
        tl.store(gradient_ptr + (row[None, :] * CHUNK + column[:, None]), total)
    tl.store(sums_ptr + column, tl.sum(total, axis=1))
