"""The Selective Attention kernels on a GPU: the numerical gate, and what only it shows.

The error of the kernels against the fp32 reference may be at most twice that of the jnp
form in the kernels' own dtype, for the output and every gradient.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.selective import SKIP_ERROR
from jattn.nn import SelectiveAttention
from jattn.ops.selective import selective_attention, selective_skipped
from jattn.ops.selective_decode import (
    cached_selective_attention,
    prefill_selective_attention,
)
from jattn.pallas import _triton, tuning
from jattn.pallas.selective import mosaic, work
from jattn.pallas.selective import triton as kernel
from jattn.train import build_model
from jattn.train.data import Batch
from jattn.train.prune import make_budget_evaluator
from jattn.train.step import init_params
from tests.gpu.gate import assert_passes_gate, calls_kernel, rounded
from tests.support import documents, normal, relative_rms
from tests.train import runs

DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}

# Sizes by name: dtype, T, S, K, G, H, V and what is special.
CASES = {
    **{f"group {g}": dict(t=257, g=g) for g in (1, 2, 3, 4, 8, 16)},
    **{
        f"widths {h}, {v}, {dtype}": dict(t=150, h=h, v=v, dtype=dtype)
        for dtype in DTYPES
        for h, v in ((64, 64), (80, 80), (96, 128), (128, 128), (192, 128), (192, 256))
    },
    **{f"T = {t}": dict(t=t, b=2, k=4, g=1, h=64, v=64) for t in (1, 63, 111, 1000)},
    "an odd number of heads": dict(t=300, k=3, g=1),
    **{f"width 64, group {g}": dict(t=400, g=g, h=64, v=64) for g in (1, 2, 4, 8)},
    "width 64, an odd number of heads": dict(t=300, k=3, g=1, h=64, v=64),
    "fp16": dict(t=1000, dtype="fp16"),
    "fp32": dict(t=1000, dtype="fp32"),
    "packed": dict(t=1000, b=2, packed=True),
    "packed, queries end the keys": dict(t=500, s=1000, b=2, packed=True),
    "packed, width 64, group 1": dict(t=1000, g=1, h=64, v=64, packed=True),
    "packed, fp32": dict(t=500, packed=True, dtype="fp32"),
    "queries end the keys": dict(t=100, s=1000, g=3),
    "in chunks": dict(t=1000, b=2, chunk_bytes=2**20),
    "width 64, in chunks": dict(t=1000, b=2, g=1, h=64, v=64, chunk_bytes=2**20),
    "in chunks, packed": dict(t=1000, b=2, packed=True, chunk_bytes=2**20),
    "memory": dict(t=1000, g=1, memory_tau=1.0),
    "memory, packed": dict(t=1000, b=2, g=4, packed=True, memory_tau=1.0),
    "memory, queries end the keys": dict(t=500, s=1000, g=8, memory_tau=0.3),
    "a budget": dict(t=1000, b=2, budget=300, memory_tau=1.0),
    "a budget, packed": dict(t=1000, b=2, g=1, packed=True, budget=200),
    "a budget, width 80": dict(t=600, h=80, v=80, packed=True, budget=100),
    "a budget, fp32": dict(t=600, dtype="fp32", budget=100, memory_tau=1.0),
    "a budget, in chunks": dict(t=1000, budget=150, chunk_bytes=2**20),
}


def inputs(case, seed=0):
    """Query, key, value and first row of F; options and cotangents of a case."""
    sizes = dict(b=1, k=2, g=2, h=128, v=128, dtype="bf16") | case
    b, t, k, g, h, v = (sizes[x] for x in ("b", "t", "k", "g", "h", "v"))
    s = sizes.get("s", t)
    arrays = normal(
        seed, (b, t, k * g, h), (b, s, k, h), (b, s, k, v), dtype=DTYPES[sizes["dtype"]]
    )
    (first_row,) = normal(seed + 1, (b, s))
    first_row = jnp.where(jnp.arange(s) < s - t, jnp.abs(first_row), 0)
    segment_ids = (
        documents(s // 3, s - s // 3, batch=b) if sizes.get("packed") else None
    )
    cotangents = normal(seed + 2, (b, t, k * g, v), (b, t, k * g), (b, t))
    # What the kernels get, everything gets.
    cotangents[0] = cotangents[0].astype(arrays[0].dtype)
    options = {name: sizes.get(name) for name in ("budget", "memory_tau")}
    options["segment_ids"] = segment_ids
    return (*arrays, first_row), options, cotangents


@functools.partial(
    jax.jit, static_argnames=("implementation", "budget", "skip_error", "memory_tau")
)
def value_and_gradients(arrays, cotangents, *, implementation, **options):
    """Output, log-sum-exp, M if asked for, and the gradients of all arrays."""

    def attend(*arrays):
        return selective_attention(
            *arrays[:3],
            initial_mask=arrays[3],
            implementation=implementation,
            return_lse=True,
            **options,
        )

    outputs, pullback = jax.vjp(attend, *arrays)
    cotangents = cotangents[0].astype(outputs[0].dtype), *cotangents[1 : len(outputs)]
    return *outputs, *pullback(cotangents)


@pytest.mark.parametrize("name", CASES)
def test_numerical_gate(monkeypatch, name):
    case = dict(CASES[name])
    chunk_bytes = case.pop("chunk_bytes", work.CHUNK_BYTES)
    monkeypatch.setattr(work, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(work, "GRADIENT_BYTES", 4 * chunk_bytes)
    arrays, options, cotangents = inputs(case)

    def run(arrays, implementation):
        return value_and_gradients(
            arrays, cotangents, implementation=implementation, **options
        )

    with jax.default_matmul_precision("highest"):
        reference = run([x.astype(jnp.float32) for x in arrays], "xla")
    jax.clear_caches()  # CHUNK_BYTES may differ from that of an earlier trace
    actual = run(arrays, "triton")
    plain = rounded(functools.partial(run, implementation="xla"), arrays)
    assert_passes_gate(actual, plain, reference)
    for x, y in zip(actual, run(arrays, "triton"), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("sizes", "tiling"),
    [
        (dict(g=1), mosaic.Tiling(1, 1, 64, 1, 5, 2, 132)),
        (dict(g=1, h=64, v=64), mosaic.Tiling(1, 2, 128, 2, 4, 2, 132)),
        (dict(g=2), mosaic.Tiling(2, 2, 64, 1, 8, 4, 132)),
        (dict(g=4), mosaic.Tiling(2, 2, 128, 1, 4, 2, 132)),
        (dict(g=4, h=64, v=64), mosaic.Tiling(1, 4, 128, 2, 4, 2, 120)),
    ],
)
@pytest.mark.parametrize("skip_error", [0.0, 1e-3])
def test_every_mosaic_tiling_gives_the_same(sizes, tiling, skip_error):
    arrays, _, _ = inputs({"t": 1500, "s": 1700, "b": 2} | sizes)

    @jax.jit
    def attend(*arrays):
        return selective_attention(
            *arrays[:3],
            initial_mask=arrays[3],
            skip_error=skip_error,
            return_lse=True,
            implementation="triton",
        )

    expected = attend(*arrays)
    jax.clear_caches()
    with tuning.force("selective_forward_mosaic", tiling) as requests:
        actual = attend(*arrays)
    assert requests
    assert relative_rms(actual[0], expected[0]) <= 2e-3 + skip_error
    assert relative_rms(actual[1], expected[1]) <= 1e-6 + skip_error
    for x, y in zip(actual, attend(*arrays), strict=True):
        np.testing.assert_array_equal(x, y)


def test_automatic_choice_is_the_kernel():
    arrays, options, cotangents = inputs({"t": 257})

    def run(implementation):
        return functools.partial(
            value_and_gradients, implementation=implementation, **options
        )

    assert calls_kernel(run(None), arrays, cotangents)
    assert not calls_kernel(run("xla"), arrays, cotangents)
    chosen = run(None)(arrays, cotangents)
    for x, y in zip(chosen, run("triton")(arrays, cotangents), strict=True):
        np.testing.assert_array_equal(x, y)
    # What the kernels do not support goes to the jnp form without a word.
    wide, *_ = inputs({"t": 257, "h": 300, "v": 300})
    assert not calls_kernel(selective_attention, *wide[:3])


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, True),
        ({"packed": True}, True),
        ({"h": 96}, True),
        ({"h": 80, "v": 40}, True),
        ({"h": 32, "v": 24}, False),
        ({"h": 192}, False),
    ],
)
def test_gradients_are_mosaics(changes, chosen):
    arrays, options, cotangents = inputs({"t": 257} | changes)
    run = functools.partial(value_and_gradients, implementation=None, **options)
    program = str(jax.make_jaxpr(run)(arrays, cotangents))
    for name in ("selective_query_gradient", "selective_key_gradient"):
        assert (name in program) == chosen


def test_automatic_choice_in_the_module():
    x, cotangent = normal(0, (2, 500, 96), (2, 500, 96))
    segment_ids = documents(150, 350, batch=2)

    def run(implementation):
        mixer = SelectiveAttention(
            num_heads=4, num_kv_heads=2, head_dim=32, implementation=implementation
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


def test_automatic_choice_in_the_module_with_a_cache():
    x, after = normal(0, (2, 500, 96), (2, 1, 96))
    lengths = jnp.array([500, 300])
    plain = SelectiveAttention(
        num_heads=4, num_kv_heads=2, head_dim=32, implementation="xla"
    )
    params = plain.init(jax.random.key(0), x)

    def run(implementation):
        mixer = plain.clone(implementation=implementation)

        def attend(x, lengths, cache):
            return mixer.apply(params, x, lengths=lengths, cache=cache)

        results, cache = [], mixer.init_cache(2, 501)
        for arguments in (x, lengths), (after, None):
            # Where they are not the first, 500 tokens have the jnp form alone.
            chosen = calls_kernel(attend, *arguments, cache)
            assert chosen == (implementation is None)
            out, cache = jax.jit(attend)(*arguments, cache)
            results += [out, cache.key, cache.value, cache.mask]
        return results

    with jax.default_matmul_precision("highest"):
        for actual, expected in zip(run(None), run("xla"), strict=True):
            assert relative_rms(actual, expected) <= 1e-5


def test_the_search_of_budgets_runs_the_kernels(monkeypatch):
    config = runs.config(
        "", scheme="selective", num_layers=2, accumulation=2, dtype="float32"
    )
    params = jax.jit(lambda: init_params(build_model(config, 256), config))()
    # Selection as strong as a trained model's, so that it matters who is dropped.
    params = jax.tree.map(lambda x: 3 * x if x.ndim == 3 else x, params)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 300), dtype=np.int32)
    segments = np.asarray(documents(200, 100, batch=4))
    batch = Batch(tokens, segments, np.ones_like(tokens))
    budgets = np.array([[300, 300], [4, 300], [300, 3], [2, 20]], np.int32)
    names = []
    call = _triton.call

    def spy(launched, *operands, **options):
        names.append(launched.fn.__name__)
        return call(launched, *operands, **options)

    monkeypatch.setattr(_triton, "call", spy)

    def losses(implementation):
        model = dataclasses.replace(config.model, implementation=implementation)
        with_model = dataclasses.replace(config, model=model)
        evaluate = make_budget_evaluator(
            build_model(with_model, 256), with_model, params, [batch]
        )
        with jax.default_matmul_precision("highest"):
            return evaluate(budgets)

    expected = losses("xla")
    assert not names
    actual = losses(None)
    assert "eviction_kernel" in names
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert np.min(np.abs(np.diff(np.sort(expected)))) > 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_skipping_stays_within_its_error(packed):
    arrays, options, cotangents = inputs(
        {"t": 2000, "h": 64, "v": 64, "packed": packed}
    )
    error = 1e-3
    skipped, causal = kernel.skipped_tiles(
        *arrays[:2], options["segment_ids"], 64**-0.5, error, 64
    )
    assert skipped / causal > 0.3
    run = functools.partial(
        value_and_gradients, arrays, cotangents, implementation="triton", **options
    )
    plain, skipping = run(), run(skip_error=error)
    assert np.all(skipping[1] <= plain[1] + 1e-5)
    assert np.all(skipping[1] >= plain[1] + np.log1p(-error) - 1e-5)
    for x, y in zip(skipping, plain, strict=True):
        assert relative_rms(x, y) <= 2 * error
    for x, y in zip(skipping, run(skip_error=error), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_memory_term_is_exact_with_skipping(tau):
    arrays, options, cotangents = inputs({"t": 2000, "h": 64, "v": 64})
    options["memory_tau"] = tau
    run = functools.partial(
        value_and_gradients, arrays, cotangents, implementation="triton", **options
    )
    plain, skipping = run(), run(skip_error=1e-3)
    assert relative_rms(skipping[2], plain[2]) <= 1e-6
    for x, y in zip(skipping, plain, strict=True):
        assert relative_rms(x, y) <= 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4, 7])
def test_decoding_passes_the_gate(dtype, group):
    b, s, k = 3, 1000, 2
    query, key, value = normal(
        0, (b, 1, k * group, 128), *[(b, s, k, 128)] * 2, dtype=DTYPES[dtype]
    )
    (mask,) = normal(1, (b, s))
    positions = jax.random.permutation(jax.random.key(2), jnp.arange(s))
    positions = jnp.where(positions < 900, positions, -1)
    now = jnp.array([[950], [500], [-1]])

    @functools.partial(jax.jit, static_argnames="implementation")
    def decode(query, key, value, implementation):
        return cached_selective_attention(
            query,
            key,
            value,
            jnp.abs(mask),
            query_positions=now,
            key_positions=jnp.broadcast_to(positions, (b, s)),
            scale=128**-0.5,
            implementation=implementation,
        )

    arrays = query, key, value
    with jax.default_matmul_precision("highest"):
        reference = decode(*(x.astype(jnp.float32) for x in arrays), "xla")
    actual = decode(*arrays, "triton")
    assert_passes_gate(actual, decode(*arrays, "xla"), reference)
    assert not np.any(np.asarray(actual[0][2], np.float32))
    for x, y in zip(actual, decode(*arrays, None), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("length", [512, 4096, 20_000])
def test_evicts_what_the_jnp_form_does(length):
    query, key = (
        jnp.round(x.astype(jnp.float32)).astype(x.dtype)
        for x in inputs({"t": length, "b": 2, "k": 1, "g": 1})[0][:2]
    )
    # Integers: F is exact, and many keys have the same.
    budget = length // 8

    @functools.partial(jax.jit, static_argnames="implementation")
    def prefill(implementation):
        lengths = jnp.array([length, length - 100])
        return prefill_selective_attention(
            query,
            key,
            key,
            lengths,
            budget=budget,
            skip_error=0.0,
            scale=1.0,
            implementation=implementation,
        )

    _, mask, held = prefill("triton")
    _, expected_mask, expected = prefill("xla")
    np.testing.assert_array_equal(held, expected)
    np.testing.assert_array_equal(np.sum(held, axis=1), budget)
    np.testing.assert_array_equal(mask[held], expected_mask[held])


@pytest.mark.parametrize("budget", [None, 150])
def test_prefill_passes_the_gate(budget):
    arrays = inputs({"t": 1000, "b": 2})[0][:3]
    lengths = jnp.array([1000, 700])

    @functools.partial(jax.jit, static_argnames="implementation")
    def prefill(query, key, value, implementation):
        return prefill_selective_attention(
            query,
            key,
            value,
            lengths,
            budget=budget,
            skip_error=0.0,
            scale=128**-0.5,
            implementation=implementation,
        )

    with jax.default_matmul_precision("highest"):
        reference = prefill(*(x.astype(jnp.float32) for x in arrays), "xla")
    actual = prefill(*arrays, "triton")
    plain = prefill(*arrays, "xla")
    assert_passes_gate(actual[:2], plain[:2], reference[:2])
    np.testing.assert_array_equal(actual[2], reference[2])
    for x, y in zip(actual, prefill(*arrays, None), strict=True):
        np.testing.assert_array_equal(x, y)


def test_prefill_skips_within_its_error():
    (query, key, value, _), _, _ = inputs({"t": 1000, "h": 64, "v": 64})

    @functools.partial(jax.jit, static_argnames=("implementation", "skip_error"))
    def prefill(query, key, value, implementation, skip_error):
        return prefill_selective_attention(
            query,
            key,
            value,
            jnp.array([1000]),
            budget=None,
            skip_error=skip_error,
            scale=64**-0.5,
            implementation=implementation,
        )

    with jax.default_matmul_precision("highest"):
        arrays = (x.astype(jnp.float32) for x in (query, key, value))
        exact = prefill(*arrays, "xla", 0.0)
    actual = prefill(query, key, value, "triton", 1e-3)
    assert relative_rms(actual[0], exact[0]) <= 7e-3
    assert relative_rms(actual[1], exact[1]) <= 1e-5
    # The last queries skip the keys from 128 to 192.
    poisoned = value.at[:, 128:192].set(jnp.nan)
    changed = prefill(query, key, poisoned, "triton", 1e-3)
    np.testing.assert_array_equal(changed[0][:, 896:], actual[0][:, 896:])
    assert np.all(np.isnan(changed[0][:, 128:192]))


def test_the_benchmarks_inputs_skip_three_quarters():
    query, key = normal(0, *[(1, 4096, 16, 64)] * 2)
    assert selective_skipped(query, key, skip_error=SKIP_ERROR) > 0.75


def test_skipped_values_are_not_read():
    (query, key, value, first_row), options, cotangents = inputs(
        {"t": 1000, "h": 64, "v": 64}
    )
    run = functools.partial(
        value_and_gradients,
        cotangents=cotangents,
        implementation="triton",
        skip_error=1e-3,
        **options,
    )
    plain = run((query, key, value, first_row))
    poisoned = value.at[:, 128:192].set(jnp.nan)
    changed = run((query, key, poisoned, first_row))
    np.testing.assert_array_equal(changed[0][:, 896:], plain[0][:, 896:])


def test_more_than_2_to_the_31_elements():
    t, last = 140_000, 64
    shapes = (1, t, 64, 256), (1, t, 4, 256), (1, t, 4, 64)
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    )
    assert query.size > 2**31
    # Nothing is selected: then the last queries can be computed by themselves.
    query = query.at[:, :, 0].set(-jnp.abs(query[:, :, 0]))
    key = key.at[:, :, 0].set(jnp.abs(key[:, :, 0]))

    def attend(query, implementation):
        def total(query):
            out = selective_attention(
                query,
                key,
                value,
                initial_mask=jnp.zeros((1, t)),
                implementation=implementation,
            )
            return jnp.sum(out[:, -last:].astype(jnp.float32) ** 2), out[:, -last:]

        gradient, out = jax.grad(total, has_aux=True)(query)
        return out, gradient[:, -last:]

    attend = jax.jit(attend, static_argnames="implementation")
    actual = attend(query, implementation="triton")
    expected = attend(query[:, -last:], implementation="xla")
    for x, y in zip(actual, expected, strict=True):
        assert relative_rms(x, y) <= 5e-3
