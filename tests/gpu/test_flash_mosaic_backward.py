"""Mosaic's gradients of attention to strided windows on a GPU: the numerical gate.

The error of the kernels against the fp32 reference may be at most twice that of the jnp
form in the kernels' own dtype, for every gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.pallas import tuning
from jattn.pallas.flash import mosaic_key_gradient, mosaic_query_gradient
from tests.gpu.gate import assert_passes_gate
from tests.gpu.test_flash import CASES as ALL_CASES
from tests.gpu.test_flash import NSA, inputs, value_and_gradients

# What has one document, and heads of 128 or 64.
CASES = {
    name: case
    for name, case in ALL_CASES.items()
    if not case.get("packed")
    and case.get("dtype") != "fp32"
    and {case.get("h", 128), case.get("v", 128)} in ({64}, {128})
} | {
    "group 64": dict(t=257, g=64),
    "group 8, a batch": dict(t=300, g=8, b=3, s=301),
    "many tiles of keys": dict(t=3000, g=16, window=512),
    "split tiles of keys": dict(t=20000, g=16, k=1, kernel_size=64, stride=64),
    "a narrow window": dict(t=300, g=16, window=3),
    "queries see nothing": dict(t=200, g=2, kernel_size=64, stride=16),
    "late queries, a window": dict(t=100, s=1000, g=16, window=60),
    "width 64, compressed": dict(t=3000, g=8, h=64, v=64, dtype="fp16", **NSA),
}

KERNELS = {
    "flash_query_gradient_mosaic": [
        mosaic_query_gradient.Tiling(slots=2, programs=132),
        mosaic_query_gradient.Tiling(slots=3, programs=7),
    ],
    "flash_key_gradient_mosaic": [
        mosaic_key_gradient.Tiling(slots=2, programs=1),
        mosaic_key_gradient.Tiling(slots=3, programs=500),
    ],
}


def gradients(case, implementation, changed=None):
    """Of query, key and value, with the cotangent of the output rounded for all."""
    arrays, operation, (out_gradient, lse_gradient) = inputs(case)
    dtype = arrays[0].dtype
    cotangents = out_gradient.astype(dtype), lse_gradient
    if implementation == "exact":
        implementation = "xla"
        arrays = [x.astype(jnp.float32) for x in arrays]
    if changed is not None:
        arrays = changed(*arrays)
    run = functools.partial(value_and_gradients, implementation=implementation)
    return run(operation, arrays, cotangents)[2:]


def assert_case_passes_gate(case):
    """Runs the kernels twice, and the jnp form in their dtype and in fp32."""
    with jax.default_matmul_precision("highest"):
        reference = gradients(case, "exact")
    actual = gradients(case, "triton")
    assert_passes_gate(actual, gradients(case, "xla"), reference)
    for x, y in zip(actual, gradients(case, "triton"), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", CASES)
def test_numerical_gate(name):
    assert_case_passes_gate(CASES[name])


@pytest.mark.parametrize(
    ("name", "tiling"), [(name, x) for name, xs in KERNELS.items() for x in xs]
)
def test_numerical_gate_of_tilings(name, tiling):
    jax.clear_caches()
    with tuning.force(name, tiling):
        assert_case_passes_gate(CASES["compressed, T = 5000"])
        assert_case_passes_gate(CASES["a window of 128"])


@pytest.mark.parametrize(
    ("changes", "chosen"), [({}, True), ({"packed": True}, False), ({"h": 96}, False)]
)
def test_automatic_choice(changes, chosen):
    arrays, operation, cotangents = inputs(dict(t=257, g=16, **NSA) | changes)
    run = functools.partial(value_and_gradients, operation, implementation=None)
    program = str(jax.make_jaxpr(run)(arrays, cotangents))
    for kernel in ("flash_query_gradient", "flash_key_gradient"):
        assert (kernel in program) == chosen


@pytest.mark.parametrize("g", [4, 16])
def test_memory_nobody_sees_may_hold_anything(g):
    case, hidden = dict(t=100, s=1000, g=g, b=2, window=60), 1000 - 100 - 60 + 1

    def poison(query, *key_value):
        return [query, *(x.at[:, :hidden].set(jnp.nan) for x in key_value)]

    plain = gradients(case, "triton")
    for x, y in zip(gradients(case, "triton", poison), plain, strict=True):
        np.testing.assert_array_equal(x, y)
    for gradient in plain[1:]:
        assert not np.any(gradient[:, :hidden])
