"""A step of decoding with native sparse attention, beside one of dense attention.

The caches are full but for a few tokens, and hold the newest token already. Timed are
programs of eight steps, each of which waits for the one before, as layers do: it is
then the GPU that is timed, not how fast it is given work. The figures are of one step.
Sizes are the paper's: windows of 32 keys every 16, 16 blocks of 64, a sliding window of
512; there are 64 query heads to 4 key-value heads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.dense import attention_flops, normal
from benchmarks.measure import Case
from benchmarks.ops import Tuning
from jattn.ops.compressed import num_windows
from jattn.ops.nsa_decode import cached_attention
from jattn.pallas.nsa_decode.triton import Tiling

STEPS = 8
FREE = 100
WINDOW = 512
SIZES: dict[str, Any] = {
    "kernel_size": 32,
    "stride": 16,
    "block_size": 64,
    "num_blocks": 16,
    "num_initial": 1,
    "num_local": 2,
    "window_size": WINDOW,
}

SHAPES = {
    f"batch of {batch}, {length}k": dict(batch=batch, length=1024 * length)
    for batch in (1, 8, 32)
    for length in (8, 32, 64)
}

TUNING = {
    kernel: Tuning(
        [
            Tiling(keys=keys, programs=programs, warps=warps, stages=stages)
            for keys, warps, stages in (
                (32, 4, 3),
                (64, 4, 2),
                (64, 4, 3),
                (64, 4, 4),
                (64, 8, 3),
                (128, 4, 2),
                (128, 8, 2),
            )
            for programs in (264, 768, 1536)
        ],
        case="jattn",
        direction="forward",
    )
    for kernel in ("nsa_decode_compressed", "nsa_decode_local")
}


def cases(
    *,
    batch: int,
    length: int,
    heads: int = 64,
    kv_heads: int = 4,
    width: int = 128,
    implementation: str = "triton",
) -> dict[str, Case]:
    """The operation on a cache, and dense attention to a cache by cuDNN.

    Args:
      batch: Rows.
      length: Slots for tokens in a row.
      heads: Query heads.
      kv_heads: Key-value heads.
      width: That of the heads.
      implementation: Which form of the operation.
    """
    windows = num_windows(length, SIZES["kernel_size"], SIZES["stride"])
    query, gates, *arrays = normal(
        (batch, 1, heads, width),
        (batch, 1, heads, 3),
        *[
            (batch, slots, kv_heads, width)
            for slots in (windows, length, min(length, WINDOW))
            for _ in range(2)
        ],
    )
    lengths = jnp.full(batch, length - FREE, jnp.int32)
    seen = num_windows(length - FREE, SIZES["kernel_size"], SIZES["stride"])
    # Of the query's own block it sees what is before it.
    seen += (SIZES["num_blocks"] - 1) * SIZES["block_size"]
    seen += (length - FREE - 1) % SIZES["block_size"] + 1
    seen += min(length - FREE, WINDOW)

    def flops(keys):
        needed = attention_flops(batch * keys, heads, width)
        return needed | {"backward_flops": 0, "steps": STEPS}

    decode = functools.partial(sparse, implementation=implementation)
    return {
        "jattn": Case(
            functools.partial(chained, decode),
            (query, jax.nn.sigmoid(gates), *arrays),
            constants=(lengths,),
            **flops(seen),
        ),
        "cudnn": Case(
            functools.partial(chained, dense),
            (query, *arrays[2:4]),
            constants=(lengths,),
            **flops(length - FREE),
        ),
    }


def chained(step, query, *arguments):
    """The output of the last of STEPS steps, all of which are the same."""
    out = step(query, *arguments)
    for _ in range(STEPS - 1):
        out = step(query + 0 * out, *arguments)
    return out


def sparse(query, gates, *arguments, implementation):
    """One step of native sparse attention: [B, 1, N, H] -> [B, 1, N, H]."""
    *arrays, lengths = arguments
    out, _ = cached_attention(
        query,
        tuple(arrays[:2]),
        tuple(arrays[2:4]),
        tuple(arrays[4:]),
        gates,
        positions=lengths[:, None] - 1,
        window_end=lengths,
        ring=True,
        scale=query.shape[-1] ** -0.5,
        implementation=implementation,
        **SIZES,
    )
    return out


def dense(query, key, value, lengths):
    """One step of dense attention by cuDNN: [B, 1, N, H] -> [B, 1, N, H]."""
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=jnp.ones_like(lengths),
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
