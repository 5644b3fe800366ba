"""Selective Attention in Triton: which keys a query no longer holds, by a budget.

Letters as in `jattn.pallas.selective.triton`; there are as many queries as keys.
"""

# A type checker does not see what a constexpr stands for.
# pyright: reportOperatorIssue=false

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jattn.pallas import _triton
from jattn.pallas.selective import work as shared
from jattn.pallas.selective.mask import _first_seen, _place_in_fragments
from jattn.pallas.selective.work import Work, chunks_of, firsts

# One program goes through the queries of a row, and has all keys in its registers.
COLUMNS_PER_WARP = 256
MAX_WARPS = 32


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
            num_warps=min(max(columns // COLUMNS_PER_WARP, 4), MAX_WARPS),
            num_stages=1,
            CHUNK=chunk,
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
    COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Goes through a chunk of the queries of one row, each of which may drop a key."""
    batch = tl.program_id(1).to(tl.int64)
    first_token = tl.load(region_ptr)
    budget = tl.load(budget_ptr)
    column = tl.arange(0, COLUMNS)
    expiry_ptr += batch * columns + column
    expiry = tl.load(expiry_ptr, mask=column < columns, other=0)
    bias_ptr += batch * CHUNK * columns
    for token in range(first_token, tl.minimum(first_token + CHUNK, queries)):
        start = _first_seen(starts_ptr, batch, token, queries, keys, PACKED)
        # From here on, a document has as many keys as it may, and one more.
        if token - start >= budget:
            held = (start < column) & (column < token) & (token < expiry)
            place = _place_in_fragments(token - first_token, column, columns)
            bias = tl.load(bias_ptr + place, mask=held, other=float("inf"))
            forgotten = tl.argmin(bias, axis=0, tie_break_left=True)
            expiry = tl.where(column == forgotten, token, expiry)
    tl.store(expiry_ptr, expiry, mask=column < columns)
