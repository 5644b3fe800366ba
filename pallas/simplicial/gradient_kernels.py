"""The kernels of the gradients of 2-simplicial attention; see `backward.py`."""

import triton
import triton.language as tl

from jattn.pallas._tiles import _load_rows, _store_rows
from jattn.pallas.simplicial.tiles import _load_columns, _load_factors, _rows


@triton.jit
def _query_step(
    expanded,
    expanded_gradient,
    lse,
    delta,
    key,
    value,
    seen,
    expanded_sum,
    gradient_sum,
    scale_log2,
):
    """Adds what a block of keys gives to dS K' and P V'."""
    logits = tl.dot(expanded, tl.trans(key), input_precision="tf32x3")
    if seen is not None:
        logits = tl.where(seen, logits, -float("inf"))
    weights = tl.exp2(logits * scale_log2 - lse[:, None])
    gradient = tl.dot(expanded_gradient, tl.trans(value), input_precision="tf32x3")
    gradient_sum = tl.dot(
        weights.to(value.dtype), value, gradient_sum, input_precision="tf32x3"
    )
    gradient = weights * (gradient - delta[:, None])
    expanded_sum = tl.dot(
        gradient.to(key.dtype), key, expanded_sum, input_precision="tf32x3"
    )
    return expanded_sum, gradient_sum


@triton.jit
def query_gradient_kernel(
    query_ptr,  # [B, T, N, H]
    few_key_ptr,  # [B, F, K, H]
    few_value_ptr,  # [B, F, K, V]
    many_key_ptr,  # [B, M, K, H]
    many_value_ptr,  # [B, M, K, V]
    visible_ptr,  # [B, T] if LIMITED
    out_gradient_ptr,  # [B, T, N, V]
    lse_ptr,  # [B, T, N], in base 2, +inf where nothing is seen
    delta_ptr,  # [B, T, N]
    chunk_ptr,  # [1]: the chunk's first position
    key_tiles,  # [B, M, K, H], tiles [1, BLOCK, 1, H_PAD]
    value_tiles,  # [B, M, K, V], tiles [1, BLOCK, 1, V_PAD]
    scale_log2,
    queries,
    few_keys,
    many_keys,
    few_window,
    many_window,
    query_gradient_ptr,  # [B, L, N, H]
    partial_key_ptr,  # [B, L, K, R, W, H], without the factor scale
    partial_value_ptr,  # [B, L, K, R, W, V]
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """What the pairs of a few positions give to their queries and keys."""
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    SHARED: tl.constexpr = TOKENS * ENTRIES == 1
    ROWS: tl.constexpr = TOKENS * HEADS * ENTRIES
    chunk_first = tl.load(chunk_ptr)
    first = chunk_first + tl.program_id(0) * TOKENS
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
    low = tl.where(many_reach > 0, first_seen, many_keys)
    low = tl.minimum(tl.min(low, axis=0), many_keys)
    full_low = tl.maximum(tl.max(tl.where(live, first_seen, 0), axis=0), low)
    high = tl.where(many_reach > 0, last_seen + 1, 0)
    high = tl.maximum(tl.max(high, axis=0), 0)
    middle = low + (full_low - low + BLOCK - 1) // BLOCK * BLOCK
    last = middle + tl.maximum(many_first + 1 - middle, 0) // BLOCK * BLOCK

    query_row = (batch * queries + first) * (KV_HEADS * GROUP)
    query_ptr += query_row * H
    out_gradient_ptr += query_row * V
    few_row = (batch * few_keys + few_first) * KV_HEADS + kv_head
    few_key_ptr += few_row * H
    few_value_ptr += few_row * V
    many_row = (batch * many_keys + low) * KV_HEADS + kv_head
    many_key_ptr += many_row * H
    many_value_ptr += many_row * V
    chunk_row = batch * (tl.num_programs(0) * TOKENS) + tl.program_id(0) * TOKENS
    partial_row = (chunk_row * KV_HEADS + kv_head) * HEAD_TILES + head_tile
    partial_key_ptr += partial_row * few_window * H
    partial_value_ptr += partial_row * few_window * V

    column = tl.arange(0, BLOCK)
    query_gradient = tl.zeros([ROWS, H_PAD], tl.float32)
    for start in range(0, longest, ENTRIES):
        back = start + entry
        valid = back < few_reach
        key_factors = _load_factors(
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
        lse = tl.load(lse_ptr + query_row + source, mask=valid, other=float("inf"))
        delta = tl.load(delta_ptr + query_row + source, mask=valid, other=0.0)
        # Transposed, and loaded again after the blocks: there are no registers to keep
        # them in meanwhile, and the compiler would merge two loads that are the same.
        query = _load_columns(query_ptr, source, live, H, H_PAD)
        expanded = tl.trans((query * tl.trans(key_factors)).to(query.dtype))
        out_gradient = _load_columns(out_gradient_ptr, source, live, V, V_PAD)
        expanded_gradient = (out_gradient * tl.trans(value_factors)).to(query.dtype)
        expanded_gradient = tl.trans(expanded_gradient)
        expanded_sum = tl.zeros([ROWS, H_PAD], tl.float32)
        gradient_sum = tl.zeros([ROWS, V_PAD], tl.float32)
        if TOKENS > 1:
            for block in range(low, middle, BLOCK):
                position = block + column
                row = (position - low) * KV_HEADS
                key = _load_rows(many_key_ptr, row, position < high, H, H_PAD)
                value = _load_rows(many_value_ptr, row, position < high, V, V_PAD)
                seen = position[None, :] <= last_seen[:, None]
                seen &= position[None, :] >= first_seen[:, None]
                expanded_sum, gradient_sum = _query_step(
                    expanded,
                    expanded_gradient,
                    lse,
                    delta,
                    key,
                    value,
                    seen,
                    expanded_sum,
                    gradient_sum,
                    scale_log2,
                )
        for block in range(middle, last, BLOCK):
            place = [kv_row // KV_HEADS, block, kv_head, 0]
            expanded_sum, gradient_sum = _query_step(
                expanded,
                expanded_gradient,
                lse,
                delta,
                key_tiles.load(place).reshape(BLOCK, H_PAD),
                value_tiles.load(place).reshape(BLOCK, V_PAD),
                None,
                expanded_sum,
                gradient_sum,
                scale_log2,
            )
        for block in range(last, high, TAIL):
            position = block + tl.arange(0, TAIL)
            row = (position - low) * KV_HEADS
            key = _load_rows(many_key_ptr, row, position < high, H, H_PAD)
            value = _load_rows(many_value_ptr, row, position < high, V, V_PAD)
            seen = position[None, :] <= last_seen[:, None]
            seen &= position[None, :] >= first_seen[:, None]
            expanded_sum, gradient_sum = _query_step(
                expanded,
                expanded_gradient,
                lse,
                delta,
                key,
                value,
                seen,
                expanded_sum,
                gradient_sum,
                scale_log2,
            )
        query = _load_rows(query_ptr, source, live, H, H_PAD)
        out_gradient = _load_rows(out_gradient_ptr, source, live, V, V_PAD)
        query_gradient += expanded_sum * key_factors.to(tl.float32)
        key_gradient = expanded_sum * query.to(tl.float32)
        value_gradient = gradient_sum * out_gradient.to(tl.float32)
        if SHARED:
            key_gradient = tl.sum(key_gradient, axis=0, keep_dims=True)
            value_gradient = tl.sum(value_gradient, axis=0, keep_dims=True)
        elif HEADS > 1:
            key_gradient = tl.sum(
                tl.reshape(key_gradient, [TOKENS, HEADS, ENTRIES, H_PAD]), axis=1
            )
            key_gradient = tl.reshape(key_gradient, [TOKENS * ENTRIES, H_PAD])
            value_gradient = tl.sum(
                tl.reshape(value_gradient, [TOKENS, HEADS, ENTRIES, V_PAD]), axis=1
            )
            value_gradient = tl.reshape(value_gradient, [TOKENS * ENTRIES, V_PAD])
        partial = tl.arange(0, TOKENS * ENTRIES)
        back = start + partial % ENTRIES
        target = partial // ENTRIES * (KV_HEADS * HEAD_TILES) * few_window + back
        _store_rows(partial_key_ptr, target, back < few_window, key_gradient, H, H_PAD)
        _store_rows(
            partial_value_ptr, target, back < few_window, value_gradient, V, V_PAD
        )

    if ENTRIES > 1:
        query_gradient = tl.sum(
            tl.reshape(query_gradient, [TOKENS * HEADS, ENTRIES, H_PAD]), axis=1
        )
    state = tl.arange(0, TOKENS * HEADS)
    token = state // HEADS
    head = head_tile * HEADS + state % HEADS
    live = (first + token < queries) & (head < GROUP)
    target = (token * KV_HEADS + kv_head) * GROUP + head
    query_gradient *= scale_log2 * 0.6931471805599453
    query_gradient_ptr += chunk_row * (KV_HEADS * GROUP * H)
    _store_rows(query_gradient_ptr, target, live, query_gradient, H, H_PAD)


@triton.jit
def sum_kernel(
    sums_ptr,  # [B, F, K, WIDTH]
    partials_ptr,  # [B, L, K, R, W, WIDTH]
    visible_ptr,  # [B, T] if LIMITED
    chunk_ptr,  # [1]: the chunk's first position
    length,
    queries,
    few_keys,
    few_window,
    totals_ptr,  # [B, F, K, WIDTH]
    KV_HEADS: tl.constexpr,
    HEAD_TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """Adds to each key what the positions of a chunk that see it have for it."""
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(1) % KV_HEADS
    first = tl.load(chunk_ptr)
    key = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key_row = (key * KV_HEADS + kv_head).to(tl.int64) + batch * few_keys * KV_HEADS
    total = _load_rows(sums_ptr, key_row, key < few_keys, WIDTH, PADDED)
    # Position i has its own key at i + few_keys - queries.
    nearest = first + few_keys - queries - tl.program_id(0) * ROWS
    steps = tl.minimum(few_window, nearest + length)
    for back in range(tl.maximum(0, nearest - ROWS + 1), steps):
        position = key + back - (few_keys - queries)
        inside = (position >= first) & (position < first + length)
        inside &= (position < queries) & (key < few_keys)
        if LIMITED:
            visible = tl.load(
                visible_ptr + batch * queries + position, mask=inside, other=0
            )
            inside &= back < visible
        row = (batch * length + position - first) * KV_HEADS + kv_head
        for head_tile in range(HEAD_TILES):
            partial = (row * HEAD_TILES + head_tile) * few_window + back
            total += _load_rows(partials_ptr, partial, inside, WIDTH, PADDED)
    _store_rows(totals_ptr, key_row, key < few_keys, total, WIDTH, PADDED)


@triton.jit
def key_gradient_kernel(
    query_ptr,  # [B, T, N, H]
    few_key_ptr,  # [B, F, K, H]
    few_value_ptr,  # [B, F, K, V]
    many_key_ptr,  # [B, M, K, H]
    many_value_ptr,  # [B, M, K, V]
    visible_ptr,  # [B, T] if LIMITED
    out_gradient_ptr,  # [B, T, N, V]
    lse_ptr,  # [B, T, N], in base 2, +inf where nothing is seen
    delta_ptr,  # [B, T, N]
    scale_log2,
    queries,
    few_keys,
    many_keys,
    few_window,
    many_window,
    key_gradient_ptr,  # [P, B, M, K, H]
    value_gradient_ptr,  # [P, B, M, K, V]
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """What a part of the positions gives to a block of keys and values."""
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    SHARED: tl.constexpr = TOKENS * ENTRIES == 1
    kv_row = tl.program_id(1)
    batch = (kv_row // KV_HEADS).to(tl.int64)
    kv_head = kv_row % KV_HEADS
    low = tl.program_id(0) * BLOCK
    position = low + tl.arange(0, BLOCK)
    # Those that no query sees may hold anything.
    ahead = many_keys - queries
    exists = (position < many_keys) & (position > ahead - many_window)
    many_row = (batch * many_keys + position) * KV_HEADS + kv_head
    key = _load_rows(many_key_ptr, many_row, exists, H, H_PAD)
    value = _load_rows(many_value_ptr, many_row, exists, V, V_PAD)
    key_gradient = tl.zeros([BLOCK, H_PAD], tl.float32)
    value_gradient = tl.zeros([BLOCK, V_PAD], tl.float32)

    # Tiles of positions that see the block, and those all of which see all of it.
    begin = tl.maximum(0, low - ahead)
    end = tl.minimum(queries, low + BLOCK - 1 + many_window - ahead)
    tiles = tl.maximum(end - begin + TOKENS - 1, 0) // TOKENS
    share = (tiles + tl.num_programs(2) - 1) // tl.num_programs(2)
    tile = tl.minimum(tl.program_id(2) * share, tiles)
    tile_end = tl.minimum(tile + share, tiles)
    full = (low + BLOCK - 1 - ahead - begin + TOKENS - 1) // TOKENS
    full_end = (tl.minimum(queries, low + many_window - ahead) - begin) // TOKENS
    if LIMITED:
        full_end = full

    for step in range(tile * HEAD_TILES, tile_end * HEAD_TILES):
        step_tile = step // HEAD_TILES
        first = begin + step_tile * TOKENS
        token, head, entry, live, few_reach, many_reach = _rows(
            visible_ptr + batch * queries + first,
            first,
            step - step_tile * HEAD_TILES,
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
        longest = tl.maximum(tl.max(few_reach, axis=0), 0)
        query_row = (batch * queries + first) * (KV_HEADS * GROUP)
        source = (token * KV_HEADS + kv_head) * GROUP + head
        few_row = (batch * few_keys + few_keys - queries + first) * KV_HEADS + kv_head
        query = _load_rows(query_ptr + query_row * H, source, live, H, H_PAD)
        out_gradient = _load_rows(
            out_gradient_ptr + query_row * V, source, live, V, V_PAD
        )
        row_lse = tl.load(lse_ptr + query_row + source, mask=live, other=float("inf"))
        delta = tl.load(delta_ptr + query_row + source, mask=live, other=0.0)
        some_hidden = (step_tile < full) | (step_tile >= full_end)
        for start in range(0, longest, ENTRIES):
            back = start + entry
            factors = _load_factors(
                few_key_ptr + few_row * H,
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
            factors = _load_factors(
                few_value_ptr + few_row * V,
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
            expanded_gradient = (out_gradient * factors).to(out_gradient.dtype)
            lse = tl.where(back < few_reach, row_lse, float("inf"))
            # Transposed: weights and gradient then enter the products for key and value
            # from registers.
            logits = tl.dot(key, tl.trans(expanded), input_precision="tf32x3")
            gradient = tl.dot(
                value, tl.trans(expanded_gradient), input_precision="tf32x3"
            )
            if some_hidden:
                last_seen = first + token + ahead
                seen = position[:, None] <= last_seen[None, :]
                seen &= position[:, None] > (last_seen - many_reach)[None, :]
                logits = tl.where(seen, logits, -float("inf"))
            weights = tl.exp2(logits * scale_log2 - lse[None, :])  # [BLOCK, ROWS]
            value_gradient = tl.dot(
                weights.to(value.dtype),
                expanded_gradient,
                value_gradient,
                input_precision="tf32x3",
            )
            gradient = weights * (gradient - delta[None, :])
            if LIMITED:
                # Nor do others see all of the block.
                gradient = tl.where(weights > 0.0, gradient, 0.0)
            key_gradient = tl.dot(
                gradient.to(key.dtype), expanded, key_gradient, input_precision="tf32x3"
            )

    key_gradient *= scale_log2 * 0.6931471805599453
    batches = tl.num_programs(1) // KV_HEADS
    many_row += tl.program_id(2).to(tl.int64) * batches * many_keys * KV_HEADS
    exists = position < many_keys
    _store_rows(key_gradient_ptr, many_row, exists, key_gradient, H, H_PAD)
    _store_rows(value_gradient_ptr, many_row, exists, value_gradient, V, V_PAD)
