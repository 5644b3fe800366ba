"""Mixture of block attention, which chooses its blocks on the clock."""

import functools

import jattn
from benchmarks.block_sparse import SCHEMES, selected_pairs
from benchmarks.dense import attention_flops, cudnn, normal
from benchmarks.measure import Case

SHAPES = {
    f"{length}k": SCHEMES["moba 16/16"] | {"length": length * 1024}
    for length in (8, 16, 32, 64, 128)
}


def cases(
    *,
    length: int,
    heads: int,
    kv_heads: int,
    block_size: int,
    num_blocks: int,
    width: int = 128,
) -> dict[str, Case]:
    """The whole operation, and dense causal attention by cuDNN.

    Args:
      length: Of the one sequence.
      heads: Query heads.
      kv_heads: Key-value heads.
      block_size: Keys in a block.
      num_blocks: Blocks that a query attends to, its own among them.
      width: That of the heads.
    """
    query, key, value = normal(
        (1, length, heads, width), *[(1, length, kv_heads, width)] * 2
    )
    function = functools.partial(
        jattn.mixture_of_block_attention, block_size=block_size, top_k=num_blocks
    )
    pairs = selected_pairs(length, block_size, num_blocks)
    flops = attention_flops(pairs, heads, width)
    return {
        "jattn": Case(function, (query, key, value), **flops),
        "cudnn": cudnn(query, key, value),
    }
