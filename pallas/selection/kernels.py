"""The kernels that choose blocks; what launches them is in `triton.py`."""

import triton
import triton.language as tl

from jattn.pallas._tiles import _load_rows


@triton.jit
def _load_queries(
    pointer,
    row,
    live,
    H: tl.constexpr,
    H_MAIN: tl.constexpr,
    H_TAIL: tl.constexpr,
):
    """Rows [.., H]: a tile [ROWS, H_MAIN] and, if H_TAIL, one [ROWS, H_TAIL]."""
    main = _load_rows(pointer, row, live, H, H_MAIN)
    tail = _load_rows(pointer, row, live, H, H_TAIL, H_MAIN) if H_TAIL else main
    return main, tail


@triton.jit
def _load_keys(
    pointer,
    row,
    live,
    H: tl.constexpr,
    H_MAIN: tl.constexpr,
    H_TAIL: tl.constexpr,
):
    """Rows [.., H] as columns: a tile [H_MAIN, COLUMNS], one [H_TAIL, COLUMNS]."""
    main, tail = _load_queries(pointer, row, live, H, H_MAIN, H_TAIL)
    return tl.trans(main), tl.trans(tail)


@triton.jit
def _product(query, query_tail, key, key_tail, H_TAIL: tl.constexpr):
    """Products of queries and keys, fp32 [ROWS, COLUMNS]."""
    product = tl.dot(query.to(key.dtype), key, input_precision="tf32x3")
    if H_TAIL:
        query_tail = query_tail.to(key.dtype)
        product = tl.dot(query_tail, key_tail, product, input_precision="tf32x3")
    return product


@triton.jit
def block_scores_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, M, K, H]
    lse_ptr,  # [B, N, T], in base 2
    starts_ptr,  # [B, T] if PACKED
    step_ptr,  # [1], the chunk's number
    scale_log2,
    queries,
    windows,
    length,
    chunk,
    scores_ptr,  # [B, K, L, P, W]
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    H_MAIN: tl.constexpr,
    H_TAIL: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CELLS: tl.constexpr,
    SLOTS: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Scores of some blocks for some queries, summed over the heads of a kv head.

    A column is a window. Blocks take SLOTS columns each, of which the first CELLS are
    the windows that start in them.
    """
    BLOCKS: tl.constexpr = COLUMNS // SLOTS
    first_block = tl.program_id(0) % TILES * BLOCKS
    # The latest queries first: they see the most.
    tile_row = (tl.num_programs(0) - 1 - tl.program_id(0)) // TILES * ROWS
    first = tl.load(step_ptr) * chunk + tile_row
    last_position = tl.minimum(first + ROWS, queries) - 1 + length - queries
    if (first >= queries) | (first_block * (CELLS * STRIDE) > last_position):
        return
    kv_row = tl.program_id(1)
    batch = (kv_row // KV_HEADS).to(tl.int64)
    kv_head = kv_row % KV_HEADS
    row = tl.arange(0, ROWS)
    token = first + row
    live = (tile_row + row < chunk) & (token < queries)
    if PACKED:
        start = tl.load(starts_ptr + batch * queries + token, mask=live, other=length)
        if (first_block + BLOCKS) * (CELLS * STRIDE) <= tl.min(start, axis=0):
            return
    column = tl.arange(0, COLUMNS)
    window = (first_block + column // SLOTS) * CELLS + column % SLOTS
    exists = (column % SLOTS < CELLS) & (window < windows)
    key_ptr += (batch * windows * KV_HEADS + kv_head) * H
    key_row = window.to(tl.int64) * KV_HEADS
    key, key_tail = _load_keys(key_ptr, key_row, exists, H, H_MAIN, H_TAIL)

    head = batch * (KV_HEADS * GROUP) + kv_head * GROUP
    lse_ptr += head * queries + first
    query_ptr += ((batch * queries + first) * KV_HEADS + kv_head) * (GROUP * H)
    query_row = row * (KV_HEADS * GROUP)
    weights = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(GROUP):
        lse = tl.load(lse_ptr + row, mask=live, other=0.0)
        query, query_tail = _load_queries(query_ptr, query_row, live, H, H_MAIN, H_TAIL)
        logits = _product(query, query_tail, key, key_tail, H_TAIL)
        weights += tl.exp2(logits * scale_log2 - lse[:, None])
        lse_ptr += queries
        query_ptr += H

    # What is out of sight may have become anything, NaN included.
    position = token + length - queries
    seen = exists[None, :] & (
        window[None, :] * STRIDE + (KERNEL - 1) <= position[:, None]
    )
    if PACKED:
        seen &= window[None, :] * STRIDE >= start[:, None]
    weights = tl.where(seen, weights, 0.0)
    weights = tl.reshape(weights, [ROWS, BLOCKS, SLOTS])
    # Strides that a window shares with its block, and with the next one.
    slot = tl.arange(0, SLOTS)
    inside = tl.minimum(CELLS - slot, KERNEL // STRIDE).to(tl.float32)
    outside = tl.maximum(slot + (KERNEL // STRIDE - CELLS), 0).to(tl.float32)
    block = first_block + tl.arange(0, BLOCKS)[None, :]
    scores_ptr += (kv_row.to(tl.int64) * chunk + tile_row) * (PLANES * WIDTH)
    target = row[:, None] * (PLANES * WIDTH) + block
    own = tl.sum(weights * inside[None, None, :], axis=2)
    tl.store(scores_ptr + target, own, mask=live[:, None])
    if PLANES == 2:
        following = tl.sum(weights * outside[None, None, :], axis=2)
        tl.store(scores_ptr + WIDTH + target, following, mask=live[:, None])


@triton.jit
def affinities_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, blocks, K, H]
    starts_ptr,  # [B, T] if PACKED
    step_ptr,  # [1], the chunk's number
    queries,
    blocks,
    length,
    chunk,
    scores_ptr,  # [B, N, L, 1, W]
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    H_MAIN: tl.constexpr,
    H_TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Products of some queries of one head with the blocks before them."""
    # The latest queries first: they have the most to do.
    tile_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    first = tl.load(step_ptr) * chunk + tile_row
    if first >= queries:
        return
    head_row = tl.program_id(1)
    batch = (head_row // (KV_HEADS * GROUP)).to(tl.int64)
    head = head_row % (KV_HEADS * GROUP)
    row = tl.arange(0, ROWS)
    token = first + row
    live = (tile_row + row < chunk) & (token < queries)
    query_ptr += ((batch * queries + first) * (KV_HEADS * GROUP) + head) * H
    query_row = row * (KV_HEADS * GROUP)
    query, query_tail = _load_queries(query_ptr, query_row, live, H, H_MAIN, H_TAIL)
    key_ptr += (batch * blocks * KV_HEADS + head // GROUP) * H
    scores_ptr += (head_row.to(tl.int64) * chunk + tile_row) * WIDTH
    column = tl.arange(0, COLUMNS)
    target = row[:, None] * WIDTH + column[None, :]

    first_block = 0
    if PACKED:
        start = tl.load(starts_ptr + batch * queries + token, mask=live, other=length)
        first_block = tl.min(start, axis=0) // BLOCK // COLUMNS * COLUMNS
    last_position = tl.minimum(first + ROWS, queries) - 1 + length - queries
    for tile_block in range(first_block, last_position // BLOCK, COLUMNS):
        block = tile_block + column
        key_row = block.to(tl.int64) * KV_HEADS
        exists = block < blocks
        key, key_tail = _load_keys(key_ptr, key_row, exists, H, H_MAIN, H_TAIL)
        scores = _product(query, query_tail, key, key_tail, H_TAIL)
        tl.store(scores_ptr + tile_block + target, scores, mask=live[:, None])


@triton.jit
def best_blocks_kernel(
    starts_ptr,  # [B, T] if PACKED
    step_ptr,  # [1], the chunk's number
    queries,
    length,
    chunk,
    scores_ptr,  # [B, R, L, P, W]
    blocks_ptr,  # [B, T, R, n]
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The initial and the local blocks of some queries, and the best of the others."""
    first = tl.load(step_ptr) * chunk + tl.program_id(0) * ROWS
    if first >= queries:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = first + tl.arange(0, ROWS)
    live = (row < chunk) & (token < queries)
    batch = (tl.program_id(1) // LISTS).to(tl.int64)
    own_block = (token + length - queries) // BLOCK
    # Nobody sees what is before the first block or past its own.
    own_block = tl.where(live, own_block, -1)
    if PACKED:
        start = tl.load(starts_ptr + batch * queries + token, mask=live, other=0)
        first_block = start // BLOCK
    else:
        first_block = tl.zeros([ROWS], tl.int32)
    scores_ptr += (tl.program_id(1).to(tl.int64) * chunk + row)[:, None] * (
        PLANES * WIDTH
    )
    list_row = (batch * queries + token) * LISTS + tl.program_id(1) % LISTS
    blocks_ptr += list_row[:, None] * NUM_BLOCKS
    # The first blocks are all there is for the first queries.
    last_block = tl.max(own_block, axis=0)
    HALF: tl.constexpr = COLUMNS // 2 if COLUMNS >= 64 else COLUMNS
    QUARTER: tl.constexpr = COLUMNS // 4 if COLUMNS >= 64 else COLUMNS
    if last_block < QUARTER:
        _find_best(
            scores_ptr,
            first_block,
            own_block,
            blocks_ptr,
            NUM_BLOCKS,
            INITIAL,
            LOCAL,
            PLANES,
            WIDTH,
            SIGNED,
            QUARTER,
        )
    elif last_block < HALF:
        _find_best(
            scores_ptr,
            first_block,
            own_block,
            blocks_ptr,
            NUM_BLOCKS,
            INITIAL,
            LOCAL,
            PLANES,
            WIDTH,
            SIGNED,
            HALF,
        )
    else:
        _find_best(
            scores_ptr,
            first_block,
            own_block,
            blocks_ptr,
            NUM_BLOCKS,
            INITIAL,
            LOCAL,
            PLANES,
            WIDTH,
            SIGNED,
            COLUMNS,
        )
    # What is chosen in any case comes first and last.
    slot = tl.arange(0, SLOTS)[None, :]
    total = tl.minimum(own_block - first_block + 1, NUM_BLOCKS)[:, None]
    block = tl.where(
        slot < INITIAL,
        first_block[:, None] + slot,
        own_block[:, None] - total + 1 + slot,
    )
    block = tl.where(slot < total, block, -1)
    forced = (slot < INITIAL) | (slot >= total - LOCAL)
    tl.store(
        blocks_ptr + slot, block, mask=live[:, None] & forced & (slot < NUM_BLOCKS)
    )


@triton.jit
def _find_best(
    scores_ptr,  # [ROWS, 1] pointers to [P, W]
    first_block,  # [ROWS], the first one that is visible
    own_block,  # [ROWS], the last one
    blocks_ptr,  # [ROWS, 1] pointers to [n]
    NUM_BLOCKS: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes those of each row's blocks that are not chosen in any case."""
    # They compete for as many places as are left.
    begin, end = first_block + INITIAL, own_block - LOCAL
    competitors = tl.maximum(end - begin + 1, 0)
    wanted = NUM_BLOCKS - (tl.maximum(own_block - first_block + 1, 0) - competitors)
    begin = begin[:, None]
    end = end[:, None]
    block = tl.arange(0, COLUMNS)[None, :]
    competes = (block >= begin) & (block <= end)
    # Loaded in fours, 16 bytes at once; those that do not compete may be anything.
    four = block // 4 * 4
    near = (four + 3 >= begin) & (four <= end)
    score = tl.load(scores_ptr + block, mask=near, other=0.0)
    if PLANES == 2:
        follows = competes & (block > first_block[:, None])
        score += tl.load(scores_ptr + (WIDTH - 1) + block, mask=follows, other=0.0)

    # Integers in the order of the scores, and -1 for what does not compete.
    order = score.to(tl.int32, bitcast=True)
    least = 0
    if SIGNED:
        # Both zeros are equal. If too few scores are above them, only those below
        # matter.
        order = tl.where(score == 0.0, 0, order)
        order ^= (order >> 31) & 0x7FFFFFFF
        above = tl.sum((competes & (order >= 0)).to(tl.int32), axis=1)
        below = (tl.minimum(order, -1) & 0x7FFFFFFF) - 1
        order = tl.where((above < wanted)[:, None], below, order)
        least = -1
    order = tl.where(competes, tl.maximum(order, least), -1)

    # The largest threshold that as many as wanted reach is between the best one of all
    # and the least of the best ones of enough groups, or else 0.
    if (COLUMNS >= 128) & (NUM_BLOCKS <= 32):
        groups = tl.reshape(order, [order.shape[0], COLUMNS // 128, 32, 4])
        groups = tl.max(tl.max(groups, axis=3), axis=1)
        threshold = tl.maximum(tl.min(groups, axis=1), 0)
        highest = tl.max(groups, axis=1)
    else:
        threshold = tl.zeros_like(wanted)
        highest = tl.max(order, axis=1)
    highest = tl.minimum(highest, 0x7FFFFFFE)
    too_many = competitors > wanted
    # It is built from the highest bit of its distance on, and settled where no more
    # than wanted reach it.
    distance = tl.max(tl.where(too_many, highest - threshold, 0), axis=0)
    exponent = tl.cast(distance, tl.float32).to(tl.int32, bitcast=True) >> 23
    bit = tl.full([], 1, tl.int32) << tl.minimum(tl.maximum(exponent - 127, 0), 30)
    excess = too_many.to(tl.int32)
    unsettled = tl.max(excess, axis=0) != 0
    while unsettled:
        trial = threshold + tl.minimum(bit, highest + 1 - threshold)
        reached = COLUMNS + tl.sum((order - trial[:, None]) >> 31, axis=1)
        threshold = tl.where(reached >= wanted, trial, threshold)
        excess = tl.where(reached >= wanted, reached - wanted, excess)
        bit >>= 1
        unsettled = (tl.max(excess, axis=0) != 0) & (bit != 0)

    if tl.max(excess, axis=0) != 0:
        # Of those that just reach it the last ones are too many.
        tie = order == threshold[:, None]
        ties = tl.cumsum(tl.where(tie, 1, 0), axis=1)
        reached = COLUMNS + tl.sum((order - threshold[:, None]) >> 31, axis=1)
        kept = tl.max(ties, axis=1) - (reached - wanted)
        order = tl.where(tie & (ties > kept[:, None]), -1, order)
    # A thread has four that are adjacent: it counts them by itself.
    chosen = tl.where(order >= threshold[:, None], 1, 0)
    chosen = tl.reshape(chosen, [chosen.shape[0], COLUMNS // 4, 2, 2])
    even, odd = tl.split(chosen)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    count = first + second + third + fourth
    slot = tl.cumsum(count, axis=1) - count + (INITIAL - 1)
    block = tl.arange(0, COLUMNS // 4)[None, :] * 4
    slot += first
    tl.store(blocks_ptr + slot, block, mask=first == 1)
    slot += second
    tl.store(blocks_ptr + slot, block + 1, mask=second == 1)
    slot += third
    tl.store(blocks_ptr + slot, block + 2, mask=third == 1)
    slot += fourth
    tl.store(blocks_ptr + slot, block + 3, mask=fourth == 1)


@triton.jit
def log_sum_exp_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, M, K, H]
    starts_ptr,  # [B, T] if PACKED
    scale_log2,
    queries,
    windows,
    length,
    lse_ptr,  # [B, N, T], in base 2
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    H_MAIN: tl.constexpr,
    H_TAIL: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Log-sum-exp of some queries' logits; a row is a query and a head."""
    TOKENS: tl.constexpr = ROWS // GROUP
    # The latest queries first: they have the most to do.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    kv_row = tl.program_id(1)
    batch = (kv_row // KV_HEADS).to(tl.int64)
    kv_head = kv_row % KV_HEADS
    row = tl.arange(0, ROWS)
    token = first + row // GROUP
    live = (row < TOKENS * GROUP) & (token < queries)
    query_ptr += ((batch * queries + first) * KV_HEADS + kv_head) * (GROUP * H)
    query_row = row // GROUP * (KV_HEADS * GROUP) + row % GROUP
    query, query_tail = _load_queries(query_ptr, query_row, live, H, H_MAIN, H_TAIL)
    key_ptr += (batch * windows * KV_HEADS + kv_head) * H
    position = token + length - queries
    start = tl.zeros([ROWS], tl.int32)
    first_tile = 0
    if PACKED:
        start = tl.load(starts_ptr + batch * queries + token, mask=live, other=length)
        first_tile = tl.min(start, axis=0) // STRIDE // COLUMNS

    # Windows that the first and the last query have behind them, in whole tiles: all
    # may see the former ones, nobody more than the latter.
    first_position = first + length - queries
    last_position = tl.minimum(first + TOKENS, queries) - 1 + length - queries
    free = tl.maximum(first_position - (KERNEL - STRIDE) + 1, 0) // STRIDE // COLUMNS
    seen = tl.maximum(last_position - (KERNEL - STRIDE) + 1, 0) // STRIDE
    last_tile = tl.cdiv(seen, COLUMNS)
    if PACKED:
        free = first_tile
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for masked in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues]
        low = free if masked else first_tile
        high = last_tile if masked else free
        for tile in range(low, high):
            window = tile * COLUMNS + tl.arange(0, COLUMNS)
            key_row = window.to(tl.int64) * KV_HEADS
            exists = window < windows
            key, key_tail = _load_keys(key_ptr, key_row, exists, H, H_MAIN, H_TAIL)
            logits = _product(query, query_tail, key, key_tail, H_TAIL)
            if masked:
                last = window[None, :] * STRIDE + (KERNEL - 1)
                may = exists[None, :] & (last <= position[:, None])
                if PACKED:
                    may &= window[None, :] * STRIDE >= start[:, None]
                logits = tl.where(may, logits, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(logits, axis=1) * scale_log2)
            finite_peak = tl.where(new_peak == -float("inf"), 0.0, new_peak)
            weights = tl.exp2(logits * scale_log2 - finite_peak[:, None])
            total = total * tl.exp2(peak - finite_peak) + tl.sum(weights, axis=1)
            peak = new_peak
    head = batch * (KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP
    # log2(0) = -inf where nothing is seen, and so is the peak.
    lse = tl.where(total == 0.0, -float("inf"), peak + tl.log2(total))
    tl.store(lse_ptr + head * queries + token, lse, mask=live)
