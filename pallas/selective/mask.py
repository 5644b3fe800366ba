"""Selective Attention in Triton: F, and the gradient through it.

F enters the attention kernels as a bias of the raw products q·k, ``-F / scale``, which
their matrix products start from: it costs its loads and no arithmetic. `bias_kernel`
writes it for a region of queries and keys, and all heads read it.

Query t is at position t + S - T. Tiles of the bias that lie wholly in the future are
never written; attention masks whatever it reads there. Skipped tiles are neither
written nor read. Other documents are as the future to attention in Triton; for that in
Mosaic GPU, which knows no documents, their bias is UNSEEN, and so is for both that of
keys that a query no longer holds.

Letters as in `jattn.pallas.selective.triton`.
"""

# A type checker sees neither that static_range unrolls nor what a constexpr stands for.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from jattn.pallas._tiles import _load_rows

UNSEEN = tl.constexpr(-float("inf"))


@triton.jit
def _fragments(
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COPIES: tl.constexpr = 1,  # pyright: ignore[reportArgumentType]
):
    """Where the numbers of a tile [ROWS, COLUMNS] are kept in an array [.., width].

    Relative to the place of the tile's first number: that of row r and column c is
    ``r width + 16 c`` if both start a fragment. With COPIES the tile is so many of them
    one above the other.
    """
    column = tl.arange(0, COLUMNS // 8)[:, None, None, None] * 128
    row = tl.arange(0, ROWS // 16) % (ROWS // 16 // COPIES)
    row = row[None, :, None, None] * (16 * width)
    lane = tl.arange(0, 32)[None, None, :, None] * 4
    return column + row + lane + tl.arange(0, 4)


@triton.jit
def _load_fragments(
    pointer,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COPIES: tl.constexpr = 1,  # pyright: ignore[reportArgumentType]
):
    """A tile [ROWS, COLUMNS] of what _store_fragments wrote, or COPIES of a tile."""
    tile = tl.load(pointer + _fragments(width, ROWS, COLUMNS, COPIES))
    tile = tl.reshape(tile, [COLUMNS // 8, ROWS // 16, 8, 4, 2, 2])
    return tl.reshape(tl.permute(tile, (1, 4, 2, 0, 3, 5)), [ROWS, COLUMNS])


@triton.jit
def _store_fragments(
    pointer, tile, width, condition, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Writes a tile so that the threads that start a product from it can read it.

    A warp holds 16 rows of an accumulator. Of each 8 columns a thread has two
    neighbours in a row and two 8 rows below, and a fragment holds the 4 numbers of each
    of its 32 threads: the accumulator is read with wide loads, without an exchange
    between threads. Nothing is written if the condition is 0, and all if it is 1.
    """
    tile = tl.reshape(tile, [ROWS // 16, 2, 8, COLUMNS // 8, 4, 2])
    tile = tl.permute(tile, (3, 0, 2, 4, 1, 5))
    tile = tl.reshape(tile, [COLUMNS // 8, ROWS // 16, 32, 4])
    wanted = tl.arange(0, 4) < 4 * condition
    tl.store(pointer + _fragments(width, ROWS, COLUMNS), tile, mask=wanted)


@triton.jit
def _place_in_fragments(row, column, width):
    """Where a number is that _store_fragments wrote."""
    lane = row % 8 * 4 + column % 8 // 2
    number = row % 16 // 8 * 2 + column % 2
    return row // 16 * (16 * width) + column // 8 * 128 + lane * 4 + number


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
    """Whether no query of a tile sees a key of it; with PACKED, by documents too."""
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
    TRANSPOSED: tl.constexpr = False,  # pyright: ignore[reportArgumentType]
):
    """The selecting head's q·k of a tile; who may select whom, and who sees whom.

    A query selects neither itself nor the first token of its document. TRANSPOSED,
    the tiles are [KEYS, ROWS].
    """
    token = first_token + tl.arange(0, ROWS)
    position = first_key + tl.arange(0, KEYS)
    live, exists = token < queries, position < keys
    query = _load_rows(query_ptr, (batch * queries + token) * HEADS, live, H, H_PAD)
    key = _load_rows(key_ptr, (batch * keys + position) * KV_HEADS, exists, H, H_PAD)
    first = _first_seen(starts_ptr, batch, token, queries, keys, PACKED)
    if TRANSPOSED:
        if key.dtype.primitive_bitwidth > 16:
            # Both wide operands in shared memory would not fit.
            products = tl.dot(query, tl.trans(key), input_precision="tf32x3")
            products = tl.trans(products)
        else:
            products = tl.dot(key, tl.trans(query))
        token, first, live = token[None, :], first[None, :], live[None, :]
        position = position[:, None]
    else:
        products = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        token, first, live = token[:, None], first[:, None], live[:, None]
        position = position[None, :]
    selects = (first < position) & (position < token + keys - queries) & live
    sees = (first <= position) & (position <= token + keys - queries) & live
    return products, selects, sees


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
        products, selects, _ = _products(
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
    expiry_ptr,  # [B, columns] if HELD
    region_ptr,  # [2]
    limit,
    queries,
    keys,
    blocks,
    columns,
    bias_ptr,  # [B, region's queries, region's keys], or TRANSPOSED, in fragments
    kept_ptr,  # [B, region's keys / KEYS, region's queries] if MEMORY
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PACKED: tl.constexpr,
    SKIP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MEMORY: tl.constexpr,
    SEPARATE: tl.constexpr,
    HELD: tl.constexpr,
):
    """The bias of one block of queries and one tile of keys in a region.

    With SEPARATE that of other documents is UNSEEN, with HELD that of keys that have
    expired: the query number expiry and later ones do not hold them.

    With MEMORY, but not TRANSPOSED, also how much each query still needs of the tile,
    of keys that count 0 once the bias has come down to -limit. A skipped tile counts 0.
    """
    batch = tl.program_id(2).to(tl.int64)
    first_token = tl.load(region_ptr) + tl.program_id(1) * ROWS
    first_key = tl.load(region_ptr + 1) + tl.program_id(0) * KEYS
    block = batch * blocks + first_token // ROWS
    ENDED: tl.constexpr = PACKED and not SEPARATE  # pyright: ignore
    needless = _nothing_seen(
        starts_ptr, batch, first_token, first_key, queries, keys, ROWS, KEYS, ENDED
    )
    if SKIP:
        dead = (first_token < queries) & (first_key < columns)
        place = (block * columns + first_key) // ROWS
        needless |= tl.load(dead_ptr + place, mask=dead, other=0) != 0
    rows, width = tl.num_programs(1) * ROWS, tl.num_programs(0) * KEYS
    row, column = tl.program_id(1) * ROWS, tl.program_id(0) * KEYS
    if MEMORY:
        kept_ptr += (batch * tl.num_programs(0) + tl.program_id(0)) * rows + row
        kept_ptr += tl.arange(0, ROWS)
        if needless:
            tl.store(kept_ptr, tl.zeros([ROWS], tl.float32))
    if needless:
        return
    products, selects, sees = _products(
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
        TRANSPOSED,
    )
    selected = tl.where(selects, tl.maximum(products, 0.0), 0.0)
    # A selection holds for strictly later queries.
    earlier = tl.cumsum(selected, axis=1 if TRANSPOSED else 0) - selected
    carry = tl.load(carries_ptr + block * columns + first_key + tl.arange(0, KEYS))
    bias = -(tl.expand_dims(carry, 1 if TRANSPOSED else 0) + earlier)
    if HELD:
        expiry = tl.load(expiry_ptr + batch * columns + first_key + tl.arange(0, KEYS))
        expiry = tl.expand_dims(expiry, 1 if TRANSPOSED else 0)
        token = first_token + tl.arange(0, ROWS)
        sees &= tl.expand_dims(token, 0 if TRANSPOSED else 1) < expiry
    if MEMORY:
        kept = tl.where(sees, tl.maximum(limit + bias, 0.0) / limit, 0.0)
        tl.store(kept_ptr, tl.sum(kept, axis=1))
    if SEPARATE or HELD:
        bias = tl.where(sees, bias, UNSEEN)
    bias_ptr += batch * rows * width
    if TRANSPOSED:
        bias_ptr += column * rows + row * 16
        _store_fragments(bias_ptr, bias, rows, 1, KEYS, ROWS)
    else:
        bias_ptr += row * width + column * 16
        _store_fragments(bias_ptr, bias, width, 1, ROWS, KEYS)


@triton.jit
def selection_gradient_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    starts_ptr,  # [B, S] if PACKED
    ends_ptr,  # [B, columns / KEYS]
    gradient_ptr,  # [B, rows, CHUNK]
    later_ptr,  # [B, rows / ROWS, CHUNK]
    region_ptr,  # [2]
    scale,
    queries,
    keys,
    columns,
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
    last = tl.load(ends_ptr + batch * (columns // KEYS) + first_key // KEYS)
    # From `last` on, no query needs a key of the tile, and none has a gradient.
    if (first_token < last) & (
        _nothing_seen(
            starts_ptr, batch, first_token, first_key, queries, keys, ROWS, KEYS, PACKED
        )
        == 0
    ):
        products, selects, _ = _products(
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
