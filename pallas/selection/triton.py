"""Choosing blocks of keys by score in Triton, without ever holding all scores.

Queries go through in chunks. One kernel writes the scores that the queries of a chunk
give to blocks, and a second one finds each query's best. Scores of blocks in the future
or in another document are neither computed, but where they share a tile with others,
nor read. What a kernel in Mosaic GPU supports of the former, it does.

Letters: B batch, T queries, N query heads, K kv heads, H key width, R lists of blocks
for each query (K or N), G = N / K; M compressed keys, n blocks in a list, L queries in
a chunk, P planes of W scores.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import triton

from jattn.pallas import _device, _steps, _triton, tuning
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.selection import ROWS, kernels, mosaic, unsupported_mosaic
from jattn.pallas.selection.mosaic_items import MAX_CELLS, tile_blocks

# Query heads of a kv head up to which its scores have one plane.
MAX_JOINED = 1

# Bound on the scores of one chunk. They are gone before attention to the chosen blocks
# needs its own memory.
SCORE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel is cut up: speed, never results.

    Attributes:
      rows: Queries of a tile, times heads where these are packed.
      columns: Keys of a tile.
      warps: Warps of a program.
      stages: Tiles in flight.
      registers: What a thread may use at most, or None for no limit.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None


@dataclasses.dataclass(frozen=True)
class RowTiling:
    """How the search for the best blocks is cut up: speed, never results.

    Attributes:
      rows: Lists that a program makes.
      warps: Warps of a program.
    """

    rows: int
    warps: int


def nsa_blocks(
    query: jax.Array,
    key: jax.Array,
    lse: jax.Array | None,
    document_starts: jax.Array | None,
    *,
    length: int,
    kernel_size: int,
    stride: int,
    block_size: int,
    num_blocks: int,
    num_initial: int,
    num_local: int,
    scale: float,
) -> jax.Array:
    """Blocks by the attention that the windows in them get. Not differentiated.

    Args:
      query: [B, T, N, H].
      key: [B, M, K, H], compressed.
      lse: fp32 [B, T, N], natural log-sum-exp of the logits; computed if None.
      document_starts: int [B, T], the first position of each query's document; None
        for one document.
      length: Tokens of the sequence, of which the queries are the last T.
      kernel_size: Tokens in a window.
      stride: Tokens between the starts of windows, a divisor of the other sizes.
      block_size: Tokens in a block, at least kernel_size.
      num_blocks: Blocks to choose, at least num_initial + num_local.
      num_initial: Blocks always chosen at the document's start.
      num_local: Blocks always chosen at the query.
      scale: Factor of the logits.

    Returns:
      int32 [B, T, K, num_blocks], ascending, -1 last.
    """
    query, key, lse = jax.lax.stop_gradient((query, key, lse))
    starts = _document_starts(document_starts)
    sizes: dict[str, Any] = {
        "length": length,
        "kernel_size": kernel_size,
        "stride": stride,
        "scale_log2": float(scale) * LOG2_E,
    }
    if lse is None:
        lse = _log_sum_exp(query, key, starts, **sizes)
    else:
        lse = jnp.moveaxis(lse, 1, 2) * LOG2_E  # [B, N, T], in base 2
    sizes["block_size"] = block_size
    scores = _mosaic_scores(query, key, lse, starts, **sizes)
    if scores is None:
        scores = _triton_scores(query, key, lse, starts, **sizes)
    return _best_blocks(
        scores,
        query,
        starts,
        lists=key.shape[2],
        length=length,
        block_size=block_size,
        num_blocks=num_blocks,
        num_initial=num_initial,
        num_local=num_local,
    )


@dataclasses.dataclass(frozen=True)
class _Scores:
    """How a chunk of queries gets its scores.

    Attributes:
      planes: P, whose sum is the scores; the second one does not count for the first
        block that a query sees, and is found at the block before.
      width: W.
      signed: Whether they may be negative.
      tile_rows: Queries in a tile.
      write: Of a chunk's number, int32 [1], the length L of chunks, an array or its
        shape, and what has to be there before or None, gives the array with scores fp32
        [B, R, >= L, P, W] of blocks.
    """

    planes: int
    width: int
    signed: bool
    tile_rows: int
    write: Callable[..., jax.Array]


def _mosaic_scores(
    query, key, lse, starts, *, length, kernel_size, stride, block_size, scale_log2
) -> _Scores | None:
    """Scores by windows as Mosaic GPU computes them, if it supports the call."""
    b, _, n, h = query.shape
    kv_heads = key.shape[2]
    cells = block_size // stride
    if unsupported_mosaic(query, key, packed=starts.packed, cells=cells) is not None:
        return None
    before = kernel_size // stride - 1
    # Few heads share a list's scores: to write them in one plane is worth some more.
    is_joined = n // kv_heads <= MAX_JOINED and cells + before <= MAX_CELLS
    planes = 1 if before == 0 or is_joined else 2
    width = tile_blocks(cells, before if is_joined else 0)
    width = _multiple(triton.cdiv(length, block_size), width)
    if ROWS * _bytes_per_query(b, kv_heads, planes, width) > SCORE_BYTES:
        return None
    shape = {"group": n // kv_heads, "width": h, "dtype": str(query.dtype)}
    heuristic = heuristic_mosaic_tiling(h, n // kv_heads)
    tiling = tuning.choose("selection_scores_mosaic", shape, heuristic)

    block_scores = functools.partial(
        mosaic.block_scores,
        length=length,
        kernel_size=kernel_size,
        stride=stride,
        cells=cells,
        scale_log2=scale_log2,
        tiling=tiling,
    )

    def write(step, rows, _, after):
        shape = b, kv_heads, _multiple(rows, ROWS), planes, width
        scores = jax.ShapeDtypeStruct(shape, jnp.float32)
        return block_scores(query, key, lse, step, after, scores=scores)

    return _Scores(planes, width, signed=False, tile_rows=ROWS, write=write)


def heuristic_mosaic_tiling(width: int, group: int) -> mosaic.Tiling:
    """The Mosaic kernel's tiling for groups of heads of that width."""
    return mosaic.Tiling(
        consumers=3,
        # So that keys serve as many products, whatever the group is.
        tiles=max(1, 8 // group),
        slots=2 if width > 64 else 6,
        key_slots=2,
        programs=_device.multiprocessors(),
        turns=True,
    )


def _triton_scores(
    query, key, lse, starts, *, length, kernel_size, stride, block_size, scale_log2
) -> _Scores:
    """Scores by windows as Triton computes them."""
    b, t, n, h = query.shape
    kv_heads = key.shape[2]
    cells = block_size // stride
    slots = triton.next_power_of_2(cells)
    # Three programs fit on a multiprocessor: while some take products, others take
    # exponentials.
    tiling = Tiling(rows=64, columns=128, warps=4, stages=2, registers=168)
    tiling = _tiling("selection_scores", query, key, tiling)
    tile_blocks = max(1, tiling.columns // slots)
    tiles = triton.cdiv(triton.cdiv(length, block_size), tile_blocks)
    width = _padded(tiles * tile_blocks)
    # A window may reach into the next block.
    planes = 1 if kernel_size == stride else 2

    def write(step, rows, out, _):
        [out] = _steps.write(
            kernels.block_scores_kernel,
            query,
            key,
            lse,
            starts.array,
            step,
            scale_log2,
            t,
            key.shape[1],
            length,
            rows,
            results=[out],
            grid=(tiles * triton.cdiv(rows, tiling.rows), b * kv_heads),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            max_registers=tiling.registers,
            flops=2 * b * rows * key.shape[1] * n * h,
            KV_HEADS=kv_heads,
            GROUP=n // kv_heads,
            **_widths(h),
            KERNEL=kernel_size,
            STRIDE=stride,
            CELLS=cells,
            SLOTS=slots,
            PLANES=planes,
            WIDTH=width,
            TILES=tiles,
            ROWS=tiling.rows,
            COLUMNS=tile_blocks * slots,
            PACKED=starts.packed,
        )
        return out

    return _Scores(planes, width, signed=False, tile_rows=tiling.rows, write=write)


def moba_blocks(
    query: jax.Array,
    key: jax.Array,
    document_starts: jax.Array | None,
    *,
    length: int,
    block_size: int,
    top_k: int,
) -> jax.Array:
    """A query's own block and those whose mean keys it likes best. Not differentiated.

    Args:
      query: [B, T, N, H].
      key: [B, blocks, K, H], the mean keys, in query's dtype or fp32.
      document_starts: int [B, T], the first position of each query's document; None
        for one document.
      length: Tokens of the sequence, of which the queries are the last T.
      block_size: Tokens in a block.
      top_k: Blocks to choose, the own one included.

    Returns:
      int32 [B, T, N, top_k], ascending, -1 last.
    """
    query, key = jax.lax.stop_gradient((query, key))
    starts = _document_starts(document_starts)
    tiling = Tiling(rows=128, columns=64, warps=8, stages=2)
    tiling = _tiling("selection_affinities", query, key, tiling)
    width = _padded(triton.cdiv(key.shape[1], tiling.columns) * tiling.columns)

    def write(step, rows, out, _):
        b, t, n, h = query.shape
        [out] = _steps.write(
            kernels.affinities_kernel,
            query,
            key,
            starts.array,
            step,
            t,
            key.shape[1],
            length,
            rows,
            results=[out],
            grid=(triton.cdiv(rows, tiling.rows), b * n),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            max_registers=tiling.registers,
            flops=2 * b * rows * key.shape[1] * n * h,
            KV_HEADS=key.shape[2],
            GROUP=n // key.shape[2],
            **_widths(h),
            BLOCK=block_size,
            WIDTH=width,
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            PACKED=starts.packed,
        )
        return out

    return _best_blocks(
        _Scores(1, width, signed=True, tile_rows=tiling.rows, write=write),
        query,
        starts,
        lists=query.shape[2],
        length=length,
        block_size=block_size,
        num_blocks=top_k,
        num_initial=0,
        num_local=1,
    )


def _log_sum_exp(query, key, starts, *, length, kernel_size, stride, scale_log2):
    """Log-sum-exp of the logits in base 2, fp32 [B, N, T]."""
    b, t, n, h = query.shape
    kv_heads = key.shape[2]
    group = n // kv_heads
    tiling = Tiling(rows=128, columns=128, warps=8, stages=2, registers=128)
    tiling = _tiling("selection_log_sum_exp", query, key, tiling)
    [lse] = _triton.call(
        kernels.log_sum_exp_kernel,
        query,
        key,
        starts.array,
        scale_log2,
        t,
        key.shape[1],
        length,
        outputs=[jax.ShapeDtypeStruct((b, n, t), jnp.float32)],
        grid=(triton.cdiv(t, tiling.rows // group), b * kv_heads),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        max_registers=tiling.registers,
        flops=2 * b * t * key.shape[1] * n * h,
        KV_HEADS=kv_heads,
        GROUP=group,
        **_widths(h),
        KERNEL=kernel_size,
        STRIDE=stride,
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        PACKED=starts.packed,
    )
    return lse


def _best_blocks(
    scores: _Scores,
    query: jax.Array,
    starts: "_Starts",
    *,
    lists: int,
    length: int,
    block_size: int,
    num_blocks: int,
    num_initial: int,
    num_local: int,
) -> jax.Array:
    """Lists int32 [B, T, R, n] of the best blocks, a chunk of queries at a time.

    Args:
      scores: What writes scores of a chunk.
      query: [B, T, N, H].
      starts: First positions of the queries' documents.
      lists: R.
      length: Tokens of the sequence.
      block_size: Tokens in a block.
      num_blocks: Blocks in a list.
      num_initial: Blocks always chosen at the document's start.
      num_local: Blocks always chosen at the query.
    """
    b, t = query.shape[:2]
    planes, width = scores.planes, scores.width
    most = max(1, SCORE_BYTES // _bytes_per_query(b, lists, planes, width))
    if scores.tile_rows < most < t:
        most -= most % scores.tile_rows
    # Of about the same length: a short last chunk would not keep the GPU busy.
    rows = triton.cdiv(t, triton.cdiv(t, most))
    if scores.tile_rows < most:
        rows = min(most, t, _multiple(rows, scores.tile_rows))
    columns = max(4, triton.next_power_of_2(triton.cdiv(length, block_size)))
    heuristic = RowTiling(max(1, 512 // columns), min(16, max(1, columns // 1024)))
    tiling = tuning.choose("selection_best_blocks", {"columns": columns}, heuristic)
    new = (
        jax.ShapeDtypeStruct((b, lists, rows, planes, width), jnp.float32),
        jax.ShapeDtypeStruct((b, t, lists, num_blocks), jnp.int32),
    )

    def chunk(step, results):
        block_scores, blocks = results or new
        after = None if results is None else blocks
        block_scores = scores.write(step, rows, block_scores, after)
        return _steps.write(
            kernels.best_blocks_kernel,
            starts.array,
            step,
            t,
            length,
            block_scores.shape[2],
            results=[block_scores, blocks],
            grid=(triton.cdiv(rows, tiling.rows), b * lists),
            num_warps=tiling.warps,
            LISTS=lists,
            BLOCK=block_size,
            NUM_BLOCKS=num_blocks,
            INITIAL=num_initial,
            LOCAL=num_local,
            PLANES=planes,
            WIDTH=width,
            SIGNED=scores.signed,
            ROWS=tiling.rows,
            COLUMNS=columns,
            SLOTS=triton.next_power_of_2(num_blocks),
            PACKED=starts.packed,
        )

    return _steps.each_step(triton.cdiv(t, rows), chunk)[1]


@dataclasses.dataclass(frozen=True)
class _Starts:
    """First positions of documents, int32 [B, T]; something else if not packed."""

    array: jax.Array
    packed: bool


def _document_starts(document_starts):
    if document_starts is None:
        return _Starts(jnp.zeros((1, 1), jnp.int32), packed=False)
    return _Starts(document_starts.astype(jnp.int32), packed=True)


def _tiling(kernel, query, key, heuristic):
    """The tiling of a kernel of matrix products; the heuristic is for usual heads."""
    n, h = query.shape[2:]
    k = key.shape[2]
    if key.dtype.itemsize > 2:  # takes several times the shared memory and registers
        columns = 64 if h <= 128 else 32
        heuristic = Tiling(rows=64, columns=columns, warps=4, stages=1)
    elif h > 128:
        heuristic = dataclasses.replace(heuristic, rows=128, warps=8, registers=None)
    # No length, so that what was measured at one serves all.
    shape = {"group": n // k, "width": h, "dtype": str(query.dtype)}
    return tuning.choose(kernel, shape, heuristic)


def _bytes_per_query(batch, lists, planes, width):
    """Of the scores."""
    return 4 * batch * lists * planes * width


def _padded(width):
    """Scores in a row of them, for vector loads."""
    return _multiple(width, 16)


def _multiple(x, divisor):
    """The least multiple of the divisor that is not below x."""
    return triton.cdiv(x, divisor) * divisor


def _widths(width) -> dict[str, Any]:
    """Widths of heads as the kernels take them: a power of two, and the rest."""
    main = 1 << width.bit_length() - 1
    tail = max(16, triton.next_power_of_2(width - main)) if width > main else 0
    # Two products are worth it if they are smaller than one.
    if main < 16 or main <= tail:
        main, tail = max(16, triton.next_power_of_2(width)), 0
    return {"H": width, "H_MAIN": main, "H_TAIL": tail}
