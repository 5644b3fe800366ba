"""jattn.dense_attention against loops in float64, and its contract."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

import jattn
from tests.support import (
    assert_equal_up_to_rounding,
    documents,
    normal,
    shard_over_batch,
    temporary_bytes,
)


def slow_attention(query, key, value, window=None, segment_ids=None):
    """One query, one head, one key at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    b, t, n, h = query.shape
    s, k, v = value.shape[1:]
    out, lse = np.zeros((b, t, n, v)), np.full((b, t, n), -np.inf)
    for row, i, head in np.ndindex(b, t, n):
        position, kv_head = s - t + i, head // (n // k)
        first = 0 if window is None else max(0, position - window + 1)
        seen = [
            j
            for j in range(first, position + 1)
            if segment_ids is None or segment_ids[row, j] == segment_ids[row, position]
        ]
        logits = np.array([query[row, i, head] @ key[row, j, kv_head] for j in seen])
        weights = np.exp(logits / np.sqrt(h))
        lse[row, i, head] = np.log(weights.sum())
        out[row, i, head] = weights / weights.sum() @ value[row, seen, kv_head]
    return out, lse


def qkv(seed=0, b=2, t=7, s=None, n=4, k=2, h=8, v=6, dtype=jnp.float32):
    s = s or t
    return normal(seed, (b, t, n, h), (b, s, k, h), (b, s, k, v), dtype=dtype)


@given(
    b=st.integers(1, 2),
    t=st.integers(1, 17),
    extra=st.integers(0, 5),
    k=st.integers(1, 3),
    g=st.integers(1, 3),
    window=st.none() | st.integers(1, 9),
    packed=st.booleans(),
)
def test_equals_the_loop_for_any_shape(b, t, extra, k, g, window, packed):
    s = t + extra
    query, key, value = qkv(b=b, t=t, s=s, n=k * g, k=k)
    segments = documents(s // 2, s - s // 2, batch=b) if packed else None
    out, lse = jattn.dense_attention(
        query, key, value, window=window, segment_ids=segments, return_lse=True
    )
    slow_out, slow_lse = slow_attention(query, key, value, window, segments)
    assert_equal_up_to_rounding(out, slow_out)
    assert_equal_up_to_rounding(lse, slow_lse)


def test_fp64_stays_fp64(x64):
    query, key, value = qkv(dtype=jnp.float64)
    out, lse = jattn.dense_attention(query, key, value, return_lse=True)
    assert out.dtype == lse.dtype == jnp.float64
    assert_equal_up_to_rounding(out, slow_attention(query, key, value)[0], 1e-14)


def test_bf16_keeps_statistics_in_fp32():
    query, key, value = qkv(dtype=jnp.bfloat16)
    out, lse = jattn.dense_attention(query, key, value, return_lse=True)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    slow_out, slow_lse = slow_attention(query, key, value)
    assert_equal_up_to_rounding(out, slow_out, 5e-3)
    assert_equal_up_to_rounding(lse, slow_lse, 1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_equal_finite_differences(x64, window):
    arguments = qkv(b=1, t=6, n=2, k=1, h=4, v=3, dtype=jnp.float64)

    def loss(*arguments):
        out, lse = jattn.dense_attention(*arguments, window=window, return_lse=True)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    check_grads(loss, arguments, order=1, modes=["rev"])


@pytest.mark.parametrize("window", [None, 4])
def test_chunks_change_nothing(monkeypatch, window):
    arguments = qkv(t=61, b=1)

    def value_and_grads():
        def loss(*arguments):
            out = jattn.dense_attention(*arguments, window=window)
            return jnp.sum(jnp.sin(out)), out

        grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arguments)
        return out, grads

    whole = value_and_grads()
    monkeypatch.setattr("jattn.ops._common.CHUNK_BYTES", 2**10)
    chunked = value_and_grads()
    jax.tree.map(assert_equal_up_to_rounding, chunked, whole)


@pytest.mark.parametrize("window", [None, 5])
def test_the_future_changes_nothing_bit_for_bit(window):
    query, key, value = qkv(t=40)
    other = qkv(seed=1, t=40)
    cut = 23
    changed = [
        jnp.concatenate([x[:, :cut], y[:, cut:]], axis=1)
        for x, y in zip((query, key, value), other, strict=True)
    ]
    before = jattn.dense_attention(query, key, value, window=window)
    after = jattn.dense_attention(*changed, window=window)
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert np.any(before[:, cut:] != after[:, cut:])


def test_packed_documents_equal_documents_alone():
    query, key, value = qkv(b=1, t=20)
    packed = jattn.dense_attention(query, key, value, segment_ids=documents(8, 12))
    alone = [
        jattn.dense_attention(query[:, a:b], key[:, a:b], value[:, a:b])
        for a, b in [(0, 8), (8, 20)]
    ]
    assert_equal_up_to_rounding(packed, jnp.concatenate(alone, axis=1))


def test_long_windows_do_not_build_a_square():
    shapes = [jax.ShapeDtypeStruct((1, 8192, 4, 64), jnp.float32)] * 3
    f = functools.partial(jattn.dense_attention, window=512)
    assert temporary_bytes(f, *shapes) < 2**28


def test_transformations_agree():
    query, key, value = qkv(b=2)
    plain = jattn.dense_attention(query, key, value)
    jitted = jax.jit(jattn.dense_attention)(query, key, value)
    mapped = jax.vmap(lambda *a: jattn.dense_attention(*(x[None] for x in a))[0])(
        query, key, value
    )
    sharded = shard_over_batch(jattn.dense_attention)(query, key, value)
    chex.assert_trees_all_close(plain, jitted, mapped, sharded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": (2, 7, 3, 8), "value": (2, 7, 3, 6)}, "N=4, K=3"),
        ({"key": (2, 7, 2, 9)}, r"key must have shape \[B=2, S, K, H=8\]"),
        ({"value": (2, 6, 2, 6)}, r"value must have shape \[B=2, S=7, K=2, V\]"),
        ({"query": (2, 9, 4, 8)}, "T may not exceed S"),
        ({"query": (7, 4, 8)}, r"query must have shape \[B, T, N, H\]"),
    ],
)
def test_wrong_shapes_are_named(changes, message):
    arguments = dict(zip(("query", "key", "value"), qkv(), strict=True))
    for name, shape in changes.items():
        arguments[name] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(jattn.dense_attention, **arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be a positive integer; got 0"),
        ({"implementation": "cuda"}, ValueError, "implementation must be"),
        ({"implementation": "pallas"}, NotImplementedError, "no such kernel"),
        ({"segment_ids": jnp.zeros((2, 3), jnp.int32)}, ValueError, "segment_ids"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        jattn.dense_attention(*qkv(), **options)
