"""Selective Attention in Triton for a given F: output, and query's gradient.

F is the bias that `jattn.pallas.selective.mask` writes; matrix products of q·k start
from it. Query t is at position t + S - T.

The bias is what most of the traffic is about. So that a tile of it serves several heads
of one program, heads that share a kv head are packed as rows of a tile (PACK of them,
each with TOKENS queries), and others take turns (STREAMS of them).

Letters as in `jattn.pallas.selective.triton`.
"""

# A type checker sees neither that static_range unrolls nor what a constexpr stands for.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from jattn.pallas._tiles import _load_rows, _store_rows
from jattn.pallas.selective.mask import (
    _first_seen,
    _load_fragments,
)

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile_range(
    starts_ptr,
    tiles_ptr,
    counts_ptr,
    batch,
    first_token,
    queries,
    keys,
    blocks,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    SKIP: tl.constexpr,
    TILES: tl.constexpr,
):
    """The tiles of keys that a tile of queries sees.

    With SKIP they are places in the list of its block of queries, which names the tiles
    that are not skipped in order, and after them those in the future.

    Returns the list, the first tile, the first that needs a mask, and the end.
    """
    offset = keys - queries
    begin = 0
    full = (first_token + offset + 1) // KEYS
    end = tl.cdiv(tl.minimum(first_token + TOKENS, queries) + offset, KEYS)
    if SKIP:
        row = batch * blocks + first_token // BLOCK
        tiles_ptr += row * TILES
        # Skipped tiles are all in the past of the block.
        skipped = TILES - tl.load(counts_ptr + row)
        full -= skipped
        end -= skipped
    elif PACKED:
        first = _first_seen(starts_ptr, batch, first_token, queries, keys, PACKED)
        begin = first // KEYS
    if PACKED:
        full = begin
    return tiles_ptr, begin, full, end


@triton.jit
def _tile_start(tiles_ptr, place, KEYS: tl.constexpr, SKIP: tl.constexpr):
    """The first key of the tile at this place of a list."""
    tile = place
    if SKIP:
        tile = tl.load(tiles_ptr + place)
    return tile * KEYS


@triton.jit
def _unseen(logits, token, position, first, offset, PACKED: tl.constexpr):
    """Logits [queries, keys] with minus infinity where a query does not see a key."""
    seen = position[None, :] <= (token + offset)[:, None]
    if PACKED:
        seen &= first[:, None] <= position[None, :]
    return tl.where(seen, logits, -float("inf"))


@triton.jit
def forward_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, V]
    bias_ptr,  # [B, CHUNK, columns], in fragments
    starts_ptr,  # [B, S] if PACKED
    tiles_ptr,  # [B, blocks, TILES] if SKIP
    counts_ptr,  # [B, blocks] if SKIP
    region_ptr,  # [2]
    out_ptr,  # [B, T, N, V], updated
    lse_ptr,  # [B, T, N], updated
    scale_log2,
    queries,
    keys,
    blocks,
    columns,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PACK: tl.constexpr,
    STREAMS: tl.constexpr,
    AHEAD: tl.constexpr,
    PACKED: tl.constexpr,
    SKIP: tl.constexpr,
    TILES: tl.constexpr,
):
    """Attention of one tile of queries in PACK times STREAMS heads.

    The programs of one tile of queries follow each other: they find the bias in the
    cache. With AHEAD it is loaded a tile before it is needed, and kept for all streams.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    MEMBERS: tl.constexpr = PACK * STREAMS
    TOKENS: tl.constexpr = ROWS // PACK
    batch = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) % (HEADS // MEMBERS) * MEMBERS
    tile = CHUNK // TOKENS - 1 - tl.program_id(0) // (HEADS // MEMBERS)
    first_token = tl.load(region_ptr) + tile * TOKENS
    if first_token >= queries:
        return
    offset = keys - queries
    row = tl.arange(0, ROWS)
    token = first_token + row % TOKENS
    live = token < queries
    source = (batch * queries + token) * HEADS + head + row // TOKENS
    first = _first_seen(starts_ptr, batch, token, queries, keys, PACKED)
    tiles_ptr, begin, full, end = _tile_range(
        starts_ptr,
        tiles_ptr,
        counts_ptr,
        batch,
        first_token,
        queries,
        keys,
        blocks,
        TOKENS,
        KEYS,
        BLOCK,
        PACKED,
        SKIP,
        TILES,
    )
    column = tl.arange(0, KEYS)
    bias_ptr += (batch * CHUNK + tile * TOKENS) * columns
    start = _tile_start(tiles_ptr, begin, KEYS, SKIP)
    if AHEAD:
        bias = _load_fragments(bias_ptr + start * 16, columns, ROWS, KEYS, PACK)

    query, peak, total, out = (), (), (), ()
    for i in tl.static_range(STREAMS):
        query += (_load_rows(query_ptr, source + i * PACK, live, H, H_PAD),)
        peak += (tl.full([ROWS], -float("inf"), tl.float32),)
        total += (tl.zeros([ROWS], tl.float32),)
        out += (tl.zeros([ROWS, V_PAD], tl.float32),)

    for MASKED in tl.static_range(2):
        if MASKED:
            begin, full = full, end
        for n in range(begin, full):
            start = _tile_start(tiles_ptr, n, KEYS, SKIP)
            following = _tile_start(tiles_ptr, tl.minimum(n + 1, end - 1), KEYS, SKIP)
            position = start + column
            exists = column >= 0  # all of them, which costs nothing
            if MASKED:
                exists = position < keys
            new_peak, new_total, new_out = (), (), ()
            for i in tl.static_range(STREAMS):
                kv_head = (head + i * PACK) // GROUP
                key_row = (batch * keys + position) * KV_HEADS + kv_head
                key = _load_rows(key_ptr, key_row, exists, H, H_PAD)
                value = _load_rows(value_ptr, key_row, exists, V, V_PAD)
                if not AHEAD:
                    bias = _load_fragments(
                        bias_ptr + start * 16, columns, ROWS, KEYS, PACK
                    )
                logits = tl.dot(query[i], tl.trans(key), bias, input_precision="tf32x3")
                if AHEAD and i == STREAMS - 1:
                    bias = _load_fragments(
                        bias_ptr + following * 16, columns, ROWS, KEYS, PACK
                    )
                if MASKED:
                    logits = _unseen(logits, token, position, first, offset, PACKED)
                highest = tl.maximum(peak[i], tl.max(logits, axis=1))
                shift = highest * scale_log2
                # The bias of a whole row of a tile may be minus infinity.
                shift = tl.where(highest == -float("inf"), 0.0, shift)
                weights = tl.exp2(logits * scale_log2 - shift[:, None])
                decay = tl.exp2(peak[i] * scale_log2 - shift)
                new_peak += (highest,)
                new_total += (total[i] * decay + tl.sum(weights, axis=1),)
                new_out += (
                    tl.dot(
                        weights.to(value.dtype),
                        value,
                        out[i] * decay[:, None],
                        input_precision="tf32x3",
                    ),
                )
            peak, total, out = new_peak, new_total, new_out

    for i in tl.static_range(STREAMS):
        result = out[i] / tl.expand_dims(total[i], 1)
        _store_rows(out_ptr, source + i * PACK, live, result, V, V_PAD)
        lse = (peak[i] * scale_log2 + tl.log2(total[i])) * LN_2
        tl.store(lse_ptr + source + i * PACK, lse, mask=live)


@triton.jit
def query_gradient_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, V]
    bias_ptr,  # [B, CHUNK, columns], in fragments
    starts_ptr,  # [B, S] if PACKED
    tiles_ptr,  # [B, blocks, TILES] if SKIP
    counts_ptr,  # [B, blocks] if SKIP
    region_ptr,  # [2]
    out_gradient_ptr,  # [B, T, N, V]
    lse_ptr,  # [B, T, N], in base 2
    delta_ptr,  # [B, T, N]
    query_gradient_ptr,  # [B, T, N, H], updated
    scale_log2,
    queries,
    keys,
    blocks,
    columns,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PACK: tl.constexpr,
    STREAMS: tl.constexpr,
    AHEAD: tl.constexpr,
    PACKED: tl.constexpr,
    SKIP: tl.constexpr,
    TILES: tl.constexpr,
):
    """The query's gradient for a given F, in what forward_kernel calls a program."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    MEMBERS: tl.constexpr = PACK * STREAMS
    TOKENS: tl.constexpr = ROWS // PACK
    batch = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) % (HEADS // MEMBERS) * MEMBERS
    tile = CHUNK // TOKENS - 1 - tl.program_id(0) // (HEADS // MEMBERS)
    first_token = tl.load(region_ptr) + tile * TOKENS
    if first_token >= queries:
        return
    offset = keys - queries
    row = tl.arange(0, ROWS)
    token = first_token + row % TOKENS
    live = token < queries
    source = (batch * queries + token) * HEADS + head + row // TOKENS
    first = _first_seen(starts_ptr, batch, token, queries, keys, PACKED)
    tiles_ptr, begin, full, end = _tile_range(
        starts_ptr,
        tiles_ptr,
        counts_ptr,
        batch,
        first_token,
        queries,
        keys,
        blocks,
        TOKENS,
        KEYS,
        BLOCK,
        PACKED,
        SKIP,
        TILES,
    )
    column = tl.arange(0, KEYS)
    bias_ptr += (batch * CHUNK + tile * TOKENS) * columns
    start = _tile_start(tiles_ptr, begin, KEYS, SKIP)
    if AHEAD:
        bias = _load_fragments(bias_ptr + start * 16, columns, ROWS, KEYS, PACK)

    query, out_gradient, lse, delta, query_gradient = (), (), (), (), ()
    for i in tl.static_range(STREAMS):
        place = source + i * PACK
        query += (_load_rows(query_ptr, place, live, H, H_PAD),)
        out_gradient += (_load_rows(out_gradient_ptr, place, live, V, V_PAD),)
        lse += (tl.load(lse_ptr + place, mask=live, other=float("inf")),)
        delta += (tl.load(delta_ptr + place, mask=live, other=0.0),)
        query_gradient += (tl.zeros([ROWS, H_PAD], tl.float32),)

    for MASKED in tl.static_range(2):
        if MASKED:
            begin, full = full, end
        for n in range(begin, full):
            start = _tile_start(tiles_ptr, n, KEYS, SKIP)
            following = _tile_start(tiles_ptr, tl.minimum(n + 1, end - 1), KEYS, SKIP)
            position = start + column
            exists = column >= 0  # all of them, which costs nothing
            if MASKED:
                exists = position < keys
            sums = ()
            for i in tl.static_range(STREAMS):
                kv_head = (head + i * PACK) // GROUP
                key_row = (batch * keys + position) * KV_HEADS + kv_head
                key = _load_rows(key_ptr, key_row, exists, H, H_PAD)
                value = _load_rows(value_ptr, key_row, exists, V, V_PAD)
                if not AHEAD:
                    bias = _load_fragments(
                        bias_ptr + start * 16, columns, ROWS, KEYS, PACK
                    )
                logits = tl.dot(query[i], tl.trans(key), bias, input_precision="tf32x3")
                if AHEAD and i == STREAMS - 1:
                    bias = _load_fragments(
                        bias_ptr + following * 16, columns, ROWS, KEYS, PACK
                    )
                if MASKED:
                    logits = _unseen(logits, token, position, first, offset, PACKED)
                weights = tl.exp2(logits * scale_log2 - tl.expand_dims(lse[i], 1))
                gradient = tl.dot(
                    out_gradient[i], tl.trans(value), input_precision="tf32x3"
                )
                gradient -= tl.expand_dims(delta[i], 1)
                gradient = weights * gradient  # of logits
                sums += (
                    tl.dot(
                        gradient.to(key.dtype),
                        key,
                        query_gradient[i],
                        input_precision="tf32x3",
                    ),
                )
            query_gradient = sums

    for i in tl.static_range(STREAMS):
        result = query_gradient[i] * (scale_log2 * LN_2)
        _store_rows(query_gradient_ptr, source + i * PACK, live, result, H, H_PAD)
