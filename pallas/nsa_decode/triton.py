"""Native sparse attention of a few new tokens to what is cached, in Triton.

Decoding reads much and computes little: what counts is that nothing is read twice or
copied, that all multiprocessors read at once however small the batch is, and that there
are few kernels. There are four:

1. attention to the compressed tokens, split into parts; beside it the sums of softmax
   weights over each block, which selection needs;
2. selection: the sums of all heads and parts, put on one scale, and the best blocks;
3. attention to the selected blocks and to the window, split into parts;
4. the parts of each branch added up, and the branches times their gates.

The G query heads of a kv head are the rows of a matrix tile. One query and kv head make
a row of every grid; whatever depends on its length is found out in the kernel, from the
query's position. Parts are added in a fixed order: same input, same bits.

Letters: B batch, T queries, N query heads, K kv heads, G = N / K, H key width, V value
width; M slots for compressed tokens, S for selected ones, W for those of the window;
R = B T K rows of a grid, P parts of one branch, n selected blocks, C = blocks that the
tiles of compressed tokens cover.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import triton

from jattn.pallas import _triton, tuning
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.nsa_decode import kernels

# A head's parts are added up in one tile.
MAX_PARTS = 64

# What one thread holds of the scores of several heads at once.
SCORES_PER_THREAD = 16

Pair = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel is cut up: speed, never results.

    Attributes:
      keys: Keys of a matrix tile, a power of two, at least 16.
      programs: How many programs are enough; fewer if there are not so many tiles.
      warps: Warps of a program.
      stages: Tiles in flight.
    """

    keys: int
    programs: int
    warps: int
    stages: int


def heuristic(query: jax.Array, key: jax.Array, value: jax.Array) -> Tiling:
    """The tiling of either kernel that reads keys and values."""
    # Tiles of equal size: two or three programs of a multiprocessor then have theirs in
    # flight together. They all run at once, or nearly so, in two rounds.
    widest = triton.next_power_of_2(max(key.shape[-1], value.shape[-1]))
    itemsize = max(query.dtype.itemsize, key.dtype.itemsize)
    keys = max(16, min(64, 2**14 // (widest * itemsize)))
    warps = 8 if widest * itemsize > 512 else 4
    return Tiling(keys=keys, programs=768, warps=warps, stages=3)


def attend(
    query: jax.Array,
    compressed: Pair,
    selected: Pair,
    window: Pair,
    gates: jax.Array,
    positions: jax.Array,
    window_end: jax.Array,
    *,
    ring: bool,
    kernel_size: int,
    stride: int,
    block_size: int,
    num_blocks: int,
    num_initial: int,
    num_local: int,
    window_size: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """The gated sum of the three branches; see `jattn.ops.nsa_decode`.

    Args:
      query: [B, T, N, H].
      compressed: Keys [B, M, K, H] and values [B, M, K, V].
      selected: Keys [B, S, K, H] and values [B, S, K, V].
      window: Keys [B, W, K, H] and values [B, W, K, V], the tokens before window_end.
      gates: [B, T, N, 3].
      positions: int32 [B, T], negative for a query that sees nothing. One past the
        last of the S slots reads compressed and selected tokens as one there does.
      window_end: int32 [B], the position after the last one of window.
      ring: Whether window is a ring buffer of at most window_size slots and T = 1;
        otherwise it is in order.
      kernel_size: Tokens in a compressed window.
      stride: Tokens between the starts of compressed windows.
      block_size: Tokens in a selected block.
      num_blocks: Blocks a query reads.
      num_initial: Blocks always read at the start.
      num_local: Blocks always read at the query.
      window_size: Tokens the window branch sees.
      scale: Factor of the logits.

    Returns:
      [B, T, N, V] in query's dtype, and the blocks int32 [B, T, K, num_blocks],
      ascending, -1 last.
    """
    b, t, n, h = query.shape
    m, kv_heads, v = compressed[1].shape[1:]
    rows, group = b * t * kv_heads, n // kv_heads
    shape = {"B": b, "T": t, "G": group, "K": kv_heads, "H": h, "V": v}
    sizes: dict[str, Any] = {"KV_HEADS": kv_heads, "GROUP": group}
    widths: dict[str, Any] = {
        "H": h,
        "V": v,
        "H_PAD": max(16, triton.next_power_of_2(h)),
        "V_PAD": max(16, triton.next_power_of_2(v)),
        "ROWS": max(16, triton.next_power_of_2(group)),
    }

    def part_outputs(parts):
        """Of each part: output, not normalised, peak and total of the softmax."""
        stats = jax.ShapeDtypeStruct((rows, parts, group), jnp.float32)
        return [stats.update(shape=(*stats.shape, v)), stats, stats]

    # Compressed tokens lie in tiles of whole blocks.
    tiling = tuning.choose(
        "nsa_decode_compressed",
        {**shape, "M": m, "dtype": str(query.dtype)},
        heuristic(query, *compressed),
    )
    cells = block_size // stride
    padded_cells = triton.next_power_of_2(cells)
    tile_blocks = triton.cdiv(tiling.keys, padded_cells)
    tiles = triton.cdiv(m, tile_blocks * cells)
    parts = min(tiles, MAX_PARTS, triton.cdiv(tiling.programs, rows))
    blocks = tiles * tile_blocks
    of_blocks = jax.ShapeDtypeStruct((rows, group, blocks), jnp.float32)
    *compressed_parts, tile_peak, own, following = _triton.call(
        kernels.compressed_kernel,
        query,
        *compressed,
        positions,
        float(scale) * LOG2_E,
        t,
        m,
        outputs=[
            *part_outputs(parts),
            of_blocks.update(shape=(rows, group, tiles)),
            of_blocks,
            of_blocks,
        ],
        grid=(rows, parts),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        flops=2 * b * t * n * m * (h + v),
        KERNEL_SIZE=kernel_size,
        STRIDE=stride,
        CELLS=cells,
        CELLS_PAD=padded_cells,
        TILE_BLOCKS=tile_blocks,
        TILES=tiles,
        **sizes,
        **widths,
    )

    # A query may be in a block past those in which windows start.
    cached_blocks = triton.cdiv(selected[0].shape[1], block_size)
    padded_tiles = triton.next_power_of_2(
        max(tiles, triton.cdiv(cached_blocks, tile_blocks))
    )
    padded_blocks = padded_tiles * tile_blocks
    warps = min(16, max(4, padded_blocks // 64))
    heads = SCORES_PER_THREAD * 32 * warps // padded_blocks
    [chosen] = _triton.call(
        kernels.select_kernel,
        positions,
        *compressed_parts[1:],
        tile_peak,
        own,
        following,
        selected[0].shape[1],
        outputs=[jax.ShapeDtypeStruct((rows, num_blocks), jnp.int32)],
        grid=(rows, 1),
        num_warps=warps,
        KERNEL_SIZE=kernel_size,
        STRIDE=stride,
        BLOCK_SIZE=block_size,
        CELLS=cells,
        TILE_BLOCKS=tile_blocks,
        TILES=tiles,
        TILES_PAD=padded_tiles,
        SLOTS=num_blocks,
        SLOTS_PAD=triton.next_power_of_2(num_blocks),
        INITIAL=num_initial,
        LOCAL=num_local,
        PARTS=parts,
        PARTS_PAD=triton.next_power_of_2(parts),
        HEADS=max(1, min(triton.next_power_of_2(group), heads)),
        **sizes,
    )

    slots = window[0].shape[1]
    tiling = tuning.choose(
        "nsa_decode_local",
        {**shape, "keys": num_blocks * block_size + slots, "dtype": str(query.dtype)},
        heuristic(query, *selected),
    )
    tiles = [triton.cdiv(x, tiling.keys) for x in (num_blocks * block_size, slots)]
    # Parts of both branches are of one size, at most the whole of the longer one.
    part_tiles = max(
        triton.cdiv(max(tiles), MAX_PARTS),
        min(max(tiles), rows * sum(tiles) // tiling.programs),
    )
    selected_parts, window_parts = (triton.cdiv(x, part_tiles) for x in tiles)
    local_parts = _triton.call(
        kernels.local_kernel,
        query,
        *selected,
        *window,
        positions,
        window_end,
        chosen,
        float(scale) * LOG2_E,
        t,
        selected[0].shape[1],
        slots,
        outputs=part_outputs(selected_parts + window_parts),
        grid=(rows, selected_parts + window_parts),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        flops=2 * b * t * n * (num_blocks * block_size + slots) * (h + v),
        RING=ring,
        WINDOW=window_size,
        BLOCK_SIZE=block_size,
        SLOTS=num_blocks,
        KEYS=tiling.keys,
        PART_TILES=part_tiles,
        SELECTED_PARTS=selected_parts,
        **sizes,
        **widths,
    )

    [out] = _triton.call(
        kernels.merge_kernel,
        *compressed_parts,
        *local_parts,
        gates,
        outputs=[jax.ShapeDtypeStruct((b, t, n, v), query.dtype)],
        grid=(rows, group),
        num_warps=4,
        GROUP=group,
        V=v,
        V_PAD=widths["V_PAD"],
        COMPRESSED_PARTS=parts,
        SELECTED_PARTS=selected_parts,
        WINDOW_PARTS=window_parts,
        COMPRESSED_PAD=triton.next_power_of_2(parts),
        SELECTED_PAD=triton.next_power_of_2(selected_parts),
        WINDOW_PAD=triton.next_power_of_2(window_parts),
    )
    return out, chosen.reshape(b, t, kv_heads, num_blocks)
