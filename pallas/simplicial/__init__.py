"""2-simplicial attention on a GPU: what its kernels support."""

import jax
import jax.numpy as jnp

from jattn.pallas import _device, _mosaic, _triton

MAX_WIDTH = 256

# Of fewer pairs, the gradient of a logit is the difference of two numbers that 16 bits
# round differently: with a single pair nothing but that is left.
MIN_PAIRS_OF_16_BITS = 32

# Rows in a tile of the Mosaic kernel: heads that share a kv head, or one head at that
# many positions, whose steps through the larger window reach far beyond a small one.
ROWS = 64
MIN_KEYS, MIN_KEYS_OF_ONE_HEAD = 64, 256


def unsupported(
    query: jax.Array,
    few_key: jax.Array,
    few_value: jax.Array,
    many_key: jax.Array,
    many_value: jax.Array,
    *,
    few_window: int,
    many_window: int,
    scale: float,
) -> str | None:
    """Why the Triton kernels do not support a call, or None.

    Args:
      query: [B, T, N, H].
      few_key: [B, F, K, H], the keys with the smaller window.
      few_value: [B, F, K, V].
      many_key: [B, M, K, H].
      many_value: [B, M, K, V].
      few_window: Keys that a query sees of the one set at most.
      many_window: Of the other.
      scale: Factor of the logits.
    """
    if (reason := _triton.unavailable(90)) is not None:
        return reason
    arrays = (query, few_key, few_value, many_key, many_value)
    dtypes = {x.dtype for x in (query, many_key, many_value)}
    # What has a constant added to it is not rounded before it multiplies.
    dtypes |= {x.dtype for x in (few_key, few_value)} - {jnp.dtype(jnp.float32)}
    if len(dtypes) > 1 or query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        names = ", ".join(sorted(map(str, dtypes)))
        return f"queries, keys and values must all be bf16, fp16 or fp32, not {names}"
    widest = max(query.shape[-1], few_value.shape[-1])
    if widest > MAX_WIDTH:
        return f"logits and values may be at most {MAX_WIDTH} wide, not {widest}"
    if any(0 in x.shape for x in arrays):
        return "an array is empty"
    if scale <= 0:
        return f"scale must be positive, not {scale}"
    pairs = min(few_window, few_key.shape[1]) * min(many_window, many_key.shape[1])
    if query.dtype.itemsize < 4 and pairs < MIN_PAIRS_OF_16_BITS:
        return f"the gradients of {pairs} pairs need more than 16 bits"
    if max(x.size // x.shape[0] for x in arrays[1:]) >= 2**31:
        return "it numbers the keys' elements of a batch row in 32 bits"
    return None


def unsupported_mosaic(
    query: jax.Array,
    few_key: jax.Array,
    few_value: jax.Array,
    many_key: jax.Array,
    many_value: jax.Array,
    *,
    few_window: int,
    many_window: int,
    scale: float,
    limited: bool,
) -> str | None:
    """Why the Mosaic kernel, with Triton's for gradients, does not support a call.

    Args:
      query: [B, T, N, H].
      few_key: [B, F, K, H], the keys with the smaller window.
      few_value: [B, F, K, V].
      many_key: [B, M, K, H].
      many_value: [B, M, K, V].
      few_window: Keys that a query sees of the one set at most.
      many_window: Of the other.
      scale: Factor of the logits.
      limited: Whether anything but the windows limits what a query sees.

    Returns:
      The reason, or None if it is supported.
    """
    arrays = (query, few_key, few_value, many_key, many_value)
    if (reason := _mosaic.unavailable()) is not None:
        return reason
    windows = {"few_window": few_window, "many_window": many_window}
    if (reason := unsupported(*arrays, **windows, scale=scale)) is not None:
        return reason
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries, keys and values must be bf16 or fp16, not {query.dtype}"
    widths = query.shape[-1], few_value.shape[-1]
    if widths not in ((64, 64), (128, 128)):
        return f"keys and values must both be 64 or 128 wide, not {widths}"
    group = query.shape[2] // few_key.shape[2]
    if group > 1 and group % ROWS:
        return (
            f"one query head or a multiple of {ROWS} must have a kv head, not {group}"
        )
    if group == 1 and (limited or few_key.dtype != query.dtype or widths[0] < 128):
        return (
            "where each query head has its own kv head, it is for keys 128 wide "
            "without constants, of one document and not from a cache"
        )
    least = MIN_KEYS if group > 1 else MIN_KEYS_OF_ONE_HEAD
    if many_window < least:
        return f"the larger window must be of at least {least} keys"
    # Each item of work has a multiprocessor to itself; Triton's kernel divides them.
    batch, queries, heads, _ = query.shape
    items = batch * queries * heads // ROWS
    if items < _device.multiprocessors():
        return f"{items} tiles of {ROWS} rows do not keep the GPU busy"
    if items >= 2**31:
        return "it numbers tiles in 32 bits"
    return None
