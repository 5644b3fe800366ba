"""Times block-sparse attention on a GPU beside dense attention by cuDNN.

    python -m benchmarks.block_sparse --out benchmarks/results/block_sparse_h200.json

Everything is timed in one process, on N(0, 1) data in bf16 and one sequence, in rounds
that go through all competitors; the figures are medians over the rounds. The kernel
gets random blocks: the query's own, the one before it, the first, and any others
before it. The whole operations choose their blocks themselves, on the clock.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import jattn
from benchmarks.table import details, summary

WIDTH = 128
WINDOW = 512
KERNEL_SIZE, STRIDE = 32, 16
MATMUL_SIZE = 8192


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      out: JSON file, rewritten after every length.
      lengths: Sequence lengths.
      rounds: Measurements of each function.
      seconds: Least duration of one measurement.
    """

    out: pathlib.Path
    lengths: tuple[int, ...] = (8192, 16384, 32768, 65536)
    rounds: int = 5
    seconds: float = 0.1


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Sizes of block-sparse attention.

    Attributes:
      heads: Query heads.
      kv_heads: Key-value heads, with a list of blocks each.
      block_size: Keys in a block.
      num_blocks: Blocks in a list.
    """

    heads: int
    kv_heads: int
    block_size: int
    num_blocks: int


SCHEMES = {"moba": Scheme(16, 16, 128, 8), "nsa": Scheme(64, 4, 64, 16)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A function to time.

    Attributes:
      function: Of the arrays, then the constants.
      arrays: What it is differentiated in.
      pairs: Pairs of a query and a key that one query head has to look at.
      constants: Its other arguments.
    """

    function: Callable[..., jax.Array]
    arrays: tuple[jax.Array, ...]
    pairs: int
    constants: tuple[jax.Array, ...] = ()


def main(config: Config) -> None:
    """Measures everything, prints a table and writes the JSON file."""
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "jaxlib", "jax-triton", "triton", "nvidia-cudnn-cu13")
        },
        "rounds": config.rounds,
        "schemes": {name: dataclasses.asdict(x) for name, x in SCHEMES.items()},
        "rows": [],
    }
    # The whole operations last: they take the longest.
    for make_cases in (kernel_cases, operation_cases):
        for name, scheme in SCHEMES.items():
            for length in config.lengths:
                rows = measure(make_cases(name, scheme, length), scheme, config)
                for row in rows:
                    results["rows"].append({"scheme": name, "length": length, **row})
                    print(json.dumps(results["rows"][-1]), flush=True)
                config.out.parent.mkdir(parents=True, exist_ok=True)
                config.out.write_text(json.dumps(results, indent=1) + "\n")
    print(summary(results), details(results), sep="\n\n")


def kernel_cases(_: str, scheme: Scheme, length: int) -> dict[str, Case]:
    """The block-sparse kernel and dense causal attention by cuDNN."""
    qkv = normal(scheme.heads, scheme.kv_heads, scheme.kv_heads, length=length)
    kernel = functools.partial(
        jattn.block_sparse_attention,
        block_size=scheme.block_size,
        implementation="triton",
    )
    dense = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
    )
    blocks = random_blocks(scheme, length)
    return {
        "kernel": Case(kernel, qkv, selected_pairs(scheme, length), (blocks,)),
        "cudnn": Case(dense, qkv, length * (length + 1) // 2),
    }


def operation_cases(name: str, scheme: Scheme, length: int) -> dict[str, Case]:
    """The operation that chooses blocks and attends to them."""
    pairs = selected_pairs(scheme, length)
    if name == "moba":
        function = functools.partial(
            jattn.mixture_of_block_attention,
            block_size=scheme.block_size,
            top_k=scheme.num_blocks,
        )
        arrays = normal(scheme.heads, scheme.kv_heads, scheme.kv_heads, length=length)
        return {"operation": Case(function, arrays, pairs)}
    pairs += sum(min(t + 1, WINDOW) for t in range(length))
    pairs += sum(
        (t + 1 - KERNEL_SIZE) // STRIDE + 1 for t in range(KERNEL_SIZE - 1, length)
    )
    arrays = normal(scheme.heads, *[scheme.kv_heads] * 6, length=length)
    gates = jax.nn.sigmoid(arrays[0][..., :3])
    function = functools.partial(
        native_sparse, block_size=scheme.block_size, num_blocks=scheme.num_blocks
    )
    return {"operation": Case(function, (*arrays, gates), pairs)}


def native_sparse(query, *arrays, **sizes):
    """Native sparse attention with compression by the mean, on the clock as well."""
    key, value, *others, gates = arrays
    windows = functools.partial(
        jattn.nsa_windows, kernel_size=KERNEL_SIZE, stride=STRIDE
    )
    return jattn.native_sparse_attention(
        query,
        (windows(key).mean(axis=2), windows(value).mean(axis=2)),
        (others[0], others[1]),
        (others[2], others[3]),
        gates,
        kernel_size=KERNEL_SIZE,
        stride=STRIDE,
        window_size=WINDOW,
        **sizes,
    )


def normal(*heads: int, length: int, seed: int = 0) -> tuple[jax.Array, ...]:
    """Arrays [1, length, heads, WIDTH] of N(0, 1) numbers in bf16."""
    keys = jax.random.split(jax.random.key(seed), len(heads))
    return tuple(
        jax.random.normal(key, (1, length, n, WIDTH), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def random_blocks(scheme: Scheme, length: int) -> jax.Array:
    """Blocks int32 [1, length, K, num_blocks], -1 where there are no more."""
    own = jnp.arange(length)[:, None, None] // scheme.block_size
    block = jnp.arange(math.ceil(length / scheme.block_size))
    shape = (length, scheme.kv_heads, block.size)
    scores = jax.random.uniform(jax.random.key(1), shape)
    scores = jnp.where((block == 0) | (block >= own - 1), 2, scores)
    scores = jnp.where(block <= own, scores, -1)
    best, chosen = jax.lax.top_k(scores, scheme.num_blocks)
    return jnp.where(best < 0, -1, chosen)[None].astype(jnp.int32)


def selected_pairs(scheme: Scheme, length: int) -> int:
    """Pairs (query, key) in distinct blocks, the own one among them."""
    size, others = scheme.block_size, scheme.num_blocks - 1
    return sum(t % size + 1 + size * min(others, t // size) for t in range(length))


def measure(
    cases: dict[str, Case], scheme: Scheme, config: Config
) -> list[dict[str, Any]]:
    """Times cases forward, and forward and backward, in turns with a matrix product."""
    square = jax.random.normal(
        jax.random.key(2), (MATMUL_SIZE, MATMUL_SIZE), jnp.bfloat16
    )
    calls: dict[tuple[str, str], tuple[Callable[..., Any], tuple[jax.Array, ...]]]
    calls = {("matmul", "forward"): (jnp.matmul, (square, square))}
    for name, case in cases.items():
        arguments = (*case.arrays, *case.constants)
        (cotangent,) = normal(scheme.heads, length=case.arrays[0].shape[1], seed=3)
        calls[name, "forward"] = case.function, arguments
        calls[name, "forward and backward"] = (
            functools.partial(gradients, case.function, len(case.arrays)),
            (cotangent, *arguments),
        )
    # Lowering compiles the Triton kernels, which threads would not make faster.
    lowered = [jax.jit(f).lower(*arguments) for f, arguments in calls.values()]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = list(pool.map(lambda x: x.compile(), lowered))

    runs = {}
    limit = jax.devices()[0].memory_stats()["bytes_limit"]
    temporary = {
        key: program.memory_analysis().temp_size_in_bytes
        for key, program in zip(calls, programs, strict=True)
    }
    for key, program in zip(calls, programs, strict=True):
        if temporary[key] > 0.8 * limit:
            print(f"{key} needs {temporary[key] / 2**30:.0f} GiB: left out")
            continue
        run = functools.partial(seconds_per_call, program, calls[key][1])
        run(1)
        runs[key] = run, math.ceil(config.seconds / run(2))
    rounds = [
        {key: run(count) for key, (run, count) in runs.items()}
        for _ in range(config.rounds)
    ]
    median = {key: statistics.median(x[key] for x in rounds) for key in runs}
    ceiling = 2 * MATMUL_SIZE**3 / median.pop(("matmul", "forward"))
    rows = []
    for (name, direction), seconds in median.items():
        # Two matrix products forward, five backward.
        products = 2 if direction == "forward" else 7
        flops = products * 2 * WIDTH * scheme.heads * cases[name].pairs
        times = [x[name, direction] for x in rounds]
        rows.append(
            {
                "what": name,
                "direction": direction,
                "milliseconds": 1e3 * seconds,
                "fastest_milliseconds": 1e3 * min(times),
                "slowest_milliseconds": 1e3 * max(times),
                "useful_flops_per_second": flops / seconds,
                "matmul_flops_per_second": ceiling,
                "temporary_bytes": temporary[name, direction],
            }
        )
    return rows


def gradients(function, count, cotangent, *arguments):
    """Gradients of function in its first `count` arguments."""
    arrays, constants = arguments[:count], arguments[count:]
    _, pullback = jax.vjp(lambda *arrays: function(*arrays, *constants), *arrays)
    return pullback(cotangent)


def seconds_per_call(program, arguments, count: int) -> float:
    """Wall-clock time of one of `count` calls in a row."""
    start = time.perf_counter()
    for _ in range(count):
        out = program(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
