"""Choosing blocks of keys on a GPU: what its kernels support."""

import jax
import jax.numpy as jnp

from jattn.pallas import _device, _mosaic, _triton

MAX_WIDTH = 256
MAX_GROUP = 64
MAX_CELLS = 64
MAX_BLOCKS = 16384

# Of a consumer's tile in the Mosaic kernel: queries, and compressed keys.
ROWS, COLUMNS = 64, 128
# Tiles of queries for each multiprocessor from which on that kernel is faster.
MIN_TILES = 4


def unsupported(
    query: jax.Array,
    key: jax.Array,
    *,
    lists: int,
    blocks: int,
    cells: int = 1,
    scale: float = 1.0,
) -> str | None:
    """Why the Triton kernels do not support a call, or None.

    Args:
      query: [B, T, N, H].
      key: [B, M, K, H], compressed or mean keys.
      lists: Lists of blocks for each query: K or N.
      blocks: Blocks to choose from.
      cells: Windows that start in a block.
      scale: Factor of the logits.
    """
    if (reason := _triton.unavailable(90)) is not None:
        return reason
    if query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"query must be bf16, fp16 or fp32, not {query.dtype}"
    if key.dtype not in (query.dtype, jnp.float32):
        return f"keys must be {query.dtype} or fp32 as query is, not {key.dtype}"
    if query.shape[-1] > MAX_WIDTH:
        return f"heads may be at most {MAX_WIDTH} wide, not {query.shape[-1]}"
    group = query.shape[2] // key.shape[2]
    if group > MAX_GROUP:
        return f"at most {MAX_GROUP} query heads may share a kv head, not {group}"
    if cells > MAX_CELLS:
        return f"a block may be at most {MAX_CELLS} strides long, not {cells}"
    if blocks > MAX_BLOCKS:
        return f"there may be at most {MAX_BLOCKS} blocks, not {blocks}"
    if scale <= 0:
        return f"scale must be positive, not {scale}"
    if 0 in query.shape + key.shape:
        return "an array is empty"
    if query.shape[0] * lists >= 2**16:
        return "a grid has fewer than 65536 rows of programs"
    return None


def unsupported_mosaic(
    query: jax.Array, key: jax.Array, *, packed: bool, cells: int
) -> str | None:
    """Why the Mosaic kernel does not support a call that Triton's supports, or None.

    Args:
      query: [B, T, N, H].
      key: [B, M, K, H], compressed.
      packed: Whether there are several documents.
      cells: Windows that start in a block.
    """
    if (reason := _mosaic.unavailable()) is not None:
        return reason
    if packed:
        return "it knows no documents"
    if query.dtype not in (jnp.bfloat16, jnp.float16) or key.dtype != query.dtype:
        return f"query and key must both be bf16 or fp16, not {query.dtype, key.dtype}"
    if query.shape[-1] not in (64, 128):
        return f"heads must be 64 or 128 wide, not {query.shape[-1]}"
    if cells not in (1, 2, 4, 8, 16):
        return f"a block must be 1, 2, 4, 8 or 16 strides long, not {cells}"
    tiles = query.shape[0] * key.shape[2] * -(-query.shape[1] // ROWS)
    if tiles < MIN_TILES * _device.multiprocessors():
        return f"{tiles} tiles of queries do not keep the GPU busy"
    return None
