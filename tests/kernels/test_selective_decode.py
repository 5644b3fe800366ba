"""Selective Attention's decoding and prefill in Triton's interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.ops.selective_decode import (
    cached_selective_attention,
    prefill_selective_attention,
)
from jattn.pallas import _triton, tuning
from jattn.pallas.selective import decode as kernel
from jattn.pallas.selective import decode_unsupported
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


def prefill(implementation, *arrays, budget):
    return prefill_selective_attention(
        *arrays,
        budget=budget,
        skip_error=0.0,
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
