"""Attention over strided windows of tokens on a GPU: what its kernel supports."""

import jax
import jax.numpy as jnp

from jattn.pallas import _device, _mosaic, _triton

MAX_WIDTH = 256

# Of a consumer's tile in the Mosaic forward kernel: tokens times heads of a kv head.
ROWS = 64
MIN_CONSUMERS = 2


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


def unsupported_mosaic_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    packed: bool,
    kernel_size: int,
    stride: int,
    window: int | None,
    length: int,
) -> str | None:
    """Why the Mosaic kernel does not support a call that Triton's supports, or None.

    Args:
      query: [B, T, N, H], the last T of `length` positions.
      key: [B, M, K, H].
      value: [B, M, K, V].
      packed: Whether there are several documents.
      kernel_size: Tokens that a key stands for.
      stride: Tokens between the first ones of two keys.
      window: Tokens back from the query, itself counted, among which a key's first has
        to be; None for no limit.
      length: Tokens of the sequence.
    """
    if reason := _mosaic.unsupported(query, value, packed=packed):
        return reason
    batch, queries, heads, _ = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    if ROWS % group:
        return f"query heads that share a kv head must divide {ROWS}, not be {group}"
    if length < kernel_size or (window is not None and window < kernel_size):
        return "no query sees a key"
    # Each item of work has a multiprocessor to itself.
    items = batch * kv_heads * -(-queries * group // (MIN_CONSUMERS * ROWS))
    if items < _device.multiprocessors():
        return f"{items} tiles of rows do not keep the GPU busy"
    if batch * queries * heads >= 2**31:
        return "it numbers rows in 32 bits"
    return None
