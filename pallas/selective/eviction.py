"""Selective Attention in Triton: which keys a query no longer holds, by a budget.

Letters as in `jattn.pallas.selective.triton`; there are as many queries as keys.
"""

# A type checker sees neither that static_range unrolls nor what a constexpr stands for.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jattn.pallas import _triton
from jattn.pallas.selective import work as shared
from jattn.pallas.selective.mask import _first_seen, _place_in_fragments
from jattn.pallas.selective.work import Work, chunks_of, firsts

# One program goes through the queries of a row: warps, and keys of one at a time.
MAX_WARPS = 32
KEYS_PER_WARP = 256


def expiry(work: Work, carries: jax.Array, budget: jax.Array) -> jax.Array:
    """The first query that no longer holds each key because of the budget.

    A query that would hold more than budget keys of its document, itself included,
    drops the one with the largest F, the oldest if several have it, but never the first
    of the document nor itself. What a query drops, later ones do not hold.

    Args:
      work: Of the arguments, with T = S.
      carries: Those of the mask, `Work.carries`.
      budget: int32 [], at least 2.

    Returns:
      int32 [B, columns]; T where no query drops the key.
    """
    size = 4 * work.batch * work.columns
    chunks, chunk = chunks_of(work.rows, size, shared.CHUNK_BYTES)
    columns = triton.next_power_of_2(work.columns)
    warps = min(triton.cdiv(columns, KEYS_PER_WARP), MAX_WARPS)

    def step(expiry, first):
        region = jnp.stack([first, jnp.zeros_like(first)])
        bias, _ = work.bias(carries, None, region, chunk, work.columns)
        [expiry] = _triton.call(
            eviction_kernel,
            bias,
            work.starts,
            region,
            budget.reshape(1),
            expiry,
            work.queries,
            work.keys,
            work.columns,
            outputs=[],
            updated=[4],
            grid=(1, work.batch),
            num_warps=warps,
            num_stages=1,
            CHUNK=chunk,
            KEYS=min(columns, warps * KEYS_PER_WARP),
            COLUMNS=columns,
            PACKED=work.packed,
        )
        return expiry, None

    [never] = work.vary([jnp.full((work.batch, work.columns), work.queries, jnp.int32)])
    return jax.lax.scan(step, never, firsts(chunks, chunk))[0]


@triton.jit
def eviction_kernel(
    bias_ptr,  # [B, CHUNK, columns], in fragments
    starts_ptr,  # [B, S] if PACKED
    region_ptr,  # [2]
    budget_ptr,  # [1]
    expiry_ptr,  # [B, columns], updated
    queries,
    keys,
    columns,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Goes through a chunk of the queries of one row, each of which may drop a key.

    Which keys have been dropped is in registers: bit i of column c is that of key
    ``i KEYS + c``.
    """
    batch = tl.program_id(1).to(tl.int64)
    first_token = tl.load(region_ptr)
    budget = tl.load(budget_ptr)
    column = tl.arange(0, KEYS)
    expiry_ptr += batch * columns
    bias_ptr += batch * CHUNK * columns
    dropped = tl.zeros([KEYS], tl.int32)
    for i in tl.static_range(COLUMNS // KEYS):
        key = i * KEYS + column
        expiry = tl.load(expiry_ptr + key, mask=key < columns, other=0)
        dropped |= (expiry < queries).to(tl.int32) << i

    end = tl.minimum(first_token + CHUNK, queries)
    for token in range(tl.maximum(first_token, budget), end):
        start = _first_seen(starts_ptr, batch, token, queries, keys, PACKED)
        # Until a document has more keys than it may, none is dropped.
        past = tl.where(token - start >= budget, token, 0)
        least = tl.full([KEYS], float("inf"), tl.float32)
        place = tl.full([KEYS], COLUMNS, tl.int32)
        for i in tl.static_range(COLUMNS // KEYS):
            if i * KEYS < past:
                key = i * KEYS + column
                held = (start < key) & (key < past) & ((dropped >> i & 1) == 0)
                number = _place_in_fragments(token - first_token, key, columns)
                bias = tl.load(bias_ptr + number, mask=held, other=float("inf"))
                place = tl.where(bias < least, key, place)
                least = tl.minimum(bias, least)
        place = tl.where(least == tl.min(least, axis=0), place, COLUMNS)
        forgotten = tl.min(place, axis=0)
        bit = 1 << forgotten // KEYS
        dropped |= tl.where(column == forgotten % KEYS, bit, 0)
        tl.store(expiry_ptr + forgotten, token, mask=forgotten < columns)
