"""The 2-simplicial kernels in Triton's interpreter, against the jnp form, in fp32."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.ops.simplicial import attend_pairs, two_simplicial_attention
from jattn.pallas import _triton, tuning
from jattn.pallas.simplicial import backward as gradients
from jattn.pallas.simplicial import triton as kernel
from jattn.pallas.simplicial import unsupported
from tests.support import (
    assert_equal_up_to_rounding,
    documents,
    normal,
    shard_over_batch,
)

# Sizes by name: what inputs take, then options of the operation.
CASES = {
    "one query": dict(t=1, windows=(5, 3)),
    "tiles of one position": dict(t=13, k=1, g=4, windows=(5, 9)),
    "tiles of several positions": dict(b=2, t=21, g=1, windows=(40, 3)),
    "groups of three, odd widths": dict(t=11, g=3, h=7, v=5, windows=(3, 9)),
    "a group of several tiles": dict(t=5, k=1, g=37, windows=(4, 4)),
    "no windows": dict(t=17, g=2, windows=(None, None)),
    "queries end the keys": dict(t=6, s=19, windows=(8, 8)),
    "packed": dict(b=2, t=20, g=2, windows=(7, 4), lengths=(3, 16, 1)),
    "packed, tiles of one position": dict(
        t=9, k=1, g=32, windows=(3, 6), lengths=(4, 5)
    ),
    "determinants": dict(t=9, h=8, windows=(6, 4), form="determinant"),
    "biases": dict(t=9, windows=(4, 6), key2_bias=1 / 16, value2_bias=1.0),
}

# Tilings that the cases above do not choose.
FORWARD = kernel.Tiling(rows=8, tokens=1, chains=2, block=16, warps=4, stages=1)
BACKWARD = gradients.Tiling(rows=16, tokens=2, block=16, warps=4, stages=1)


def inputs(b=1, t=9, s=None, k=2, g=2, h=16, v=16):
    """Query, keys and values of both sets."""
    s = s or t
    keys, values = (b, s, k, h), (b, s, k, v)
    return normal(0, (b, t, k * g, h), keys, values, keys, values)


def value_and_gradients(attend, *arrays):
    """Output, log-sum-exp and the gradients of a function of both."""

    def loss(*arrays):
        out, lse = attend(*arrays)
        seen = jnp.where(jnp.isneginf(lse), 0, lse)
        return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.sin(seen)), (out, lse)

    gradients, outputs = jax.grad(loss, argnums=range(5), has_aux=True)(*arrays)
    return *outputs, *gradients


def operation(implementation, **options):
    attend = functools.partial(
        two_simplicial_attention,
        implementation=implementation,
        return_lse=True,
        **options,
    )
    return jax.jit(functools.partial(value_and_gradients, attend))


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Lets the operation choose the kernel, which then runs in the interpreter."""
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    # Work is not split for want of programs: the interpreter runs one at a time.
    monkeypatch.setattr(gradients, "PROGRAMS", 1)
    monkeypatch.setattr(kernel, "WARPS", 0)


def assert_equals_the_jnp_form(case):
    sizes = dict(case)
    options = {
        name: sizes.pop(name)
        for name in ("windows", "form", "key2_bias", "value2_bias")
        if name in sizes
    }
    lengths = sizes.pop("lengths", None)
    arrays = inputs(**sizes)
    if lengths is not None:
        options["segment_ids"] = documents(*lengths, batch=arrays[0].shape[0])
    actual = operation("triton", **options)(*arrays)
    expected = operation("xla", **options)(*arrays)
    jax.tree.map(assert_equal_up_to_rounding, actual, expected)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_jnp_form(case):
    assert_equals_the_jnp_form(CASES[case])


@pytest.mark.parametrize(
    "case",
    [
        dict(b=2, t=15, k=1, g=4, windows=(18, 7)),
        dict(t=19, k=1, g=6, windows=(17, 5), lengths=(2, 17)),
    ],
)
def test_tilings_change_nothing(case):
    with contextlib.ExitStack() as stack:
        for name, tiling in (
            ("simplicial_forward", FORWARD),
            ("simplicial_backward_query", BACKWARD),
            ("simplicial_backward_key", BACKWARD),
        ):
            stack.enter_context(tuning.force(name, tiling))
        assert_equals_the_jnp_form(case)


def test_chunks_and_parts_change_nothing(monkeypatch):
    sizes = dict(t=14, k=1, g=2, windows=(12, 9), lengths=(9, 5))
    # Chunks that do not divide the positions.
    monkeypatch.setattr(gradients, "PARTIAL_BYTES", 4 * 9 * 2 * 16 * 4)
    monkeypatch.setattr(gradients, "PROGRAMS", 3)
    monkeypatch.setattr(kernel, "WARPS", 2)
    assert_equals_the_jnp_form(sizes)


def test_a_query_that_sees_nothing_gives_zero():
    arrays = inputs(t=4, k=1)
    visible = jnp.array([[0, 2, 0, 0]])

    def pairs(implementation):
        return jax.jit(
            functools.partial(
                value_and_gradients,
                functools.partial(
                    attend_pairs,
                    visible=visible,
                    windows=(3, 2),
                    form="trilinear",
                    key2_bias=0.0,
                    value2_bias=0.0,
                    scale=1.0,
                    implementation=implementation,
                ),
            )
        )

    # The last keys are seen by nobody.
    query, *keys = arrays
    keys = [x.at[:, 2:].set(jnp.nan) for x in keys]
    actual = pairs("triton")(query, *keys)
    jax.tree.map(assert_equal_up_to_rounding, actual, pairs("xla")(*arrays))
    out, lse, query_gradient, *key_gradients = actual
    assert not np.any(out[:, ::2])
    assert np.all(np.isneginf(lse[:, ::2]))
    assert not np.any(query_gradient[:, ::2])
    assert not np.any([x[:, 2:] for x in key_gradients])


def test_unseen_memory_does_not_matter_and_bits_repeat():
    query, *keys = inputs(t=5, s=30)
    run = operation("triton", windows=(4, 7))
    plain = run(query, *keys)
    # No query sees the first set before 30 - 5 - 3, nor the second before 30 - 5 - 6.
    poisoned = [
        x.at[:, :end].set(jnp.nan)
        for x, end in zip(keys, (22, 22, 19, 19), strict=True)
    ]
    for x, y in zip(run(query, *poisoned), plain, strict=True):
        np.testing.assert_array_equal(x, y)
    for gradient, end in zip(plain[3:], (22, 22, 19, 19), strict=True):
        assert not np.any(gradient[:, :end])
        assert np.all(np.any(gradient[:, end:], axis=(0, 2, 3)))


def test_sets_of_different_length():
    # As decoding has them: the end of each window, and the new tokens.
    query, key, value, key2, value2 = inputs(b=2, t=3, s=12)
    arguments = (query, key, value, key2[:, -7:], value2[:, -7:])

    def pairs(implementation):
        attend = functools.partial(
            attend_pairs,
            visible=jnp.array([[8, 9, 10], [1, 2, 3]]),
            windows=(9, 4),
            form="trilinear",
            key2_bias=0.0,
            value2_bias=0.0,
            scale=0.25,
            implementation=implementation,
        )
        return jax.jit(functools.partial(value_and_gradients, attend))(*arguments)

    jax.tree.map(assert_equal_up_to_rounding, pairs("triton"), pairs("xla"))


def test_transformations_agree():
    arrays = inputs(b=2, t=7, k=1)
    run = operation("triton", windows=(4, 3))
    plain = run(*arrays)
    mapped = jax.vmap(lambda *x: [y[0] for y in run(*(a[None] for a in x))])
    for transformed in (mapped, shard_over_batch(run)):
        for x, y in zip(transformed(*arrays), plain, strict=True):
            np.testing.assert_array_equal(x, y)


# Constants make the keys and values that multiply fp32.
@pytest.mark.parametrize("biases", [{}, {"key2_bias": 1 / 128, "value2_bias": 1.0}])
def test_compiles_to_matrix_instructions_for_hopper(compile_triton, biases):
    def shape(heads):
        return jax.ShapeDtypeStruct((1, 1000, heads, 128), jnp.bfloat16)

    run = operation("triton", windows=(512, 32), **biases)
    kernels = compile_triton(run, shape(64), *[shape(1)] * 4)
    for name in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"):
        ptx, shared_bytes = kernels[name]
        assert "wgmma.mma_async" in ptx
        assert shared_bytes <= 227 * 1024


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"query": (2, 40, 4, 300)}, "at most 256 wide, not 300"),
        ({"few_value": (2, 40, 2, 300)}, "at most 256 wide, not 300"),
        ({"dtype": jnp.float64}, "must all be bf16, fp16 or fp32, not float64"),
        ({"many_key": (2, 0, 2, 8)}, "an array is empty"),
        ({"scale": -1.0}, "scale must be positive, not -1.0"),
        ({"few_key": (2, 7, 2, 8)}, None),
        ({"few_key": (2, 1, 2, 8), "many_key": (2, 31, 2, 8)}, "gradients of 30 pairs"),
        ({"few_window": 3, "many_window": 5}, "gradients of 15 pairs"),
        ({"few_window": 1, "many_window": 1, "dtype": jnp.float32}, None),
        ({"many_key": (2, 2**28, 2, 8)}, "32 bits"),
    ],
)
def test_says_what_it_does_not_support(changes, reason):
    names = ("query", "few_key", "few_value", "many_key", "many_value")
    shapes = {name: (2, 40, 4 if name == "query" else 2, 8) for name in names}
    arrays = {
        name: jax.ShapeDtypeStruct(
            changes.get(name, shape), changes.get("dtype", jnp.bfloat16)
        )
        for name, shape in shapes.items()
    }
    options = {"few_window": 5, "many_window": 30, "scale": 0.5}
    options |= {x: changes[x] for x in options if x in changes}
    actual = unsupported(**arrays, **options)
    assert actual == reason or reason in actual


def test_needs_a_gpu(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        two_simplicial_attention(*inputs(), implementation="triton")
