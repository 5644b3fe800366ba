"""The kernels of attention to chosen blocks forward; `triton.py` launches them."""

import triton
import triton.language as tl

from jattn.pallas._tiles import _load_rows, _store_rows

LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _step_place(step_ptr, kv_row, length, chunks, KV_HEADS: tl.constexpr):
    """Where a program is whose kv head is the portion's kv_row-th.

    Returns the row of the step's arrays [D, C, M, ..], and the batch row, the kv head
    and the chunk's first query.
    """
    step = tl.load(step_ptr)
    row = step * tl.num_programs(1) + kv_row
    place = step // chunks * tl.num_programs(1) + kv_row
    return row, place // KV_HEADS, place % KV_HEADS, step % chunks * length


@triton.jit
def plan_kernel(
    lists_ptr,  # [B, T, K, R, n / SPLIT]
    queries,
    keys,
    length,
    chunks,
    blocks_ptr,  # int32 [D, C, M, L, R, n]
    shared_ptr,  # int32 [B K, C L / TOKENS, R, 4] if SHARE
    KV_HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PAD: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    PORTION: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Blocks of some queries without those that repeat or are past the query.

    With SHARE, the last block, the one before and the first go to shared_ptr where all
    the queries of a tile have them, after their number, and are left out of blocks_ptr.
    Those that are left come first in their list, in order.
    """
    ENTRIES: tl.constexpr = SLOTS // SPLIT
    tile = tl.program_id(0) // LISTS
    member = tl.program_id(0) % LISTS
    kv_row = tl.program_id(1)
    batch = kv_row // KV_HEADS
    count = tl.cdiv(keys, BLOCK)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    live = token < queries
    list_row = ((batch * queries + token).to(tl.int64) * KV_HEADS) + kv_row % KV_HEADS
    lists_ptr += (list_row * LISTS + member)[:, None] * ENTRIES
    slot = tl.arange(0, SLOTS_PAD)[None, :]
    inside = live[:, None] & (slot < SLOTS)
    entry = slot // SPLIT
    listed = tl.load(lists_ptr + entry, mask=inside, other=-1)
    own = (token + keys - queries) // BLOCK
    kept = (listed >= 0) & (listed <= own[:, None] // SPLIT)
    for earlier in range(ENTRIES - 1):
        again = tl.load(lists_ptr + earlier, mask=live[:, None], other=-1)
        kept &= (listed != again) | (entry <= earlier)
    block = listed * SPLIT + slot % SPLIT
    block = tl.where(kept & (block <= own[:, None]), block, count)

    if SHARE:
        last = (tile * TOKENS + keys - queries) // BLOCK
        first = tl.min(tl.min(block, axis=1), axis=0)
        tiles = tl.num_programs(0) // LISTS
        shared_ptr += ((kv_row * tiles + tile) * LISTS + member) * 4
        found = 0
        for i in tl.static_range(3):  # pyright: ignore[reportGeneralTypeIssues]
            candidate = first if i == 2 else last - i
            has = (block == candidate) & (block < count)
            has = tl.max(has.to(tl.int32), axis=1)
            everyone = tl.min(tl.where(live, has, 1), axis=0) != 0
            block = tl.where(everyone & (block == candidate), count, block)
            found = tl.where(everyone, found + 1, found)
            tl.store(shared_ptr + found, candidate, mask=everyone)
        tl.store(shared_ptr, found)

    chunk = tile * TOKENS // length
    row = (kv_row // PORTION * chunks + chunk) * PORTION + kv_row % PORTION
    row = (row.to(tl.int64) * length + token - chunk * length) * LISTS + member
    used = ((block < count) & (slot < SLOTS)).to(tl.int32)
    before = tl.cumsum(used, axis=1)
    # Of those that are not used, as many as there are slots before and not used ones.
    last = tl.sum(used, axis=1, keep_dims=True) + slot - before
    place = tl.where(used != 0, before - 1, last)
    tl.store(blocks_ptr + row[:, None] * SLOTS + place, block, mask=slot < SLOTS)


@triton.jit
def _load_pairs(
    pairs_ptr,  # [P], of this chunk and kv head
    start,
    last,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Which rows of a tile hold anything, and their pairs."""
    row = tl.arange(0, ROWS)
    index = start + row // GROUP
    live = (index < last) & (row < ROWS // GROUP * GROUP)
    return live, tl.load(pairs_ptr + index, mask=live, other=0)


@triton.jit
def _pair_rows(
    pair,
    kv_row,
    kv_head,
    KV_HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Where the rows of a tile come from and go to.

    Returns their query, counted from the chunk's first, their row in arrays [L, N, ..]
    and their row in partial results [L, M, R, n, G, ..].
    """
    row = tl.arange(0, ROWS)
    entry = pair // SLOTS
    token = entry // LISTS
    member = entry % LISTS
    source = ((token * KV_HEADS + kv_head) * LISTS + member) * GROUP + row % GROUP
    target = (token * tl.num_programs(1) + kv_row) * LISTS + member
    target = target * SLOTS + pair % SLOTS
    return token, source, target * GROUP + row % GROUP


@triton.jit
def forward_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, V]
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
    partial_out_ptr,  # [L, M, R, n, G, V]
    partial_lse_ptr,  # [L, M, R, n, G], in base 2
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
    position = block * BLOCK + tl.arange(0, BLOCK)
    exists = position < keys
    key_row = (batch * keys + position).to(tl.int64) * KV_HEADS + kv_head
    key = _load_rows(key_ptr, key_row, exists, H, H_PAD)  # [BLOCK, H]
    value = _load_rows(value_ptr, key_row, exists, V, V_PAD)  # [BLOCK, V]
    segment_ptr += batch.to(tl.int64) * keys
    if PACKED:
        key_segment = tl.load(segment_ptr + position, mask=exists, other=0)
    pairs_ptr += row.to(tl.int64) * pairs
    # Pairs are in order of the query: whether the first one sees the whole block.
    first_query = tl.load(pairs_ptr + first) // (LISTS * SLOTS) + first_token
    masked = PACKED or first_query + keys - queries < block * BLOCK + BLOCK - 1

    STEP: tl.constexpr = ROWS // GROUP
    live, pair = _load_pairs(pairs_ptr, first, last, GROUP, ROWS)
    _, source, _ = _pair_rows(
        pair, kv_row, kv_head, KV_HEADS, LISTS, SLOTS, GROUP, ROWS
    )
    query = _load_rows(query_ptr, source, live, H, H_PAD)  # [ROWS, H]
    for start in range(first, last, STEP):
        token, _, target = _pair_rows(
            pair, kv_row, kv_head, KV_HEADS, LISTS, SLOTS, GROUP, ROWS
        )
        written = live
        live, pair = _load_pairs(pairs_ptr, start + STEP, last, GROUP, ROWS)
        logits = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        # The next tile's queries arrive while this one is worked on.
        _, source, _ = _pair_rows(
            pair, kv_row, kv_head, KV_HEADS, LISTS, SLOTS, GROUP, ROWS
        )
        query = _load_rows(query_ptr, source, live, H, H_PAD)
        if masked:
            query_position = first_token + token + keys - queries
            seen = exists[None, :] & (position[None, :] <= query_position[:, None])
            if PACKED:
                segment = tl.load(segment_ptr + query_position, mask=written, other=0)
                seen &= key_segment[None, :] == segment[:, None]
            logits = tl.where(seen, logits, -float("inf"))  # [ROWS, BLOCK]
        peak = tl.max(logits, axis=1) * scale_log2
        peak = tl.where(peak == -float("inf"), 0.0, peak)
        weights = tl.exp2(logits * scale_log2 - peak[:, None])
        total = tl.sum(weights, axis=1)
        out = tl.dot(weights.to(value.dtype), value, input_precision="tf32x3")
        out *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        _store_rows(partial_out_ptr, target, written, out, V, V_PAD)
        # log2(0) = -inf where nothing is seen.
        lse = peak + tl.log2(total)
        tl.store(partial_lse_ptr + target, lse, mask=written)


@triton.jit
def combine_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, V]
    segment_ptr,  # [B, S] if PACKED
    before_ptr,  # [B, T, N, V] if ADD
    after_ptr,  # [B, T, N, V] if ADD and KEEP, or else they are in out_ptr
    gates_ptr,  # [B, T, N, 3] if ADD
    blocks_ptr,  # [D, C, M, L, R, n]
    shared_ptr,  # [B K, C L / TOKENS, R, 4]
    step_ptr,  # [1]
    scale_log2,
    queries,
    keys,
    length,
    chunks,
    partial_out_ptr,  # [L, M, R, n, G, V]
    partial_lse_ptr,  # [L, M, R, n, G], in base 2
    out_ptr,  # [B, T, N, V]
    lse_ptr,  # [B, T, N]
    attended_ptr,  # [B, T, N, V] if KEEP
    KV_HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    AHEAD: tl.constexpr,
    PACKED: tl.constexpr,
    ADD: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Attention of a tile of queries: to the blocks they share, and what is partial.

    Log-sum-exps of partial results are read WIDE at a time, their outputs arrive while
    others are added, AHEAD - 1 at a time. ADD and KEEP are those of `merge_kernel`.
    """
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
    head = (kv_head * LISTS + member) * GROUP + row % GROUP
    first_row = (batch * queries + first_token).to(tl.int64)
    first_row *= KV_HEADS * LISTS * GROUP
    source = token * (KV_HEADS * LISTS * GROUP) + head
    query = _load_rows(query_ptr + first_row * H, source, live, H, H_PAD)
    first_position = first_token + keys - queries
    position = first_position + token
    if PACKED:
        segment_ptr += batch.to(tl.int64) * keys
        segment = tl.load(segment_ptr + position, mask=live, other=0)
    tiles = chunks * length // TOKENS
    shared_row = (batch * KV_HEADS + kv_head) * tiles + first_token // TOKENS
    shared_ptr += (shared_row * LISTS + member) * 4
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, V_PAD], tl.float32)
    for place in range(tl.load(shared_ptr)):
        block = tl.load(shared_ptr + 1 + place)
        key_position = block * BLOCK + tl.arange(0, BLOCK)
        exists = key_position < keys
        key_row = (batch * keys + key_position).to(tl.int64) * KV_HEADS + kv_head
        key = _load_rows(key_ptr, key_row, exists, H, H_PAD)
        logits = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        if PACKED or block * BLOCK + BLOCK - 1 > first_position:
            seen = exists[None, :] & (key_position[None, :] <= position[:, None])
            if PACKED:
                key_segment = tl.load(segment_ptr + key_position, mask=exists, other=0)
                seen &= key_segment[None, :] == segment[:, None]
            logits = tl.where(seen, logits, -float("inf"))  # [ROWS, BLOCK]
        new_peak = tl.maximum(peak, tl.max(logits, axis=1) * scale_log2)
        finite_peak = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.exp2(logits * scale_log2 - finite_peak[:, None])
        decay = tl.exp2(peak - finite_peak)
        total = total * decay + tl.sum(weights, axis=1)
        peak = new_peak
        # Loaded only here: earlier, it would take registers from the logits.
        value = _load_rows(value_ptr, key_row, exists, V, V_PAD)
        weights = weights.to(value.dtype)
        out = tl.dot(weights, value, out * decay[:, None], input_precision="tf32x3")

    list_row = (step_row.to(tl.int64) * length + tile_token + token) * LISTS + member
    blocks_ptr += list_row * SLOTS
    blocks = tl.cdiv(keys, BLOCK)
    first_target = (tile_token * tl.num_programs(1) + kv_row) * LISTS + member
    partial_out_ptr += first_target.to(tl.int64) * (SLOTS * GROUP * V)
    partial_lse_ptr += first_target.to(tl.int64) * (SLOTS * GROUP)
    target = token * (tl.num_programs(1) * LISTS * SLOTS * GROUP) + row % GROUP
    lse_ptrs = partial_lse_ptr + target
    # The slots that a query has a partial result of come first.
    count = tl.zeros([ROWS], tl.int32)
    new_peak = peak
    for first_slot in range(0, SLOTS, WIDE):
        slot = first_slot + tl.arange(0, WIDE)[None, :]
        inside = live[:, None] & (slot < SLOTS)
        # Both are loaded at once, though the latter may be anything if there is none.
        block = tl.load(blocks_ptr[:, None] + slot, mask=inside, other=blocks)
        lse = tl.load(lse_ptrs[:, None] + slot * GROUP, mask=inside, other=0.0)
        lse = tl.where(block < blocks, lse, -float("inf"))
        count += tl.sum((block < blocks).to(tl.int32), axis=1)
        new_peak = tl.maximum(new_peak, tl.max(lse, axis=1))
    finite_peak = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    decay = tl.exp2(peak - finite_peak)
    total *= decay
    out *= decay[:, None]
    for slot in tl.range(0, tl.max(count, axis=0), num_stages=AHEAD):  # pyright: ignore
        here = slot < count
        place = slot * GROUP
        partial_out = _load_rows(partial_out_ptr, target + place, here, V, V_PAD)
        lse = tl.load(lse_ptrs + place, mask=here, other=-float("inf"))
        weight = tl.exp2(lse - finite_peak)
        total += weight
        out += partial_out * weight[:, None]

    out *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    # log2(0) = -inf where nothing is seen; times log(2) for the natural logarithm.
    lse = (new_peak + tl.log2(total)) * LOG_2
    tl.store(lse_ptr + first_row + source, lse, mask=live)
    if KEEP:
        _store_rows(attended_ptr + first_row * V, source, live, out, V, V_PAD)
    out_ptr += first_row * V
    if ADD:
        gates_ptr += (first_row + source) * 3
        gate = tl.load(gates_ptr + 1, mask=live, other=0.0).to(tl.float32)
        out *= gate[:, None]
        before_ptr += first_row * V
        after_ptr = after_ptr + first_row * V if KEEP else out_ptr
        # One after the other: at once, they would take too many registers.
        for i in range(2):
            pointer = before_ptr if i == 0 else after_ptr
            term = _load_rows(pointer, source, live, V, V_PAD)
            gate = tl.load(gates_ptr + 2 * i, mask=live, other=0.0).to(tl.float32)
            out += term.to(tl.float32) * gate[:, None]
    _store_rows(out_ptr, source, live, out, V, V_PAD)


@triton.jit
def _load_once(pointer, row, live, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """_load_rows of what nobody reads again: it need not stay in a cache."""
    column = tl.arange(0, PADDED)
    return tl.load(
        pointer + row[:, None] * WIDTH + column[None, :],
        mask=live[:, None] & (column < WIDTH)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def merge_kernel(
    before_ptr,  # [B, T, N, V] if ADD
    after_ptr,  # [B, T, N, V] if ADD and KEEP, or else they are in out_ptr
    gates_ptr,  # [B, T, N, 3] if ADD
    blocks_ptr,  # [D, C, M, L, R, n]
    shared_ptr,  # [B K, C L / SHARED, R, 4]
    step_ptr,  # [1]
    queries,
    keys,
    length,
    chunks,
    partial_out_ptr,  # [L, M, R, 1 + n, G, V]
    partial_lse_ptr,  # [L, M, R, 1 + n, G], in base 2
    out_ptr,  # [B, T, N, V]
    lse_ptr,  # [B, T, N]
    attended_ptr,  # [B, T, N, V] if KEEP
    KV_HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    ADD: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Adds up the partial results of a tile of queries, AHEAD of them at a time.

    The first one is of the blocks that the query shares with its neighbours. With ADD,
    the output is a sum of three with gates, of which this is the second. With KEEP, it
    goes to attended_ptr by itself as well.
    """
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
    list_row = (step_row.to(tl.int64) * length + tile_token + token) * LISTS + member
    slot = tl.arange(0, SLOTS_PAD)[None, :]
    block = tl.load(
        blocks_ptr + list_row[:, None] * SLOTS + slot - 1,
        mask=live[:, None] & (slot > 0) & (slot <= SLOTS),
        other=2**30,
    )
    groups = chunks * length // SHARED
    shared_row = (batch * KV_HEADS + kv_head) * groups + first_token // SHARED
    shared = tl.load(shared_ptr + (shared_row * LISTS + member) * 4)
    # The first partial result is of blocks that are shared, if there are any.
    begin = tl.where(shared > 0, 0, 1)
    written = (block < tl.cdiv(keys, BLOCK)) | (slot == 0)
    written &= live[:, None] & (slot >= begin)
    # One past the last one.
    count = tl.max(tl.where(written, slot + 1, 0), axis=1)
    first_target = (tile_token * tl.num_programs(1) + kv_row) * LISTS + member
    first_target = first_target.to(tl.int64) * ((1 + SLOTS) * GROUP)
    partial_out_ptr += first_target * V
    target = token * (tl.num_programs(1) * LISTS * (1 + SLOTS) * GROUP) + row % GROUP
    lse_ptrs = partial_lse_ptr + first_target + target
    lse = tl.load(lse_ptrs[:, None] + slot * GROUP, mask=written, other=-float("inf"))
    peak = tl.max(lse, axis=1)
    finite_peak = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.sum(tl.exp2(lse - finite_peak[:, None]), axis=1)
    scale = 1.0 / tl.where(total == 0.0, 1.0, total)
    out = tl.zeros([ROWS, V_PAD], tl.float32)
    last = tl.max(count, axis=0)
    for start in range(0, last, AHEAD):  # pyright: ignore
        for i in tl.static_range(AHEAD):  # pyright: ignore[reportGeneralTypeIssues]
            place = start + i + tl.zeros([ROWS], tl.int32)
            here = (place >= begin) & (place < count)
            place *= GROUP
            partial_out = _load_once(partial_out_ptr, target + place, here, V, V_PAD)
            lse_here = tl.load(lse_ptrs + place, mask=here, other=-float("inf"))
            weight = tl.exp2(lse_here - finite_peak) * scale
            out += partial_out.to(tl.float32) * weight[:, None]

    head = (kv_head * LISTS + member) * GROUP + row % GROUP
    first_row = (batch * queries + first_token).to(tl.int64)
    first_row *= KV_HEADS * LISTS * GROUP
    source = token * (KV_HEADS * LISTS * GROUP) + head
    # log2(0) = -inf where nothing is seen; times log(2) for the natural logarithm.
    lse_out = (peak + tl.log2(total)) * LOG_2
    tl.store(lse_ptr + first_row + source, lse_out, mask=live)
    if KEEP:
        _store_rows(attended_ptr + first_row * V, source, live, out, V, V_PAD)
    out_ptr += first_row * V
    if ADD:
        gates_ptr += (first_row + source) * 3
        before = _load_rows(before_ptr + first_row * V, source, live, V, V_PAD)
        after_ptr = after_ptr + first_row * V if KEEP else out_ptr
        after = _load_rows(after_ptr, source, live, V, V_PAD)
        gate = tl.load(gates_ptr + 1, mask=live, other=0.0).to(tl.float32)
        out *= gate[:, None]
        gate = tl.load(gates_ptr, mask=live, other=0.0).to(tl.float32)
        out += before.to(tl.float32) * gate[:, None]
        gate = tl.load(gates_ptr + 2, mask=live, other=0.0).to(tl.float32)
        out += after.to(tl.float32) * gate[:, None]
    _store_rows(out_ptr, source, live, out, V, V_PAD)
