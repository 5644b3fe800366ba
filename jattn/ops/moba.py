"""Mixture of Block Attention (arXiv 2502.13189): each query picks its key blocks.

A query's affinity to a block is its product with the mean of the block's keys. The
block it is in itself is always picked; the others are the best of those before it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jattn.ops import _common
from jattn.ops.block_sparse import block_sparse_attention
from jattn.pallas import selection


def mixture_of_block_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    block_size: int,
    top_k: int,
    block_indices: jax.Array | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: _common.Implementation | None = None,
    return_lse: bool = False,
) -> _common.AttentionOutput:
    """Causal attention of each query head to the top_k blocks it picks.

    ``o_t = Σ_s softmax_s(scale q_t·k_s) v_s`` over the keys ``s <= t`` of the blocks
    ``i`` with the largest ``s_i = q_t · mean(k in block i)``, the query's own block
    always among them. `moba_select_blocks` says which these are. The selection has no
    gradient.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], where K divides N; G = N / K query heads share a kv head.
      value: [B, S, K, V].
      block_size: Keys in a block.
      top_k: Blocks a query head sees, its own included; 1 for only that one.
      block_indices: int [B, T, N, top_k], a selection to use; computed if None.
      scale: Factor of the logits; H ** -0.5 if None.
      segment_ids: int [B, S], the document each key belongs to. Documents are
        contiguous and never see each other; blocks count from the row's start.
      implementation: "xla", "pallas", "triton", or None for the fastest that
        supports the call.
      return_lse: Also return the log-sum-exp of the logits.

    Returns:
      [B, T, N, V] in value's dtype, and with return_lse also [B, T, N] in fp32
      (natural log; fp64 for fp64 inputs).

    Raises:
      ValueError: Shapes or dtypes do not fit, a size is not positive, or top_k
        exceeds the blocks there are.
      NotImplementedError: The requested implementation does not support the call.
    """
    sizes = _common.check_attention(query, key, value, segment_ids)
    _check_blocks(sizes["S"], block_size, top_k)
    if block_indices is None:
        block_indices = moba_select_blocks(
            query,
            key,
            block_size=block_size,
            top_k=top_k,
            segment_ids=segment_ids,
            implementation=implementation,
        )
    elif block_indices.shape != (*query.shape[:3], top_k):
        raise ValueError(
            f"block_indices must have shape [B={sizes['B']}, T={sizes['T']}, "
            f"N={sizes['N']}, top_k={top_k}]; got {list(block_indices.shape)}"
        )
    return block_sparse_attention(
        query,
        key,
        value,
        block_indices,
        block_size=block_size,
        scale=scale,
        segment_ids=segment_ids,
        implementation=implementation,
        return_lse=return_lse,
    )


def moba_select_blocks(
    query: jax.Array,
    key: jax.Array,
    *,
    block_size: int,
    top_k: int,
    segment_ids: jax.Array | None = None,
    round_pooled_keys: bool = True,
    implementation: _common.Implementation | None = None,
) -> jax.Array:
    """The blocks each query head attends to: its own, and the best before it.

    Blocks before the query's own are ranked by ``q_t · mean(k in block)`` in fp32 (fp64
    for fp64 inputs), ties going to the lower index; blocks after it are never picked.
    Not differentiated.

    A block that several documents share counts for the document of its last token, and
    its mean is that of this document's tokens only.

    Args:
      query: [B, T, N, H], the last T positions.
      key: [B, S, K, H], where K divides N.
      block_size: Keys in a block; the last one may be shorter.
      top_k: Blocks to pick, the own one included.
      segment_ids: int [B, S], the document each key belongs to.
      round_pooled_keys: Round the mean keys to key's dtype, as models trained with the
        released code did. Without it, selections differ where scores are close.
      implementation: "xla", "pallas", "triton", or None for the fastest that
        supports the call.

    Returns:
      int32 [B, T, N, top_k] in ascending order, -1 at the end where a query has fewer
      blocks to see.

    Raises:
      ValueError: Shapes or dtypes do not fit, a size is not positive, or top_k
        exceeds the blocks there are.
      NotImplementedError: The requested implementation does not support the call.
    """
    sizes = _common.check_attention(query, key, key, segment_ids)
    b, t, s = sizes["B"], sizes["T"], sizes["S"]
    count = _check_blocks(s, block_size, top_k)
    chosen = _common.choose_implementation(
        "moba_select_blocks",
        implementation,
        [
            (
                "triton",
                selection.unsupported(query, key, lists=sizes["N"], blocks=count),
            )
        ],
    )
    starts = None
    if segment_ids is None:
        segment_ids = jnp.zeros((b, s), jnp.int32)
    else:
        starts = _common.document_starts(segment_ids)[:, s - t :]
    last_tokens = jnp.minimum(jnp.arange(1, count + 1) * block_size, s) - 1
    block_segments = segment_ids[:, last_tokens]  # [B, count]

    tail = count * block_size - s
    represented = segment_ids == jnp.repeat(block_segments, block_size, axis=1)[:, :s]
    kept = jnp.where(
        represented[..., None, None], key.astype(_common.statistics_dtype(key)), 0
    )
    sums = jnp.pad(kept, [(0, 0), (0, tail), (0, 0), (0, 0)])
    sums = sums.reshape(b, count, block_size, *key.shape[2:]).sum(axis=2)
    tokens = jnp.pad(represented, [(0, 0), (0, tail)])
    tokens = tokens.reshape(b, count, block_size).sum(axis=2)
    rounded_to = key.dtype if round_pooled_keys else sums.dtype
    pooled_keys = mean_keys(sums, tokens[..., None, None], rounded_to)
    if chosen == "triton":
        # Triton is an optional dependency.
        from jattn.pallas.selection import triton as kernel

        # The kernel's products are fp32 in either dtype; in a narrow one they are fast.
        return kernel.moba_blocks(
            query,
            pooled_keys.astype(rounded_to),
            starts,
            length=s,
            block_size=block_size,
            top_k=top_k,
        )
    return select_pooled(
        query,
        pooled_keys,
        block_size=block_size,
        top_k=top_k,
        query_positions=jnp.broadcast_to(jnp.arange(s - t, s), (b, t)),
        query_segment_ids=segment_ids[:, s - t :],
        block_segment_ids=block_segments,
    )


def mean_keys(sums: jax.Array, tokens: jax.Array | int, dtype: Any) -> jax.Array:
    """Mean keys of blocks, rounded to dtype but in that of their sums."""
    # A cast there and back may be compiled away; this is not.
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(sums / tokens, info.nexp, info.nmant)


def select_pooled(
    query: jax.Array,
    pooled_keys: jax.Array,
    *,
    block_size: int,
    top_k: int,
    query_positions: jax.Array,
    query_segment_ids: jax.Array | None = None,
    block_segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Picks blocks by their mean keys, for queries at explicit positions.

    Args:
      query: [B, T, N, H].
      pooled_keys: [B, count, K, H]. A block is a candidate only for the queries of
        later blocks, so what stands at a block that is not full yet has no effect.
      block_size: Keys in a block.
      top_k: Blocks to pick, the own one included; at most count.
      query_positions: int [B, T]; a query at a negative position picks nothing.
      query_segment_ids: int [B, T], or None.
      block_segment_ids: int [B, count], or None.

    Returns:
      int32 [B, T, N, top_k] in ascending order, -1 at the end.
    """
    b, t, n, h = query.shape
    count, k = pooled_keys.shape[1:3]
    dtype = _common.statistics_dtype(query, pooled_keys)
    pooled_keys = jax.lax.stop_gradient(pooled_keys).astype(dtype)
    if query_segment_ids is None or block_segment_ids is None:
        query_segment_ids = jnp.zeros((b, t), jnp.int32)
        block_segment_ids = jnp.zeros((b, count), jnp.int32)

    def select(query, positions, segments):
        t = query.shape[1]
        scores = jnp.einsum(
            "btkgh,bckh->btkgc",
            query.reshape(b, t, k, n // k, h).astype(dtype),
            pooled_keys,
            precision=jax.lax.Precision.HIGHEST,
        ).reshape(b, t, n, count)
        own = positions // block_size  # negative for a negative position
        candidates = jnp.arange(count) < own[..., None]  # [B, t, count]
        candidates &= segments[..., None] == block_segment_ids[:, None]
        scores = jnp.where(candidates[:, :, None], scores, -jnp.inf)
        best, blocks = jax.lax.top_k(scores, top_k - 1)
        blocks = jnp.where(jnp.isneginf(best), count, blocks)
        own = jnp.where(own < 0, count, own)
        own = jnp.broadcast_to(own[..., None, None], (b, t, n, 1))
        blocks = jnp.sort(jnp.concatenate([blocks, own], axis=-1), axis=-1)
        return jnp.where(blocks == count, -1, blocks).astype(jnp.int32)

    return _common.map_query_chunks(
        select,
        jax.lax.stop_gradient(query),
        query_positions,
        query_segment_ids,
        chunk=_common.chunk_length(t, 2 * b * n * count * dtype.itemsize),
    )


def key_convolution(
    key: jax.Array, weight: jax.Array, *, segment_ids: jax.Array | None = None
) -> jax.Array:
    """FlashMoBA's key convolution (arXiv 2511.11571), which clusters related keys.

    ``k'_t = k_t + SiLU(Σ_{l<W} w_l ⊙ k_{t-l})``, causal, one filter for each channel;
    keys before the start, or of another document, are zero.

    Args:
      key: [B, S, K, H], before rotary embedding.
      weight: [W, K, H].
      segment_ids: int [B, S], the document each key belongs to.

    Returns:
      [B, S, K, H] in key's dtype; computed in fp32 (fp64 for fp64 inputs).

    Raises:
      ValueError: Shapes or dtypes do not fit.
    """
    sizes = _common.bind_shapes(("key", key, "BSKH"), ("weight", weight, "WKH"))
    _common.check_floating(key=key, weight=weight)
    _common.check_segment_ids(segment_ids, sizes["B"], sizes["S"])
    wide = key.astype(_common.statistics_dtype(key, weight))
    total = wide * weight[0]
    for lag in range(1, min(sizes["W"], sizes["S"])):
        earlier = wide[:, :-lag]
        if segment_ids is not None:
            same = segment_ids[:, :-lag] == segment_ids[:, lag:]
            earlier = jnp.where(same[..., None, None], earlier, 0)
        total = total.at[:, lag:].add(earlier * weight[lag])
    return (wide + jax.nn.silu(total)).astype(key.dtype)


def _check_blocks(length, block_size, top_k):
    """The number of blocks; ValueError unless top_k of them exist."""
    _common.check_positive(block_size=block_size, top_k=top_k)
    count = -(-length // block_size)
    if top_k > count:
        raise ValueError(
            f"top_k={top_k} exceeds the {count} blocks of block_size={block_size} that "
            f"S={length} keys make; top_k may be at most {count}"
        )
    return count
