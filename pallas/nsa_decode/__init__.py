"""Native sparse attention of a few new tokens to a cache: what its kernels support."""

import jax
import jax.numpy as jnp

from jattn.pallas import _triton

MAX_QUERIES = 8
MAX_WIDTH = 256
MAX_GROUP = 64
# Scores of all blocks of a row are in the registers of one program.
MAX_BLOCKS = 2**15
# A tile holds the compressed tokens of a block, or of several.
MAX_CELLS = 128

Pair = tuple[jax.Array, jax.Array]


def unsupported(
    query: jax.Array,
    compressed: Pair,
    selected: Pair,
    window: Pair,
    *,
    block_size: int,
    stride: int,
    num_blocks: int,
) -> str | None:
    """Why the Triton kernels do not support a call, or None.

    Args:
      query: [B, T, N, H].
      compressed: Keys [B, M, K, H] and values [B, M, K, V].
      selected: Keys [B, S, K, H] and values [B, S, K, V].
      window: Keys [B, W, K, H] and values [B, W, K, V].
      block_size: Tokens in a selected block.
      stride: Tokens between the starts of compressed windows.
      num_blocks: Blocks a query reads.
    """
    if (reason := _triton.unavailable(90)) is not None:
        return reason
    arrays = (query, *compressed, *selected, *window)
    dtypes = {x.dtype for x in arrays}
    if not dtypes <= {jnp.dtype(x) for x in (jnp.bfloat16, jnp.float16, jnp.float32)}:
        names = ", ".join(sorted(map(str, dtypes)))
        return f"query, keys and values must be bf16, fp16 or fp32, not {names}"
    if (queries := query.shape[1]) > MAX_QUERIES:
        return f"at most {MAX_QUERIES} queries a row are decoded at once, not {queries}"
    widest = max(query.shape[-1], compressed[1].shape[-1])
    if widest > MAX_WIDTH:
        return f"heads may be at most {MAX_WIDTH} wide, not {widest}"
    group = query.shape[2] // selected[0].shape[2]
    if group > MAX_GROUP:
        return f"at most {MAX_GROUP} query heads may share a kv head, not {group}"
    if (cells := block_size // stride) > MAX_CELLS:
        return f"a block may be at most {MAX_CELLS} strides long, not {cells}"
    if (blocks := -(-selected[0].shape[1] // block_size)) > MAX_BLOCKS:
        return f"at most {MAX_BLOCKS} blocks may be cached, not {blocks}"
    if num_blocks * block_size >= 2**31:
        return "it numbers the keys of the selected blocks in 32 bits"
    if any(0 in x.shape for x in arrays):
        return "an array is empty"
    return None
