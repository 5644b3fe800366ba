"""Choosing blocks of keys, alone, beside dense causal attention.

`nsa` has 64 heads on 4 kv heads with a list each, of 16 blocks of 64 keys, chosen by
windows of 32 keys every 16; `moba` has 16 heads with a list each, of 8 blocks of 128.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import jattn
from benchmarks.block_sparse import SCHEMES
from benchmarks.dense import cudnn, normal
from benchmarks.measure import Case
from benchmarks.ops import Tuning
from jattn.ops.compressed import num_windows
from jattn.ops.nsa_selection import select_blocks_by_lse
from jattn.pallas.selection import mosaic
from jattn.pallas.selection.triton import RowTiling, Tiling

KERNEL_SIZE, STRIDE = 32, 16

SHAPES = {
    f"{name}, {length}k": sizes | {"scheme": name.split()[0], "length": length * 1024}
    for name, sizes in SCHEMES.items()
    for length in (8, 16, 32, 64, 128)
}
NSA_SHAPES = [name for name in SHAPES if name.startswith("nsa")]
MOBA_SHAPES = [name for name in SHAPES if name.startswith("moba")]

TUNING = {
    "selection_scores": Tuning(
        [
            Tiling(rows=64, columns=128, warps=4, stages=2),
            Tiling(rows=64, columns=128, warps=4, stages=2, registers=168),
            Tiling(rows=64, columns=128, warps=4, stages=3),
            Tiling(rows=64, columns=128, warps=8, stages=2, registers=128),
            Tiling(rows=64, columns=256, warps=8, stages=2),
            Tiling(rows=64, columns=256, warps=8, stages=3),
            Tiling(rows=128, columns=128, warps=8, stages=2),
            Tiling(rows=128, columns=128, warps=8, stages=4),
        ],
        case="lse given, packed",
        direction="forward",
        shapes=NSA_SHAPES,
    ),
    "selection_scores_mosaic": Tuning(
        [
            mosaic.Tiling(3, tiles, slots, key_slots, programs=132, turns=turns)
            for slots, key_slots in ((7, 1), (2, 2))
            for tiles in (1, 2)
            for turns in (False, True)
        ],
        case="lse given",
        direction="forward",
        # With fewer queries there are too few tiles for it.
        shapes=[name for name in NSA_SHAPES if name != "nsa 64/4, 8k"],
    ),
    "selection_log_sum_exp": Tuning(
        [
            Tiling(rows=64, columns=128, warps=4, stages=2),
            Tiling(rows=64, columns=128, warps=4, stages=3),
            Tiling(rows=128, columns=64, warps=4, stages=3),
            Tiling(rows=128, columns=128, warps=8, stages=2),
            Tiling(rows=128, columns=128, warps=8, stages=4),
        ],
        case="jattn",
        direction="forward",
        shapes=NSA_SHAPES,
    ),
    "selection_affinities": Tuning(
        [
            Tiling(rows=64, columns=64, warps=4, stages=2),
            Tiling(rows=64, columns=128, warps=4, stages=2),
            Tiling(rows=128, columns=64, warps=4, stages=2),
            Tiling(rows=128, columns=64, warps=8, stages=2),
            Tiling(rows=128, columns=128, warps=8, stages=3),
        ],
        case="jattn",
        direction="forward",
        shapes=MOBA_SHAPES,
    ),
    "selection_best_blocks": Tuning(
        [
            RowTiling(rows=1, warps=1),
            RowTiling(rows=2, warps=1),
            RowTiling(rows=4, warps=1),
            RowTiling(rows=1, warps=2),
            RowTiling(rows=4, warps=4),
            RowTiling(rows=8, warps=4),
        ],
        case="jattn",
        direction="forward",
    ),
}


def cases(
    *,
    scheme: str,
    length: int,
    heads: int,
    kv_heads: int,
    block_size: int,
    num_blocks: int,
    width: int = 128,
    implementation: str = "triton",
) -> dict[str, Case]:
    """The operation, also in jnp, and dense causal attention by cuDNN.

    Args:
      scheme: "nsa" or "moba".
      length: Of the one sequence.
      heads: Query heads.
      kv_heads: Key-value heads.
      block_size: Keys in a block.
      num_blocks: Blocks in a list.
      width: That of the heads.
      implementation: Which form of the operation.
    """
    query, key, value = normal(
        (1, length, heads, width), *[(1, length, kv_heads, width)] * 2
    )
    product = 2 * heads * width  # of a query and a key, over the heads
    baseline = {"cudnn": cudnn(query, key, value)}
    if scheme == "moba":
        select = functools.partial(
            jattn.moba_select_blocks, block_size=block_size, top_k=num_blocks
        )
        flops = product * sum(t // block_size for t in range(length))
        return {
            "jattn": _case(select, implementation, (query, key), flops),
            "xla": _case(select, "xla", (query, key), flops),
        } | baseline
    windows: dict[str, Any] = {"kernel_size": KERNEL_SIZE, "stride": STRIDE}
    key_cmp = jattn.nsa_windows(key, **windows).mean(axis=2)
    _, lse = jattn.compressed_attention(
        query, key_cmp, key_cmp, return_lse=True, **windows
    )
    select = functools.partial(
        jattn.nsa_select_blocks, block_size=block_size, num_blocks=num_blocks, **windows
    )
    select_by_lse = functools.partial(
        select_blocks_by_lse,
        block_size=block_size,
        num_blocks=num_blocks,
        num_initial=1,
        num_local=2,
        length=length,
        scale=None,
        **windows,
    )
    # One document, but the kernels do not know.
    segment_ids = jnp.zeros((1, length), jnp.int32)
    packed = functools.partial(select_by_lse, segment_ids=segment_ids)
    select_by_lse = functools.partial(select_by_lse, segment_ids=None)
    flops = product * sum(
        num_windows(t, KERNEL_SIZE, STRIDE) for t in range(1, length + 1)
    )
    return {
        "jattn": _case(select, implementation, (query, key_cmp), flops),
        "lse given": _case(select_by_lse, implementation, (query, key_cmp, lse), flops),
        "lse given, packed": _case(
            packed, implementation, (query, key_cmp, lse), flops
        ),
        "xla": _case(select, "xla", (query, key_cmp), flops),
    } | baseline


def _case(select, implementation: str, arrays: tuple[jax.Array, ...], flops: int):
    """A selection, which has no gradient."""
    function = functools.partial(select, implementation=implementation)
    return Case(function, arrays, flops=flops, backward_flops=0)
