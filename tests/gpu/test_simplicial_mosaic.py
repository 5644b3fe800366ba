"""The 2-simplicial Mosaic kernel on a GPU: the numerical gate.

The error of the kernel against the fp32 reference may be at most twice that of the jnp
form in the kernel's own dtype, for the output and, by Triton's kernels, every gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.ops.simplicial import two_simplicial_attention
from jattn.pallas import tuning
from jattn.pallas.simplicial import mosaic as kernel
from tests.gpu.gate import assert_passes_gate
from tests.gpu.test_simplicial import inputs, value_and_gradients
from tests.support import normal, relative_rms

# What makes the number of tiles of heads larger than that of multiprocessors, and what
# is special.
CASES = {
    "64 heads on 1": dict(g=64, windows=(512, 32), t=1000),
    "128 heads on 1": dict(g=128, windows=(512, 32), t=700),
    "256 heads on 2": dict(g=128, k=2, t=257),
    **{
        f"width {h}, {dtype}": dict(t=257, h=h, v=h, dtype=dtype)
        for dtype in ("bf16", "fp16")
        for h in (64, 128)
    },
    **{f"T = {t}": dict(t=t, s=139, b=140 // t + 1) for t in (1, 63, 111, 139)},
    **{
        f"windows {windows}": dict(t=300, windows=windows)
        for windows in ((64, 64), (1, 100), (256, 9), (257, 33), (1000, 7), (None, 3))
    },
    "no windows": dict(t=140, windows=(None, None)),
    "packed": dict(t=1000, b=2, lengths=(3, 400, 597), windows=(512, 32)),
    "queries end the keys": dict(t=200, s=1000, windows=(512, 32)),
    "biases": dict(t=257, key2_bias=1 / 128, value2_bias=1.0),
    "16 heads on 16": dict(g=1, k=16, windows=(512, 32), t=1000),
    "16 heads on 16, fp16": dict(g=1, k=16, windows=(7, 260), t=600, dtype="fp16"),
    "16 heads on 16, queries end the keys": dict(
        g=1, k=16, windows=(512, 32), t=600, s=1003
    ),
    "32 heads on 32, no windows": dict(g=1, k=32, windows=(None, None), t=300),
}

TILINGS = [
    kernel.Tiling(columns=64, blocks=1, slots=2, few=2, programs=132),
    kernel.Tiling(columns=64, blocks=3, slots=7, few=4, programs=100),
    kernel.Tiling(columns=64, blocks=4, slots=10, few=8, programs=132),
    kernel.Tiling(columns=128, blocks=1, slots=5, few=8, programs=132),
    kernel.Tiling(columns=128, blocks=2, slots=4, few=16, programs=132, turns=False),
    kernel.Tiling(columns=256, blocks=1, slots=2, few=8, programs=132),
]


def attend(arrays, implementation, segment_ids=None, **options):
    """Output and log-sum-exp."""

    @jax.jit
    def run(arrays):
        return two_simplicial_attention(
            *arrays,
            segment_ids=segment_ids,
            implementation=implementation,
            return_lse=True,
            **options,
        )

    return run(arrays)


@pytest.mark.parametrize("name", CASES)
def test_numerical_gate(name):
    arrays, segment_ids, options, cotangents = inputs(dict(k=1, g=64) | CASES[name])

    def run(arrays, implementation):
        return value_and_gradients(
            arrays, segment_ids, cotangents, implementation=implementation, **options
        )

    with jax.default_matmul_precision("highest"):
        reference = run([x.astype(jnp.float32) for x in arrays], "xla")
    actual = run(arrays, "pallas")
    assert_passes_gate(actual, run(arrays, "xla"), reference)
    for x, y in zip(actual, run(arrays, "pallas"), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_tilings_change_nothing(tiling):
    arrays, segment_ids, _, _ = inputs(
        dict(k=1, g=64, t=600, b=2, lengths=(3, 290, 307))
    )
    options = {"segment_ids": segment_ids, "windows": (512, 32)}
    with jax.default_matmul_precision("highest"):
        exact = attend([x.astype(jnp.float32) for x in arrays], "xla", **options)
    plain = attend(arrays, "xla", **options)
    with tuning.force("simplicial_forward_mosaic", tiling):
        actual = attend(arrays, "pallas", **options)
    assert_passes_gate(actual, plain, exact)


def test_forward_is_the_kernel_and_backward_tritons():
    case = dict(k=1, g=64, t=257, windows=(512, 32))
    arrays, segment_ids, options, cotangents = inputs(case)
    for implementation in (None, "pallas"):
        run = functools.partial(
            value_and_gradients, implementation=implementation, **options
        )
        program = str(jax.make_jaxpr(run)(arrays, segment_ids, cotangents))
        assert "two_simplicial_forward" in program
        assert "triton_kernel_call" in program
    arrays, _, _, cotangents = inputs(case | {"g": 32})
    with pytest.raises(
        NotImplementedError, match="a multiple of 64 must have a kv head"
    ):
        run(arrays, None, cotangents)


@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        (dict(k=1, g=64, t=200, s=1000, lengths=(700, 300)), 100),
        (dict(k=16, g=1, t=600, s=1400), 300),
    ],
)
def test_unseen_memory_does_not_matter(sizes, window):
    (query, *keys), segment_ids, _, _ = inputs(sizes)
    # The first query is at 800; it sees so many keys of the first set and 20 of the
    # second.
    ends = (801 - window, 801 - window, 781, 781)
    poisoned = [x.at[:, :end].set(jnp.nan) for x, end in zip(keys, ends, strict=True)]
    options = {"segment_ids": segment_ids, "windows": (window, 20)}
    plain = attend([query, *keys], "pallas", **options)
    changed = attend([query, *poisoned], "pallas", **options)
    for x, y in zip(changed, plain, strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_order_of_the_sets_does_not_matter():
    (query, key, value, key2, value2), _, _, _ = inputs(dict(k=1, g=64, t=500))
    expected = attend((query, key, value, key2, value2), "pallas", windows=(200, 24))
    actual = attend((query, key2, value2, key, value), "pallas", windows=(24, 200))
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_batches_and_maps_agree():
    arrays = normal(0, (3, 150, 64, 128), *[(3, 150, 1, 128)] * 4, dtype=jnp.bfloat16)
    run = functools.partial(
        kernel.forward, few_window=20, many_window=100, scale=128**-0.5
    )
    expected = jax.jit(run)(*arrays, None)
    mapped = jax.jit(jax.vmap(lambda *x: run(*x, None)))
    actual = mapped(*(x[:, None] for x in arrays))
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(x[:, 0], y)


def test_more_than_2_to_the_31_elements():
    t, last = 140_000, 64
    shapes = (1, t, 128, 128), *[(1, t, 1, 128)] * 4
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ]
    assert arrays[0].size > 2**31
    out, lse = attend(arrays, "pallas", windows=(64, 2))
    # Queries may be the last of the keys: only those are compared.
    query, *keys = arrays
    short = [query[:, -last:], *(x[:, -200:] for x in keys)]
    expected = attend(short, "xla", windows=(64, 2))
    for x, y in zip((out[:, -last:], lse[:, -last:]), expected, strict=True):
        assert relative_rms(x, y) <= 5e-3
