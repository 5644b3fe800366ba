"""Dense causal attention by cuDNN, what everything else is compared with."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.measure import Case


def normal(*shapes: tuple[int, ...], seed: int = 0) -> tuple[jax.Array, ...]:
    """Arrays of N(0, 1) numbers in bf16, of the given shapes."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    # Drawn in bf16 they would be 128 numbers with a mean of -0.012.
    return tuple(
        jax.random.normal(key, shape).astype(jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    )


def attention_flops(pairs: int, heads: int, width: int) -> dict[str, int]:
    """What attention needs: two matrix products forward, five more backward.

    Args:
      pairs: Pairs of a query and a key that it sees, of one head, over the batch.
      heads: Query heads.
      width: That of queries, keys and values.
    """
    product = 2 * pairs * heads * width
    return {"flops": 2 * product, "backward_flops": 5 * product}


def causal_pairs(length: int) -> int:
    """Pairs of a query and a key not after it."""
    return length * (length + 1) // 2


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> Case:
    """Causal attention, [B, T, N, H] to [B, T, K, H]."""
    batch, length, heads, width = query.shape
    return Case(
        functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
        ),
        (query, key, value),
        **attention_flops(batch * causal_pairs(length), heads, width),
    )
