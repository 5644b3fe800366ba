"""Native sparse attention whole, beside dense causal attention.

Everything is on the clock: compression of keys and values by their mean, selection, the
three branches and their gated sum. Sizes are the paper's, windows of 32 keys every 16,
16 blocks of 64, a sliding window of 512; each branch has keys and values of its own.
`torch dense` is dense causal attention by PyTorch's scaled_dot_product_attention.
"""

import functools

import jax

import jattn
from benchmarks import torch_peers
from benchmarks.block_sparse import selected_pairs
from benchmarks.dense import attention_flops, cudnn, normal
from benchmarks.measure import Case

KERNEL_SIZE, STRIDE = 32, 16
BLOCK_SIZE, NUM_BLOCKS = 64, 16
WINDOW = 512

means = functools.partial(
    jattn.nsa_window_means, kernel_size=KERNEL_SIZE, stride=STRIDE
)
select_blocks = functools.partial(
    jattn.nsa_select_blocks,
    kernel_size=KERNEL_SIZE,
    stride=STRIDE,
    block_size=BLOCK_SIZE,
    num_blocks=NUM_BLOCKS,
)

SHAPES = {
    f"64/4, {length}k": dict(heads=64, kv_heads=4, length=1024 * length)
    for length in (8, 16, 32, 64, 128)
} | {
    f"groups of {group}, 32k": dict(heads=16, kv_heads=16 // group, length=32768)
    for group in (1, 2, 4, 8)
}


def cases(
    *,
    length: int,
    heads: int,
    kv_heads: int,
    width: int = 128,
    blocks_given: bool = False,
) -> dict[str, Case]:
    """The operation, and dense causal attention by cuDNN and by PyTorch.

    Args:
      length: Of the one sequence.
      heads: Query heads.
      kv_heads: Key-value heads.
      width: That of the heads.
      blocks_given: Whether the operation gets the blocks it would choose: another
        rounding makes another choice where two scores are close.
    """
    query, *pairs = normal(
        (1, length, heads, width), *[(1, length, kv_heads, width)] * 6
    )
    gates = jax.nn.sigmoid(query[..., :3])
    seen = selected_pairs(length, BLOCK_SIZE, NUM_BLOCKS)
    seen += sum(min(t + 1, WINDOW) for t in range(length))
    seen += sum(
        (t + 1 - KERNEL_SIZE) // STRIDE + 1 for t in range(KERNEL_SIZE - 1, length)
    )
    flops = attention_flops(seen, heads, width)
    blocks = (select_blocks(query, means(pairs[0])),) if blocks_given else ()
    return {
        "jattn": Case(native_sparse, (query, *pairs, gates), constants=blocks, **flops),
        "cudnn": cudnn(query, *pairs[:2]),
        **torch_peers.attention(query, *pairs[:2]),
    }


def native_sparse(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_selected: jax.Array,
    value_selected: jax.Array,
    key_window: jax.Array,
    value_window: jax.Array,
    gates: jax.Array,
    block_indices: jax.Array | None = None,
) -> jax.Array:
    """Native sparse attention of query [B, T, N, H] with compression by the mean."""
    return jattn.native_sparse_attention(
        query,
        (means(key), means(value)),
        (key_selected, value_selected),
        (key_window, value_window),
        gates,
        kernel_size=KERNEL_SIZE,
        stride=STRIDE,
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        window_size=WINDOW,
        block_indices=block_indices,
    )
