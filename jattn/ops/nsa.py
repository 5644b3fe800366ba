"""Native Sparse Attention (arXiv 2502.11089): three gated branches of attention.

Each query attends to compressed tokens that stand for windows of keys, to the few
blocks of keys that those compressed tokens point at, and to a sliding window.

Letters beside those of `jattn.ops._common`: M compressed tokens, l = kernel_size keys
in a compressed window, d = stride between windows, l' = block_size.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jattn.ops import _common
from jattn.ops.block_sparse import block_sparse_attention, choose_block_sparse
from jattn.ops.compressed import (
    check_compressed,
    check_windows,
    compressed_attention,
    query_range,
    visible_windows,
)
from jattn.ops.dense import dense_attention
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


def native_sparse_attention(
    query: jax.Array,
    compressed: tuple[jax.Array, jax.Array],
    selected: tuple[jax.Array, jax.Array],
    window: tuple[jax.Array, jax.Array],
    gates: jax.Array,
    *,
    kernel_size: int = 32,
    stride: int = 16,
    block_size: int = 64,
    num_blocks: int = 16,
    num_initial: int = 1,
    num_local: int = 2,
    window_size: int = 512,
    block_indices: jax.Array | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: _common.Implementation | None = None,
    return_lse: bool = False,
    return_block_indices: bool = False,
) -> Any:
    """Native sparse attention: ``o_t = Σ_c gate_t^c · Attention^c(q_t)`` (equation 5).

    The branches c are `compressed_attention`, `block_sparse_attention` to the blocks
    of `nsa_select_blocks`, and `dense_attention` with a window. Each has keys and
    values of its own. All are causal; when T < S the queries are the last T positions.

    Args:
      query: [B, T, N, H]; as keys, values and gates of a floating-point dtype.
      compressed: Keys [B, M, K, H] and values [B, M, K, V], one for each of
        `nsa_windows`; K divides N. The values of all branches have one dtype.
      selected: Keys [B, S, K, H] and values [B, S, K, V].
      window: Keys [B, S, K, H] and values [B, S, K, V].
      gates: [B, T, N, 3], in the order of the branches.
      kernel_size: Tokens in a compressed window, at most block_size.
      stride: Tokens between the starts of compressed windows, a divisor of
        kernel_size and of block_size.
      block_size: Tokens in a selected block.
      num_blocks: Blocks a query reads, at least num_initial + num_local.
      num_initial: Blocks always read at the document's start; at least 0.
      num_local: Blocks always read at the query, its own counted; at least 1.
      window_size: Tokens the window branch sees, the query's own counted.
      block_indices: int [B, T, K or N, n], the blocks to read instead of those that
        `nsa_select_blocks` would choose; -1 for none.
      scale: Factor of the logits in every branch, a number; H ** -0.5 if None.
      segment_ids: int [B, S], the document of each token. Documents are contiguous
        and never see each other; windows and blocks count from the row's start.
      implementation: "xla", "triton" (kernels in Triton, or in Mosaic GPU where that is
        faster; every branch needs one), or None for the fastest that supports the
        call, branch by branch. "pallas" is no kernel of this operation.
      return_lse: Also return the log-sum-exp of each branch's logits.
      return_block_indices: Also return the blocks that were read.

    Returns:
      [B, T, N, V] in the values' dtype, summed over the branches in fp32 (fp64 for
      fp64 inputs). With return_lse then the log-sum-exps [B, T, N, 3] in the order of
      the branches (natural log, -inf where a branch sees nothing). With
      return_block_indices last the blocks, int32 [B, T, K, num_blocks], or
      block_indices as they were given.

    Raises:
      ValueError: A branch is no pair of arrays, shapes or dtypes do not fit, K does
        not divide N, T exceeds S, M is not the number of windows of S tokens, a size
        is not an integer in its range, the sizes contradict each other, scale is
        traced, or implementation is no such name.
      NotImplementedError: The requested implementation does not support the call.
    """
    kernel_size, stride, block_size, num_blocks, num_initial, num_local = check_sizes(
        kernel_size, stride, block_size, num_blocks, num_initial, num_local
    )
    (window_size,) = _common.positive_integers(window_size=window_size)
    sizes = _check_branches(query, compressed, selected, window, gates)
    check_compressed(
        sizes, kernel_size, stride, sizes["S"], segment_ids, name="compressed key"
    )
    shared: dict[str, Any] = {
        "scale": scale,
        "segment_ids": segment_ids,
        "implementation": implementation,
    }
    windows: dict[str, Any] = {
        "kernel_size": kernel_size,
        "stride": stride,
        "length": sizes["S"],
    }
    from_compressed = compressed_attention(
        query, *compressed, return_lse=True, **windows, **shared
    )
    in_window = dense_attention(
        query, *window, window=window_size, return_lse=True, **shared
    )
    # Where there are no more blocks than a query reads, it reads all that it may see.
    every_block = block_indices is None and num_blocks * block_size >= sizes["S"]
    if every_block:
        block_indices = _visible_blocks(
            *query_range(query, sizes["S"], segment_ids),
            (sizes["K"], num_blocks),
            block_size,
        )
        attended, lse = dense_attention(query, *selected, return_lse=True, **shared)
        outputs = from_compressed[0], attended, in_window[0]
        total = gated_sum(outputs, gates)
    else:
        if block_indices is None:
            block_indices = select_blocks_by_lse(
                query,
                compressed[0],
                from_compressed[1],
                block_size=block_size,
                num_blocks=num_blocks,
                num_initial=num_initial,
                num_local=num_local,
                **windows,
                **shared,
            )
        total, lse = _add_selected(
            query,
            *selected,
            block_indices,
            (from_compressed[0], in_window[0]),
            gates,
            block_size=block_size,
            **shared,
        )
    result = [total]
    if return_lse:
        result.append(jnp.stack([from_compressed[1], lse, in_window[1]], axis=-1))
    if return_block_indices:
        result.append(block_indices)
    return tuple(result) if len(result) > 1 else result[0]


def _check_branches(query, compressed, selected, window, gates):
    """Checks the arrays of `native_sparse_attention`; returns their sizes by letter."""
    branches = {"selected": selected, "window": window, "compressed": compressed}
    for name, pair in branches.items():
        if (
            not isinstance(pair, tuple | list)
            or len(pair) != 2
            or any(x is None for x in pair)
        ):
            shapes = jax.tree.map(jnp.shape, pair)
            raise ValueError(
                f"{name} must be a pair of arrays, (key, value); got shapes {shapes}"
            )
    sizes = _common.bind_shapes(
        ("query", query, "BTNH"),
        ("selected key", selected[0], "BSKH"),
        ("selected value", selected[1], "BSKV"),
        ("window key", window[0], "BSKH"),
        ("window value", window[1], "BSKV"),
        ("compressed key", compressed[0], "BMKH"),
        ("compressed value", compressed[1], "BMKV"),
        ("gates", gates, "BTN3"),
    )
    keys = {f"{name} key": pair[0] for name, pair in branches.items()}
    values = {f"{name} value": pair[1] for name, pair in branches.items()}
    _common.check_floating(query=query, gates=gates, **keys, **values)
    if len({x.dtype for x in values.values()}) > 1:
        got = ", ".join(f"{name} {x.dtype}" for name, x in values.items())
        raise ValueError(f"values must have one dtype, the output's; got {got}")
    return sizes


def _add_selected(
    query,
    key,
    value,
    block_indices,
    others,
    gates,
    *,
    block_size,
    scale,
    segment_ids,
    implementation,
):
    """The gated sum of attention to blocks and of the first and last of three branches.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, V].
      block_indices: int [B, T, K or N, n].
      others: Outputs [B, T, N, V] of the other branches.
      gates: [B, T, N, 3].
      block_size: Tokens in a block.
      scale: Factor of the logits, or None.
      segment_ids: int [B, S], or None.
      implementation: What was asked for.

    Returns:
      The sum [B, T, N, V], and the log-sum-exp [B, T, N] of attention to blocks.
    """
    arrays = query, key, value, block_indices
    before, after = others
    scale = _common.default_scale(scale, query.shape[-1])
    chosen = choose_block_sparse(
        *arrays,
        segment_ids,
        block_size=block_size,
        scale=scale,
        implementation=implementation,
    )
    alike = before.dtype == value.dtype == after.dtype and gates.dtype.itemsize <= 4
    if chosen == "triton" and alike:
        # Triton is an optional dependency.
        from jattn.pallas.block_sparse import triton as kernel

        addends = kernel.Addends(before, after, gates)
        results: Any = kernel.attend_and_add(
            *arrays, segment_ids, addends, block_size, scale
        )
        return results
    attended, lse = block_sparse_attention(
        *arrays,
        block_size=block_size,
        scale=scale,
        segment_ids=segment_ids,
        implementation=implementation,
        return_lse=True,
    )
    return gated_sum((before, attended, after), gates), lse


def gated_sum(outputs: tuple[jax.Array, ...], gates: jax.Array) -> jax.Array:
    """Sums outputs, each [B, T, N, V], with gates [B, T, N, len(outputs)] in fp32.

    The outputs are of one dtype, which is that of the sum.
    """
    dtype = _common.statistics_dtype(*outputs, gates)
    total = sum(
        gates[..., i, None].astype(dtype) * out.astype(dtype)
        for i, out in enumerate(outputs)
    )
    return jnp.asarray(total, outputs[0].dtype)


def select_blocks_by_lse(
    query: jax.Array,
    key_cmp: jax.Array,
    lse: jax.Array | None,
    *,
    kernel_size: int,
    stride: int,
    block_size: int,
    num_blocks: int,
    num_initial: int,
    num_local: int,
    length: int | None,
    scale: float | None,
    segment_ids: jax.Array | None,
    implementation: _common.Implementation | None,
) -> jax.Array:
    """`nsa_select_blocks`, which need not normalise scores that are normalised before.

    Args:
      query: [B, T, N, H].
      key_cmp: [B, M, K, H].
      lse: [B, T, N], the log-sum-exp of `compressed_attention` with the same arguments,
        or None if it is not known.
      kernel_size: See `nsa_select_blocks`, as for all that follow.
      stride: Its argument.
      block_size: Its argument.
      num_blocks: Its argument.
      num_initial: Its argument.
      num_local: Its argument.
      length: Its argument.
      scale: Its argument.
      segment_ids: Its argument.
      implementation: Its argument.

    Returns:
      int32 [B, T, K, num_blocks], ascending; -1 at the end where fewer can be seen.

    Raises:
      ValueError: As `nsa_select_blocks` does.
      NotImplementedError: As `nsa_select_blocks` does.
    """
    sizes = _common.bind_shapes(("query", query, "BTNH"), ("key_cmp", key_cmp, "BMKH"))
    _common.check_floating(query=query, key_cmp=key_cmp)
    kernel_size, stride, block_size, num_blocks, num_initial, num_local = check_sizes(
        kernel_size, stride, block_size, num_blocks, num_initial, num_local
    )
    length = check_compressed(sizes, kernel_size, stride, length, segment_ids)
    scale = _common.default_scale(scale, sizes["H"])
    reason = None
    if sizes["M"]:
        reason = selection.unsupported(
            query,
            key_cmp,
            lists=sizes["K"],
            blocks=-(-length // block_size),
            cells=block_size // stride,
            scale=scale,
        )
    chosen = _common.choose_implementation(
        "nsa_select_blocks", implementation, [("triton", reason)]
    )
    shared: dict[str, Any] = {
        "length": length,
        "kernel_size": kernel_size,
        "stride": stride,
        "block_size": block_size,
        "num_blocks": num_blocks,
        "num_initial": num_initial,
        "num_local": num_local,
        "scale": scale,
    }
    positions, starts = query_range(query, length, segment_ids)
    # Without compressed tokens there are no scores, whatever was asked for.
    if chosen == "triton" and sizes["M"]:
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


def _visible_blocks(positions, starts, lists_shape, block_size):
    """All blocks [B, T, *lists_shape] from a query's document start up to its own."""
    first, own = starts // block_size, positions // block_size
    blocks = first[..., None] + jnp.arange(lists_shape[-1], dtype=jnp.int32)
    blocks = jnp.where(blocks <= own[..., None], blocks, -1)
    return jnp.broadcast_to(blocks[:, :, None], (*positions.shape, *lists_shape))


def check_sizes(
    kernel_size, stride, block_size, num_blocks, num_initial, num_local
) -> tuple[int, int, int, int, int, int]:
    """The sizes of a selection as Python integers, in the order of the arguments.

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
    return kernel_size, stride, block_size, num_blocks, num_initial, num_local
