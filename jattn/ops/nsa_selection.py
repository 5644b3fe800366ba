"""The blocks of keys that native sparse attention reads: those with the best scores.

Letters as in `jattn.ops.nsa`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jattn.ops import _common
from jattn.ops.compressed import (
    check_compressed,
    check_windows,
    query_range,
    visible_windows,
)
from jattn.pallas import selection


def nsa_select_blocks(
    query: jax.Array,
    key_cmp: jax.Array,
    *,
    kernel_size: int = 32,
    stride: int = 16,
    block_size: int = 64,
    num_blocks: int = 16,
    num_initial: int = 1,
    num_local: int = 2,
    length: int | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: _common.Implementation | None = None,
) -> jax.Array:
    """The blocks of keys that each query reads, shared by the heads of a kv head.

    Block j holds the tokens ``j * block_size`` to ``(j + 1) * block_size - 1``. Its
    score for query t is ``Σ_heads Σ_i |window_i ∩ block_j| / stride · p_i``, where p is
    the softmax of one head over the compressed tokens that t sees (equations 8 to 10;
    the overlap is what the indices of equation 9 count). Of the blocks that hold a
    token t may see, those chosen are the first num_initial ones of t's document, the
    last num_local ones up to t's own, and then the best scores until there are
    num_blocks; equal scores go to the lower index (equation 11). Scores are computed
    in fp32 (fp64 for fp64 inputs); nothing is differentiated.

    Args:
      query: [B, T, N, H]; as key_cmp of a floating-point dtype.
      key_cmp: [B, M, K, H], where K divides N, one for each of `nsa_windows`.
      kernel_size: Tokens in a window, at most block_size.
      stride: Tokens between the starts of windows, a divisor of kernel_size and of
        block_size.
      block_size: Tokens in a block.
      num_blocks: Blocks a query reads, at least num_initial + num_local.
      num_initial: Blocks always read at the document's start.
      num_local: Blocks always read at the query, its own counted; at least 1.
      length: Tokens S of the sequence, of which the queries are the last T; if None
        the length of segment_ids, or T.
      scale: Factor of the logits, a number; H ** -0.5 if None.
      segment_ids: int [B, S], the document of each token. Documents are contiguous;
        blocks count from the row's start.
      implementation: "xla", "triton" (kernels in Triton, or in Mosaic GPU where that is
        faster), or None for the fastest that supports the call. "pallas" is no kernel
        of this operation.

    Returns:
      int32 [B, T, K, num_blocks], ascending; -1 at the end where fewer can be seen.

    Raises:
      ValueError: Shapes or dtypes do not fit, K does not divide N, T exceeds S, M is
        not the number of windows of S tokens, a size is not an integer in its range,
        the sizes contradict each other, scale is traced, or implementation is no such
        name.
      NotImplementedError: The requested implementation does not support the call.
    """
    return select_blocks_by_lse(
        query,
        key_cmp,
        None,
        kernel_size=kernel_size,
        stride=stride,
        block_size=block_size,
        num_blocks=num_blocks,
        num_initial=num_initial,
        num_local=num_local,
        length=length,
        scale=scale,
        segment_ids=segment_ids,
        implementation=implementation,
    )


def select_blocks_by_lse(
    query: jax.Array,
    key_cmp: jax.Array,
    lse: jax.Array | None,
    *,
    length: int | None,
    scale: float | None,
    segment_ids: jax.Array | None,
    implementation: _common.Implementation | None,
    **sizes: int,
) -> jax.Array:
    """`nsa_select_blocks`, which need not normalise scores that are normalised before.

    Args:
      query: [B, T, N, H].
      key_cmp: [B, M, K, H].
      lse: [B, T, N], the log-sum-exp of `compressed_attention` with the same arguments,
        or None if it is not known.
      length: See `nsa_select_blocks`, as for all that follow.
      scale: Its argument.
      segment_ids: Its argument.
      implementation: Its argument.
      **sizes: Its six arguments that `check_sizes` takes, all of them.

    Returns:
      int32 [B, T, K, num_blocks], ascending; -1 at the end where fewer can be seen.

    Raises:
      ValueError: As `nsa_select_blocks` does.
      NotImplementedError: As `nsa_select_blocks` does.
    """
    axes = _common.bind_shapes(("query", query, "BTNH"), ("key_cmp", key_cmp, "BMKH"))
    _common.check_floating(query=query, key_cmp=key_cmp)
    shared = check_sizes(**sizes)
    kernel_size, stride = shared["kernel_size"], shared["stride"]
    length = check_compressed(axes, kernel_size, stride, length, segment_ids)
    shared |= {"length": length, "scale": _common.default_scale(scale, axes["H"])}
    reason = None
    if axes["M"]:
        reason = selection.unsupported(
            query,
            key_cmp,
            lists=axes["K"],
            blocks=-(-length // shared["block_size"]),
            cells=shared["block_size"] // stride,
            scale=shared["scale"],
        )
    chosen = _common.choose_implementation(
        "nsa_select_blocks", implementation, [("triton", reason)]
    )
    positions, starts = query_range(query, length, segment_ids)
    # Without compressed tokens there are no scores, whatever was asked for.
    if chosen == "triton" and axes["M"]:
        # Triton is an optional dependency.
        from jattn.pallas.selection import triton as kernel

        starts = None if segment_ids is None else starts
        return kernel.nsa_blocks(query, key_cmp, lse, starts, **shared)
    return select_blocks(
        query, key_cmp, query_positions=positions, document_starts=starts, **shared
    )


def select_blocks(
    query: jax.Array,
    key_cmp: jax.Array,
    *,
    query_positions: jax.Array,
    document_starts: jax.Array,
    length: int,
    kernel_size: int,
    stride: int,
    block_size: int,
    num_blocks: int,
    num_initial: int,
    num_local: int,
    scale: float,
) -> jax.Array:
    """`nsa_select_blocks` from explicit positions, as decoding needs it.

    Args:
      query: [B, T, N, H]; as key_cmp of a floating-point dtype.
      key_cmp: [B, M, K, H], where K divides N; what lies past the queries is not read.
      query_positions: int [B, T]; negative for a query that reads no block.
      document_starts: int [B, T], the first position of each query's document.
      length: Tokens the blocks divide up, at least those that were compressed.
      kernel_size: Tokens in a window.
      stride: Tokens between the starts of windows.
      block_size: Tokens in a block.
      num_blocks: Blocks a query reads.
      num_initial: Blocks always read at the document's start.
      num_local: Blocks always read at the query.
      scale: Factor of the logits.

    Returns:
      int32 [B, T, K, num_blocks], ascending, -1 last. Nothing is checked, and nothing
      differentiated.
    """
    b, t, n, h = query.shape
    m, k = key_cmp.shape[1:3]
    dtype = _common.statistics_dtype(query, key_cmp)
    query, key_cmp = jax.lax.stop_gradient((query, key_cmp.astype(dtype)))
    count = -(-length // block_size)
    blocks = jnp.arange(count, dtype=jnp.int32)

    def select(query, positions, starts):
        logits = scale * jnp.einsum(
            "btkgh,bmkh->bkgtm",
            query.reshape(b, -1, k, n // k, h).astype(dtype),
            key_cmp,
            precision=jax.lax.Precision.HIGHEST,
        )
        visible = visible_windows(positions, starts, m, kernel_size, stride)
        probabilities, _ = _common.masked_softmax(logits, visible[:, None, None])
        scores = _block_scores(
            jnp.sum(probabilities, axis=2), count, kernel_size, stride, block_size
        )
        scores = jnp.moveaxis(scores, 2, 1)  # [B, chunk, K, count]
        first = (starts // block_size)[..., None, None]
        own = (positions // block_size)[..., None, None]
        forced = (blocks < first + num_initial) | (blocks > own - num_local)
        # Blocks out of sight are told apart from those whose score is 0.
        scores = jnp.where(forced, jnp.inf, scores)
        scores = jnp.where((blocks >= first) & (blocks <= own), scores, -jnp.inf)
        best, chosen = jax.lax.top_k(scores, min(num_blocks, count))
        chosen = jnp.sort(jnp.where(best > -jnp.inf, chosen, count), axis=-1)
        return jnp.where(chosen < count, chosen, -1)

    chunk = _common.chunk_length(t, b * n * m * dtype.itemsize)
    chosen = _common.map_query_chunks(
        select, query, query_positions, document_starts, chunk=chunk
    )
    missing = num_blocks - chosen.shape[-1]
    return jnp.pad(chosen, [(0, 0)] * 3 + [(0, missing)], constant_values=-1)


def _block_scores(weights, count, kernel_size, stride, block_size):
    """Σ_i |window_i ∩ block_j| / stride · weights_i: [..., M] -> [..., count].

    Windows and blocks are both made of whole cells of `stride` tokens, so that the
    overlap is the number of cells they share.
    """
    window_cells, block_cells = kernel_size // stride, block_size // stride
    cells = count * block_cells
    # Cell c lies in the windows c - window_cells + 1 to c.
    before, after = window_cells - 1, cells - weights.shape[-1]
    padded = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(before, after)])
    in_cells = sum(padded[..., i : i + cells] for i in range(window_cells))
    return jnp.sum(
        jnp.reshape(in_cells, (*weights.shape[:-1], count, block_cells)), axis=-1
    )


def visible_blocks(positions, starts, lists_shape, block_size):
    """All blocks [B, T, *lists_shape] from a query's document start up to its own."""
    first, own = starts // block_size, positions // block_size
    blocks = first[..., None] + jnp.arange(lists_shape[-1], dtype=jnp.int32)
    blocks = jnp.where(blocks <= own[..., None], blocks, -1)
    return jnp.broadcast_to(blocks[:, :, None], (*positions.shape, *lists_shape))


def check_sizes(
    *, kernel_size, stride, block_size, num_blocks, num_initial, num_local
) -> dict[str, Any]:
    """The sizes of a selection as Python integers, by name.

    Raises:
      ValueError: They contradict each other, or one is no integer in its range.
    """
    kernel_size, stride = check_windows(kernel_size, stride)
    block_size, num_blocks, num_local = _common.positive_integers(
        block_size=block_size, num_blocks=num_blocks, num_local=num_local
    )
    num_initial = _common.integer_from(0, "num_initial", num_initial)
    if block_size % stride or kernel_size > block_size:
        raise ValueError(
            "block_size must be a multiple of stride and at least kernel_size; got "
            f"block_size={block_size}, stride={stride}, kernel_size={kernel_size}"
        )
    if num_blocks < num_initial + num_local:
        raise ValueError(
            "num_blocks counts the forced blocks and must be at least num_initial + "
            f"num_local; got {num_blocks} < {num_initial} + {num_local}"
        )
    return {
        "kernel_size": kernel_size,
        "stride": stride,
        "block_size": block_size,
        "num_blocks": num_blocks,
        "num_initial": num_initial,
        "num_local": num_local,
    }
