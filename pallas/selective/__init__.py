"""Selective Attention on a GPU: what its kernels support."""

import jax
import jax.numpy as jnp

from jattn.pallas import _triton

MAX_WIDTH = 256
# Query heads of a kv head are the rows of a tile in decoding.
MAX_GROUP = 64
# With a budget, a bit of each is in the registers of one program.
MAX_BUDGET_KEYS = 2**17


def unsupported(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    budget: int | jax.Array | None,
) -> str | None:
    """Why the Triton kernels do not support a call, or None.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, V].
      scale: Factor of the logits.
      budget: Most keys a query holds, or None.
    """
    if (reason := _unsupported_arrays(query, key, value, scale)) is not None:
        return reason
    if budget is not None and key.shape[1] > MAX_BUDGET_KEYS:
        return f"with a budget it takes {MAX_BUDGET_KEYS} keys, not {key.shape[1]}"
    return None


def decode_unsupported(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
) -> str | None:
    """Why the Triton kernel for one new token does not support a call, or None.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, V].
      mask: [B, S].
      scale: Factor of the logits.
    """
    if (reason := _unsupported_arrays(query, key, value, scale)) is not None:
        return reason
    if query.shape[1] > 1:
        return f"it takes one query a row, not {query.shape[1]}"
    if mask.dtype != jnp.float32:
        return f"mask must be fp32, not {mask.dtype}"
    group = query.shape[2] // key.shape[2]
    if group > MAX_GROUP:
        return f"at most {MAX_GROUP} query heads may share a kv head, not {group}"
    return None


def _unsupported_arrays(query, key, value, scale):
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
    return None
