"""Attention to chosen blocks of keys on a GPU: what its kernel supports."""

import jax
import jax.numpy as jnp

from jattn.pallas import _mosaic, _triton
from jattn.pallas.block_sparse.pairs import kernel_block, portions

MAX_WIDTH = 256
MAX_GROUP = 32


def unsupported(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_indices: jax.Array,
    block_size: int,
    scale: float,
) -> str | None:
    """Why the Triton kernel does not support a call, or None.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, V].
      block_indices: int [B, T, K, n] or [B, T, N, n].
      block_size: Keys in a block.
      scale: Factor of the logits.
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
    group = query.shape[2] // block_indices.shape[2]
    if group > MAX_GROUP:
        return f"at most {MAX_GROUP} query heads may share a list, not {group}"
    if block_size % 16:
        return f"block_size must be a multiple of 16, not {block_size}"
    if scale <= 0:
        return f"scale must be positive, not {scale}"
    if 0 in query.shape + value.shape + block_indices.shape:
        return "an array is empty"
    b, k = query.shape[0], key.shape[2]
    block = kernel_block(query, value, block_size)
    slots = block_indices.shape[-1] * (block_size // block)
    blocks = -(-key.shape[1] // block)
    rows = portions(query, k, slots, widest, 1)
    # Chunks may be rounded up to whole tiles.
    tokens = query.shape[1] + rows.chunks * block
    pairs = b * tokens * block_indices.shape[2] * slots
    if max(pairs, rows.chunks * b * k * (blocks + 1)) >= 2**31:
        return "it numbers pairs of a query and a block in 32 bits"
    return None


def unsupported_mosaic(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_indices: jax.Array,
    block_size: int,
    packed: bool,
) -> str | None:
    """Why Mosaic's kernels do not make the partial results of a call, or None.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, V].
      block_indices: int [B, T, K, n] or [B, T, N, n].
      block_size: Keys in a block.
      packed: Whether there are documents.
    """
    if (reason := _mosaic.unavailable()) is not None:
        return reason
    if packed:
        return "documents are not supported"
    if query.dtype.itemsize > 2:
        return f"arrays must be bf16 or fp16, not {query.dtype}"
    width, group = query.shape[-1], query.shape[2] // block_indices.shape[2]
    if (width, value.shape[-1]) != (128, 128):
        return f"heads must be 128 wide, not {width} and {value.shape[-1]}"
    if group != 16:
        # Of smaller groups it would make many small copies.
        return f"16 query heads must share a list, not {group}"
    if block_size % 64:
        return f"block_size must be a multiple of 64, not {block_size}"
    if (keys := block_indices.shape[-1] * block_size) > 8192:
        return f"a list may be of at most 8192 keys, not {keys}"
    return None
