"""A step of decoding with 2-simplicial attention, beside one of dense attention.

The rings are full. Timed are programs of eight steps, each of which writes a token into
them and waits for the one before, as layers do: it is then the GPU that is timed, not
how fast it is given work. The figures are of one step. Dense attention by cuDNN reads a
cache of as many keys as the windows have pairs, whose FLOPs are the same; it does not
write to it.
"""

import functools
import math

import jax
import jax.numpy as jnp

from benchmarks.dense import attention_flops, normal
from benchmarks.measure import Case
from benchmarks.nsa_decode import STEPS, chained
from benchmarks.simplicial import WINDOWS
from jattn.nn.simplicial import SimplicialCache, attend_cached

# Tokens before the first step.
LENGTH = 10_000
NAMES = ("key", "value", "key2", "value2")

SHAPES = {
    f"batch of {batch}, {heads}/{kv_heads}": dict(
        batch=batch, heads=heads, kv_heads=kv_heads
    )
    for heads, kv_heads in ((64, 1), (16, 4))
    for batch in (1, 64)
}


def cases(
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    width: int = 128,
    windows: tuple[int, int] = WINDOWS,
) -> dict[str, Case]:
    """The operation on a cache, and dense attention to a cache by cuDNN.

    Args:
      batch: Rows.
      heads: Query heads.
      kv_heads: Key-value heads.
      width: That of the heads.
      windows: Keys a query sees of either set.
    """
    query, *rings = normal(
        (batch, 1, heads, width),
        *[(batch, window, kv_heads, width) for window in windows for _ in range(2)],
    )
    tokens = normal(*[(batch, STEPS, kv_heads, width)] * 4, seed=1)
    keys = math.prod(windows)
    dense_cache = normal(*[(batch, keys, kv_heads, width)] * 2, seed=2)
    dense = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    flops = attention_flops(batch * keys, heads, width)
    flops |= {"backward_flops": 0, "steps": STEPS}
    return {
        "jattn": Case(
            functools.partial(simplicial, windows=windows),
            (query, *rings, *tokens),
            **flops,
        ),
        # Not by its usual name: its keys are not those of two windows.
        "dense": Case(
            functools.partial(chained, dense), (query, *dense_cache), **flops
        ),
    }


def simplicial(query, *arrays, windows):
    """The output of the last of STEPS steps: [B, 1, N, H] -> [B, 1, N, H]."""
    rings, tokens = arrays[:4], arrays[4:]
    batch = query.shape[0]
    cache = SimplicialCache(*rings, length=jnp.full(batch, LENGTH, jnp.int32))
    out = jnp.zeros_like(query)
    for step in range(STEPS):
        new = {
            name: x[:, step : step + 1] for name, x in zip(NAMES, tokens, strict=True)
        }
        out, cache = attend_cached(
            query + 0 * out,
            new,
            cache,
            jnp.ones_like(cache.length),
            windows=windows,
            form="trilinear",
            key2_bias=0.0,
            value2_bias=0.0,
            implementation=None,
        )
    return out
