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
    compressed_attention,
    query_range,
)
from jattn.ops.dense import dense_attention
from jattn.ops.nsa_selection import (
    check_sizes,
    select_blocks_by_lse,
    visible_blocks,
)
from jattn.pallas._sharding import vary_alike


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
    selection = check_sizes(
        kernel_size=kernel_size,
        stride=stride,
        block_size=block_size,
        num_blocks=num_blocks,
        num_initial=num_initial,
        num_local=num_local,
    )
    kernel_size, stride = selection["kernel_size"], selection["stride"]
    block_size, num_blocks = selection["block_size"], selection["num_blocks"]
    (window_size,) = _common.positive_integers(window_size=window_size)
    sizes = _check_branches(query, compressed, selected, window, gates)
    length = check_compressed(
        sizes, kernel_size, stride, sizes["S"], segment_ids, name="compressed key"
    )
    shared: dict[str, Any] = {
        "scale": scale,
        "segment_ids": segment_ids,
        "implementation": implementation,
    }
    from_compressed = compressed_attention(
        query,
        *compressed,
        kernel_size=kernel_size,
        stride=stride,
        length=length,
        return_lse=True,
        **shared,
    )
    in_window = dense_attention(
        query, *window, window=window_size, return_lse=True, **shared
    )
    # Where there are no more blocks than a query reads, it reads all that it may see.
    every_block = block_indices is None and num_blocks * block_size >= length
    if every_block:
        block_indices = visible_blocks(
            *query_range(query, length, segment_ids),
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
                length=length,
                **selection,
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
        varying = vary_alike(*arrays, segment_ids, addends)
        results: Any = kernel.attend_and_add(*varying, block_size, scale)
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
