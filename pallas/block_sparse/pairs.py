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


class Portions(NamedTuple):
    """How much is worked on at once, so that partial results fit PARTIAL_BYTES.

    Attributes:
      rows: M, kv heads in a portion, counted through the batch.
      count: D, portions.
      length: L, queries in a chunk.
      chunks: C, chunks.
    """

    rows: int
    count: int
    length: int
    chunks: int

    @property
    def steps(self) -> int:
        """Chunks of all portions."""
        return self.count * self.chunks


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
    query: jax.Array,
    kv_heads: int,
    slots: int,
    width: int,
    tokens: int,
    times: int = 1,
) -> Portions:
    """Portions of the B K kv heads, and chunks of the queries.

    Queries are cut up last, so that a block meets as many of them as possible at a
    time.

    Args:
      query: [B, T, N, H].
      kv_heads: K.
      slots: n, blocks of the kernels in a list.
      width: That of a partial result.
      tokens: What the length of a chunk has to be a multiple of.
      times: How many times PARTIAL_BYTES partial results may take.
    """
    limit = times * PARTIAL_BYTES
    b, t, heads = query.shape[:3]
    head_bytes = t * heads // kv_heads * slots * width * query.dtype.itemsize
    most = max(1, limit // head_bytes)
    total = b * kv_heads
    rows = max(x for x in range(1, total + 1) if total % x == 0 and x <= most)
    # The kernels address the queries of a chunk in 32 bits.
    least = t * heads * width // 2**31 + 1
    chunks = max(least, -(-rows * head_bytes // limit))
    length = -(-t // min(t, chunks))
    length += -length % tokens
    return Portions(rows, total // rows, length, -(-t // length))


def sort_pairs(blocks: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Sorts the pairs of each chunk and kv head by block, and then by query.

    Args:
      blocks: int32 [D, C, M, L, R, n], `count` for no block.
      count: Blocks there are.

    Returns:
      The pairs int32 [D, C, M, P], ``(t R + list) n + slot`` with t counted from the
      chunk's first query, those of no block last; and where each block's pairs start,
      int32 [D, C, M, count + 1].
    """
    shape = blocks.shape[:3]
    rows, pairs = math.prod(shape), math.prod(blocks.shape[3:])
    # One flat sort, since GPUs sort one long row much faster than many short ones; by
    # few bits, since they sort by some of them at a time.
    dtype = jnp.uint16 if rows * (count + 1) < 2**16 else jnp.uint32
    row = jnp.arange(rows, dtype=dtype)[:, None] * (count + 1)
    of_pair = row + blocks.reshape(rows, pairs).astype(dtype)
    number = jnp.broadcast_to(jnp.arange(pairs, dtype=jnp.int32), (rows, pairs))
    of_pair, number = jax.lax.sort(
        (of_pair.reshape(-1), number.reshape(-1)), num_keys=1, is_stable=True
    )
    bounds = row + jnp.arange(count + 1, dtype=dtype)
    starts = jnp.searchsorted(of_pair, bounds.reshape(-1), method="scan_unrolled")
    starts = starts.astype(jnp.int32).reshape(rows, count + 1)
    starts -= pairs * jnp.arange(rows, dtype=jnp.int32)[:, None]
    return number.reshape(*shape, pairs), starts.reshape(*shape, count + 1)


def split_units(starts: jax.Array, pairs: int, length: int) -> Units:
    """Splits every block's pairs into units of at most length.

    Args:
      starts: int32 [D, C, M, blocks + 1], where each block's pairs start.
      pairs: Of each chunk and kv head, at most.
      length: Pairs in a unit, at most.
    """
    blocks = starts.shape[-1] - 1
    counts = -(-(starts[..., 1:] - starts[..., :-1]) // length)
    unit_starts = jnp.pad(jnp.cumsum(counts, axis=-1), [(0, 0)] * 3 + [(1, 0)])
    unit = jnp.arange(pairs // length + blocks, dtype=jnp.int32)

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


def split_tiles(
    starts: jax.Array, length: int, programs: int
) -> tuple[jax.Array, jax.Array]:
    """Splits every block's pairs into tiles, and shares these out to programs.

    Args:
      starts: int32 [D, C, M, blocks + 1], where each block's pairs start.
      length: Pairs in a tile, at most.
      programs: Of each chunk and kv head. One's tiles are adjacent.

    Returns:
      Where each block's tiles start, int32 [D, C, M, blocks + 1], and of each program
      the first tile, one past the last, the first block and one past the last, int32
      [D, C, M, programs, 4].
    """
    counts = -(-(starts[..., 1:] - starts[..., :-1]) // length)
    tile_starts = jnp.pad(jnp.cumsum(counts, axis=-1), [(0, 0)] * 3 + [(1, 0)])
    total = tile_starts[..., -1:]
    program = jnp.arange(programs + 1, dtype=jnp.int32)
    bounds = total // programs * program + jnp.minimum(total % programs, program)
    first, last = bounds[..., :-1], bounds[..., 1:]

    @jax.vmap
    @jax.vmap
    @jax.vmap
    def block_of_tile(starts, tile):
        place = jnp.searchsorted(starts, tile, side="right", method="scan_unrolled")
        return place.astype(jnp.int32) - 1

    first_block = block_of_tile(tile_starts, first)
    last_block = jnp.where(
        first < last, block_of_tile(tile_starts, last - 1) + 1, first_block
    )
    return tile_starts, jnp.stack([first, last, first_block, last_block], axis=-1)


def split_units_of_ranges(
    tile_starts: jax.Array, ranges: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Units of work where each block's tiles within a range are one.

    Args:
      tile_starts: int32 [D, C, M, blocks + 1], where each block's tiles start.
      ranges: int32 [D, C, M, programs, 4], which tiles are whose, as `split_tiles`
        gives both.

    Returns:
      Where each block's units start, int32 [D, C, M, blocks + 1], fewer than blocks
      and programs, and the number of each range's first unit, int32
      [D, C, M, programs].
    """
    lasts = ranges[..., 1]

    @jax.vmap
    @jax.vmap
    @jax.vmap
    def program_of_tile(lasts, tile):
        place = jnp.searchsorted(lasts, tile, side="right", method="scan_unrolled")
        return place.astype(jnp.int32)

    begin, end = tile_starts[..., :-1], tile_starts[..., 1:]
    first = program_of_tile(lasts, begin)
    counts = jnp.where(end > begin, program_of_tile(lasts, end - 1) + 1 - first, 0)
    unit_starts = jnp.pad(jnp.cumsum(counts, axis=-1), [(0, 0)] * 3 + [(1, 0)])
    first_block = jnp.minimum(ranges[..., 2], begin.shape[-1] - 1)
    program = jnp.arange(ranges.shape[-2], dtype=jnp.int32)
    before = program - jnp.take_along_axis(first, first_block, axis=-1)
    return unit_starts, jnp.take_along_axis(unit_starts, first_block, axis=-1) + before
