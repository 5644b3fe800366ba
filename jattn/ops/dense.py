"""Dense causal attention, the baseline, with an optional sliding window."""

import jax
import jax.numpy as jnp

from jattn.ops import _common
from jattn.pallas._sharding import vary_alike
from jattn.pallas.flash import unsupported


def dense_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: _common.Implementation | None = None,
    return_lse: bool = False,
) -> _common.AttentionOutput:
    """Causal softmax attention: ``o_t = Σ_s softmax_s(scale q_t·k_s) v_s``.

    Query t sees key s where ``s <= t``, ``t - s < window`` if there is a window, and
    both belong to the same document. When T < S the queries are the last T positions.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], where K divides N; G = N / K query heads share a kv head.
      value: [B, S, K, V].
      window: Keys a query sees, itself included; None for all before it.
      scale: Factor of the logits; H ** -0.5 if None.
      segment_ids: int [B, S], the document each key belongs to. Documents are
        contiguous and never see each other.
      implementation: "xla", "pallas", "triton", or None for the fastest that
        supports the call.
      return_lse: Also return the log-sum-exp of the logits.

    Returns:
      [B, T, N, V] in value's dtype, and with return_lse also [B, T, N] in fp32
      (natural log; fp64 for fp64 inputs).

    Raises:
      ValueError: Shapes or dtypes do not fit, or window is not positive.
      NotImplementedError: The requested implementation does not support the call.
    """
    sizes = _common.check_attention(query, key, value, segment_ids)
    _common.check_positive(window=window)
    b, t, s = sizes["B"], sizes["T"], sizes["S"]
    scale = _common.default_scale(scale, sizes["H"])
    chosen = _common.choose_implementation(
        "dense_attention",
        implementation,
        [("triton", unsupported(query, key, value, stride=1, scale=scale))],
    )
    if chosen == "triton":
        # Triton is an optional dependency.
        from jattn.pallas.flash import triton as kernel

        starts = None
        if segment_ids is not None:
            starts = _common.document_starts(segment_ids)[:, s - t :]
        results: _common.AttentionOutput = kernel.attend(
            *vary_alike(query, key, value, starts),
            kernel_size=1,
            stride=1,
            window=window,
            length=s,
            scale=scale,
        )
        return results if return_lse else results[0]
    positions = jnp.broadcast_to(jnp.arange(s), (b, s))
    # Where a chunk of queries and its window are much shorter than the keys, only
    # that stretch of keys is read.
    chunk = min(window, t) if window else t
    if window is not None and chunk + window - 1 < s // 2:
        out, lse = _windowed(query, key, value, segment_ids, window, chunk, scale)
    else:
        out, lse = attend_positions(
            query,
            key,
            value,
            query_positions=positions[:, s - t :],
            key_positions=positions,
            window=window,
            scale=scale,
            query_segment_ids=None if segment_ids is None else segment_ids[:, s - t :],
            key_segment_ids=segment_ids,
        )
    return (out, lse) if return_lse else out


def attend_positions(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    window: int | None = None,
    scale: float,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention between tokens at explicit positions, as decoding needs it.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H] in any order, such as that of a ring buffer.
      value: [B, S, K, V].
      query_positions: int [B, T].
      key_positions: int [B, S]; negative where a slot holds nothing.
      window: Keys a query sees, itself included; None for all before it.
      scale: Factor of the logits.
      query_segment_ids: int [B, T], or None.
      key_segment_ids: int [B, S], or None.

    Returns:
      Output [B, T, N, V] and log-sum-exp [B, T, N].
    """
    b, t, n, _ = query.shape
    if query_segment_ids is None or key_segment_ids is None:
        query_segment_ids = jnp.zeros((b, t), jnp.int32)
        key_segment_ids = jnp.zeros(key_positions.shape, jnp.int32)

    def attend(query, query_positions, query_segment_ids):
        distance = query_positions[:, :, None] - key_positions[:, None, :]  # [B, T, S]
        mask = (distance >= 0) & (key_positions >= 0)[:, None, :]
        mask &= query_segment_ids[:, :, None] == key_segment_ids[:, None, :]
        if window is not None:
            mask &= distance < window
        return _common.masked_attention(
            query, key, value, mask[:, None, None], scale=scale
        )

    itemsize = _common.statistics_dtype(query, key, value).itemsize
    chunk = _common.chunk_length(t, b * n * key.shape[1] * itemsize)
    return _common.map_query_chunks(
        attend, query, query_positions, query_segment_ids, chunk=chunk
    )


def _windowed(query, key, value, segment_ids, window, chunk, scale):
    """Sliding-window attention that reads chunk + window - 1 keys per chunk."""
    b, t, n, _ = query.shape
    s = key.shape[1]
    itemsize = _common.statistics_dtype(query, key, value).itemsize
    chunk = min(chunk, _common.chunk_length(t, 2 * b * n * window * itemsize))
    span = chunk + window - 1
    if segment_ids is None:
        segment_ids = jnp.zeros((b, s), jnp.int32)
    # Padding in front lets every chunk read a whole span; it sits at negative
    # positions, which nobody sees.
    pad = [(0, 0), (span, 0)]
    key = jnp.pad(key, [*pad, (0, 0), (0, 0)])
    value = jnp.pad(value, [*pad, (0, 0), (0, 0)])
    key_segment_ids = jnp.pad(segment_ids, pad)

    def attend(query, positions, query_segment_ids):
        # The chunk may end in padding, whose position is 0: its maximum is the last
        # real query's, and the span ends there.
        last = jnp.max(positions)
        start = last + 1  # the span's end is at last + span, in padded coordinates

        def read(x):
            return jax.lax.dynamic_slice_in_dim(x, start, span, axis=1)

        key_positions = jnp.broadcast_to(start + jnp.arange(span) - span, (b, span))
        return attend_positions(
            query,
            read(key),
            read(value),
            query_positions=positions,
            key_positions=key_positions,
            window=window,
            scale=scale,
            query_segment_ids=query_segment_ids,
            key_segment_ids=read(key_segment_ids),
        )

    positions = jnp.broadcast_to(jnp.arange(s - t, s), (b, t))
    return _common.map_query_chunks(
        attend, query, positions, segment_ids[:, s - t :], chunk=chunk
    )
