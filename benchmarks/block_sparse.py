"""Attention to given blocks of keys, beside dense causal attention.

The blocks are random: the query's own, the one before it, the first, and any others
before it. `moba` has 16 heads with a list each, of 8 blocks of 128 keys; `nsa` has 64
heads on 4 kv heads with a list each, of 16 blocks of 64.
"""

import functools
import math

import jax
import jax.numpy as jnp

import jattn
from benchmarks.dense import attention_flops, cudnn, normal
from benchmarks.measure import Case
from benchmarks.ops import Tuning
from jattn.pallas.block_sparse import mosaic, mosaic_backward
from jattn.pallas.block_sparse.launch import RowTiling, Tiling

SCHEMES = {
    "moba 16/16": dict(heads=16, kv_heads=16, block_size=128, num_blocks=8),
    "nsa 64/4": dict(heads=64, kv_heads=4, block_size=64, num_blocks=16),
}
SHAPES = {
    f"{name}, {length}k": sizes | {"length": length * 1024}
    for name, sizes in SCHEMES.items()
    for length in (8, 16, 32, 64, 128)
}

# Mosaic's kernels are for groups of 16 heads.
IN_MOSAIC = [name for name in SHAPES if name.startswith("nsa")]
IN_TRITON = [name for name in SHAPES if name not in IN_MOSAIC]

TUNING = {
    "block_sparse_forward": Tuning(
        [
            Tiling(rows=64, tiles=8, warps=4, stages=1, registers=128),
            Tiling(rows=64, tiles=16, warps=4, stages=1),
            Tiling(rows=64, tiles=16, warps=4, stages=2),
            Tiling(rows=64, tiles=16, warps=4, stages=3),
            Tiling(rows=64, tiles=32, warps=4, stages=1, registers=128),
            Tiling(rows=128, tiles=8, warps=4, stages=1),
            Tiling(rows=128, tiles=8, warps=8, stages=1),
            Tiling(rows=128, tiles=16, warps=8, stages=2),
        ],
        case="jattn",
        direction="forward",
        shapes=IN_TRITON,
    ),
    "block_sparse_combine": Tuning(
        [
            RowTiling(rows=128, warps=8, stages=1),
            RowTiling(rows=128, warps=8, stages=2, registers=128),
            RowTiling(rows=64, warps=4, stages=1, registers=168),
            RowTiling(rows=64, warps=8, stages=1),
            RowTiling(rows=64, warps=8, stages=1, registers=80),
            RowTiling(rows=64, warps=8, stages=2),
        ],
        case="jattn",
        direction="forward",
        shapes=IN_TRITON,
    ),
    "block_sparse_forward_mosaic": Tuning(
        [
            mosaic.Tiling(consumers=2, slots=3, programs=132),
            mosaic.Tiling(consumers=2, slots=2, programs=132),
            mosaic.Tiling(consumers=3, slots=2, programs=264),
        ],
        case="jattn",
        direction="forward",
        shapes=IN_MOSAIC,
    ),
    "block_sparse_merge": Tuning(
        [
            RowTiling(rows=16, warps=1, stages=1),
            RowTiling(rows=16, warps=1, stages=4),
            RowTiling(rows=16, warps=2, stages=4),
            RowTiling(rows=32, warps=2, stages=2),
            RowTiling(rows=64, warps=4, stages=2),
        ],
        case="jattn",
        direction="forward",
        shapes=IN_MOSAIC,
    ),
    "block_sparse_backward": Tuning(
        [
            Tiling(rows=64, tiles=32, warps=4, stages=2),
            Tiling(rows=64, tiles=64, warps=4, stages=1),
            Tiling(rows=64, tiles=64, warps=4, stages=3),
            Tiling(rows=64, tiles=64, warps=8, stages=2),
            Tiling(rows=64, tiles=128, warps=4, stages=2),
            Tiling(rows=128, tiles=32, warps=8, stages=1),
            Tiling(rows=128, tiles=32, warps=8, stages=2),
        ],
        case="jattn",
        direction="backward",
        shapes=IN_TRITON,
    ),
    "block_sparse_backward_mosaic": Tuning(
        [mosaic_backward.Tiling(programs=264)],
        case="jattn",
        direction="backward",
        shapes=IN_MOSAIC,
    ),
}


def cases(
    *,
    length: int,
    heads: int,
    kv_heads: int,
    block_size: int,
    num_blocks: int,
    width: int = 128,
    implementation: str = "triton",
) -> dict[str, Case]:
    """The kernel, and dense causal attention by cuDNN.

    Args:
      length: Of the one sequence.
      heads: Query heads.
      kv_heads: Key-value heads, with a list of blocks each.
      block_size: Keys in a block.
      num_blocks: Blocks in a list.
      width: That of the heads.
      implementation: Which form of the operation.
    """
    query, key, value = normal(
        (1, length, heads, width), *[(1, length, kv_heads, width)] * 2
    )
    kernel = functools.partial(
        jattn.block_sparse_attention,
        block_size=block_size,
        implementation=implementation,
    )
    flops = attention_flops(
        selected_pairs(length, block_size, num_blocks), heads, width
    )
    blocks = random_blocks(length, kv_heads, block_size, num_blocks)
    return {
        "jattn": Case(kernel, (query, key, value), constants=(blocks,), **flops),
        "cudnn": cudnn(query, key, value),
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def random_blocks(
    length: int, kv_heads: int, block_size: int, num_blocks: int
) -> jax.Array:
    """Blocks int32 [1, length, kv_heads, num_blocks], -1 where there are no more."""
    own = jnp.arange(length)[:, None, None] // block_size
    block = jnp.arange(math.ceil(length / block_size))
    scores = jax.random.uniform(jax.random.key(1), (length, kv_heads, block.size))
    scores = jnp.where((block == 0) | (block >= own - 1), 2, scores)
    scores = jnp.where(block <= own, scores, -1)
    best, chosen = jax.lax.top_k(scores, num_blocks)
    return jnp.where(best < 0, -1, chosen)[None].astype(jnp.int32)


def selected_pairs(length: int, block_size: int, num_blocks: int) -> int:
    """Pairs (query, key) in distinct blocks, the own one among them."""
    others = num_blocks - 1
    return sum(
        t % block_size + 1 + block_size * min(others, t // block_size)
        for t in range(length)
    )
