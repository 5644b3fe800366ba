"""Selective Attention in Triton: what one program does.

F enters the attention kernels as a bias of the raw products q·k, ``-F / scale``, which
their matrix products start from: it costs its loads and no arithmetic. `bias_kernel`
writes it for a region of queries and keys, and all heads read it.

Query t is at position t + S - T. Tiles of the bias that lie wholly in the future or in
other documents are never written; attention masks whatever it reads there. Skipped
tiles are neither written nor read.

Letters as in `jattn.pallas.selective.triton`.
"""

# A type checker sees neither that static_range unrolls nor what a constexpr stands for.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from jattn.pallas._tiles import _load_rows, _store_rows

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_fragments(pointer, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile [ROWS, COLUMNS] of what _store_fragments wrote to [.., width].

    The pointer is that of the tile's first number: that of row r and column c has the
    place ``r width + 16 c`` if both start a fragment.
    """
    column = tl.arange(0, COLUMNS // 8)[:, None, None, None] * 128
    row = tl.arange(0, ROWS // 16)[None, :, None, None] * (16 * width)
    lane = tl.arange(0, 32)[None, None, :, None] * 4
    tile = tl.load(pointer + (column + row + lane + tl.arange(0, 4)))
    tile = tl.reshape(tile, [COLUMNS // 8, ROWS // 16, 8, 4, 2, 2])
    return tl.reshape(tl.permute(tile, (1, 4, 2, 0, 3, 5)), [ROWS, COLUMNS])


@triton.jit
def _store_fragments(pointer, tile, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes a tile so that the threads that start a product from it can read it.

    A warp holds 16 rows of an accumulator. Of each 8 columns a thread has two
    neighbours in a row and two 8 rows below, and a fragment holds the 4 numbers of each
    of its 32 threads: the accumulator is read with wide loads, without an exchange
    between threads.
    """
    tile = tl.reshape(tile, [ROWS // 16, 2, 8, COLUMNS // 8, 4, 2])
    tile = tl.permute(tile, (3, 0, 2, 4, 1, 5))
    tile = tl.reshape(tile, [COLUMNS // 8, ROWS // 16, 32, 4])
    column = tl.arange(0, COLUMNS // 8)[:, None, None, None] * 128
    row = tl.arange(0, ROWS // 16)[None, :, None, None] * (16 * width)
    lane = tl.arange(0, 32)[None, None, :, None] * 4
    tl.store(pointer + (column + row + lane + tl.arange(0, 4)), tile)


@triton.jit
def _first_seen(starts_ptr, batch, token, queries, keys, PACKED: tl.constexpr):
    """The first key that each query sees."""
    first = token * 0
    if PACKED:
        token = tl.minimum(token, queries - 1)
        first = tl.load(starts_ptr + batch * keys + token + keys - queries)
    return first


@triton.jit
def _nothing_seen(
    starts_ptr,
    batch,
    first_token,
    first_key,
    queries,
    keys,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Whether no query of a tile sees a key of it."""
    last_token = tl.minimum(first_token + ROWS, queries) - 1
    future = first_key > last_token + keys - queries
    first = _first_seen(starts_ptr, batch, first_token, queries, keys, PACKED)
    return future | (first_token >= queries) | (first >= first_key + KEYS)


@triton.jit
def _products(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    starts_ptr,  # [B, S] if PACKED
    batch,
    first_token,
    first_key,
    queries,
    keys,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The selecting head's q·k of a tile, and whether the query may select the key.

    A query selects neither itself nor the first token of its document.
    """
    token = first_token + tl.arange(0, ROWS)
    position = first_key + tl.arange(0, KEYS)
    live, exists = token < queries, position < keys
    query = _load_rows(query_ptr, (batch * queries + token) * HEADS, live, H, H_PAD)
    key = _load_rows(key_ptr, (batch * keys + position) * KV_HEADS, exists, H, H_PAD)
    products = tl.dot(query, tl.trans(key), input_precision="tf32x3")
    first = _first_seen(starts_ptr, batch, token, queries, keys, PACKED)
    selects = first[:, None] < position[None, :]
    selects &= position[None, :] < (token + keys - queries)[:, None]
    return products, selects & live[:, None]


@triton.jit
def sums_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    starts_ptr,  # [B, S] if PACKED
    queries,
    keys,
    columns,
    sums_ptr,  # [B, blocks, columns]
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """How strongly one block of queries selects each key of a tile."""
    block, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_token, first_key = block * ROWS, tl.program_id(0) * KEYS
    sums_ptr += (batch * tl.num_programs(1) + block) * columns + first_key
    column = tl.arange(0, KEYS)
    if _nothing_seen(
        starts_ptr, batch, first_token, first_key, queries, keys, ROWS, KEYS, PACKED
    ):
        tl.store(sums_ptr + column, tl.zeros([KEYS], tl.float32))
    else:
        products, selects = _products(
            query_ptr,
            key_ptr,
            starts_ptr,
            batch,
            first_token,
            first_key,
            queries,
            keys,
            HEADS,
            KV_HEADS,
            H,
            H_PAD,
            ROWS,
            KEYS,
            PACKED,
        )
        selected = tl.where(selects, tl.maximum(products, 0.0), 0.0)
        tl.store(sums_ptr + column, tl.sum(selected, axis=0))


@triton.jit
def bias_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    starts_ptr,  # [B, S] if PACKED
    carries_ptr,  # [B, blocks, columns]
    dead_ptr,  # [B, blocks, columns / ROWS] if SKIP
    region_ptr,  # [2]
    queries,
    keys,
    blocks,
    columns,
    bias_ptr,  # [B, region's queries, region's keys], or TRANSPOSED, in fragments
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PACKED: tl.constexpr,
    SKIP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """The bias of one block of queries and one tile of keys in a region."""
    batch = tl.program_id(2).to(tl.int64)
    first_token = tl.load(region_ptr) + tl.program_id(1) * ROWS
    first_key = tl.load(region_ptr + 1) + tl.program_id(0) * KEYS
    if _nothing_seen(
        starts_ptr, batch, first_token, first_key, queries, keys, ROWS, KEYS, PACKED
    ):
        return
    block = batch * blocks + first_token // ROWS
    if SKIP and tl.load(dead_ptr + (block * columns + first_key) // ROWS):
        return
    products, selects = _products(
        query_ptr,
        key_ptr,
        starts_ptr,
        batch,
        first_token,
        first_key,
        queries,
        keys,
        HEADS,
        KV_HEADS,
        H,
        H_PAD,
        ROWS,
        KEYS,
        PACKED,
    )
    selected = tl.where(selects, tl.maximum(products, 0.0), 0.0)
    # A selection holds for strictly later queries.
    earlier = tl.cumsum(selected, axis=0) - selected
    column = tl.arange(0, KEYS)
    carry = tl.load(carries_ptr + block * columns + first_key + column)
    bias = -(carry[None, :] + earlier)
    rows, width = tl.num_programs(1) * ROWS, tl.num_programs(0) * KEYS
    row, column = tl.program_id(1) * ROWS, tl.program_id(0) * KEYS
    bias_ptr += batch * rows * width
    if TRANSPOSED:
        bias_ptr += column * rows + row * 16
        _store_fragments(bias_ptr, tl.trans(bias), rows, KEYS, ROWS)
    else:
        bias_ptr += row * width + column * 16
        _store_fragments(bias_ptr, bias, width, ROWS, KEYS)


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
    ROWS: tl.constexpr,
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
    end = tl.cdiv(tl.minimum(first_token + ROWS, queries) + offset, KEYS)
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
def _load_bias(
    bias_ptr,
    tiles_ptr,
    tile,
    columns,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SKIP: tl.constexpr,
):
    """The bias of a tile of queries and the tile of keys at this place of its list."""
    if SKIP:
        tile = tl.load(tiles_ptr + tile)
    return _load_fragments(bias_ptr + tile * (16 * KEYS), columns, ROWS, KEYS)


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
    MEMBERS: tl.constexpr,
    PACKED: tl.constexpr,
    SKIP: tl.constexpr,
    TILES: tl.constexpr,
):
    """Attention of one tile of queries, in MEMBERS heads at once.

    They share the bias, which the second head finds in the cache nearest to it. The
    programs of one tile of queries follow each other for the same reason.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    batch = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) % (HEADS // MEMBERS) * MEMBERS
    tile = CHUNK // ROWS - 1 - tl.program_id(0) // (HEADS // MEMBERS)
    first_token = tl.load(region_ptr) + tile * ROWS
    if first_token >= queries:
        return
    offset = keys - queries
    row = tl.arange(0, ROWS)
    token = first_token + row
    live = token < queries
    source = (batch * queries + token) * HEADS + head
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
        ROWS,
        KEYS,
        BLOCK,
        PACKED,
        SKIP,
        TILES,
    )
    column = tl.arange(0, KEYS)
    bias_ptr += (batch * CHUNK + tile * ROWS) * columns
    bias = _load_bias(bias_ptr, tiles_ptr, begin, columns, ROWS, KEYS, SKIP)

    query, peak, total, out = (), (), (), ()
    for i in tl.static_range(MEMBERS):
        query += (_load_rows(query_ptr, source + i, live, H, H_PAD),)
        peak += (tl.full([ROWS], -float("inf"), tl.float32),)
        total += (tl.zeros([ROWS], tl.float32),)
        out += (tl.zeros([ROWS, V_PAD], tl.float32),)

    for MASKED in tl.static_range(2):
        if MASKED:
            begin, full = full, end
        for n in range(begin, full):
            start = n * KEYS
            if SKIP:
                start = tl.load(tiles_ptr + n) * KEYS
            position = start + column
            exists = position < keys
            new_peak, new_total, new_out = (), (), ()
            for i in tl.static_range(MEMBERS):
                if i == 0 or GROUP % MEMBERS:
                    key_row = (batch * keys + position) * KV_HEADS + (head + i) // GROUP
                    key = _load_rows(key_ptr, key_row, exists, H, H_PAD)
                    value = _load_rows(value_ptr, key_row, exists, V, V_PAD)
                logits = tl.dot(query[i], tl.trans(key), bias, input_precision="tf32x3")
                if i == MEMBERS - 1:
                    # That of the next tile: it takes a while to come.
                    following = tl.minimum(n + 1, end - 1)
                    bias = _load_bias(
                        bias_ptr, tiles_ptr, following, columns, ROWS, KEYS, SKIP
                    )
                if MASKED:
                    seen = position[None, :] <= (token + offset)[:, None]
                    if PACKED:
                        seen &= first[:, None] <= position[None, :]
                    logits = tl.where(seen, logits, -float("inf"))
                highest = tl.maximum(peak[i], tl.max(logits, axis=1))
                shift = highest * scale_log2
                if PACKED:
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

    for i in tl.static_range(MEMBERS):
        result = out[i] / tl.expand_dims(total[i], 1)
        _store_rows(out_ptr, source + i, live, result, V, V_PAD)
        lse = (peak[i] * scale_log2 + tl.log2(total[i])) * LN_2
        tl.store(lse_ptr + source + i, lse, mask=live)


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
    MEMBERS: tl.constexpr,
    PACKED: tl.constexpr,
    SKIP: tl.constexpr,
    TILES: tl.constexpr,
):
    """The query's gradient for a given mask, in what forward_kernel calls a program."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    batch = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) % (HEADS // MEMBERS) * MEMBERS
    tile = CHUNK // ROWS - 1 - tl.program_id(0) // (HEADS // MEMBERS)
    first_token = tl.load(region_ptr) + tile * ROWS
    if first_token >= queries:
        return
    offset = keys - queries
    row = tl.arange(0, ROWS)
    token = first_token + row
    live = token < queries
    source = (batch * queries + token) * HEADS + head
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
        ROWS,
        KEYS,
        BLOCK,
        PACKED,
        SKIP,
        TILES,
    )
    column = tl.arange(0, KEYS)
    bias_ptr += (batch * CHUNK + tile * ROWS) * columns
    bias = _load_bias(bias_ptr, tiles_ptr, begin, columns, ROWS, KEYS, SKIP)

    query, out_gradient, lse, delta, query_gradient = (), (), (), (), ()
    for i in tl.static_range(MEMBERS):
        query += (_load_rows(query_ptr, source + i, live, H, H_PAD),)
        out_gradient += (_load_rows(out_gradient_ptr, source + i, live, V, V_PAD),)
        lse += (tl.load(lse_ptr + source + i, mask=live, other=float("inf")),)
        delta += (tl.load(delta_ptr + source + i, mask=live, other=0.0),)
        query_gradient += (tl.zeros([ROWS, H_PAD], tl.float32),)

    for MASKED in tl.static_range(2):
        if MASKED:
            begin, full = full, end
        for n in range(begin, full):
            start = n * KEYS
            if SKIP:
                start = tl.load(tiles_ptr + n) * KEYS
            position = start + column
            exists = position < keys
            sums = ()
            for i in tl.static_range(MEMBERS):
                if i == 0 or GROUP % MEMBERS:
                    key_row = (batch * keys + position) * KV_HEADS + (head + i) // GROUP
                    key = _load_rows(key_ptr, key_row, exists, H, H_PAD)
                    value = _load_rows(value_ptr, key_row, exists, V, V_PAD)
                logits = tl.dot(query[i], tl.trans(key), bias, input_precision="tf32x3")
                if i == MEMBERS - 1:
                    # That of the next tile: it takes a while to come.
                    following = tl.minimum(n + 1, end - 1)
                    bias = _load_bias(
                        bias_ptr, tiles_ptr, following, columns, ROWS, KEYS, SKIP
                    )
                if MASKED:
                    seen = position[None, :] <= (token + offset)[:, None]
                    if PACKED:
                        seen &= first[:, None] <= position[None, :]
                    logits = tl.where(seen, logits, -float("inf"))
                weights = tl.exp2(logits * scale_log2 - lse[i][:, None])
                gradient = tl.dot(
                    out_gradient[i], tl.trans(value), input_precision="tf32x3"
                )
                gradient = weights * (gradient - delta[i][:, None])  # of logits
                sums += (
                    tl.dot(
                        gradient.to(key.dtype),
                        key,
                        query_gradient[i],
                        input_precision="tf32x3",
                    ),
                )
            query_gradient = sums

    for i in tl.static_range(MEMBERS):
        result = query_gradient[i] * (scale_log2 * LN_2)
        _store_rows(query_gradient_ptr, source + i, live, result, H, H_PAD)


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
    PACKED: tl.constexpr,
):
    """What MEMBERS query heads of one kv head give the gradients of a tile of keys.

    The queries that see the tile are divided among SLICES programs.
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
    bias = tl.zeros([KEYS, ROWS], tl.float32)
    if begin < end:
        bias = _load_fragments(bias_ptr + begin * (16 * ROWS), rows, KEYS, ROWS)

    for UNMASKED in tl.static_range(2):
        if UNMASKED:
            begin, full = full, end
        for n in range(begin * MEMBERS, full * MEMBERS):
            token = n // MEMBERS * ROWS + row
            live = token < queries
            source = (batch * queries + token) * HEADS + head + n % MEMBERS
            query = _load_rows(query_ptr, source, live, H, H_PAD)
            out_gradient = _load_rows(out_gradient_ptr, source, live, V, V_PAD)
            lse = tl.load(lse_ptr + source, mask=live, other=float("inf"))
            delta = tl.load(delta_ptr + source, mask=live, other=0.0)
            # Transposed: weights and gradient then enter the products for value and
            # key from registers.
            logits = tl.dot(key, tl.trans(query), bias, input_precision="tf32x3")
            # That of the next tile: it takes a while to come.
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
    scale_log2,
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
    PACKED: tl.constexpr,
):
    """The gradient of L - F in one tile, summed over the heads one after the other.

    Also its sums over the queries of the tile.
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
        seen &= first[None, :] <= position[:, None]
        bias_ptr += (batch * CHUNK + tl.program_id(0) * KEYS) * rows + first_token * 16
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
            logits = tl.dot(key, tl.trans(query), bias, input_precision="tf32x3")
            gradient = tl.dot(value, tl.trans(out_gradient), input_precision="tf32x3")
            weights = tl.exp2(logits * scale_log2 - lse[None, :])
            total += weights * (gradient - delta[None, :])
        total = tl.where(seen, total, 0.0)
    tl.store(gradient_ptr + (row[None, :] * CHUNK + column[:, None]), total)
    tl.store(sums_ptr + column, tl.sum(total, axis=1))


@triton.jit
def selection_gradient_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    starts_ptr,  # [B, S] if PACKED
    gradient_ptr,  # [B, rows, CHUNK]
    later_ptr,  # [B, rows / ROWS, CHUNK]
    region_ptr,  # [2]
    scale,
    queries,
    keys,
    selection_gradient_ptr,  # [B, rows, CHUNK]
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """What all F give the gradient of the selecting head's products in one tile.

    A selection lowers L - F of all later queries. `later` sums their gradients over the
    tiles of queries after this one.
    """
    batch = tl.program_id(2).to(tl.int64)
    first_token = tl.program_id(1) * ROWS
    first_key = tl.load(region_ptr + 1) + tl.program_id(0) * KEYS
    column, row = tl.arange(0, KEYS), tl.arange(0, ROWS)
    target = batch * tl.num_programs(1) + tl.program_id(1)
    later_ptr += target * CHUNK + tl.program_id(0) * KEYS
    tile = row[:, None] * CHUNK + column[None, :]
    tile += target * ROWS * CHUNK + tl.program_id(0) * KEYS
    result = tl.zeros([ROWS, KEYS], tl.float32)
    if (
        _nothing_seen(
            starts_ptr, batch, first_token, first_key, queries, keys, ROWS, KEYS, PACKED
        )
        == 0
    ):
        products, selects = _products(
            query_ptr,
            key_ptr,
            starts_ptr,
            batch,
            first_token,
            first_key,
            queries,
            keys,
            HEADS,
            KV_HEADS,
            H,
            H_PAD,
            ROWS,
            KEYS,
            PACKED,
        )
        gradient = tl.load(gradient_ptr + tile)
        later = tl.load(later_ptr + column)[None, :]
        later += tl.cumsum(gradient, axis=0, reverse=True) - gradient
        result = tl.where(selects & (products > 0.0), -scale * later, 0.0)
    result = result.to(selection_gradient_ptr.dtype.element_ty)
    tl.store(selection_gradient_ptr + tile, result)
