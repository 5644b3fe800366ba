"""The kernels that choose blocks; what launches them is in `triton.py`."""

import triton
import triton.language as tl

from jattn.pallas._tiles import _load_rows

# Below the order of every score.
LOWEST = tl.constexpr(-(2**31))


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
        fits = live[:, None] & (block + 1 < WIDTH)
        tl.store(scores_ptr + WIDTH + 1 + target, following, mask=fits)


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
            COLUMNS,
        )
    slot = tl.arange(0, SLOTS)[None, :]
    total = tl.minimum(own_block - first_block + 1, NUM_BLOCKS)[:, None]
    empty = live[:, None] & (slot >= total) & (slot < NUM_BLOCKS)
    tl.store(blocks_ptr + slot, -1, mask=empty)


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
    COLUMNS: tl.constexpr,
):
    """Writes the blocks of each row's list in ascending order."""
    first_block = first_block[:, None]
    own_block = own_block[:, None]
    block = tl.arange(0, COLUMNS)[None, :]
    visible = (block >= first_block) & (block <= own_block)
    forced = (block < first_block + INITIAL) | (block > own_block - LOCAL)
    # Loaded in fours, 16 bytes at once; those that are not visible may be anything.
    four = block // 4 * 4
    wanted = (four + 3 >= first_block) & (four <= own_block)
    score = tl.load(scores_ptr + block, mask=wanted, other=0.0)
    if PLANES == 2:
        previous = tl.load(scores_ptr + WIDTH + block, mask=wanted, other=0.0)
        score += tl.where(block > first_block, previous, 0.0)

    # Integers in the order of the scores, both zeros being equal; above all of them
    # what is forced, below what is out of sight.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    order = tl.where(forced, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    order = tl.where(visible, order, LOWEST)
    # The largest threshold that NUM_BLOCKS reach, or else all that is visible, is built
    # from the highest bit on; it is settled where no more than these reach it. After
    # the sign, what has another one than the threshold is moved next to zero, so that
    # differences fit 32 bits.
    reached = tl.sum((order >= 0).to(tl.int32), axis=1)
    positive = reached >= NUM_BLOCKS
    reached = tl.where(positive, reached, tl.sum(visible.to(tl.int32), axis=1))
    threshold = tl.where(positive, 0, LOWEST + 1)
    order = tl.where(positive[:, None], tl.maximum(order, -1), tl.minimum(order, 0))
    bit = tl.full([], 2**30, tl.int32)
    unsettled = tl.max(reached, axis=0) > NUM_BLOCKS
    while unsettled:
        trial = threshold + bit
        count = COLUMNS + tl.sum((order - trial[:, None]) >> 31, axis=1)
        threshold = tl.where(count >= NUM_BLOCKS, trial, threshold)
        reached = tl.where(count >= NUM_BLOCKS, count, reached)
        bit >>= 1
        unsettled = (tl.max(reached, axis=0) > NUM_BLOCKS) & (bit != 0)

    if tl.max(reached, axis=0) > NUM_BLOCKS:
        # Of those that just reach it the last ones are too many.
        tie = order == threshold[:, None]
        ties = tl.cumsum(tl.where(tie, 1, 0), axis=1)
        kept = tl.max(ties, axis=1) - (reached - NUM_BLOCKS)
        order = tl.where(tie & (ties > kept[:, None]), LOWEST, order)
    chosen = order >= threshold[:, None]
    slot = tl.where(chosen, tl.cumsum(tl.where(chosen, 1, 0), axis=1), 0) - 1
    tl.store(blocks_ptr + slot, block, mask=slot >= 0)


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
