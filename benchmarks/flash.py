"""Attention to compressed tokens, to a sliding window and to everything before.

Beside dense causal attention by cuDNN, and for windows its sliding-window attention.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from benchmarks.dense import attention_flops, cudnn, normal
from benchmarks.measure import Case
from benchmarks.ops import Tuning
from jattn.ops.compressed import num_windows
from jattn.pallas.flash import mosaic, mosaic_key_gradient, mosaic_query_gradient
from jattn.pallas.flash.triton import SplitTiling, Tiling

GROUPED = dict(heads=64, kv_heads=4)
UNGROUPED = dict(heads=16, kv_heads=16)
COMPRESSED = dict(kernel_size=32, stride=16)
SHAPES = {
    **{
        f"compressed 64/4, {n}k": GROUPED | COMPRESSED | {"length": n * 1024}
        for n in (8, 16, 32, 64, 128)
    },
    **{
        f"window 64/4, {n}k": GROUPED | {"window": 512, "length": n * 1024}
        for n in (8, 16, 32, 64, 128)
    },
    **{f"dense 64/4, {n}k": GROUPED | {"length": n * 1024} for n in (2, 8, 32)},
    "compressed 16/16, 32k": UNGROUPED | COMPRESSED | {"length": 32768},
    "window 16/16, 32k": UNGROUPED | {"window": 512, "length": 32768},
    "dense 16/16, 8k": UNGROUPED | {"length": 8192},
}

TUNING = {
    "flash_forward": Tuning(
        [
            Tiling(rows=128, keys=128, warps=8, stages=3),
            Tiling(rows=128, keys=64, warps=8, stages=3),
            Tiling(rows=128, keys=64, warps=4, stages=2),
            Tiling(rows=64, keys=64, warps=4, stages=2),
            Tiling(rows=64, keys=64, warps=4, stages=3),
            Tiling(rows=64, keys=128, warps=4, stages=1),
            Tiling(rows=64, keys=128, warps=4, stages=2),
        ],
        case="jattn packed",
        direction="forward",
    ),
    "flash_forward_mosaic": Tuning(
        [
            mosaic.Tiling(consumers, cluster, keys, edge, slots, programs=132)
            for consumers, keys, edge, slots in (
                (2, 128, 128, 5),
                (2, 128, 64, 5),
                (3, 64, 64, 7),
            )
            for cluster in (1, 2)
        ],
        case="jattn",
        direction="forward",
    ),
    "flash_query_gradient": Tuning(
        [
            Tiling(rows=128, keys=64, warps=8, stages=3),
            Tiling(rows=128, keys=128, warps=8, stages=1),
            Tiling(rows=128, keys=128, warps=8, stages=2),
            Tiling(rows=64, keys=64, warps=4, stages=1),
            Tiling(rows=64, keys=64, warps=4, stages=2),
            Tiling(rows=64, keys=128, warps=4, stages=1),
        ],
        case="jattn packed",
        direction="backward",
    ),
    "flash_key_gradient": Tuning(
        [
            SplitTiling(rows=64, keys=128, warps=8, stages=2, programs=132),
            SplitTiling(rows=64, keys=128, warps=8, stages=2, programs=264),
            SplitTiling(rows=64, keys=128, warps=8, stages=2, programs=528),
            SplitTiling(rows=64, keys=128, warps=8, stages=2, programs=1056),
            SplitTiling(rows=64, keys=128, warps=8, stages=3, programs=264),
            SplitTiling(rows=32, keys=128, warps=8, stages=3, programs=264),
            SplitTiling(rows=64, keys=64, warps=4, stages=2, programs=264),
            SplitTiling(rows=64, keys=64, warps=4, stages=2, programs=528),
            SplitTiling(rows=64, keys=64, warps=4, stages=2, programs=1056),
        ],
        case="jattn packed",
        direction="backward",
    ),
    "flash_query_gradient_mosaic": Tuning(
        [
            mosaic_query_gradient.Tiling(slots=2, programs=132),
            mosaic_query_gradient.Tiling(slots=3, programs=132),
        ],
        case="jattn",
        direction="backward",
    ),
    "flash_key_gradient_mosaic": Tuning(
        [
            mosaic_key_gradient.Tiling(slots=slots, programs=programs)
            for slots in (3, 4)
            for programs in (264, 528, 1056, 2112)
        ],
        case="jattn",
        direction="backward",
    ),
}


def cases(
    *,
    length: int,
    heads: int,
    kv_heads: int,
    kernel_size: int = 1,
    stride: int = 1,
    window: int | None = None,
    width: int = 128,
    implementation: str = "triton",
) -> dict[str, Case]:
    """The kernel, and what cuDNN has instead.

    Args:
      length: Of the one sequence.
      heads: Query heads.
      kv_heads: Key-value heads.
      kernel_size: Tokens that a key stands for; 1 for dense attention.
      stride: Tokens between the first ones of two keys.
      window: Keys that a query sees in dense attention; None for all before it.
      width: That of the heads.
      implementation: Which form of the operation.
    """
    keys = num_windows(length, kernel_size, stride)
    query, key, value, *whole = normal(
        (1, length, heads, width),
        *[(1, keys, kv_heads, width)] * 2,
        *[(1, length, kv_heads, width)] * 2,
    )
    if kernel_size > 1:
        function = functools.partial(
            jattn.compressed_attention, kernel_size=kernel_size, stride=stride
        )
    else:
        function = functools.partial(jattn.dense_attention, window=window)
    function = functools.partial(function, implementation=implementation)
    position = np.arange(length)
    pairs = (position - kernel_size + 1) // stride + 1
    if window is not None:
        pairs = np.minimum(pairs, window)
    flops = attention_flops(int(np.maximum(pairs, 0).sum()), heads, width)
    found = {
        "jattn": Case(function, (query, key, value), **flops),
        "cudnn": cudnn(query, whole[0], whole[1]),
    }
    # Packed documents have kernels of their own; here there is one.
    packed = functools.partial(function, segment_ids=jnp.ones((1, length), jnp.int32))
    found["jattn packed"] = Case(packed, (query, key, value), **flops)
    if window is not None:
        windowed = functools.partial(
            jax.nn.dot_product_attention,
            is_causal=True,
            local_window_size=(window - 1, 0),
            implementation="cudnn",
        )
        found["cudnn window"] = Case(windowed, (query, key, value), **flops)
    return found
