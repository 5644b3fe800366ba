"""The flash kernel on a GPU: the numerical gate, and what only a GPU can show.

The error of the kernel against the fp32 reference may be at most twice that of the jnp
form in the kernel's own dtype, for the output and every gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.ops.compressed import compressed_attention, num_windows
from jattn.ops.dense import dense_attention
from jattn.pallas import tuning
from jattn.pallas.flash import mosaic
from jattn.pallas.flash import triton as kernel
from tests.gpu.gate import assert_passes_gate, calls_kernel
from tests.support import documents, normal, relative_rms

DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}
WIDTHS = (
    (64, 64),
    (80, 80),
    (96, 96),
    (96, 128),
    (128, 128),
    (192, 128),
    (192, 256),
    (256, 256),
)
NSA = dict(kernel_size=32, stride=16)

# Sizes by name: dtype, T, S, K, G, H, V, and which keys are seen.
CASES = {
    **{f"group {g}": dict(t=257, g=g) for g in (1, 2, 3, 4, 6, 8, 16, 32, 48)},
    **{
        f"compressed, group {g}": dict(t=1000, g=g, **NSA)
        for g in (1, 3, 8, 16, 32, 128)
    },
    **{
        f"widths {h}, {v}, {dtype}": dict(t=257, g=3, h=h, v=v, dtype=dtype)
        for dtype in DTYPES
        for h, v in WIDTHS
    },
    **{f"T = {t}": dict(t=t, b=2) for t in (1, 63, 111, 1000)},
    **{f"compressed, T = {t}": dict(t=t, b=2, **NSA) for t in (63, 111, 257, 5000)},
    **{
        f"a window of {w}": dict(t=1000, g=4, window=w) for w in (1, 17, 128, 512, 2000)
    },
    **{
        f"windows of {size} every {stride}": dict(
            t=1000, g=4, kernel_size=size, stride=stride
        )
        for size, stride in ((16, 16), (24, 8), (64, 64), (2, 1))
    },
    **{
        f"compressed, {dtype}": dict(t=1000, g=16, dtype=dtype, **NSA)
        for dtype in DTYPES
    },
    **{
        f"a window, {dtype}": dict(t=1000, g=16, dtype=dtype, window=100)
        for dtype in DTYPES
    },
    "long, ungrouped": dict(t=4000, g=1, k=4),
    "packed": dict(t=1000, g=16, b=2, packed=True),
    "packed, a window": dict(t=1000, g=3, b=2, packed=True, window=200),
    "packed, compressed": dict(t=1000, g=16, b=2, packed=True, **NSA),
    "queries end the keys": dict(t=100, s=1000, g=3),
    "queries end the keys, a window": dict(t=100, s=1000, g=4, window=60, packed=True),
    "queries end the keys, compressed": dict(t=100, s=1000, g=4, packed=True, **NSA),
}


def inputs(case, seed=0):
    """Query, key, value, the operation without its arrays, and cotangents of a case."""
    sizes = dict(b=1, k=2, g=2, h=128, v=128, dtype="bf16") | case
    b, t, k, g, h, v = (sizes[x] for x in ("b", "t", "k", "g", "h", "v"))
    s = sizes.get("s", t)
    segment_ids = (
        documents(s // 7, s // 3 - s // 7, s - s // 3, batch=b)
        if sizes.get("packed")
        else None
    )
    options = {"segment_ids": segment_ids, "return_lse": True}
    m = s
    if "stride" in sizes:
        windows = {x: sizes[x] for x in ("kernel_size", "stride")}
        m = num_windows(s, **windows)
        operation = functools.partial(
            compressed_attention, length=s, **windows, **options
        )
    else:
        operation = functools.partial(
            dense_attention, window=sizes.get("window"), **options
        )
    arrays = normal(
        seed, (b, t, k * g, h), (b, m, k, h), (b, m, k, v), dtype=DTYPES[sizes["dtype"]]
    )
    cotangents = normal(seed + 1, (b, t, k * g, v), (b, t, k * g))
    return arrays, operation, cotangents


@functools.partial(jax.jit, static_argnums=0, static_argnames="implementation")
def value_and_gradients(operation, arrays, cotangents, *, implementation):
    """Output, log-sum-exp, and gradients of query, key and value."""
    attend = functools.partial(operation, implementation=implementation)
    (out, lse), pullback = jax.vjp(attend, *arrays)
    cotangents = cotangents[0].astype(out.dtype), cotangents[1]
    return out, lse, *pullback(cotangents)


def assert_case_passes_gate(case):
    """Runs the kernel twice, and the jnp form in its dtype and in fp32."""
    arrays, operation, cotangents = inputs(case)

    def run(arrays, implementation):
        return value_and_gradients(
            operation, arrays, cotangents, implementation=implementation
        )

    with jax.default_matmul_precision("highest"):
        reference = run([x.astype(jnp.float32) for x in arrays], "xla")
    actual = run(arrays, "triton")
    assert_passes_gate(actual, run(arrays, "xla"), reference)
    for x, y in zip(actual, run(arrays, "triton"), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", CASES)
def test_numerical_gate(name):
    assert_case_passes_gate(CASES[name])


# Enough work for the forward kernel in Mosaic.
MOSAIC_CASES = {
    **{f"group {g}": dict(t=4300 // g + 1, g=g, b=2) for g in (1, 2, 4, 8, 16, 32, 64)},
    **{
        f"compressed, group {g}": dict(t=8700 // g + 1, g=g, **NSA)
        for g in (1, 4, 16, 64)
    },
    **{
        f"a window of {w}": dict(t=1001, g=16, b=2, window=w)
        for w in (1, 17, 100, 512, 2000)
    },
    **{
        f"windows of {size} every {stride}": dict(
            t=1001, g=16, kernel_size=size, stride=stride
        )
        for size, stride in ((16, 16), (24, 8), (64, 64), (2, 1))
    },
    **{
        f"width {h}, {dtype}": dict(t=600, g=16, k=4, h=h, v=h, dtype=dtype, window=100)
        for h in (64, 128)
        for dtype in ("bf16", "fp16")
    },
    "queries end the keys": dict(t=300, s=3000, g=16, k=4),
    "queries end the keys, a window": dict(t=300, s=3001, g=16, k=4, window=260),
    "queries end the keys, compressed": dict(t=300, s=3001, g=16, k=4, **NSA),
}

MOSAIC_TILINGS = [
    mosaic.Tiling(2, 1, keys=128, edge=128, slots=5, programs=132),
    mosaic.Tiling(2, 2, keys=128, edge=64, slots=5, programs=132),
    mosaic.Tiling(3, 1, keys=64, edge=64, slots=7, programs=132),
    mosaic.Tiling(3, 2, keys=64, edge=64, slots=6, programs=100),
]


@pytest.mark.parametrize("name", MOSAIC_CASES)
def test_numerical_gate_of_mosaic(name):
    case = MOSAIC_CASES[name]
    arrays, operation, _ = inputs(case)
    attend = functools.partial(operation, implementation="triton")
    assert "flash_forward" in str(jax.make_jaxpr(attend)(*arrays))
    assert_case_passes_gate(case)


@pytest.mark.parametrize("tiling", MOSAIC_TILINGS, ids=str)
def test_numerical_gate_of_tilings_of_mosaic(tiling):
    jax.clear_caches()
    with tuning.force("flash_forward_mosaic", tiling):
        for name in ("compressed, group 16", "a window of 512", "group 4"):
            assert_case_passes_gate(MOSAIC_CASES[name])


TILINGS = {
    "flash_forward": [
        kernel.Tiling(64, 64, 4, 3),
        kernel.Tiling(128, 64, 4, 2),
        kernel.Tiling(128, 128, 8, 3),
    ],
    "flash_query_gradient": [
        kernel.Tiling(64, 64, 4, 2),
        kernel.Tiling(128, 128, 8, 2),
    ],
    "flash_key_gradient": [
        kernel.SplitTiling(64, 64, 4, 2, 528),
        kernel.SplitTiling(32, 128, 8, 3, 1),
        kernel.SplitTiling(128, 64, 8, 2, 100),
    ],
}


@pytest.mark.parametrize(
    ("name", "tiling"), [(name, x) for name, xs in TILINGS.items() for x in xs]
)
def test_numerical_gate_of_tilings(name, tiling):
    jax.clear_caches()
    with tuning.force(name, tiling):
        assert_case_passes_gate(CASES["packed, compressed"])
        assert_case_passes_gate(CASES["packed, a window"])


@pytest.mark.parametrize(
    ("case", "hidden"),
    [
        (dict(t=100, s=1000, g=4, b=2, window=60), 1000 - 100 - 60 + 1),
        (dict(t=300, s=3000, g=16, k=4, window=60), 3000 - 300 - 60 + 1),
        (dict(t=100, s=999, g=4, b=2, packed=True), 333),
        (dict(t=100, s=999, g=16, b=2, packed=True, **NSA), 21),
    ],
)
def test_memory_nobody_sees_may_hold_anything(case, hidden):
    (query, *key_value), operation, cotangents = inputs(case)
    poisoned = [x.at[:, :hidden].set(jnp.nan) for x in key_value]
    plain, changed = (
        value_and_gradients(operation, x, cotangents, implementation="triton")
        for x in ([query, *key_value], [query, *poisoned])
    )
    for x, y in zip(changed, plain, strict=True):
        np.testing.assert_array_equal(x, y)
    for gradient in plain[3:]:
        assert not np.any(gradient[:, :hidden])


@pytest.mark.parametrize("case", [dict(t=257), dict(t=257, **NSA)])
def test_automatic_choice_is_the_kernel(case):
    arrays, operation, cotangents = inputs(case)

    def run(implementation):
        return functools.partial(
            value_and_gradients, operation, implementation=implementation
        )

    assert calls_kernel(run(None), arrays, cotangents)
    assert not calls_kernel(run("xla"), arrays, cotangents)
    chosen = run(None)(arrays, cotangents)
    for x, y in zip(chosen, run("triton")(arrays, cotangents), strict=True):
        np.testing.assert_array_equal(x, y)
    # What the kernel does not support goes to the jnp form without a word.
    arrays, operation, cotangents = inputs(case | dict(h=12, v=12))
    assert not calls_kernel(run(None), arrays, cotangents)


def test_more_than_2_to_the_31_numbers():
    # The last row of the batch ends past 2^31 numbers of the query and of the key.
    b, t = 3, 2**16
    shape = (b, t, 96, 128)
    assert (b - 1) / b * np.prod(shape) < 2**31 < np.prod(shape)
    query = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)

    @jax.jit
    def last_hundred(query):
        attend = functools.partial(dense_attention, window=32, implementation="triton")
        out, pullback = jax.vjp(attend, query, query, query)
        return [x[-1:, -100:] for x in (out, *pullback(query))]

    # Nothing before the tail matters to the last hundred positions.
    expected = last_hundred(query[-1:, -200:])
    for x, y in zip(last_hundred(query), expected, strict=True):
        assert relative_rms(x, y) <= 5e-3


def test_long_backward_needs_little_memory():
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

    def gradients(query, key, value):
        attend = functools.partial(compressed_attention, implementation="triton", **NSA)
        out, pullback = jax.vjp(attend, query, key, value)
        return pullback(out)

    keys = num_windows(65536, **NSA)
    compiled = jax.jit(gradients).lower(
        shape(1, 65536, 64, 128), shape(1, keys, 4, 128), shape(1, keys, 4, 128)
    )
    analysis = compiled.compile().memory_analysis()
    assert analysis is not None
    # The output and its log-sum-exp, delta, and partial sums.
    assert analysis.temp_size_in_bytes < 1.5 * 2**30
