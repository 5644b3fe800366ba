"""The gradient through F where those of the logits have been kept, in Triton.

`mosaic_key_gradient` keeps the gradient of L - F, in parts of the heads, and its sums
over strips of tokens. With these a program knows what the tokens after its own
give to the gradient of each selection, and needs nothing else of them.

Letters as in `jattn.pallas.selective.triton`; G is the gradient
of the selecting head's products by F alone.
"""

# A type checker sees neither that static_range unrolls nor what a constexpr stands for.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from jattn.pallas._tiles import _load_rows, _store_rows
from jattn.pallas.selective.mask import _first_seen, _load_fragments


@triton.jit
def selection_kernel(
    query_ptr,  # [B, T, N, H]
    key_ptr,  # [B, S, K, H]
    starts_ptr,  # [B, S] if PACKED
    ends_ptr,  # [B, columns / END_KEYS]
    parts_ptr,  # [PARTS, B, CHUNK, rows], in fragments
    later_ptr,  # [B, strips, CHUNK]
    region_ptr,  # [2]
    scale,
    queries,
    keys,
    rows,
    columns,
    gradient_ptr,  # [B, CHUNK, rows]
    key_gradient_ptr,  # [strips, B, CHUNK, H]
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    END_KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    STRIP: tl.constexpr,
    PACKED: tl.constexpr,
):
    """G of a tile of keys and the STRIP queries of a strip, transposed.

    Where no query of a tile sees or needs a key, it is not written. Also what G gives
    to the gradient of the selecting head's keys. `later` sums the gradients of L - F
    over the strips after this one.
    """
    batch, strip = tl.program_id(2).to(tl.int64), tl.program_id(1)
    tile = tl.program_id(0) * KEYS
    first_key = tl.load(region_ptr + 1) + tile
    column, row = tl.arange(0, KEYS), tl.arange(0, ROWS)
    position = first_key + column
    offset = keys - queries
    last = tl.load(ends_ptr + batch * (columns // END_KEYS) + first_key // END_KEYS)
    begin = tl.maximum(tl.maximum(first_key - offset, 0) // ROWS, strip * STRIP // ROWS)
    end = tl.minimum(tl.cdiv(last, ROWS), (strip + 1) * STRIP // ROWS)

    place = (batch * tl.num_programs(1) + strip) * CHUNK + tile + column
    later = tl.load(later_ptr + place)
    key_row = (batch * keys + position) * KV_HEADS
    key = _load_rows(key_ptr, key_row, position < keys, H, H_PAD)
    key_gradient = tl.zeros([KEYS, H_PAD], tl.float32)
    parts_ptr += (batch * CHUNK + tile) * rows
    size = tl.num_programs(2).to(tl.int64) * CHUNK * rows
    gradient_ptr += (batch * CHUNK + tile) * rows
    for i in range(begin, end):
        first_token = (begin + end - 1 - i) * ROWS
        token = first_token + row
        query_row = (batch * queries + token) * HEADS
        query = _load_rows(query_ptr, query_row, token < queries, H, H_PAD)
        total = tl.zeros([KEYS, ROWS], tl.float32)
        for part in tl.static_range(PARTS):
            kept = parts_ptr + part * size + first_token * 16
            total += _load_fragments(kept, rows, KEYS, ROWS).to(tl.float32)
        visible = position[:, None] - (token + offset)[None, :]
        needed = (token < last)[None, :]
        total = tl.where((visible <= 0) & needed, total, 0.0)
        products = tl.dot(key, tl.trans(query))
        after = tl.cumsum(total, axis=1, reverse=True) - total + later[:, None]
        later += tl.sum(total, axis=1)
        # A query selects neither itself nor the first token of its document.
        first = _first_seen(starts_ptr, batch, token, queries, keys, PACKED)
        selects = (visible < 0) & (position[:, None] > first[None, :])
        selects &= needed & (products > 0.0)
        gradient = tl.where(selects, -scale * after, 0.0)
        gradient = gradient.to(gradient_ptr.dtype.element_ty)
        key_gradient = tl.dot(gradient, query, key_gradient)
        tl.store(gradient_ptr + column[:, None] * rows + token[None, :], gradient)

    target = strip * tl.num_programs(2) + batch
    target = target * CHUNK + tile + column
    _store_rows(key_gradient_ptr, target, column >= 0, key_gradient, H, H_PAD)


@triton.jit
def selecting_kernel(
    key_ptr,  # [B, S, K, H]
    ends_ptr,  # [B, columns / END_KEYS]
    gradient_ptr,  # [B, CHUNK, rows]
    region_ptr,  # [2]
    query_gradient_ptr,  # [B, rows, H], updated
    queries,
    keys,
    rows,
    columns,
    KV_HEADS: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    END_KEYS: tl.constexpr,
    SKIP: tl.constexpr,
):
    """Adds what G gives to the gradient of a tile of the selecting head's queries."""
    batch = tl.program_id(1).to(tl.int64)
    # Late queries see most keys.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    column, row = tl.arange(0, KEYS), tl.arange(0, ROWS)
    token = tile * ROWS + row
    offset = keys - queries
    first_key = tl.load(region_ptr + 1)
    visible = (tile + 1) * ROWS + offset - first_key
    tiles = tl.cdiv(tl.minimum(tl.maximum(visible, 0), CHUNK), KEYS)
    place = batch * rows + token
    total = _load_rows(query_gradient_ptr, place, row >= 0, H, H_PAD)
    gradient_ptr += batch * CHUNK * rows
    ends_ptr += batch * (columns // END_KEYS)
    for i in range(tiles):
        position = first_key + i * KEYS + column
        last = queries
        if SKIP:
            last = tl.load(ends_ptr + (first_key + i * KEYS) // END_KEYS)
        gradient = tl.load(
            gradient_ptr + (i * KEYS + column)[:, None] * rows + token[None, :],
            mask=(position[:, None] < (token + offset)[None, :])
            & (token < last)[None, :],
            other=0.0,
        )
        key_row = (batch * keys + position) * KV_HEADS
        key = _load_rows(key_ptr, key_row, position < keys, H, H_PAD)
        total = tl.dot(tl.trans(gradient), key, total)
    _store_rows(query_gradient_ptr, place, row >= 0, total, H, H_PAD)
