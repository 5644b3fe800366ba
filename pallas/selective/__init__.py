"""Selective Attention on a GPU: what its kernels support."""

import jax
import jax.numpy as jnp

from jattn.pallas import _triton

MAX_WIDTH = 256


def unsupported(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    budget: int | None,
    memory_tau: float | None,
) -> str | None:
    """Why the Triton kernels do not support a call, or None.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, V].
      scale: Factor of the logits.
      budget: Most keys a query holds, or None.
      memory_tau: Tau of the memory term, or None.
    """
    if (reason := _triton.unavailable(90)) is not None:
        return reason
    dtypes = {x.dtype for x in (query, key, value)}
    if len(dtypes) > 1 or query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        names = ", ".join(sorted(map(str, dtypes)))
        return f"query, key and value must all be bf16, fp16 or fp32, not {names}"
    widest = max(query.shape[-1], value.shape[-1])
    if widest > MAX_WIDTH:
        return f"heads may be at most {MAX_WIDTH} wide, not {widest}"
    if 0 in query.shape + key.shape + value.shape:
        return "an array is empty"
    if scale <= 0:
        return f"scale must be positive, not {scale}"
    if budget is not None:
        return "it has no budget"
    if memory_tau is not None:
        return "it has no memory term"
    return None
