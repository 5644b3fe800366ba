"""Mixture of Block Attention against loops in float64, and its contract."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
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


def slow_select(query, key, block_size, top_k, segment_ids=None, round_to=None):
    """The gate of the paper, one query and one head at a time."""
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    b, t, n, _ = query.shape
    s, k = key.shape[1:3]
    if segment_ids is None:
        segment_ids = np.zeros((b, s))
    segment_ids = np.asarray(segment_ids)
    picked = np.full((b, t, n, top_k), -1)
    for row, i, head in np.ndindex(b, t, n):
        position = s - t + i
        own = position // block_size
        scores = {own: np.inf}
        for block in range(own):
            tokens = np.arange(block * block_size, (block + 1) * block_size)
            document = segment_ids[row, tokens[-1]]
            if document != segment_ids[row, position]:
                continue
            tokens = tokens[segment_ids[row, tokens] == document]
            mean = key[row, tokens, head // (n // k)].mean(axis=0)
            if round_to is not None:
                mean = mean.astype(round_to).astype(np.float64)
            scores[block] = query[row, i, head] @ mean
        best = sorted(scores, key=lambda block: (-scores[block], block))[:top_k]
        picked[row, i, head, : len(best)] = sorted(best)
    return picked


def slow_moba(query, key, value, block_size, top_k, segment_ids=None):
    """Softmax over the keys of the picked blocks, one query and one head at a time."""
    picked = slow_select(query, key, block_size, top_k, segment_ids)
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    b, t, n, h = query.shape
    s, k, v = value.shape[1:]
    out, lse = np.zeros((b, t, n, v)), np.zeros((b, t, n))
    for row, i, head in np.ndindex(b, t, n):
        position, kv_head = s - t + i, head // (n // k)
        seen = [
            j
            for j in range(position + 1)
            if j // block_size in picked[row, i, head]
            and (
                segment_ids is None or segment_ids[row, j] == segment_ids[row, position]
            )
        ]
        logits = query[row, i, head] @ key[row, seen, kv_head].T / np.sqrt(h)
        lse[row, i, head] = np.log(np.exp(logits).sum())
        out[row, i, head] = (
            np.exp(logits - lse[row, i, head]) @ value[row, seen, kv_head]
        )
    return out, lse


def inputs(seed=0, b=2, t=14, s=None, n=4, k=2, h=8, v=6, dtype=jnp.float32):
    s = s or t
    return normal(seed, (b, t, n, h), (b, s, k, h), (b, s, k, v), dtype=dtype)


SIZES = ("block_size", "top_k")
attend = jax.jit(
    jattn.mixture_of_block_attention, static_argnames=(*SIZES, "return_lse")
)
select = jax.jit(
    jattn.moba_select_blocks, static_argnames=(*SIZES, "round_pooled_keys")
)


@given(
    b=st.integers(1, 2),
    t=st.integers(1, 17),
    extra=st.integers(0, 5),
    k=st.integers(1, 3),
    g=st.integers(1, 3),
    block_size=st.integers(1, 7),
    top_k=st.integers(1, 4),
    packed=st.booleans(),
)
def test_equals_the_loop_for_any_shape(b, t, extra, k, g, block_size, top_k, packed):
    s = t + extra
    top_k = min(top_k, -(-s // block_size))
    query, key, value = inputs(b=b, t=t, s=s, n=k * g, k=k)
    segments = documents(s // 3, s - s // 3, batch=b) if packed else None
    options = {"block_size": block_size, "top_k": top_k, "segment_ids": segments}
    blocks = select(query, key, **options)
    assert blocks.dtype == jnp.int32
    np.testing.assert_array_equal(blocks, slow_select(query, key, **options))
    out, lse = attend(
        query, key, value, **options, block_indices=blocks, return_lse=True
    )
    slow_out, slow_lse = slow_moba(query, key, value, **options)
    assert_equal_up_to_rounding(out, slow_out)
    assert_equal_up_to_rounding(lse, slow_lse)


def test_one_block_is_the_own_block():
    query, key, value = inputs(t=12)
    out = attend(query, key, value, block_size=4, top_k=1)
    alone = [
        jattn.dense_attention(
            query[:, i : i + 4], key[:, i : i + 4], value[:, i : i + 4]
        )
        for i in (0, 4, 8)
    ]
    assert_equal_up_to_rounding(out, jnp.concatenate(alone, axis=1))


def test_all_blocks_are_dense_attention():
    query, key, value = inputs()
    out = attend(query, key, value, block_size=4, top_k=4)
    assert_equal_up_to_rounding(out, jattn.dense_attention(query, key, value))


def test_ties_go_to_the_lower_index():
    query, _, _ = inputs(t=16)
    key = jnp.ones((2, 16, 2, 8))
    blocks = select(query, key, block_size=4, top_k=3)
    np.testing.assert_array_equal(blocks[:, 12:], np.full((2, 4, 4, 3), [0, 1, 3]))


def test_a_low_score_does_not_lose_the_own_block():
    query, key, _ = inputs(t=16)
    key = key.at[:, :12].set(1e30 * query[:, -1:, ::2])
    blocks = select(query, key, block_size=4, top_k=2)
    np.testing.assert_array_equal(blocks[:, 12:, :, 1], 3)


def test_pooled_keys_are_rounded_to_the_dtype_of_keys():
    query, key, _ = inputs(b=1, t=512, n=4, k=4, h=16, dtype=jnp.bfloat16)
    sizes = {"block_size": 8, "top_k": 4}
    exact = select(query, key, **sizes, round_pooled_keys=False)
    rounded = select(query, key, **sizes)
    np.testing.assert_array_equal(exact, slow_select(query, key, **sizes))
    np.testing.assert_array_equal(
        rounded, slow_select(query, key, **sizes, round_to=ml_dtypes.bfloat16)
    )
    assert 0 < np.mean(np.any(exact != rounded, axis=-1)) < 0.1


def test_fp64_stays_fp64(x64):
    query, key, value = inputs(dtype=jnp.float64)
    out, lse = attend(query, key, value, block_size=4, top_k=2, return_lse=True)
    assert out.dtype == lse.dtype == jnp.float64
    slow = slow_moba(query, key, value, 4, 2)
    assert_equal_up_to_rounding(out, slow[0], 1e-14)
    assert_equal_up_to_rounding(lse, slow[1], 1e-14)


def test_bf16_keeps_statistics_in_fp32():
    query, key, value = inputs(dtype=jnp.bfloat16)
    out, lse = attend(query, key, value, block_size=4, top_k=4, return_lse=True)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    slow_out, slow_lse = slow_moba(query, key, value, 4, 4)
    assert_equal_up_to_rounding(out, slow_out, 5e-3)
    assert_equal_up_to_rounding(lse, slow_lse, 1e-6)


def test_gradients_equal_finite_differences(x64):
    arguments = inputs(b=1, t=7, n=4, k=2, h=4, v=3, dtype=jnp.float64)

    @jax.jit
    def loss(*arguments):
        out, lse = jattn.mixture_of_block_attention(
            *arguments, block_size=2, top_k=2, return_lse=True
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    check_grads(loss, arguments, order=1, modes=["rev"], eps=1e-6)


def test_a_selection_can_be_passed_in():
    query, key, value = inputs()
    sizes = {"block_size": 4, "top_k": 2}
    blocks = select(query, key, **sizes)
    np.testing.assert_array_equal(
        attend(query, key, value, **sizes, block_indices=blocks),
        attend(query, key, value, **sizes),
    )
    own_only = jnp.where(blocks == blocks.max(axis=-1, keepdims=True), blocks, -1)
    assert_equal_up_to_rounding(
        attend(query, key, value, **sizes, block_indices=own_only),
        attend(query, key, value, block_size=4, top_k=1),
    )


def test_chunks_change_nothing(monkeypatch):
    query, key, value = inputs(t=61, b=1)

    def values():
        def loss(*arguments):
            out = jattn.mixture_of_block_attention(*arguments, block_size=8, top_k=3)
            return jnp.sum(jnp.sin(out)), out

        grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        blocks = jax.jit(lambda *a: jattn.moba_select_blocks(*a, block_size=8, top_k=3))
        return grads(query, key, value), blocks(query, key)

    whole = values()
    monkeypatch.setattr("jattn.ops._common.CHUNK_BYTES", 2**10)
    chunked = values()
    np.testing.assert_array_equal(whole[1], chunked[1])
    jax.tree.map(assert_equal_up_to_rounding, chunked[0], whole[0])


def test_the_future_changes_nothing_bit_for_bit():
    cut = 22
    arguments, other = inputs(t=40), inputs(seed=1, t=40)
    changed = [
        jnp.concatenate([x[:, :cut], y[:, cut:]], axis=1)
        for x, y in zip(arguments, other, strict=True)
    ]
    before = attend(*arguments, block_size=5, top_k=3)
    after = attend(*changed, block_size=5, top_k=3)
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert np.any(before[:, cut:] != after[:, cut:])


@pytest.mark.parametrize("perturbed", [0, 1, 2])
def test_a_document_does_not_touch_another_bit_for_bit(perturbed):
    arguments, other = inputs(b=1, t=30), inputs(seed=1, b=1, t=30)
    segments = documents(7, 13, 10)  # no boundary on that of a block
    inside = (segments[0] == perturbed + 1)[None, :, None, None]
    changed = [jnp.where(inside, y, x) for x, y in zip(arguments, other, strict=True)]
    f = functools.partial(attend, block_size=4, top_k=3, segment_ids=segments)
    before, after = f(*arguments), f(*changed)
    kept = ~np.asarray(inside[0, :, 0, 0])
    np.testing.assert_array_equal(before[:, kept], after[:, kept])
    assert np.all(before[:, ~kept] != after[:, ~kept])


def test_packed_documents_equal_documents_alone():
    query, key, value = inputs(b=1, t=24)
    f = functools.partial(attend, block_size=4, top_k=2)
    packed = f(query, key, value, segment_ids=documents(12, 12))
    alone = [f(*(x[:, a : a + 12] for x in (query, key, value))) for a in (0, 12)]
    assert_equal_up_to_rounding(packed, jnp.concatenate(alone, axis=1))


def test_long_sequences_do_not_build_a_square():
    shapes = [jax.ShapeDtypeStruct((1, 8192, 4, 64), jnp.float32)] * 3
    f = functools.partial(jattn.mixture_of_block_attention, block_size=512, top_k=3)
    assert temporary_bytes(f, *shapes) < 2**26
    loss = lambda *arguments: jnp.sum(f(*arguments))  # noqa: E731
    assert temporary_bytes(jax.grad(loss, argnums=(0, 1, 2)), *shapes) < 2**27


def test_selection_streams_over_queries():
    shapes = [jax.ShapeDtypeStruct((1, 65536, 4, 16), jnp.float32)] * 2
    f = functools.partial(jattn.moba_select_blocks, block_size=32, top_k=3)
    scores = 65536 * 4 * 2048 * 4
    assert temporary_bytes(f, *shapes) < scores / 8


def test_transformations_agree():
    f = functools.partial(jattn.mixture_of_block_attention, block_size=4, top_k=2)
    arguments = inputs()
    jitted = jax.jit(f)(*arguments)
    mapped = jax.jit(jax.vmap(lambda *a: f(*(x[None] for x in a))[0]))(*arguments)
    sharded = shard_over_batch(f)(*arguments)
    chex.assert_trees_all_close(jitted, mapped, sharded, rtol=1e-5, atol=1e-6)


def slow_convolution(key, weight, segment_ids=None):
    key, weight = np.asarray(key, np.float64), np.asarray(weight, np.float64)
    total = np.zeros_like(key)
    for row, t, lag in np.ndindex(*key.shape[:2], len(weight)):
        inside = t >= lag and (
            segment_ids is None or segment_ids[row, t - lag] == segment_ids[row, t]
        )
        if inside:
            total[row, t] += weight[lag] * key[row, t - lag]
    return key + total / (1 + np.exp(-total))


@pytest.mark.parametrize(("width", "length"), [(3, 12), (5, 12), (5, 2), (1, 4)])
def test_key_convolution_equals_the_loop(width, length):
    key, weight = normal(0, (2, length, 3, 4), (width, 3, 4))
    for segments in (None, documents(1, length - 1, batch=2)):
        assert_equal_up_to_rounding(
            jattn.key_convolution(key, weight, segment_ids=segments),
            slow_convolution(key, weight, segments),
            1e-6,
        )


def test_key_convolution_in_bf16_and_its_gradients(x64):
    key, weight = normal(0, (1, 7, 2, 3), (3, 2, 3), dtype=jnp.float64)
    f = functools.partial(jattn.key_convolution, segment_ids=documents(4, 3))
    check_grads(jax.jit(f), (key, weight), order=1, modes=["rev"])
    out = f(key.astype(jnp.bfloat16), weight.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16
    assert_equal_up_to_rounding(out, f(key, weight), 5e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 5}, ValueError, "top_k=5 exceeds the 4 blocks of block_size=4"),
        ({"top_k": 0}, ValueError, "top_k must be a positive integer; got 0"),
        ({"block_size": 0}, ValueError, "block_size must be a positive integer; got 0"),
        (
            {"block_indices": jnp.zeros((2, 14, 2, 2), jnp.int32)},
            ValueError,
            r"N=4, top_k=2\]; got \[2, 14, 2, 2\]",
        ),
        ({"implementation": "cuda"}, ValueError, "implementation must be"),
        ({"implementation": "pallas"}, NotImplementedError, "no such kernel"),
        ({"segment_ids": jnp.zeros((2, 3), jnp.int32)}, ValueError, "segment_ids"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(
            lambda *arguments: jattn.mixture_of_block_attention(
                *arguments, **{"block_size": 4, "top_k": 2} | options
            ),
            *inputs(),
        )


def test_wrong_arguments_of_selection_and_convolution_are_named():
    query, key, _ = inputs()
    with pytest.raises(ValueError, match="top_k=5 exceeds the 4 blocks"):
        select(query, key, block_size=4, top_k=5)
    with pytest.raises(ValueError, match=r"weight must have shape \[W, K=2, H=8\]"):
        jattn.key_convolution(key, jnp.zeros((3, 8)))
