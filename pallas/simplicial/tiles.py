"""Rows of the matrix tiles that the Triton kernels of 2-simplicial attention share.

A row is a query head of a position with one key of the set with the smaller window: its
first factor is the head's query times that key. The rows of a tile are TOKENS adjacent
positions x HEADS heads of a kv head x ENTRIES keys, in this order; keys are counted
back from the position, 0 for its own.
"""

from typing import Any

import jax
import triton
import triton.language as tl


def tuning_shape(
    query: jax.Array, few_value: jax.Array, few_window: int, many_window: int
) -> dict[str, int | str]:
    """What the best tilings depend on."""
    return {
        "group": query.shape[2] // few_value.shape[2],
        "H": query.shape[-1],
        "V": few_value.shape[-1],
        "few_window": few_window,
        "many_window": many_window,
        "dtype": query.dtype.name,
    }


def constants(
    query: jax.Array, few_value: jax.Array, few_window: int, rows: int, tokens: int
) -> dict[str, Any]:
    """The constants that all kernels have.

    Args:
      query: [B, T, N, H].
      few_value: [B, F, K, V].
      few_window: The smaller window.
      rows: Rows of a tile, a power of two: heads, then keys, then positions.
      tokens: Positions of a tile at least, a power of two.
    """
    kv_heads, value_width = few_value.shape[2:]
    group = query.shape[2] // kv_heads
    heads = min(rows // tokens, triton.next_power_of_2(group))
    entries = min(rows // tokens // heads, triton.next_power_of_2(few_window))
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "H": query.shape[-1],
        "V": value_width,
        "H_PAD": max(16, triton.next_power_of_2(query.shape[-1])),
        "V_PAD": max(16, triton.next_power_of_2(value_width)),
        "TOKENS": rows // (heads * entries),
        "HEADS": heads,
        "ENTRIES": entries,
    }


@triton.jit
def _rows(
    visible_ptr,  # [B, T] at the first position, if LIMITED
    first,
    head_tile,
    queries,
    few_keys,
    many_keys,
    few_window,
    many_window,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """What the rows of the tile at position `first` are.

    Returns of each row its token, counted from `first`, its head, counted from the
    kv head's first, and its entry; whether there is such a query; and how many keys
    it sees of the set with the smaller window and of the other one.
    """
    row = tl.arange(0, TOKENS * HEADS * ENTRIES)
    token = row // (HEADS * ENTRIES)
    head = head_tile * HEADS + row // ENTRIES % HEADS
    live = (first + token < queries) & (head < GROUP)
    position = first + token - queries + 1
    few_reach = tl.minimum(position + few_keys, few_window)
    many_reach = tl.minimum(position + many_keys, many_window)
    if LIMITED:
        visible = tl.load(visible_ptr + token, mask=live, other=0)
        few_reach = tl.minimum(few_reach, visible)
        many_reach = tl.minimum(many_reach, visible)
    few_reach = tl.where(live, few_reach, 0)
    many_reach = tl.where(live, many_reach, 0)
    return token, head, row % ENTRIES, live, few_reach, many_reach


@triton.jit
def _load_columns(pointer, row, live, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Like _load_rows, transposed: [PADDED, rows]."""
    column = tl.arange(0, PADDED)
    return tl.load(
        pointer + column[:, None] + row[None, :] * WIDTH,
        mask=(column < WIDTH)[:, None] & live[None, :],
        other=0.0,
    )


@triton.jit
def _load_factors(
    pointer,  # [.., K, WIDTH] of a kv head, at the tile's first position
    start,  # of the entries
    longest,  # reach of any row
    back,
    reach,
    token,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    SHARED: tl.constexpr,
):
    """The factors [ROWS, PADDED], `back` keys before each row's token.

    They are 0 beyond its reach. SHARED says that all rows are of one token and entry.
    """
    column = tl.arange(0, PADDED)
    if SHARED:
        # Each thread loads what it needs of the one row: to spread it over the threads
        # once it is loaded takes longer.
        same = tl.zeros_like(token) - tl.where(start < longest, start, 0)
        factors = tl.load(
            pointer + same[:, None] * (KV_HEADS * WIDTH) + column[None, :],
            mask=(back < longest)[:, None] & (column < WIDTH)[None, :],
            other=0.0,
        )
    else:
        factors = tl.load(
            pointer + (token - back)[:, None] * (KV_HEADS * WIDTH) + column[None, :],
            mask=(back < reach)[:, None] & (column < WIDTH)[None, :],
            other=0.0,
        )
    return factors
