"""Pairs (query, block) sorted by block and shared out to programs, in jnp.

Letters as in ``jattn.pallas.block_sparse.triton``.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Bound on the partial results of one chunk of one portion. The queries of a chunk
# should fit the second-level cache: each is read once for every block it attends to.
PARTIAL_BYTES = 2**29


class Pairs(NamedTuple):
    """Pairs (query, block), of each chunk of queries and kv head in order of block.

    Attributes:
      pairs: int32 [D, C, M, P]: ``(t R + list) n + slot``, with t counted from the
        chunk's first query; pairs of no block come last.
      starts: int32 [D, C, M, blocks + 1]: where each block's pairs start.
      firsts: int32 [D, C, 2]: the first (batch, kv head) of each portion, counted
        through, and the first query of each chunk.
      live: bool [D, C, L, M, R, n]: which pairs have a block.
    """

    pairs: jax.Array
    starts: jax.Array
    firsts: jax.Array
    live: jax.Array


class Units(NamedTuple):
    """Units of work of bounded length, one program each.

    Attributes:
      blocks: int32 [D, C, M, U]: the unit's block, or -1 if there is no such unit.
      firsts: int32 [D, C, M, U]: its first pair.
      lasts: int32 [D, C, M, U]: one past its last pair.
      starts: int32 [D, C, M, blocks + 1]: where each block's units start.
    """

    blocks: jax.Array
    firsts: jax.Array
    lasts: jax.Array
    starts: jax.Array


def kernel_block(query: jax.Array, value: jax.Array, block_size: int) -> int:
    """Keys in a block of the kernels, of which a block has one or several."""
    limit = 64
    if query.dtype.itemsize > 2:  # fp32 takes several times the shared memory
        limit = 32 if max(query.shape[-1], value.shape[-1]) <= 128 else 16
    return math.gcd(block_size, limit)


def portions(
    query: jax.Array, lists_shape: tuple[int, ...], width: int
) -> tuple[int, int]:
    """How much is worked on at once, so that partial results fit PARTIAL_BYTES.

    Args:
      query: [B, T, N, H].
      lists_shape: [B, T, K, R, n].
      width: That of a partial result.

    Returns:
      Portions D of the B K kv heads, and chunks C of the queries. Queries are cut up
      last, so that a block meets as many of them as possible at a time.
    """
    b, t, k, _, n = lists_shape
    head_bytes = t * query.shape[2] // k * n * width * query.dtype.itemsize
    most = max(1, PARTIAL_BYTES // head_bytes)
    heads = max(x for x in range(1, b * k + 1) if b * k % x == 0 and x <= most)
    # The kernels address the queries of a chunk in 32 bits.
    least = t * query.shape[2] * width // 2**31 + 1
    chunks = max(least, -(-heads * head_bytes // PARTIAL_BYTES))
    return b * k // heads, min(t, chunks)


def split_blocks(lists: jax.Array, count: int) -> jax.Array:
    """Lists [.., n] of blocks as lists [.., n count] of parts, count to a block."""
    parts = lists[..., None] * count + jnp.arange(count, dtype=lists.dtype)
    parts = jnp.where(lists[..., None] < 0, -1, parts)
    return parts.reshape(*lists.shape[:-1], -1)


def sort_pairs(
    lists: jax.Array, keys: int, block: int, parts: int, chunks: int
) -> Pairs:
    """Sorts pairs by block.

    Args:
      lists: int [B, T, K, R, n], negative for no block. A repetition counts once, and a
        block past the query, which is one of the last T keys, not at all.
      keys: How many keys there are.
      block: Keys in a block.
      parts: How many portions to cut the B K kv heads into.
      chunks: How many chunks to cut the queries into, at most.
    """
    b, t, k, r, n = lists.shape
    blocks = -(-keys // block)
    length = -(-t // chunks)
    chunks = -(-t // length)
    lists = jnp.sort(lists, axis=-1)
    repeated = jnp.pad(lists[..., 1:] == lists[..., :-1], [(0, 0)] * 4 + [(1, 0)])
    last_block = (jnp.arange(keys - t, keys) // block)[:, None, None, None]
    live = (lists >= 0) & (lists <= last_block) & ~repeated
    padding = [(0, 0), (0, chunks * length - t), (0, 0), (0, 0), (0, 0)]
    of_pair = jnp.pad(jnp.where(live, lists, blocks), padding, constant_values=blocks)
    of_pair = of_pair.reshape(b, chunks, length, k, r, n)
    of_pair = jnp.moveaxis(of_pair, 3, 1).reshape(parts, -1, chunks, length, r, n)
    of_pair = jnp.moveaxis(of_pair, 2, 1)  # [D, C, M, L, R, n]
    live = jnp.moveaxis(of_pair < blocks, 2, 3)

    # One flat sort, since GPUs sort one long row much faster than many short ones.
    shape = of_pair.shape[:3]
    rows, pairs = math.prod(shape), length * r * n
    row = jnp.arange(rows, dtype=jnp.uint32)[:, None] * (blocks + 1)
    of_pair = of_pair.reshape(rows, pairs).astype(jnp.uint32)
    number = jnp.broadcast_to(jnp.arange(pairs, dtype=jnp.int32), (rows, pairs))
    of_pair, number = jax.lax.sort(
        ((row + of_pair).reshape(-1), number.reshape(-1)), num_keys=1, is_stable=True
    )
    bounds = row + jnp.arange(blocks + 1, dtype=jnp.uint32)
    starts = jnp.searchsorted(of_pair, bounds.reshape(-1), method="scan_unrolled")
    starts = starts.astype(jnp.int32).reshape(rows, blocks + 1)
    starts -= pairs * jnp.arange(rows, dtype=jnp.int32)[:, None]
    firsts = jnp.meshgrid(
        b * k // parts * jnp.arange(parts, dtype=jnp.int32),
        length * jnp.arange(chunks, dtype=jnp.int32),
        indexing="ij",
    )
    return Pairs(
        pairs=number.reshape(*shape, pairs),
        starts=starts.reshape(*shape, blocks + 1),
        firsts=jnp.stack(firsts, axis=-1),
        live=live,
    )


def split_units(pairs: Pairs, length: int) -> Units:
    """Splits every block's pairs into units of at most length."""
    starts = pairs.starts
    blocks = starts.shape[-1] - 1
    counts = -(-(starts[..., 1:] - starts[..., :-1]) // length)
    unit_starts = jnp.pad(jnp.cumsum(counts, axis=-1), [(0, 0)] * 3 + [(1, 0)])
    unit = jnp.arange(pairs.pairs.shape[-1] // length + blocks, dtype=jnp.int32)

    @jax.vmap
    @jax.vmap
    @jax.vmap
    def block_of_unit(ends):
        return jnp.searchsorted(ends, unit, side="right", method="scan_unrolled")

    block = block_of_unit(unit_starts[..., 1:]).astype(jnp.int32)

    def of_block(x):
        return jnp.take_along_axis(x, jnp.minimum(block, blocks - 1), axis=-1)

    first = of_block(starts) + (unit - of_block(unit_starts)) * length
    return Units(
        blocks=jnp.where(block < blocks, block, -1),
        firsts=first,
        lasts=jnp.minimum(first + length, of_block(starts[..., 1:])),
        starts=unit_starts,
    )
