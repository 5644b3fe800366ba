"""Attention to strided windows of tokens in Triton: what one program does.

Key i stands for the tokens ``i STRIDE`` to ``i STRIDE + KERNEL_SIZE - 1``. A query sees
one run of keys, and the runs of later queries neither start nor end earlier. Of the
keys that a tile of rows meets, only those near the ends of its run need a mask.

Row ``t G + g`` of a kv head is its query head g at query t. A tile is a stretch of
rows, for any G, and rows past the last one are computed and not stored.

A head width that is no power of two is taken in two pieces, such as 192 = 128 + 64, or
padded. Letters as in ``jattn.pallas.flash.triton``.
"""

import triton
import triton.language as tl

from jattn.pallas._tiles import _load_rows, _store_rows

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _first_key(
    token,
    starts_ptr,  # [T] of this batch row, if PACKED
    offset,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The first key in a query's document and window."""
    first = token * 0
    # Where the dividend is negative, rounding towards zero or down gives at most 0.
    if WINDOW > 0:
        first = tl.maximum((token + offset - WINDOW + STRIDE) // STRIDE, 0)
    if PACKED:
        start = tl.load(starts_ptr + token)
        first = tl.maximum(first, (start + STRIDE - 1) // STRIDE)
    return first


@triton.jit
def _end_key(token, offset, keys, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """One past the last key that is over at a query's position."""
    end = (token + offset - KERNEL_SIZE + 1 + STRIDE) // STRIDE
    return tl.minimum(tl.maximum(end, 0), keys)


@triton.jit
def _rows_of_key(
    key,
    end_tokens_ptr,  # [M] of this batch row, if PACKED
    queries,
    offset,
    GROUP: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The first row that sees a key, and one past the last."""
    first = tl.maximum(key * STRIDE + KERNEL_SIZE - 1 - offset, 0)
    end = queries
    if WINDOW > 0:
        end = tl.minimum(tl.maximum(key * STRIDE + WINDOW - offset, 0), queries)
    if PACKED:
        end = tl.minimum(end, tl.load(end_tokens_ptr + key))
    return tl.minimum(first, queries) * GROUP, end * GROUP


@triton.jit
def _locate_rows(
    starts_ptr,  # [B, T] if PACKED
    queries,
    keys,
    offset,
    tiles,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The tile of rows of a program; late ones, which see most keys, come first.

    Returns which rows exist, their row in arrays [B, T, N, ..] as that of the first
    token and what is to be added, the first key each sees and one past the last; of the
    tile, the run of keys that some row sees, the run in it that all rows see, and its
    batch row and kv head.
    """
    start_row = (tiles - 1 - tl.program_id(0) % tiles) * ROWS
    kv_row = tl.program_id(0) // tiles
    batch = kv_row // KV_HEADS
    kv_head = kv_row % KV_HEADS
    starts_ptr += batch.to(tl.int64) * queries
    end_row = tl.minimum(start_row + ROWS, queries * GROUP)
    first_token = start_row // GROUP
    last_token = (end_row - 1) // GROUP
    begin = _first_key(first_token, starts_ptr, offset, STRIDE, WINDOW, PACKED)
    full_begin = _first_key(last_token, starts_ptr, offset, STRIDE, WINDOW, PACKED)
    full_end = _end_key(first_token, offset, keys, KERNEL_SIZE, STRIDE)
    end = _end_key(last_token, offset, keys, KERNEL_SIZE, STRIDE)
    row = start_row + tl.arange(0, ROWS)
    token = tl.minimum(row // GROUP, last_token)
    row_first = _first_key(token, starts_ptr, offset, STRIDE, WINDOW, PACKED)
    row_end = _end_key(token, offset, keys, KERNEL_SIZE, STRIDE)
    base = (batch.to(tl.int64) * queries + first_token) * (KV_HEADS * GROUP)
    base += kv_head * GROUP
    source = (row // GROUP - first_token) * (KV_HEADS * GROUP) + row % GROUP
    return (
        row < end_row,
        base,
        source,
        row_first,
        row_end,
        begin,
        end,
        full_begin,
        full_end,
        batch,
        kv_head,
    )


@triton.jit
def forward_kernel(
    query_ptr,  # [B, T, N, H]
    key_tiles,  # of [B, M, K, H], and those of its tail
    key_tails,
    value_tiles,  # of [B, M, K, V]
    starts_ptr,  # [B, T] if PACKED
    scale_log2,
    queries,
    keys,
    offset,
    tiles,
    out_ptr,  # [B, T, N, V]
    lse_ptr,  # [B, T, N]
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_MAIN: tl.constexpr,
    H_TAIL: tl.constexpr,
    V_PAD: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One tile of rows of one kv head; late ones, which see most, come first."""
    (
        live,
        base,
        source,
        row_first,
        row_end,
        begin,
        end,
        full_begin,
        full_end,
        batch,
        kv_head,
    ) = _locate_rows(
        starts_ptr,
        queries,
        keys,
        offset,
        tiles,
        KV_HEADS,
        GROUP,
        KERNEL_SIZE,
        STRIDE,
        WINDOW,
        PACKED,
        ROWS,
    )
    query = _load_rows(query_ptr + base * H, source, live, H, H_MAIN)
    if H_TAIL > 0:
        query_tail = _load_rows(query_ptr + base * H, source, live, H, H_TAIL, H_MAIN)
    column = tl.arange(0, KEYS)
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, V_PAD], tl.float32)

    for start in range(begin, end, KEYS):
        key = key_tiles.load([batch, start, kv_head, 0]).reshape(KEYS, H_MAIN)
        logits = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        if H_TAIL > 0:
            tail = key_tails.load([batch, start, kv_head, H_MAIN])
            tail = tail.reshape(KEYS, H_TAIL)
            logits = tl.dot(
                query_tail, tl.trans(tail), logits, input_precision="tf32x3"
            )
        value = value_tiles.load([batch, start, kv_head, 0]).reshape(KEYS, V_PAD)
        if (start < full_begin) | (start + KEYS > full_end):
            seen = (start + column)[None, :] < row_end[:, None]
            if PACKED or WINDOW > 0:
                seen &= (start + column)[None, :] >= row_first[:, None]
            logits = tl.where(seen, logits, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak * scale_log2)
        weights = tl.exp2(logits * scale_log2 - shift[:, None])
        decay = tl.exp2(peak * scale_log2 - shift)
        total = total * decay + tl.sum(weights, axis=1)
        out = out * decay[:, None]
        out = tl.dot(weights.to(value.dtype), value, out, input_precision="tf32x3")
        peak = new_peak

    out *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    _store_rows(out_ptr + base * V, source, live, out, V, V_PAD)
    # log2(0) = -inf where nothing is seen.
    shift = tl.where(peak == -float("inf"), 0.0, peak * scale_log2)
    tl.store(lse_ptr + base + source, (shift + tl.log2(total)) * LN_2, mask=live)


@triton.jit
def query_gradient_kernel(
    query_ptr,  # [B, T, N, H]
    key_tiles,  # of [B, M, K, H], and those of its tail
    key_tails,
    value_tiles,  # of [B, M, K, V]
    starts_ptr,  # [B, T] if PACKED
    out_ptr,  # [B, T, N, V]
    lse_ptr,  # [B, T, N]
    out_gradient_ptr,  # [B, T, N, V]
    lse_gradient_ptr,  # [B, T, N]
    scale_log2,
    queries,
    keys,
    offset,
    tiles,
    query_gradient_ptr,  # [B, T, N, H]
    shift_ptr,  # [B, T, N]
    delta_ptr,  # [B, T, N]
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_MAIN: tl.constexpr,
    H_TAIL: tl.constexpr,
    V_PAD: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The query's gradient in one tile of rows, and what the kernel after it needs.

    The probabilities P are 2 ** (logits - shift), and the gradient of the logits is
    P (out_gradient value - delta), where delta = out_gradient out - lse_gradient.
    """
    (
        live,
        base,
        source,
        row_first,
        row_end,
        begin,
        end,
        full_begin,
        full_end,
        batch,
        kv_head,
    ) = _locate_rows(
        starts_ptr,
        queries,
        keys,
        offset,
        tiles,
        KV_HEADS,
        GROUP,
        KERNEL_SIZE,
        STRIDE,
        WINDOW,
        PACKED,
        ROWS,
    )
    out_gradient = _load_rows(out_gradient_ptr + base * V, source, live, V, V_PAD)
    out = _load_rows(out_ptr + base * V, source, live, V, V_PAD)
    delta = tl.sum(out.to(tl.float32) * out_gradient.to(tl.float32), axis=1)
    delta -= tl.load(lse_gradient_ptr + base + source, mask=live, other=0.0)
    tl.store(delta_ptr + base + source, delta, mask=live)
    # +inf gives rows that see nothing, or do not exist, probabilities of 0.
    shift = tl.load(lse_ptr + base + source, mask=live, other=-float("inf")) * LOG2_E
    shift = tl.where(shift == -float("inf"), float("inf"), shift)
    tl.store(shift_ptr + base + source, shift, mask=live)
    query = _load_rows(query_ptr + base * H, source, live, H, H_MAIN)
    query_gradient = tl.zeros([ROWS, H_MAIN], tl.float32)
    if H_TAIL > 0:
        query_tail = _load_rows(query_ptr + base * H, source, live, H, H_TAIL, H_MAIN)
        query_gradient_tail = tl.zeros([ROWS, H_TAIL], tl.float32)
    column = tl.arange(0, KEYS)

    for start in range(begin, end, KEYS):
        key = key_tiles.load([batch, start, kv_head, 0]).reshape(KEYS, H_MAIN)
        logits = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        if H_TAIL > 0:
            tail = key_tails.load([batch, start, kv_head, H_MAIN])
            tail = tail.reshape(KEYS, H_TAIL)
            logits = tl.dot(
                query_tail, tl.trans(tail), logits, input_precision="tf32x3"
            )
        value = value_tiles.load([batch, start, kv_head, 0]).reshape(KEYS, V_PAD)
        gradient = tl.dot(out_gradient, tl.trans(value), input_precision="tf32x3")
        if (start < full_begin) | (start + KEYS > full_end):
            seen = (start + column)[None, :] < row_end[:, None]
            if PACKED or WINDOW > 0:
                seen &= (start + column)[None, :] >= row_first[:, None]
            logits = tl.where(seen, logits, -float("inf"))
        weights = tl.exp2(logits * scale_log2 - shift[:, None])
        gradient = (weights * (gradient - delta[:, None])).to(key.dtype)  # of logits
        query_gradient = tl.dot(gradient, key, query_gradient, input_precision="tf32x3")
        if H_TAIL > 0:
            query_gradient_tail = tl.dot(
                gradient, tail, query_gradient_tail, input_precision="tf32x3"
            )

    query_gradient *= scale_log2 * LN_2
    query_gradient_ptr += base * H
    _store_rows(query_gradient_ptr, source, live, query_gradient, H, H_MAIN)
    if H_TAIL > 0:
        query_gradient_tail *= scale_log2 * LN_2
        _store_rows(
            query_gradient_ptr, source, live, query_gradient_tail, H, H_TAIL, H_MAIN
        )


@triton.jit
def key_gradient_kernel(
    query_tiles,  # of [B, T, K, G, H] if BOXES, and those of its tail
    query_tails,
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, M, K, H]
    value_ptr,  # [B, M, K, V]
    end_tokens_ptr,  # [B, M] if PACKED: one past the last query of each key's document
    shift_ptr,  # [B, T, N]
    delta_ptr,  # [B, T, N]
    out_gradient_tiles,  # of [B, T, K, G, V] if BOXES
    out_gradient_ptr,  # [B, T, N, V]
    units_ptr,  # [U, 4]
    scale_log2,
    queries,
    keys,
    offset,
    units,
    key_gradient_ptr,  # [B, M, K, H], or if SPLIT [B K, U, KEYS, H]
    value_gradient_ptr,  # [B, M, K, V], or if SPLIT [B K, U, KEYS, V]
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_MAIN: tl.constexpr,
    H_TAIL: tl.constexpr,
    V_PAD: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    BOXES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradients of one tile of keys and values from one unit of its rows."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    kv_rows = tl.num_programs(0) // units  # B K
    units_ptr += tl.program_id(0) // kv_rows * 4
    box_batch = tl.program_id(0) % kv_rows // KV_HEADS
    box_head = tl.program_id(0) % kv_rows % KV_HEADS
    tile = tl.load(units_ptr)
    begin_row = tl.load(units_ptr + 1)
    end_row = tl.load(units_ptr + 2)
    batch = box_batch.to(tl.int64)
    kv_head = box_head.to(tl.int64)
    end_tokens_ptr += batch * keys

    column = tile * KEYS + tl.arange(0, KEYS)
    exists = column < keys
    last_key = tl.minimum((tile + 1) * KEYS, keys) - 1
    _, reach = _rows_of_key(
        last_key,
        end_tokens_ptr,
        queries,
        offset,
        GROUP,
        KERNEL_SIZE,
        STRIDE,
        WINDOW,
        PACKED,
    )
    key_begin, key_end = _rows_of_key(
        tl.minimum(column, last_key),
        end_tokens_ptr,
        queries,
        offset,
        GROUP,
        KERNEL_SIZE,
        STRIDE,
        WINDOW,
        PACKED,
    )
    end_row = tl.minimum(end_row, reach)
    key_base = (batch * keys + tile * KEYS) * KV_HEADS + kv_head
    key_row = tl.arange(0, KEYS) * KV_HEADS
    # What nobody sees may hold anything.
    readable = exists & (key_begin < key_end)
    key = _load_rows(key_ptr + key_base * H, key_row, readable, H, H_MAIN)
    value = _load_rows(value_ptr + key_base * V, key_row, readable, V, V_PAD)
    key_gradient = tl.zeros([KEYS, H_MAIN], tl.float32)
    value_gradient = tl.zeros([KEYS, V_PAD], tl.float32)
    if H_TAIL > 0:
        key_tail = _load_rows(
            key_ptr + key_base * H, key_row, readable, H, H_TAIL, H_MAIN
        )
        key_gradient_tail = tl.zeros([KEYS, H_TAIL], tl.float32)
    row = tl.arange(0, ROWS)
    base = batch * queries * HEADS + kv_head * GROUP

    for start in range(begin_row, end_row, ROWS):
        first_token = start // GROUP
        live = start + row < end_row
        first_row = base + first_token * HEADS
        source = (start + row) // GROUP - first_token
        source = source * HEADS + (start + row) % GROUP
        shift = tl.load(shift_ptr + first_row + source, mask=live, other=float("inf"))
        delta = tl.load(delta_ptr + first_row + source, mask=live, other=0.0)
        if BOXES:
            query = query_tiles.load([box_batch, first_token, box_head, 0, 0])
            query = query.reshape(ROWS, H_MAIN)
        else:
            query_base = query_ptr + first_row * H
            query = _load_rows(query_base, source, live, H, H_MAIN)
        # Transposed: weights and gradient then enter the products for value and key
        # from registers.
        logits = tl.dot(key, tl.trans(query), input_precision="tf32x3")
        if H_TAIL > 0:
            if BOXES:
                query_tail = query_tails.load(
                    [box_batch, first_token, box_head, 0, H_MAIN]
                )
                query_tail = query_tail.reshape(ROWS, H_TAIL)
            else:
                query_tail = _load_rows(query_base, source, live, H, H_TAIL, H_MAIN)
            logits = tl.dot(
                key_tail, tl.trans(query_tail), logits, input_precision="tf32x3"
            )
        if BOXES:
            out_gradient = out_gradient_tiles.load(
                [box_batch, first_token, box_head, 0, 0]
            )
            out_gradient = out_gradient.reshape(ROWS, V_PAD)
        else:
            out_gradient_base = out_gradient_ptr + first_row * V
            out_gradient = _load_rows(out_gradient_base, source, live, V, V_PAD)
        gradient = tl.dot(value, tl.trans(out_gradient), input_precision="tf32x3")
        # A branch around the mask would cost more than it saves.
        seen = (start + row)[None, :] >= key_begin[:, None]
        if PACKED or WINDOW > 0:
            seen &= (start + row)[None, :] < key_end[:, None]
        logits = tl.where(seen, logits, -float("inf"))
        weights = tl.exp2(logits * scale_log2 - shift[None, :])
        value_gradient = tl.dot(
            weights.to(value.dtype),
            out_gradient,
            value_gradient,
            input_precision="tf32x3",
        )
        gradient = (weights * (gradient - delta[None, :])).to(query.dtype)  # of logits
        key_gradient = tl.dot(gradient, query, key_gradient, input_precision="tf32x3")
        if H_TAIL > 0:
            key_gradient_tail = tl.dot(
                gradient, query_tail, key_gradient_tail, input_precision="tf32x3"
            )

    if SPLIT:
        slot = (batch * KV_HEADS + kv_head) * units + tl.load(units_ptr + 3)
        key_base = slot * KEYS
        key_row = tl.arange(0, KEYS)
    key_gradient_ptr += key_base * H
    key_gradient *= scale_log2 * LN_2
    _store_rows(key_gradient_ptr, key_row, exists, key_gradient, H, H_MAIN)
    if H_TAIL > 0:
        key_gradient_tail *= scale_log2 * LN_2
        _store_rows(
            key_gradient_ptr, key_row, exists, key_gradient_tail, H, H_TAIL, H_MAIN
        )
    value_gradient_ptr += key_base * V
    _store_rows(value_gradient_ptr, key_row, exists, value_gradient, V, V_PAD)


@triton.jit
def add_units_kernel(
    partials_ptr,  # [B K, U, KEYS, WIDTH]
    starts_ptr,  # [tiles + 1]
    keys,
    units,
    sums_ptr,  # [B, M, K, WIDTH]
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    STEP: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Adds up the units of STEP numbers of one tile of keys, always in one order."""
    element = tl.program_id(0) * STEP + tl.arange(0, STEP)  # of [KEYS, WIDTH]
    tile = tl.program_id(1)
    kv_row = tl.program_id(2).to(tl.int64)
    key = tile * KEYS + element // WIDTH
    exists = (element < KEYS * WIDTH) & (key < keys)
    last = tl.load(starts_ptr + tile + 1)
    total = tl.zeros([STEP], tl.float32)
    for unit in range(tl.load(starts_ptr + tile), last, DEPTH):
        depth = unit + tl.arange(0, DEPTH)
        slot = (kv_row * units + depth) * (KEYS * WIDTH)
        mask = (depth < last)[:, None] & exists[None, :]
        partial = tl.load(partials_ptr + slot[:, None] + element[None, :], mask, 0.0)
        total += tl.sum(partial, axis=0)
    target = (kv_row // KV_HEADS * keys + key) * KV_HEADS + kv_row % KV_HEADS
    target = target * WIDTH + element % WIDTH
    tl.store(sums_ptr + target, total.to(sums_ptr.dtype.element_ty), mask=exists)
