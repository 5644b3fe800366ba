"""A step of decoding with a pruned selective cache, beside one of dense attention.

A row has seen all but a few of its tokens. The selective cache holds an eighth of them
and drops one for each new token; the dense one holds all, and the newest already.
Timed are programs of eight steps, each of which waits for the one before, as layers do:
it is then the GPU that is timed, not how fast it is given work. The figures are of one
step, of 32 query heads to 8 key-value heads.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.dense import attention_flops, normal
from benchmarks.measure import Case
from benchmarks.nsa_decode import FREE, STEPS, chained, dense
from benchmarks.ops import Tuning
from jattn.nn.cache import KVCache, cache_bytes
from jattn.nn.selective import SelectiveAttention, SelectiveCache, attend_pruned
from jattn.pallas.selective.decode import Tiling

# Tokens in the context to one in the cache.
CONTEXT = 8

SHAPES = {
    f"batch of {batch}, {length}k": dict(batch=batch, length=1024 * length)
    for batch in (8, 32)
    for length in (32,)
}

TUNING = {
    "selective_decode": Tuning(
        [
            Tiling(keys=keys, programs=programs, warps=4, stages=stages)
            for keys, stages in ((32, 3), (64, 2), (64, 3), (64, 4), (128, 2))
            for programs in (512, 1024, 2048)
        ],
        case="jattn",
        direction="forward",
    )
}


def cases(
    *, batch: int, length: int, heads: int = 32, kv_heads: int = 8, width: int = 128
) -> dict[str, Case]:
    """The pruned cache, and dense attention to all keys by cuDNN.

    Args:
      batch: Rows.
      length: Tokens of the context.
      heads: Query heads.
      kv_heads: Key-value heads.
      width: That of the heads.
    """
    budget = length // CONTEXT
    query, *new, key, value, all_keys, all_values = normal(
        (batch, 1, heads, width),
        *[(batch, 1, kv_heads, width)] * 2,
        *[(batch, budget, kv_heads, width)] * 2,
        *[(batch, length, kv_heads, width)] * 2,
    )
    lengths = jnp.full(batch, length - FREE, jnp.int32)
    slots = jnp.broadcast_to(jnp.arange(budget, dtype=jnp.int32), (batch, budget))
    # In any order, as evictions leave them.
    mask = 10 * jax.random.uniform(jax.random.key(1), (batch, budget))
    cache = mask, slots * (CONTEXT - 1), lengths

    def flops(keys):
        needed = attention_flops(batch * keys, heads, width)
        return needed | {"backward_flops": 0, "steps": STEPS}

    return {
        "jattn": Case(
            pruned, (query, *new, key, value), constants=cache, **flops(budget)
        ),
        "cudnn": Case(
            functools.partial(chained, dense),
            (query, all_keys, all_values),
            constants=(lengths,),
            **flops(length - FREE),
        ),
    }


def pruned(query, new_key, new_value, key, value, mask, position, length):
    """The output of the last of STEPS steps, each of which drops a token."""
    cache = SelectiveCache(key, value, mask, position, length)
    out = jnp.zeros_like(query)
    for _ in range(STEPS):
        out, cache = attend_pruned(
            query + 0 * out, new_key, new_value, cache.length[:, None], cache
        )
    return out


def cache_share(
    *, batch: int, length: int, heads: int = 32, kv_heads: int = 8, width: int = 128
) -> float:
    """The bytes of the pruned cache as a share of those of a dense one, in bf16."""
    mixer = SelectiveAttention(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=width, budget=length // CONTEXT
    )
    caches = (
        functools.partial(mixer.init_cache, batch, length, jnp.bfloat16),
        functools.partial(
            KVCache.zeros, batch, length, kv_heads, width, width, jnp.bfloat16
        ),
    )
    selective, dense = (cache_bytes(jax.eval_shape(x)) for x in caches)
    return selective / dense
