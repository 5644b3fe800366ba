"""Attention over strided windows of tokens on a GPU: what its kernel supports."""

import jax
import jax.numpy as jnp

from jattn.pallas import _triton

MAX_WIDTH = 256


def unsupported(
    query: jax.Array, key: jax.Array, value: jax.Array, *, stride: int, scale: float
) -> str | None:
    """Why the Triton kernel does not support a call, or None.

    Args:
      query: [B, T, N, H].
      key: [B, M, K, H].
      value: [B, M, K, V].
      stride: Tokens between the first ones of two keys.
      scale: Factor of the logits.
    """
    if (reason := _triton.unavailable(90)) is not None:
        return reason
    dtypes = {x.dtype for x in (query, key, value)}
    if len(dtypes) > 1 or query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        names = ", ".join(sorted(map(str, dtypes)))
        return f"query, key and value must all be bf16, fp16 or fp32, not {names}"
    widths = query.shape[-1], value.shape[-1]
    if max(widths) > MAX_WIDTH:
        return f"heads may be at most {MAX_WIDTH} wide, not {max(widths)}"
    if any(width * query.dtype.itemsize % 16 for width in widths):
        return f"head widths must be multiples of 16 bytes, not {widths} {query.dtype}"
    if 0 in query.shape + value.shape:
        return "an array is empty"
    if scale <= 0:
        return f"scale must be positive, not {scale}"
    if max(query.shape[1] * query.shape[2], (key.shape[1] + 256) * stride) >= 2**30:
        return "it numbers tokens, and queries times heads, in 32 bits"
    return None
