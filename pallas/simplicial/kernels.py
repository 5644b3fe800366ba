"""The kernel of 2-simplicial attention; see `triton.py`."""

import triton
import triton.language as tl

from jattn.pallas._tiles import _load_rows, _store_rows
from jattn.pallas.simplicial.tiles import _load_factors, _rows


@triton.jit
def _forward_step(
    expanded,
    key,
    value,
    seen,
    peak,
    total,
    attended,
    scale_log2,
):
    """Flash attention of rows [ROWS, H] to one more block of keys."""
    logits = tl.dot(expanded, tl.trans(key), input_precision="tf32x3")
    if seen is not None:
        logits = tl.where(seen, logits, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    base = new_peak
    if seen is not None:
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp2(logits * scale_log2 - (base * scale_log2)[:, None])
    decay = tl.exp2((peak - base) * scale_log2)
    total = total * decay + tl.sum(weights, axis=1)
    attended = tl.dot(
        weights.to(value.dtype),
        value,
        attended * decay[:, None],
        input_precision="tf32x3",
    )
    return new_peak, total, attended


@triton.jit
def forward_kernel(
    query_ptr,  # [B, T, N, H]
    few_key_ptr,  # [B, F, K, H]
    few_value_ptr,  # [B, F, K, V]
    many_key_ptr,  # [B, M, K, H]
    many_value_ptr,  # [B, M, K, V]
    visible_ptr,  # [B, T] if LIMITED
    key_tiles,  # [B, M, K, H], tiles [1, BLOCK, 1, H_PAD]
    value_tiles,  # [B, M, K, V], tiles [1, BLOCK, 1, V_PAD]
    scale_log2,
    queries,
    few_keys,
    many_keys,
    few_window,
    many_window,
    out_ptr,  # [P, B, T, N, V]
    lse_ptr,  # [P, B, T, N]
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHAINS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    SINGLE: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """Attention of HEADS heads of TOKENS positions."""
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    SHARED: tl.constexpr = TOKENS * ENTRIES == 1
    ROWS: tl.constexpr = TOKENS * HEADS * ENTRIES
    # The last positions, whose windows are whole, come first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    head_tile = tl.program_id(1) % HEAD_TILES
    kv_row = tl.program_id(1) // HEAD_TILES
    batch = (kv_row // KV_HEADS).to(tl.int64)
    kv_head = kv_row % KV_HEADS
    few_first = first + few_keys - queries
    many_first = first + many_keys - queries
    token, head, entry, live, few_reach, many_reach = _rows(
        visible_ptr + batch * queries + first,
        first,
        head_tile,
        queries,
        few_keys,
        many_keys,
        few_window,
        many_window,
        GROUP,
        TOKENS,
        HEADS,
        ENTRIES,
        LIMITED,
    )
    source = (token * KV_HEADS + kv_head) * GROUP + head
    last_seen = many_first + token
    first_seen = last_seen + 1 - many_reach
    longest = tl.maximum(tl.max(few_reach, axis=0), 0)
    # The keys anyone sees are low to high - 1; all rows see middle to last - 1.
    low = tl.where(many_reach > 0, first_seen, many_keys)
    low = tl.minimum(tl.min(low, axis=0), many_keys)
    full_low = tl.maximum(tl.max(tl.where(live, first_seen, 0), axis=0), low)
    high = tl.where(many_reach > 0, last_seen + 1, 0)
    high = tl.maximum(tl.max(high, axis=0), 0)
    middle = low + (full_low - low + BLOCK - 1) // BLOCK * BLOCK
    last = middle + tl.maximum(many_first + 1 - middle, 0) // BLOCK * BLOCK

    query_row = (batch * queries + first) * (KV_HEADS * GROUP)
    query_ptr += query_row * H
    few_row = (batch * few_keys + few_first) * KV_HEADS + kv_head
    few_key_ptr += few_row * H
    few_value_ptr += few_row * V
    many_row = (batch * many_keys + low) * KV_HEADS + kv_head
    many_key_ptr += many_row * H
    many_value_ptr += many_row * V

    column = tl.arange(0, BLOCK)
    tail_column = tl.arange(0, TAIL)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, V_PAD], tl.float32)
    STEP: tl.constexpr = ENTRIES * CHAINS
    share = (few_window + STEP - 1) // STEP
    share = (share + tl.num_programs(2) - 1) // tl.num_programs(2) * STEP
    begin = tl.program_id(2) * share
    end = tl.minimum(longest, begin + share)
    if SINGLE:
        begin, end = 0, STEP
    for start in range(begin, end, STEP):
        back = start + entry
        query = _load_rows(query_ptr, source, live, H, H_PAD)
        factors = _load_factors(
            few_key_ptr,
            start,
            longest,
            back,
            few_reach,
            token,
            KV_HEADS,
            H,
            H_PAD,
            SHARED,
        )
        expanded = (query * factors).to(query.dtype)
        peak = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        attended = tl.zeros([ROWS, V_PAD], tl.float32)
        if CHAINS == 2:
            factors = _load_factors(
                few_key_ptr,
                start + ENTRIES,
                longest,
                back + ENTRIES,
                few_reach,
                token,
                KV_HEADS,
                H,
                H_PAD,
                SHARED,
            )
            expanded2 = (query * factors).to(query.dtype)
            peak2 = tl.full([ROWS], -float("inf"), tl.float32)
            total2 = tl.zeros([ROWS], tl.float32)
            attended2 = tl.zeros([ROWS, V_PAD], tl.float32)
        if TOKENS > 1:
            for block in range(low, middle, BLOCK):
                position = block + column
                row = (position - low) * KV_HEADS
                key = _load_rows(many_key_ptr, row, position < high, H, H_PAD)
                value = _load_rows(many_value_ptr, row, position < high, V, V_PAD)
                seen = position[None, :] <= last_seen[:, None]
                seen &= position[None, :] >= first_seen[:, None]
                peak, total, attended = _forward_step(
                    expanded, key, value, seen, peak, total, attended, scale_log2
                )
                if CHAINS == 2:
                    peak2, total2, attended2 = _forward_step(
                        expanded2,
                        key,
                        value,
                        seen,
                        peak2,
                        total2,
                        attended2,
                        scale_log2,
                    )
        for block in range(middle, last, BLOCK):
            place = [kv_row // KV_HEADS, block, kv_head, 0]
            key = key_tiles.load(place).reshape(BLOCK, H_PAD)
            value = value_tiles.load(place).reshape(BLOCK, V_PAD)
            peak, total, attended = _forward_step(
                expanded, key, value, None, peak, total, attended, scale_log2
            )
            if CHAINS == 2:
                peak2, total2, attended2 = _forward_step(
                    expanded2, key, value, None, peak2, total2, attended2, scale_log2
                )
        for block in range(last, high, TAIL):
            position = block + tail_column
            row = (position - low) * KV_HEADS
            key = _load_rows(many_key_ptr, row, position < high, H, H_PAD)
            value = _load_rows(many_value_ptr, row, position < high, V, V_PAD)
            seen = position[None, :] <= last_seen[:, None]
            seen &= position[None, :] >= first_seen[:, None]
            peak, total, attended = _forward_step(
                expanded, key, value, seen, peak, total, attended, scale_log2
            )
            if CHAINS == 2:
                peak2, total2, attended2 = _forward_step(
                    expanded2, key, value, seen, peak2, total2, attended2, scale_log2
                )

        peak = tl.where(back < few_reach, peak, -float("inf"))
        new_top = tl.maximum(top, peak)
        if CHAINS == 2:
            peak2 = tl.where(back + ENTRIES < few_reach, peak2, -float("inf"))
            new_top = tl.maximum(new_top, peak2)
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        factor = tl.exp2((peak - base) * scale_log2)
        value_factors = _load_factors(
            few_value_ptr,
            start,
            longest,
            back,
            few_reach,
            token,
            KV_HEADS,
            V,
            V_PAD,
            SHARED,
        )
        attended *= factor[:, None] * value_factors.to(tl.float32)
        if SINGLE:
            weight = factor * total
            out = attended
        else:
            decay = tl.exp2((top - base) * scale_log2)
            weight = weight * decay + factor * total
            out = out * decay[:, None] + attended
        if CHAINS == 2:
            factor = tl.exp2((peak2 - base) * scale_log2)
            value_factors = _load_factors(
                few_value_ptr,
                start + ENTRIES,
                longest,
                back + ENTRIES,
                few_reach,
                token,
                KV_HEADS,
                V,
                V_PAD,
                SHARED,
            )
            weight += factor * total2
            out += attended2 * factor[:, None] * value_factors.to(tl.float32)
        top = new_top

    if ENTRIES > 1:
        # The rows of a head, each by its own maximum.
        tops = tl.reshape(top, [TOKENS * HEADS, ENTRIES])
        top = tl.max(tops, axis=1)
        base = tl.where(top == -float("inf"), 0.0, top)
        factors = tl.exp2((tops - base[:, None]) * scale_log2)
        weight = tl.reshape(weight, [TOKENS * HEADS, ENTRIES])
        weight = tl.sum(weight * factors, axis=1)
        out *= tl.reshape(factors, [ROWS])[:, None]
        out = tl.sum(tl.reshape(out, [TOKENS * HEADS, ENTRIES, V_PAD]), axis=1)
    base = tl.where(top == -float("inf"), 0.0, top)
    out *= (1.0 / tl.where(weight == 0.0, 1.0, weight))[:, None]
    # log2(0) = -inf where nothing is seen; times log(2) for the natural logarithm.
    lse = (base * scale_log2 + tl.log2(weight)) * 0.6931471805599453
    state = tl.arange(0, TOKENS * HEADS)
    token = state // HEADS
    head = head_tile * HEADS + state % HEADS
    live = (first + token < queries) & (head < GROUP)
    target = (token * KV_HEADS + kv_head) * GROUP + head
    rows = queries * (KV_HEADS * GROUP)
    query_row += (
        tl.program_id(2)
        * (tl.num_programs(1) // HEAD_TILES // KV_HEADS)
        * rows.to(tl.int64)
    )
    tl.store(lse_ptr + query_row + target, lse, mask=live)
    _store_rows(out_ptr + query_row * V, target, live, out, V, V_PAD)
