"""Selective Attention's decoding and prefill in Triton's interpreter."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.nn import SelectiveAttention
from jattn.ops.selective_decode import (
    cached_selective_attention,
    prefill_selective_attention,
)
from jattn.pallas import _triton, tuning
from jattn.pallas.selective import decode as kernel
from jattn.pallas.selective import decode_unsupported, work
from tests.support import assert_equal_up_to_rounding, normal

SLOTS = 50


def inputs(group=2, dtype=jnp.float32):
    """A cache with empty slots, in no order; one row's query is padding."""
    batch, kv_heads, width = 3, 2, 24
    query, key, value, mask = normal(
        0,
        (batch, 1, kv_heads * group, width),
        (batch, SLOTS, kv_heads, width),
        (batch, SLOTS, kv_heads, 8),
        (batch, SLOTS),
    )
    order = jax.random.permutation(jax.random.key(1), jnp.arange(SLOTS))
    positions = jnp.broadcast_to(jnp.where(order < 40, order, -1), (batch, SLOTS))
    now = jnp.array([[39], [20], [-1]])
    return (query, key, value, jnp.abs(mask), now, positions), {"scale": 0.25}


def decode(implementation, *arrays, scale):
    *arrays, now, positions = arrays
    return cached_selective_attention(
        *arrays,
        query_positions=now,
        key_positions=positions,
        scale=scale,
        implementation=implementation,
    )


@pytest.fixture
def available(monkeypatch):
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks of 16 tokens, because the interpreter is slow."""
    tiles = collections.defaultdict(lambda: work.Tiling(16, 16, 1, 1))
    monkeypatch.setattr(work, "BLOCK", 16)
    monkeypatch.setattr(work, "tilings", lambda *_: tiles)


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("programs", [1, 12, 1000])
def test_equals_the_jnp_form(group, programs):
    arrays, options = inputs(group)
    tiling = kernel.Tiling(keys=16, programs=programs, warps=1, stages=1)
    with tuning.force("selective_decode", tiling):
        actual = decode("triton", *arrays, **options)
    expected = decode("xla", *arrays, **options)
    jax.tree.map(assert_equal_up_to_rounding, actual, expected)
    assert np.any(actual[1] != arrays[3])


@pytest.mark.usefixtures("available")
def test_gradients_are_those_of_the_jnp_form():
    (*arrays, now, positions), options = inputs()

    def loss(implementation, *arrays):
        out, mask = decode(implementation, *arrays, now, positions, **options)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(mask))

    gradients = (
        jax.grad(functools.partial(loss, x), argnums=(0, 1, 2, 3))(*arrays)
        for x in ("triton", "xla")
    )
    jax.tree.map(assert_equal_up_to_rounding, *gradients)


@pytest.mark.usefixtures("available")
def test_what_is_not_seen_may_hold_anything():
    (query, key, value, mask, now, positions), options = inputs()
    plain = decode("triton", query, key, value, mask, now, positions, **options)
    hidden = (positions > now) | (positions < 0)
    key, value = (jnp.where(hidden[..., None, None], jnp.nan, x) for x in (key, value))
    changed = decode("triton", query, key, value, mask, now, positions, **options)
    jax.tree.map(np.testing.assert_array_equal, changed, plain)
    assert not np.any(plain[0][2])


@pytest.mark.usefixtures("available")
def test_several_queries_take_the_jnp_form():
    (query, key, value, mask, now, positions), options = inputs()
    query, now = (jnp.repeat(x, 2, axis=1) for x in (query, now))
    arrays = query, key, value, mask, now, positions
    actual = decode("triton", *arrays, **options)
    jax.tree.map(
        np.testing.assert_array_equal, actual, decode("xla", *arrays, **options)
    )


def prefill(implementation, *arrays, budget, skip_error=0.0):
    return prefill_selective_attention(
        *arrays,
        budget=budget,
        skip_error=skip_error,
        scale=0.25,
        implementation=implementation,
    )


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize("budget", [None, 7])
def test_prefill_equals_the_jnp_form(budget):
    arrays = normal(0, (3, 40, 4, 24), (3, 40, 2, 24), (3, 40, 2, 8))
    lengths = jnp.array([40, 23, 0])
    actual = prefill("triton", *arrays, lengths, budget=budget)
    expected = prefill("xla", *arrays, lengths, budget=budget)
    for x, y in zip(actual[:2], expected[:2], strict=True):
        assert_equal_up_to_rounding(x, y)
    np.testing.assert_array_equal(actual[2], expected[2])
    held = np.sum(expected[2], axis=1)
    np.testing.assert_array_equal(held, np.minimum(lengths, budget or 40))


@pytest.mark.usefixtures("available", "small_tiles")
def test_prefill_skips_within_its_error():
    # Every query of the selecting head selects all keys by about 1.
    query, key, value = (0.1 * x for x in normal(0, *[(1, 64, 2, 16)] * 3))
    query, key = query.at[:, :, 0].add(1), key + 1
    lengths = jnp.array([64])
    exact = prefill("xla", query, key, value, lengths, budget=None)
    run = functools.partial(prefill, "triton", budget=None, skip_error=1e-2)
    actual = run(query, key, value, lengths)
    assert_equal_up_to_rounding(actual[0], exact[0], 5e-2)
    assert_equal_up_to_rounding(actual[1], exact[1])
    # The last queries skip what the tile from 16 to 32 holds.
    poisoned = value.at[:, 16:32].set(jnp.nan)
    changed = run(query, key, poisoned, lengths)
    np.testing.assert_array_equal(changed[0][:, 48:], actual[0][:, 48:])
    assert np.all(np.isnan(changed[0][:, 16:32]))


@pytest.mark.usefixtures("available", "small_tiles")
def test_prompts_run_the_parallel_kernels(monkeypatch):
    launched = []
    interpret = _triton._run_interpreter

    def spy(kernel, grid, arguments, constants):
        launched.append((kernel.fn.__name__, constants.get("SKIP")))
        return interpret(kernel, grid, arguments, constants)

    monkeypatch.setattr(_triton, "_run_interpreter", spy)
    (x,) = normal(0, (2, 7, 16))
    mixer = SelectiveAttention(num_heads=2, head_dim=8, budget=4, skip_error=0.1)
    params = mixer.clone(implementation="xla").init(jax.random.key(0), x)

    def kernels_of(x, cache):
        launched.clear()
        _, cache = jax.block_until_ready(mixer.apply(params, x, cache=cache))
        return list(launched), cache

    prompt, cache = kernels_of(x, mixer.init_cache(2, 9))
    assert ("eviction_kernel", None) in prompt
    assert prompt[-1] == ("forward_kernel", True)
    for count in (1, 2):
        after, _ = kernels_of(x[:, :count], cache)
        assert after == [("decode_kernel", None)] * count


@pytest.mark.usefixtures("available")
def test_gradients_of_prefill_are_those_of_the_jnp_form():
    arrays = normal(0, (2, 33, 2, 16), (2, 33, 1, 16), (2, 33, 1, 16))

    def loss(implementation, *arrays):
        lengths = jnp.array([33, 20])
        out, mask, _ = prefill(implementation, *arrays, lengths, budget=7)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(mask))

    gradients = (
        jax.grad(functools.partial(loss, x), argnums=(0, 1, 2))(*arrays)
        for x in ("triton", "xla")
    )
    jax.tree.map(assert_equal_up_to_rounding, *gradients)


TRANSFORMATIONS = {
    "nothing": lambda run: run,
    "checkpoint": jax.checkpoint,
    "vmap": lambda run: (
        lambda params, x, cache: jax.tree.map(
            lambda x: x[:, 0],
            jax.vmap(run, in_axes=(None, 0, 0))(
                params, *jax.tree.map(lambda x: x[:, None], (x, cache))
            ),
        )
    ),
}


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize(
    ("transformation", "budget"), [("nothing", None), ("checkpoint", 4), ("vmap", 4)]
)
def test_cached_calls_of_the_module_have_gradients(transformation, budget):
    x, after = normal(0, (2, 7, 16), (2, 1, 16))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(implementation, params, x):
        mixer = SelectiveAttention(
            num_heads=2, head_dim=8, budget=budget, implementation=implementation
        )

        def run(params, x, cache):
            out, cache = mixer.apply(params, x, cache=cache)
            later, _ = mixer.apply(params, after[: len(x)], cache=cache)
            return out, later

        def loss(params, x):
            transformed = TRANSFORMATIONS[transformation](run)
            outputs = transformed(params, x, mixer.init_cache(2, 8))
            return sum(jnp.sum(jnp.sin(x)) for x in outputs)

        return jax.grad(loss, argnums=(0, 1))(params, x)

    mixer = SelectiveAttention(num_heads=2, head_dim=8, implementation="xla")
    params = mixer.init(jax.random.key(0), x)
    jax.tree.map(
        assert_equal_up_to_rounding,
        gradients(None, params, x),
        gradients("xla", params, x),
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"query": (2, 3, 4, 8)}, "it takes one query a row, not 3"),
        ({"query": (2, 1, 256, 8)}, "at most 64 query heads may share a kv head"),
        ({"mask": jnp.float64}, "mask must be fp32, not float64"),
        ({"value": (2, 9, 2, 300)}, "at most 256 wide, not 300"),
    ],
)
@pytest.mark.usefixtures("available")
def test_says_what_it_does_not_support(changes, reason):
    shapes = {"query": (2, 1, 4, 8), "key": (2, 9, 2, 8), "value": (2, 9, 2, 8)}
    mask = jax.ShapeDtypeStruct((2, 9), changes.pop("mask", jnp.float32))
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in (shapes | changes).values()
    ]
    actual = decode_unsupported(*arrays, mask, scale=1.0)
    assert actual == reason or reason in actual
