"""The 2-simplicial kernels on a GPU: the numerical gate, and what only a GPU can show.

The error of the kernels against the fp32 reference may be at most twice that of the
jnp form in the kernels' own dtype, for the output and every gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.nn import TwoSimplicialAttention
from jattn.ops.simplicial import two_simplicial_attention
from jattn.pallas.simplicial import backward as gradients
from tests.gpu.gate import assert_passes_gate, calls_kernel
from tests.support import documents, normal, relative_rms

DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}

# Sizes by name: dtype, T, K, G, H, V, and options of the operation.
CASES = {
    **{f"group {g}": dict(k=2, g=g) for g in (1, 2, 3, 4, 8, 16, 32)},
    **{f"{g} heads on 1": dict(k=1, g=g) for g in (64, 96, 128)},
    **{
        f"widths {h}, {v}, {dtype}": dict(t=111, g=16, h=h, v=v, dtype=dtype)
        for dtype in DTYPES
        for h, v in ((64, 64), (80, 80), (96, 96), (128, 128), (128, 64), (256, 256))
    },
    **{f"T = {t}": dict(t=t, b=2) for t in (63, 111, 1000)},
    **{
        f"windows {windows}, group {g}": dict(g=g, windows=windows)
        for windows in ((100, 1), (8, 4), (33, 33), (64, 512), (None, 7))
        for g in (1, 64)
    },
    **{
        f"windows {windows}, fp32": dict(g=4, windows=windows, dtype="fp32")
        for windows in ((1, 1), (5, 3))
    },
    "no windows": dict(t=111, g=4, windows=(None, None)),
    "fp16": dict(t=1000, g=64, k=1, dtype="fp16"),
    "fp32": dict(t=257, g=16, dtype="fp32"),
    "packed": dict(t=1000, b=2, g=16, lengths=(3, 400, 597)),
    "packed, one head": dict(t=1000, b=2, g=1, lengths=(3, 400, 597)),
    "packed, 64 heads": dict(t=1000, k=1, g=64, lengths=(3, 400, 597)),
    "queries end the keys": dict(t=100, s=1000, g=3),
    "determinants": dict(g=16, h=64, form="determinant"),
    "determinants, wide": dict(g=16, form="determinant"),
    "biases": dict(g=16, key2_bias=1 / 128, value2_bias=1.0),
    "several chunks": dict(t=1000, g=4, partial_bytes=2**20),
}
OPTIONS = ("windows", "form", "key2_bias", "value2_bias")


def inputs(case, seed=0):
    """Query, keys and values of both sets, options and cotangents of a case."""
    sizes = dict(b=1, t=257, k=2, g=2, h=128, v=128, dtype="bf16") | case
    b, t, k, g, h, v = (sizes[x] for x in ("b", "t", "k", "g", "h", "v"))
    s = sizes.get("s", t)
    keys, values = (b, s, k, h), (b, s, k, v)
    arrays = normal(
        seed, (b, t, k * g, h), keys, values, keys, values, dtype=DTYPES[sizes["dtype"]]
    )
    options = {"windows": (100, 20)} | {x: sizes[x] for x in OPTIONS if x in sizes}
    segment_ids = None
    if "lengths" in sizes:
        segment_ids = documents(*sizes["lengths"], batch=b)
    out_cotangent, lse_cotangent = normal(seed + 1, (b, t, k * g, v), (b, t, k * g))
    # All forms get the same one, the reference too.
    cotangents = out_cotangent.astype(DTYPES[sizes["dtype"]]), lse_cotangent
    return arrays, segment_ids, options, cotangents


@functools.partial(jax.jit, static_argnames=("implementation", *OPTIONS))
def value_and_gradients(arrays, segment_ids, cotangents, *, implementation, **options):
    """Output, log-sum-exp, and gradients of query, keys and values."""

    def attend(*arrays):
        return two_simplicial_attention(
            *arrays,
            segment_ids=segment_ids,
            implementation=implementation,
            return_lse=True,
            **options,
        )

    (out, lse), pullback = jax.vjp(attend, *arrays)
    cotangents = cotangents[0].astype(out.dtype), cotangents[1]
    return out, lse, *pullback(cotangents)


@pytest.mark.parametrize("name", CASES)
def test_numerical_gate(monkeypatch, name):
    case = dict(CASES[name])
    if "partial_bytes" in case:
        monkeypatch.setattr(gradients, "PARTIAL_BYTES", case.pop("partial_bytes"))
    arrays, segment_ids, options, cotangents = inputs(case)

    def run(arrays, implementation):
        return value_and_gradients(
            arrays, segment_ids, cotangents, implementation=implementation, **options
        )

    with jax.default_matmul_precision("highest"):
        reference = run([x.astype(jnp.float32) for x in arrays], "xla")
    actual = run(arrays, "triton")
    assert_passes_gate(actual, run(arrays, "xla"), reference)
    for x, y in zip(actual, run(arrays, "triton"), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("g", "implementation"), [(64, "pallas"), (4, "triton")])
def test_automatic_choice_is_the_kernel(g, implementation):
    arrays, segment_ids, options, cotangents = inputs({"g": g})

    def run(implementation):
        return functools.partial(
            value_and_gradients, implementation=implementation, **options
        )

    assert calls_kernel(run(None), arrays, segment_ids, cotangents)
    assert not calls_kernel(run("xla"), arrays, segment_ids, cotangents)
    chosen = run(None)(arrays, segment_ids, cotangents)
    asked = run(implementation)(arrays, segment_ids, cotangents)
    for x, y in zip(chosen, asked, strict=True):
        np.testing.assert_array_equal(x, y)
    # What the kernel does not support goes to the jnp form without a word.
    arrays, _, _, cotangents = inputs({"t": 9, "h": 300})
    assert not calls_kernel(run(None), arrays, None, cotangents)


def test_a_common_rotation_leaves_the_determinant_form_as_it_is():
    query, key, value, key2, value2 = normal(
        0, (1, 257, 16, 96), *[(1, 257, 1, 96)] * 4
    )
    (matrix,) = normal(5, (3, 3))
    rotation, _ = np.linalg.qr(matrix)
    rotation *= np.linalg.det(rotation)

    def rotate(x):
        turned = np.asarray(x, np.float64).reshape(*x.shape[:-1], 32, 3) @ rotation
        return jnp.asarray(turned.reshape(x.shape), jnp.float32)

    for form, invariant in [("determinant", True), ("trilinear", False)]:
        run = functools.partial(
            two_simplicial_attention,
            windows=(100, 20),
            form=form,
            implementation="triton",
        )
        plain = run(query, key, value, key2, value2)
        turned = run(rotate(query), rotate(key), value, rotate(key2), value2)
        assert (relative_rms(turned, plain) <= 1e-5) == invariant


@pytest.mark.parametrize("g", [1, 64])
def test_windows_of_all_keys_are_no_windows(g):
    arrays, _, _, _ = inputs(dict(t=111, g=g))
    run = functools.partial(two_simplicial_attention, implementation="triton")
    expected = run(*arrays, windows=(None, None))
    for windows in [(111, 111), (None, 500)]:
        np.testing.assert_array_equal(run(*arrays, windows=windows), expected)


@pytest.mark.parametrize("g", [1, 64])
def test_the_order_of_the_sets_does_not_matter(g):
    (query, key, value, key2, value2), _, _, _ = inputs(dict(t=500, g=g))
    run = functools.partial(two_simplicial_attention, implementation="triton")
    expected = run(query, key, value, key2, value2, windows=(200, 24))
    actual = run(query, key2, value2, key, value, windows=(24, 200))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("g", [1, 4, 64])
def test_a_second_set_of_ones_leaves_a_sliding_window(g):
    (query, key, value, _, _), _, _, _ = inputs(dict(t=500, g=g))
    ones = jnp.ones_like(key)
    actual = two_simplicial_attention(
        query, key, value, ones, ones, windows=(100, 20), implementation="triton"
    )
    expected = jattn.dense_attention(
        query, key, value, window=100, implementation="xla"
    )
    assert relative_rms(actual, expected) <= 5e-3


def test_unseen_memory_does_not_matter():
    arrays, segment_ids, options, cotangents = inputs(dict(t=100, s=1000, g=16))
    query, *keys = arrays
    # The first query is at 900 and sees 100 keys of the first set, 20 of the second.
    ends = (801, 801, 881, 881)
    poisoned = [x.at[:, :end].set(jnp.nan) for x, end in zip(keys, ends, strict=True)]
    run = functools.partial(value_and_gradients, implementation="triton", **options)
    plain = run(arrays, segment_ids, cotangents)
    changed = run([query, *poisoned], segment_ids, cotangents)
    for x, y in zip(changed, plain, strict=True):
        np.testing.assert_array_equal(x, y)
    for gradient, end in zip(plain[3:], ends, strict=True):
        assert not np.any(gradient[:, :end])


def test_a_document_knows_nothing_of_the_one_before():
    arrays, _, options, cotangents = inputs(dict(t=300, g=16))
    segment_ids = documents(117, 183)
    run = functools.partial(value_and_gradients, implementation="triton", **options)
    packed = run(arrays, segment_ids, cotangents)
    others, *_ = inputs(dict(t=300, g=16), seed=7)
    arrays = [
        x.at[:, :117].set(y[:, :117]) for x, y in zip(arrays, others, strict=True)
    ]
    changed = run(arrays, segment_ids, cotangents)
    for x, y in zip(changed, packed, strict=True):
        np.testing.assert_array_equal(x[:, 117:], y[:, 117:])
        assert np.any(x[:, :117] != y[:, :117])


def test_more_than_2_to_the_31_elements():
    t, last = 140_000, 64
    shapes = (1, t, 64, 256), *[(1, t, 1, 256), (1, t, 1, 64)] * 2
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ]
    assert arrays[0].size > 2**31

    def attend(query, *keys, implementation):
        def total(query):
            out = two_simplicial_attention(
                query, *keys, windows=(64, 2), implementation=implementation
            )
            return jnp.sum(out[:, -last:].astype(jnp.float32) ** 2), out[:, -last:]

        gradient, out = jax.grad(total, has_aux=True)(query)
        return out, gradient[:, -last:]

    attend = jax.jit(attend, static_argnames="implementation")
    actual = attend(*arrays, implementation="triton")
    # Queries may be the last of the keys: only those are compared.
    query, *keys = arrays
    short = [query[:, -last:], *(x[:, -200:] for x in keys)]
    expected = attend(*short, implementation="xla")
    for x, y in zip(actual, expected, strict=True):
        assert relative_rms(x, y) <= 5e-3


@pytest.mark.parametrize("form", ["trilinear", "determinant"])
def test_automatic_choice_in_the_module(form):
    x, cotangent = normal(0, (2, 300, 96), (2, 300, 96))
    segment_ids = documents(100, 200, batch=2)

    def run(implementation):
        mixer = TwoSimplicialAttention(
            num_heads=8,
            num_kv_heads=2,
            head_dim=32,
            windows=(100, 20),
            form=form,
            implementation=implementation,
        )

        @jax.jit
        def value_and_gradients(x):
            params = mixer.init(jax.random.key(0), x)

            def attend(params, x):
                return mixer.apply(params, x, segment_ids=segment_ids)

            out, pullback = jax.vjp(attend, params, x)
            return out, pullback(cotangent)

        assert calls_kernel(value_and_gradients, x) == (implementation is None)
        return jax.tree.leaves(value_and_gradients(x))

    with jax.default_matmul_precision("highest"):
        for actual, expected in zip(run(None), run("xla"), strict=True):
            assert relative_rms(actual, expected) <= 1e-5


@pytest.mark.parametrize(("b", "heads"), [(1, 64), (3, 4)])
def test_decoding_equals_the_parallel_form(b, heads):
    mixer = TwoSimplicialAttention(
        num_heads=heads, num_kv_heads=1, head_dim=64, windows=(100, 20)
    )
    (x,) = normal(0, (b, 150, 96))
    params = mixer.init(jax.random.key(0), x)
    with jax.default_matmul_precision("highest"):
        expected = mixer.apply(params, x)
        cache = mixer.init_cache(b, 150)
        step = jax.jit(lambda x, cache: mixer.apply(params, x, cache=cache))
        assert calls_kernel(step, x[:, :1], cache)
        parts = []
        for start, end in [
            (0, 120),
            *((i, i + 1) for i in range(120, 130)),
            (130, 150),
        ]:
            out, cache = step(x[:, start:end], cache)
            parts.append(out)
    assert relative_rms(jnp.concatenate(parts, axis=1), expected) <= 1e-5
