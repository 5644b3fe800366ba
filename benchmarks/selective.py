"""Selective Attention beside dense causal attention.

Inputs are N(0, 1) numbers. The selecting head's logits are then N(0, 1) as well, and a
query adds 0.4 to the F of every key before it on average. Where up to 1e-4 of the
softmax weight may be skipped, a tile of 64 keys is left out once all its F are past the
threshold of about 50, which is some 130 to 180 queries later: more than 80 % of the
tiles at 4096 tokens, and a larger part of more tokens. Packed, a row is one document.
"""

import functools

import jax.numpy as jnp

import jattn
from benchmarks.dense import attention_flops, causal_pairs, cudnn, normal
from benchmarks.measure import Case
from benchmarks.ops import Tuning
from jattn.pallas.selective import mosaic, mosaic_key_gradient, mosaic_query_gradient
from jattn.pallas.selective.work import Tiling

# Far below what bf16 can tell apart.
SKIP_ERROR = 1e-4

SHAPES = {
    "16/16, 4k": dict(batch=4, heads=16, kv_heads=16, length=4096, width=64),
    "32/8, 32k": dict(batch=1, heads=32, kv_heads=8, length=32768, width=128),
    "32/8, 8k": dict(batch=2, heads=32, kv_heads=8, length=8192, width=128),
    "16/16, 1k": dict(batch=16, heads=16, kv_heads=16, length=1024, width=64),
    "16/16, 4k, 96 wide": dict(batch=4, heads=16, kv_heads=16, length=4096, width=96),
    "16/16, 4k, 32 wide": dict(batch=4, heads=16, kv_heads=16, length=4096, width=32),
}

# What Mosaic does not support, and Triton does.
IN_TRITON = ["16/16, 4k, 32 wide"]
IN_MOSAIC = [name for name in SHAPES if name not in IN_TRITON]

TUNING = {
    "selective_forward_mosaic": Tuning(
        [
            mosaic.Tiling(heads, cluster, keys, query_slots, slots, bias_slots, 132)
            for heads, keys, query_slots, slots, bias_slots in (
                (1, 128, 1, 5, 2),
                (1, 128, 2, 4, 2),
                (1, 64, 2, 5, 2),
                (2, 128, 1, 4, 2),
                (2, 128, 1, 6, 3),
                (2, 64, 1, 8, 4),
            )
            for cluster in (1, 2)
        ],
        case="jattn",
        direction="forward",
        shapes=IN_MOSAIC,
    ),
    "selective_forward": Tuning(
        [
            Tiling(rows=64, keys=64, warps=4, stages=2, heads=1),
            Tiling(rows=64, keys=64, warps=4, stages=3, heads=1),
            Tiling(rows=64, keys=64, warps=4, stages=2, heads=1, registers=168),
            Tiling(rows=64, keys=64, warps=4, stages=2, heads=2),
            Tiling(rows=64, keys=64, warps=4, stages=3, heads=2),
            Tiling(rows=64, keys=64, warps=4, stages=2, heads=4),
            Tiling(rows=128, keys=64, warps=4, stages=2, heads=1),
            Tiling(rows=128, keys=64, warps=4, stages=3, heads=1, ahead=False),
            Tiling(rows=128, keys=128, warps=8, stages=2, heads=4),
        ],
        case="jattn",
        direction="forward",
        shapes=IN_TRITON,
    ),
    "selective_query_gradient": Tuning(
        [
            Tiling(rows=64, keys=64, warps=4, stages=2, heads=1),
            Tiling(rows=64, keys=64, warps=4, stages=2, heads=1, ahead=False),
            Tiling(rows=64, keys=64, warps=4, stages=2, heads=2),
            Tiling(rows=64, keys=64, warps=4, stages=3, heads=1),
            Tiling(rows=128, keys=64, warps=8, stages=3, heads=1),
        ],
        case="jattn",
        direction="backward",
        shapes=IN_TRITON,
    ),
    "selective_key_gradient": Tuning(
        [
            Tiling(rows=32, keys=64, warps=4, stages=2, heads=4),
            Tiling(rows=32, keys=128, warps=8, stages=2, heads=4),
            Tiling(rows=32, keys=128, warps=8, stages=3, heads=4),
            Tiling(rows=64, keys=64, warps=4, stages=2, heads=2),
            Tiling(rows=64, keys=64, warps=4, stages=2, heads=4),
            Tiling(rows=64, keys=64, warps=4, stages=3, heads=4),
            Tiling(rows=64, keys=128, warps=8, stages=3, heads=1),
        ],
        case="jattn",
        direction="backward",
        shapes=IN_TRITON,
    ),
    "selective_key_gradient_mosaic": Tuning(
        [
            mosaic_key_gradient.Tiling(pack, kv_heads, slots, 132, ahead)
            for pack, kv_heads in ((1, 1), (1, 2), (2, 1), (4, 1))
            for slots in (2, 3, 4)
            for ahead in (False, True)
        ],
        case="jattn",
        direction="backward",
        shapes=IN_MOSAIC,
    ),
    "selective_query_gradient_mosaic": Tuning(
        [
            mosaic_query_gradient.Tiling(pack, kv_heads, slots, programs=132)
            for pack, kv_heads in ((1, 1), (1, 2), (2, 1), (4, 1))
            for slots in (2, 3)
        ],
        case="jattn",
        direction="backward",
        shapes=IN_MOSAIC,
    ),
    "selective_mask_gradient": Tuning(
        [
            Tiling(rows=32, keys=128, warps=8, stages=2),
            Tiling(rows=64, keys=64, warps=4, stages=2),
            Tiling(rows=64, keys=64, warps=4, stages=3),
            Tiling(rows=64, keys=64, warps=4, stages=2, ahead=False),
            Tiling(rows=64, keys=128, warps=8, stages=2),
            Tiling(rows=128, keys=64, warps=8, stages=2, ahead=False),
        ],
        case="jattn",
        direction="backward",
    ),
}


def cases(
    *, batch: int, length: int, heads: int, kv_heads: int, width: int
) -> dict[str, Case]:
    """The operation without and with skipping, and dense attention by cuDNN.

    Packed, each row is one document: the least that documents cost.

    Args:
      batch: Sequences.
      length: Of each.
      heads: Query heads.
      kv_heads: Key-value heads.
      width: That of the heads.
    """
    arrays = normal(
        (batch, length, heads, width), *[(batch, length, kv_heads, width)] * 2
    )
    pairs = batch * causal_pairs(length)
    case = functools.partial(Case, **attention_flops(pairs, heads, width))
    attend = functools.partial(jattn.selective_attention, implementation="triton")
    skipping = functools.partial(attend, skip_error=SKIP_ERROR)
    documents = jnp.ones((batch, length), jnp.int32)
    return {
        "jattn": case(attend, arrays),
        "jattn packed": case(functools.partial(attend, segment_ids=documents), arrays),
        "jattn, skipping": case(skipping, arrays),
        "cudnn": cudnn(*arrays),
    }
