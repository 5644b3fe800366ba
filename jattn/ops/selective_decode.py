"""Selective Attention of one new token in each row to a cache."""

import jax

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
        out, _, _, mask = attend_positions(
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
