"""jattn.block_sparse_attention against loops in float64, and its contract."""

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


def slow_attention(query, key, value, indices, block_size, segment_ids=None):
    """One query, one head, one key at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    b, t, n, h = query.shape
    s, k, v = value.shape[1:]
    lists_per_head = n // indices.shape[2]
    out, lse = np.zeros((b, t, n, v)), np.full((b, t, n), -np.inf)
    for row, i, head in np.ndindex(b, t, n):
        position, kv_head = s - t + i, head // (n // k)
        blocks = set(np.asarray(indices)[row, i, head // lists_per_head].tolist())
        seen = [
            j
            for j in range(position + 1)
            if j // block_size in blocks
            and (
                segment_ids is None or segment_ids[row, j] == segment_ids[row, position]
            )
        ]
        if seen:
            logits = query[row, i, head] @ key[row, seen, kv_head].T / np.sqrt(h)
            lse[row, i, head] = np.log(np.exp(logits).sum())
            weights = np.exp(logits - lse[row, i, head])
            out[row, i, head] = weights @ value[row, seen, kv_head]
    return out, lse


def inputs(seed=0, b=2, t=11, s=None, n=4, k=2, h=8, v=6, dtype=jnp.float32):
    s = s or t
    return normal(seed, (b, t, n, h), (b, s, k, h), (b, s, k, v), dtype=dtype)


def lists(seed=0, b=2, t=11, heads=2, n=3, blocks=3):
    """Indices from -2 to past the last block, with repetitions."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(-2, blocks + 2, (b, t, heads, n)), jnp.int32)


attend = jax.jit(
    jattn.block_sparse_attention, static_argnames=("block_size", "return_lse")
)


@given(
    b=st.integers(1, 2),
    t=st.integers(1, 17),
    extra=st.integers(0, 5),
    k=st.integers(1, 3),
    g=st.integers(1, 3),
    n=st.integers(1, 9),
    block_size=st.integers(1, 7),
    per_head=st.booleans(),
    packed=st.booleans(),
)
def test_equals_the_loop_for_any_shape(
    b, t, extra, k, g, n, block_size, per_head, packed
):
    s = t + extra
    query, key, value = inputs(b=b, t=t, s=s, n=k * g, k=k)
    indices = lists(
        b=b, t=t, heads=k * g if per_head else k, n=n, blocks=-(-s // block_size)
    )
    segments = documents(s // 2, s - s // 2, batch=b) if packed else None
    out, lse = attend(
        query,
        key,
        value,
        indices,
        block_size=block_size,
        segment_ids=segments,
        return_lse=True,
    )
    slow = slow_attention(query, key, value, indices, block_size, segments)
    assert_equal_up_to_rounding(out, slow[0])
    assert_equal_up_to_rounding(lse, slow[1])


def test_fp64_stays_fp64(x64):
    query, key, value = inputs(dtype=jnp.float64)
    indices = lists()
    out, lse = attend(query, key, value, indices, block_size=4, return_lse=True)
    assert out.dtype == lse.dtype == jnp.float64
    slow = slow_attention(query, key, value, indices, 4)
    assert_equal_up_to_rounding(out, slow[0], 1e-14)
    assert_equal_up_to_rounding(lse, slow[1], 1e-14)


def test_bf16_keeps_statistics_in_fp32():
    query, key, value = inputs(dtype=jnp.bfloat16)
    indices = lists()
    out, lse = attend(query, key, value, indices, block_size=4, return_lse=True)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    slow = slow_attention(query, key, value, indices, 4)
    assert_equal_up_to_rounding(out, slow[0], 5e-3)
    assert_equal_up_to_rounding(lse, slow[1], 1e-6)


def test_a_list_of_all_blocks_is_dense_attention():
    query, key, value = inputs(t=15)
    indices = jnp.broadcast_to(jnp.arange(5)[::-1], (2, 15, 2, 5))
    out, lse = attend(query, key, value, indices, block_size=4, return_lse=True)
    dense = jattn.dense_attention(query, key, value, return_lse=True)
    assert_equal_up_to_rounding(out, dense[0])
    assert_equal_up_to_rounding(lse, dense[1])


def test_neither_order_nor_repetition_of_indices_matters():
    query, key, value = inputs()
    once = jnp.broadcast_to(jnp.asarray([0, 1, -1, -1]), (2, 11, 2, 4))
    more = jnp.broadcast_to(jnp.asarray([1, 0, 1, 1]), (2, 11, 2, 4))
    np.testing.assert_array_equal(
        attend(query, key, value, once, block_size=4),
        attend(query, key, value, more, block_size=4),
    )


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint32, jnp.int32])
def test_indices_of_blocks_there_are_not_see_nothing(dtype):
    query, key, value = inputs()
    indices = jnp.full((2, 11, 2, 1), jnp.iinfo(dtype).max, dtype)
    out, lse = attend(query, key, value, indices, block_size=4, return_lse=True)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize("per_head", [False, True])
def test_gradients_equal_finite_differences(x64, per_head):
    arguments = inputs(b=1, t=7, s=8, n=4, k=2, h=4, v=3, dtype=jnp.float64)
    indices = lists(b=1, t=7, heads=4 if per_head else 2, blocks=3)
    segments = documents(2, 6)

    @jax.jit
    def loss(*arguments):
        out, lse = jattn.block_sparse_attention(
            *arguments, indices, block_size=3, segment_ids=segments, return_lse=True
        )
        live = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(live))

    check_grads(loss, arguments, order=1, modes=["rev"])


def test_empty_rows_have_zero_gradients():
    arguments = inputs(b=1)
    indices = jnp.full((1, 11, 2, 2), -1).at[:, 6:].set(0)

    def loss(*arguments):
        out, lse = jattn.block_sparse_attention(
            *arguments, indices, block_size=4, return_lse=True
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.exp(lse)), (out, lse)

    grads, (out, lse) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arguments)
    np.testing.assert_array_equal(out[:, :6], 0)
    np.testing.assert_array_equal(lse[:, :6], -np.inf)
    np.testing.assert_array_equal(grads[0][:, :6], 0)
    assert np.all(grads[0][:, 6:] != 0)
    for grad in grads[1:]:
        np.testing.assert_array_equal(grad[:, 4:], 0)
        assert np.all(grad[:, :4] != 0)


def test_no_row_of_logit_gradients_has_a_sum():
    """Softmax has no gradient along a constant, so keys' gradients cancel."""
    query, key, value = inputs(t=19)
    indices = lists(t=19, blocks=5)
    f = functools.partial(jattn.block_sparse_attention, block_size=4)
    loss = lambda key: jnp.sum(jnp.sin(f(query, key, value, indices)))  # noqa: E731
    grad = jax.jit(jax.grad(loss))(key)
    assert np.max(np.abs(grad)) > 0.1
    np.testing.assert_allclose(np.sum(grad, axis=1), 0, atol=1e-5)


def test_sizes_of_units_change_nothing(monkeypatch):
    arguments = inputs(t=61, b=1)
    # Every query names the first block, which therefore takes several units.
    indices = lists(t=61, b=1, heads=4, blocks=8).at[..., 0].set(0)

    def value_and_grads():
        def loss(*arguments):
            out = jattn.block_sparse_attention(*arguments, indices, block_size=8)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)

    whole = value_and_grads()
    monkeypatch.setattr("jattn.ops._common.CHUNK_BYTES", 2**9)
    jax.tree.map(assert_equal_up_to_rounding, value_and_grads(), whole)


def test_the_future_changes_nothing_bit_for_bit():
    cut = 23
    arguments = [*inputs(t=40), lists(t=40, blocks=9)]
    other = [*inputs(seed=1, t=40), lists(seed=1, t=40, blocks=9)]
    changed = [
        jnp.concatenate([x[:, :cut], y[:, cut:]], axis=1)
        for x, y in zip(arguments, other, strict=True)
    ]
    before = attend(*arguments, block_size=5)
    after = attend(*changed, block_size=5)
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert np.any(before[:, cut:] != after[:, cut:])


def test_the_same_input_gives_the_same_bits():
    arguments = inputs(t=40)
    indices = lists(t=40, blocks=9)

    @jax.jit
    def grads(*arguments):
        f = lambda *a: jnp.sum(  # noqa: E731
            jnp.sin(jattn.block_sparse_attention(*a, indices, block_size=5))
        )
        return jax.grad(f, argnums=(0, 1, 2))(*arguments)

    jax.tree.map(np.testing.assert_array_equal, grads(*arguments), grads(*arguments))


def test_packed_documents_equal_documents_alone():
    query, key, value = inputs(b=1, t=24)
    first, second = lists(b=1, t=12), lists(seed=1, b=1, t=12)
    # In the packed row, the second document's blocks come after three of the first.
    packed_lists = jnp.concatenate(
        [first, jnp.where(second < 0, -1, second + 3)], axis=1
    )
    f = functools.partial(attend, block_size=4)
    packed = f(query, key, value, packed_lists, segment_ids=documents(12, 12))
    alone = [
        f(*(x[:, a : a + 12] for x in (query, key, value)), own)
        for a, own in [(0, first), (12, second)]
    ]
    assert_equal_up_to_rounding(packed, jnp.concatenate(alone, axis=1))


@pytest.mark.parametrize("start", [7, 8])
def test_a_document_does_not_touch_another_bit_for_bit(start):
    query, key, value = inputs(b=1, t=20)
    other = inputs(seed=1, b=1, t=20)
    indices, segments = lists(b=1, t=20, blocks=5), documents(start, 20 - start)
    changed = [
        jnp.concatenate([y[:, :start], x[:, start:]], axis=1)
        for x, y in zip((query, key, value), other, strict=True)
    ]
    f = functools.partial(attend, block_size=4, segment_ids=segments)
    before, after = f(query, key, value, indices), f(*changed, indices)
    np.testing.assert_array_equal(before[:, start:], after[:, start:])
    assert np.any(before[:, :start] != after[:, :start])


def test_long_sequences_do_not_build_a_square():
    b, t, n, k, h = 1, 8192, 4, 1, 64
    shapes = [
        jax.ShapeDtypeStruct((b, t, n, h), jnp.float32),
        *[jax.ShapeDtypeStruct((b, t, k, h), jnp.float32)] * 2,
        jax.ShapeDtypeStruct((b, t, k, 16), jnp.int32),
    ]
    f = functools.partial(jattn.block_sparse_attention, block_size=64)
    assert temporary_bytes(f, *shapes) < 2**26
    loss = lambda *arguments: jnp.sum(f(*arguments))  # noqa: E731
    assert temporary_bytes(jax.grad(loss, argnums=(0, 1, 2)), *shapes) < 2**27


def test_transformations_agree():
    arguments = [*inputs(), lists()]
    f = functools.partial(jattn.block_sparse_attention, block_size=4)
    jitted = jax.jit(f)(*arguments)
    mapped = jax.jit(jax.vmap(lambda *a: f(*(x[None] for x in a))[0]))(*arguments)
    sharded = shard_over_batch(f)(*arguments)
    chex.assert_trees_all_close(jitted, mapped, sharded, rtol=1e-5, atol=1e-6)


def test_gradients_under_shard_map():
    *arguments, indices = *inputs(), lists()

    def grads(*arguments):
        f = functools.partial(jattn.block_sparse_attention, block_size=4)
        loss = lambda *a: jnp.sum(jnp.sin(f(*a, arguments[3])))  # noqa: E731
        return jax.grad(loss, argnums=(0, 1, 2))(*arguments[:3])

    chex.assert_trees_all_close(
        jax.jit(grads)(*arguments, indices),
        shard_over_batch(grads)(*arguments, indices),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key": jnp.zeros((2, 11, 3, 8))}, ValueError, r"value must have shape"),
        ({"block_size": 0}, ValueError, "block_size must be a positive integer; got 0"),
        ({"block_indices": lists(heads=3)}, ValueError, r"K=2 or N=4.*\[2, 11, 3, 3\]"),
        ({"block_indices": lists(t=10)}, ValueError, r"T=11.*got int32 \[2, 10, 2, 3"),
        ({"block_indices": lists() * 1.0}, ValueError, "integers.* got float32"),
        ({"implementation": "cuda"}, ValueError, "implementation must be"),
        ({"implementation": "pallas"}, NotImplementedError, "no such kernel"),
        ({"segment_ids": jnp.zeros((2, 3), jnp.int32)}, ValueError, "segment_ids"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    query, key, value = inputs()
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "block_indices": lists(),
        "block_size": 4,
    }
    with pytest.raises(error, match=message):
        jattn.block_sparse_attention(**arguments | changes)
