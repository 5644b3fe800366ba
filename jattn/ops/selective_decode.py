"""Selective Attention with a cache: of new tokens to it, and of the first ones."""

import jax
import jax.numpy as jnp

from jattn.ops import _common
from jattn.ops.selective import attend_positions
from jattn.pallas import selective as kernels


def cached_selective_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    scale: float,
    implementation: _common.Implementation | None,
) -> tuple[jax.Array, jax.Array]:
    """`jattn.selective_attention` of new tokens to the slots of a cache.

    Args:
      query: [B, T, N, H], in order of position. For T > 1 there is only the jnp form.
      key: [B, S, K, H] in any order.
      value: [B, S, K, V].
      mask: [B, S], row F of the first query.
      query_positions: int32 [B, T]; negative for padding, which selects nothing.
      key_positions: int32 [B, S]; negative where a slot holds nothing.
      scale: Factor of the logits.
      implementation: "xla", "triton", or None for the fastest that supports the call.

    Returns:
      Output [B, T, N, V] and row F [B, S] of the query after the last.

    Raises:
      NotImplementedError: The requested implementation does not support the call.
    """

    def reference(query, key, value, mask, query_positions, key_positions):
        out, _, _, mask, _ = attend_positions(
            query,
            key,
            value,
            mask,
            query_positions=query_positions,
            query_starts=query_positions * 0,
            key_positions=key_positions,
            scale=scale,
        )
        return out, mask

    arrays = query, key, value, mask, query_positions, key_positions
    chosen = _common.choose_implementation(
        "decoding of selective attention",
        implementation if query.shape[1] == 1 else "xla",
        [("triton", kernels.decode_unsupported(query, key, value, mask, scale=scale))],
    )
    if chosen == "xla":
        return reference(*arrays)
    # Triton is an optional dependency.
    from jattn.pallas.selective import decode as kernel

    @jax.custom_vjp
    def attend(query, key, value, mask, query_positions, key_positions):
        return kernel.attend(
            query, key, value, mask, query_positions[:, 0], key_positions, scale
        )

    def attend_forward(*arrays):
        return attend(*arrays), arrays

    def attend_backward(arrays, cotangents):
        _, pullback = jax.vjp(reference, *arrays)
        return pullback(cotangents)

    attend.defvjp(attend_forward, attend_backward)
    return attend(*arrays)


def prefill_selective_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    *,
    budget: int | None,
    skip_error: float,
    scale: float,
    implementation: _common.Implementation | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`jattn.selective_attention` among the first tokens of rows.

    Args:
      query: [B, T, N, H].
      key: [B, T, K, H].
      value: [B, T, K, V].
      lengths: int32 [B], how many of the tokens of each row are real; the rest, on the
        right, is padding, which selects and drops nothing.
      budget: Most keys a query holds; None for no limit.
      skip_error: Part of a query's softmax weight that may be left out.
      scale: Factor of the logits.
      implementation: "xla", "triton", or None for the fastest that supports the call.

    Returns:
      Output [B, T, N, V], 0 for padding; row F [B, T] of the query after the last; and
      which keys that query still holds, bool [B, T].

    Raises:
      NotImplementedError: The requested implementation does not support the call.
    """
    b, t = key.shape[:2]
    arrays = query, key, value, lengths

    def reference(query, key, value, lengths):
        positions = jnp.arange(t, dtype=jnp.int32)
        real = positions < lengths[:, None]
        positions = jnp.where(real, positions, -1)
        dtype = _common.statistics_dtype(query, key, value)
        out, _, _, mask, expiry = attend_positions(
            query,
            key,
            value,
            # Of what shard_map shards, as what a scan starts from has to be.
            jnp.zeros_like(query, dtype, shape=(b, t)),
            query_positions=positions,
            query_starts=jnp.zeros_like(positions),
            key_positions=positions,
            scale=scale,
            budget=budget,
        )
        return out, mask, real if expiry is None else real & (expiry == t)

    chosen = _common.choose_implementation(
        "prefill of selective attention",
        implementation,
        [("triton", kernels.unsupported(*arrays[:3], scale=scale, budget=budget))],
    )
    if chosen == "xla":
        return reference(*arrays)
    # Triton is an optional dependency.
    from jattn.pallas.selective import triton as kernel

    @jax.custom_vjp
    def attend(query, key, value, lengths):
        real = jnp.arange(t) < lengths[:, None]
        # What is all zeros selects nothing.
        selecting = jnp.where(real[..., None], query[:, :, 0], 0)
        query = query.at[:, :, 0].set(selecting)
        held = None if budget is None else jnp.int32(budget)
        out, mask, expiry = kernel.prefill(query, key, value, held, scale, skip_error)
        out = jnp.where(real[..., None, None], out, 0)
        # What padding drops is still there for the next token.
        return out, mask, real & (expiry >= lengths[:, None])

    def attend_forward(*arrays):
        return attend(*arrays), arrays

    def attend_backward(residuals, cotangents):
        *arrays, lengths = residuals
        _, pullback = jax.vjp(
            lambda query, key, value: reference(query, key, value, lengths)[:2], *arrays
        )
        return *pullback(cotangents[:2]), None

    attend.defvjp(attend_forward, attend_backward)
    return attend(*arrays)
