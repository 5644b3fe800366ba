"""The kernels of a few new tokens; what they are for is in `triton.py`."""

import triton
import triton.language as tl

from jattn.pallas._tiles import _load_rows, _store_rows


@triton.jit
def _visible_windows(position, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """How many compressed tokens a query sees; their windows end where it is."""
    complete = position + 1 - KERNEL_SIZE
    return tl.where(complete >= 0, complete // STRIDE + 1, 0)


@triton.jit
def _attend_tile(
    query,  # [ROWS, H_PAD]
    key_ptr,
    value_ptr,
    row,  # [keys], int64
    seen,  # [keys]
    scale_log2,
    out,  # [ROWS, V_PAD]
    peak,  # [ROWS]
    total,  # [ROWS]
    H: tl.constexpr,
    V: tl.constexpr,
    H_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
):
    """Adds a tile of keys to a running softmax; also gives the peak and the weights."""
    key = _load_rows(key_ptr, row, seen, H, H_PAD).to(query.dtype)
    value = _load_rows(value_ptr, row, seen, V, V_PAD).to(query.dtype)
    logits = tl.dot(query, tl.trans(key), input_precision="tf32x3") * scale_log2
    logits = tl.where(seen[None, :], logits, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    # Where nothing has been seen so far, any finite number will do.
    base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, axis=1)
    out = tl.dot(
        weights.to(query.dtype),
        value,
        out * shrink[:, None],
        input_precision="tf32x3",
    )
    return out, new_peak, total, weights


@triton.jit
def compressed_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, M, K, H]
    value_ptr,  # [B, M, K, V]
    position_ptr,  # [B, T]
    scale_log2,
    queries,
    windows,
    out_ptr,  # [R, P, G, V]
    peak_ptr,  # [R, P, G], in base 2
    total_ptr,  # [R, P, G]
    tile_peak_ptr,  # [R, G, tiles], in base 2
    own_ptr,  # [R, G, C], weights of windows that start in a block, by their overlap
    following_ptr,  # [R, G, C], of windows that start in the block before
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    CELLS: tl.constexpr,
    CELLS_PAD: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One part of the compressed tokens that a query sees."""
    row = tl.program_id(0)
    batch = (row // (queries * KV_HEADS)).to(tl.int64)
    kv_head = row % KV_HEADS
    position = tl.load(position_ptr + row // KV_HEADS)
    # A query past the end of the cache must not read past it.
    visible = tl.minimum(_visible_windows(position, KERNEL_SIZE, STRIDE), windows)
    tiles = tl.cdiv(visible, TILE_BLOCKS * CELLS)
    part_tiles = tl.cdiv(tiles, tl.num_programs(1))
    first = tl.program_id(1) * part_tiles
    last = tl.minimum(first + part_tiles, tiles)

    head = tl.arange(0, ROWS)
    live = head < GROUP
    query_row = row.to(tl.int64) * GROUP + head
    query = _load_rows(query_ptr, query_row, live, H, H_PAD)
    # A window starts in a cell of a block, and ends in the same block or the next one.
    slot = tl.arange(0, TILE_BLOCKS * CELLS_PAD)
    cell = slot % CELLS_PAD
    offset = slot // CELLS_PAD * CELLS + cell
    in_own = tl.minimum(KERNEL_SIZE // STRIDE, CELLS - cell)
    in_following = KERNEL_SIZE // STRIDE - in_own
    tile_block = tl.arange(0, TILE_BLOCKS)

    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, V_PAD], tl.float32)
    for tile in range(first, last):
        window = tile * (TILE_BLOCKS * CELLS) + offset
        seen = (window < visible) & (cell < CELLS)
        key_row = (batch * windows + window) * KV_HEADS + kv_head
        out, peak, total, weights = _attend_tile(
            query,
            key_ptr,
            value_ptr,
            key_row,
            seen,
            scale_log2,
            out,
            peak,
            total,
            H,
            V,
            H_PAD,
            V_PAD,
        )
        tl.store(tile_peak_ptr + query_row * TILES + tile, peak, mask=live)
        index = query_row[:, None] * (TILES * TILE_BLOCKS) + tile * TILE_BLOCKS
        index += tile_block[None, :]
        own = tl.sum(
            tl.reshape(weights * in_own[None, :], [ROWS, TILE_BLOCKS, CELLS_PAD]),
            axis=2,
        )
        tl.store(own_ptr + index, own, mask=live[:, None])
        if KERNEL_SIZE > STRIDE:
            following = tl.reshape(
                weights * in_following[None, :], [ROWS, TILE_BLOCKS, CELLS_PAD]
            )
            following = tl.sum(following, axis=2)
            # The last block of all has no next one but the query's own, always read.
            has_next = tile * TILE_BLOCKS + tile_block + 1 < TILES * TILE_BLOCKS
            tl.store(
                following_ptr + index + 1,
                following,
                mask=live[:, None] & has_next[None, :],
            )

    part_row = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * GROUP + head
    tl.store(peak_ptr + part_row, peak, mask=live)
    tl.store(total_ptr + part_row, total, mask=live)
    _store_rows(out_ptr, part_row, live & (total != 0), out, V, V_PAD)


@triton.jit
def select_kernel(
    position_ptr,  # [B, T]
    peak_ptr,  # [R, P, G], in base 2
    total_ptr,  # [R, P, G]
    tile_peak_ptr,  # [R, G, tiles], in base 2
    own_ptr,  # [R, G, C]
    following_ptr,  # [R, G, C]
    keys,
    chosen_ptr,  # [R, n]
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CELLS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    TILES_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PAD: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The blocks that a query's heads of one kv head read."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.minimum(tl.load(position_ptr + row // KV_HEADS), keys - 1)
    visible = _visible_windows(position, KERNEL_SIZE, STRIDE)
    tiles = tl.cdiv(visible, TILE_BLOCKS * CELLS)  # others hold no sums
    part = tl.arange(0, PARTS_PAD)
    tile = tl.arange(0, TILES_PAD)
    inner = tl.arange(0, TILE_BLOCKS)
    block = tile[:, None] * TILE_BLOCKS + inner[None, :]
    scores = tl.zeros([TILES_PAD, TILE_BLOCKS], tl.float32)
    for first in tl.static_range(0, GROUP, HEADS):  # pyright: ignore[reportGeneralTypeIssues]
        head = first + tl.arange(0, HEADS)
        live = (head < GROUP)[:, None]
        index = (row * PARTS + part[None, :]) * GROUP + head[:, None]
        exists = live & (part < PARTS)[None, :]
        peaks = tl.load(peak_ptr + index, mask=exists, other=-float("inf"))
        totals = tl.load(total_ptr + index, mask=exists, other=0.0)
        peak = tl.max(peaks, axis=1)
        peak = tl.where(peak == -float("inf"), 0.0, peak)
        total = tl.sum(totals * tl.exp2(peaks - peak[:, None]), axis=1)
        lse = tl.where(total == 0.0, 0.0, peak + tl.log2(total))  # [HEADS]
        head_row = (row * GROUP + head)[:, None]
        exists = live & (tile < tiles)[None, :]
        tile_peak = tl.load(
            tile_peak_ptr + head_row * TILES + tile[None, :],
            mask=exists,
            other=-float("inf"),
        )
        weights = tl.exp2(tile_peak - lse[:, None])[:, :, None]  # [HEADS, TILES_PAD, 1]
        source = (head_row * TILES)[:, :, None] * TILE_BLOCKS + block[None, :, :]
        exists = exists[:, :, None] & (inner >= 0)[None, None, :]
        own = tl.load(own_ptr + source, mask=exists, other=0.0)
        scores += tl.sum(own * weights, axis=0)
        if KERNEL_SIZE > STRIDE:
            # The first block of a tile is weighed as the tile before.
            exists = live & (tile > 0)[None, :] & (tile <= tiles)[None, :]
            tile_peak = tl.load(
                tile_peak_ptr + head_row * TILES + tile[None, :] - 1,
                mask=exists,
                other=-float("inf"),
            )
            before = tl.exp2(tile_peak - lse[:, None])[:, :, None]
            weights = tl.where((inner == 0)[None, None, :], before, weights)
            covered = (block > 0) & (block <= tiles * TILE_BLOCKS)
            covered &= block < TILES * TILE_BLOCKS
            following = tl.load(
                following_ptr + source,
                mask=live[:, :, None] & covered[None, :, :],
                other=0.0,
            )
            scores += tl.sum(following * weights, axis=0)

    scores = tl.reshape(scores, [TILES_PAD * TILE_BLOCKS])
    block = tl.arange(0, TILES_PAD * TILE_BLOCKS)
    own_block = tl.where(position >= 0, position // BLOCK_SIZE, -1)
    candidate = block <= own_block
    forced = candidate & ((block < INITIAL) | (block > own_block - LOCAL))
    # Ordered by score, and by index from last to first where scores are equal. Scores
    # are not negative: their bits are in order as integers.
    order = scores.to(tl.int32, bitcast=True).to(tl.int64) << 32
    order = tl.where(candidate & ~forced, order | (0x7FFFFFFF - block), -1)
    least = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for _ in range(SLOTS - tl.sum(forced.to(tl.int32), axis=0)):
        least = tl.max(tl.where(order < least, order, -1), axis=0)
    chosen = (forced | ((order >= least) & (order >= 0))).to(tl.int32)
    slot = tl.cumsum(chosen, axis=0) - 1
    tl.store(chosen_ptr + row * SLOTS + slot, block, mask=chosen > 0)
    slot = tl.arange(0, SLOTS_PAD)
    empty = (slot >= tl.sum(chosen, axis=0)) & (slot < SLOTS)
    tl.store(chosen_ptr + row * SLOTS + slot, -1, mask=empty)


@triton.jit
def local_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, V]
    window_key_ptr,  # [B, W, K, H]
    window_value_ptr,  # [B, W, K, V]
    position_ptr,  # [B, T]
    window_end_ptr,  # [B]
    chosen_ptr,  # [R, n]
    scale_log2,
    queries,
    keys,
    window_slots,
    out_ptr,  # [R, P, G, V], the parts of the window after those of the blocks
    peak_ptr,  # [R, P, G], in base 2
    total_ptr,  # [R, P, G]
    RING: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    KEYS: tl.constexpr,
    PART_TILES: tl.constexpr,
    SELECTED_PARTS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One part of the selected blocks or of the window."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    batch = (row // (queries * KV_HEADS)).to(tl.int64)
    kv_head = row % KV_HEADS
    position = tl.load(position_ptr + row // KV_HEADS)
    head = tl.arange(0, ROWS)
    live = head < GROUP
    query_row = row.to(tl.int64) * GROUP + head
    query = _load_rows(query_ptr, query_row, live, H, H_PAD)
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, V_PAD], tl.float32)
    if part < SELECTED_PARTS:
        first = part * PART_TILES
        last = tl.minimum(first + PART_TILES, tl.cdiv(SLOTS * BLOCK_SIZE, KEYS))
        newest = tl.minimum(position, keys - 1)
        for tile in range(first, last):
            # The selected blocks in a row, whatever their size.
            index = tile * KEYS + tl.arange(0, KEYS)
            slot = index // BLOCK_SIZE
            block = tl.load(
                chosen_ptr + row.to(tl.int64) * SLOTS + slot,
                mask=slot < SLOTS,
                other=-1,
            )
            key_position = block * BLOCK_SIZE + index % BLOCK_SIZE
            seen = (block >= 0) & (key_position <= newest)
            key_row = (batch * keys + key_position) * KV_HEADS + kv_head
            out, peak, total, _ = _attend_tile(
                query,
                key_ptr,
                value_ptr,
                key_row,
                seen,
                scale_log2,
                out,
                peak,
                total,
                H,
                V,
                H_PAD,
                V_PAD,
            )
    else:
        window_end = tl.load(window_end_ptr + batch)
        first = (part - SELECTED_PARTS) * PART_TILES
        last = tl.minimum(first + PART_TILES, tl.cdiv(window_slots, KEYS))
        for tile in range(first, last):
            slot = tile * KEYS + tl.arange(0, KEYS)
            seen = slot < window_slots
            if RING:
                # Whatever it holds is in the window of the newest token.
                seen &= slot < tl.where(position >= 0, window_end, 0)
            else:
                key_position = window_end - window_slots + slot
                seen &= (key_position >= 0) & (key_position <= position)
                seen &= position - key_position < WINDOW
            key_row = (batch * window_slots + slot) * KV_HEADS + kv_head
            out, peak, total, _ = _attend_tile(
                query,
                window_key_ptr,
                window_value_ptr,
                key_row,
                seen,
                scale_log2,
                out,
                peak,
                total,
                H,
                V,
                H_PAD,
                V_PAD,
            )
    part_row = (row.to(tl.int64) * tl.num_programs(1) + part) * GROUP + head
    tl.store(peak_ptr + part_row, peak, mask=live)
    tl.store(total_ptr + part_row, total, mask=live)
    _store_rows(out_ptr, part_row, live & (total != 0), out, V, V_PAD)


@triton.jit
def _merge_parts(
    out_ptr,  # [R, PARTS, G, V]
    peak_ptr,  # [R, PARTS, G]
    total_ptr,  # [R, PARTS, G]
    row,
    head,
    first,
    COUNT: tl.constexpr,
    COUNT_PAD: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
):
    """Attention of one head to what some parts have read [V_PAD]; 0 if nothing."""
    part = tl.arange(0, COUNT_PAD)
    source = (row * PARTS + first + part) * GROUP + head
    peaks = tl.load(peak_ptr + source, mask=part < COUNT, other=-float("inf"))
    totals = tl.load(total_ptr + source, mask=part < COUNT, other=0.0)
    outs = _load_rows(out_ptr, source, totals != 0, V, V_PAD)  # [COUNT_PAD, V_PAD]
    peak = tl.max(peaks, axis=0)
    weights = tl.exp2(peaks - tl.where(peak == -float("inf"), 0.0, peak))
    total = tl.sum(totals * weights, axis=0)
    weights = weights / tl.where(total == 0.0, 1.0, total)
    return tl.sum(outs * weights[:, None], axis=0)


@triton.jit
def merge_kernel(
    compressed_out_ptr,  # [R, P, G, V]
    compressed_peak_ptr,  # [R, P, G]
    compressed_total_ptr,  # [R, P, G]
    local_out_ptr,  # [R, P, G, V], with another P
    local_peak_ptr,  # [R, P, G]
    local_total_ptr,  # [R, P, G]
    gate_ptr,  # [B, T, N, 3]
    out_ptr,  # [B, T, N, V]
    GROUP: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    COMPRESSED_PARTS: tl.constexpr,
    SELECTED_PARTS: tl.constexpr,
    WINDOW_PARTS: tl.constexpr,
    COMPRESSED_PAD: tl.constexpr,
    SELECTED_PAD: tl.constexpr,
    WINDOW_PAD: tl.constexpr,
):
    """The gated sum of the branches for one query head."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    compressed = _merge_parts(
        compressed_out_ptr,
        compressed_peak_ptr,
        compressed_total_ptr,
        row,
        head,
        0,
        COMPRESSED_PARTS,
        COMPRESSED_PAD,
        COMPRESSED_PARTS,
        GROUP,
        V,
        V_PAD,
    )
    selected = _merge_parts(
        local_out_ptr,
        local_peak_ptr,
        local_total_ptr,
        row,
        head,
        0,
        SELECTED_PARTS,
        SELECTED_PAD,
        SELECTED_PARTS + WINDOW_PARTS,
        GROUP,
        V,
        V_PAD,
    )
    window = _merge_parts(
        local_out_ptr,
        local_peak_ptr,
        local_total_ptr,
        row,
        head,
        SELECTED_PARTS,
        WINDOW_PARTS,
        WINDOW_PAD,
        SELECTED_PARTS + WINDOW_PARTS,
        GROUP,
        V,
        V_PAD,
    )
    target = row * GROUP + head
    gate_ptr += target * 3
    out = compressed * tl.load(gate_ptr).to(tl.float32)
    out += selected * tl.load(gate_ptr + 1).to(tl.float32)
    out += window * tl.load(gate_ptr + 2).to(tl.float32)
    column = tl.arange(0, V_PAD)
    tl.store(
        out_ptr + target * V + column,
        out.to(out_ptr.dtype.element_ty),
        mask=column < V,
    )
