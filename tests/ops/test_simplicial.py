"""jattn.two_simplicial_attention against loops in float64, and its contract."""

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
from jattn.ops.simplicial import attend_pairs
from tests.support import (
    assert_equal_up_to_rounding,
    documents,
    normal,
    shard_over_batch,
    temporary_bytes,
)

FORMS = ["trilinear", "determinant"]
NAMES = ("query", "key", "value", "key2", "value2")

# Compiled whole: operation by operation would compile each of them.
attend = jax.jit(
    jattn.two_simplicial_attention,
    static_argnames=(
        "windows",
        "form",
        "key2_bias",
        "value2_bias",
        "return_lse",
    ),
)


def slow_attention(
    query, key, value, key2, value2, *, windows, form="trilinear", segment_ids=None
):
    """One query, one head, one pair of keys at a time."""
    query, key, value, key2, value2 = (
        np.asarray(x, np.float64) for x in (query, key, value, key2, value2)
    )
    b, t, n, h = query.shape
    s, k, v = value.shape[1:]
    out, lse = np.zeros((b, t, n, v)), np.full((b, t, n), -np.inf)

    def score(q, k, k2):
        if form == "trilinear":
            return np.sum(q * k * k2)
        last = h - h % 3
        triples = [
            np.stack([x[i : i + 3] for x in (q, k, k2)]) for i in range(0, last, 3)
        ]
        determinants = np.linalg.det(np.reshape(triples, (-1, 3, 3)))
        return determinants.sum() + np.sum((q * k * k2)[last:])

    for row, i, head in np.ndindex(b, t, n):
        position, kv_head = s - t + i, head // (n // k)
        seen = [
            [
                j
                for j in range(position + 1)
                if (window is None or position - j < window)
                and (
                    segment_ids is None
                    or segment_ids[row, j] == segment_ids[row, position]
                )
            ]
            for window in windows
        ]
        pairs = [(row, j, row, k) for j in seen[0] for k in seen[1]]
        logits = np.array(
            [
                score(query[row, i, head], key[r, j, kv_head], key2[r2, k2, kv_head])
                for r, j, r2, k2 in pairs
            ]
        )
        products = [
            value[r, j, kv_head] * value2[r2, k2, kv_head] for r, j, r2, k2 in pairs
        ]
        weights = np.exp(logits / np.sqrt(h))
        lse[row, i, head] = np.log(weights.sum())
        out[row, i, head] = weights / weights.sum() @ np.array(products)
    return out, lse


def inputs(seed=0, b=2, t=7, s=None, n=4, k=2, h=7, v=5, dtype=jnp.float32):
    s = s or t
    keys, values = (b, s, k, h), (b, s, k, v)
    return normal(seed, (b, t, n, h), keys, values, keys, values, dtype=dtype)


@given(
    b=st.integers(1, 2),
    t=st.integers(1, 17),
    extra=st.integers(0, 5),
    k=st.integers(1, 3),
    g=st.integers(1, 3),
    windows=st.tuples(*[st.none() | st.integers(1, 9)] * 2),
    form=st.sampled_from(FORMS),
    packed=st.booleans(),
)
def test_equals_the_loop_for_any_shape(b, t, extra, k, g, windows, form, packed):
    s = t + extra
    arguments = inputs(b=b, t=t, s=s, n=k * g, k=k)
    options = {
        "windows": windows,
        "form": form,
        "segment_ids": documents(s // 2, s - s // 2, batch=b) if packed else None,
    }
    out, lse = attend(*arguments, **options, return_lse=True)
    slow_out, slow_lse = slow_attention(*arguments, **options)
    assert_equal_up_to_rounding(out, slow_out)
    assert_equal_up_to_rounding(lse, slow_lse)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("windows", [(7, 3), (3, 7), (None, 2)])
def test_fp64_stays_fp64(x64, form, windows):
    # More queries than a tile has, so that stretches of keys start in several places.
    arguments = inputs(b=1, t=37, n=2, k=1, h=8, v=3, dtype=jnp.float64)
    out, lse = attend(*arguments, windows=windows, form=form, return_lse=True)
    assert out.dtype == lse.dtype == jnp.float64
    slow_out, slow_lse = slow_attention(*arguments, windows=windows, form=form)
    assert_equal_up_to_rounding(out, slow_out, 1e-14)
    assert_equal_up_to_rounding(lse, slow_lse, 1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_bf16_keeps_statistics_in_fp32(form):
    arguments = inputs(t=20, dtype=jnp.bfloat16)
    options = {"windows": (8, 4), "form": form}
    out, lse = attend(*arguments, **options, return_lse=True)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    slow_out, slow_lse = slow_attention(*arguments, **options)
    # A query times a key is rounded to bf16 once, before the sum over features.
    assert_equal_up_to_rounding(out, slow_out, 1e-2)
    assert_equal_up_to_rounding(lse, slow_lse, 2e-3)


def test_the_first_token_sees_one_pair():
    query, key, value, key2, value2 = inputs(n=2, k=2)
    out, lse = attend(query, key, value, key2, value2, return_lse=True)
    logit = jnp.sum(query * key * key2, axis=-1)[:, 0] / np.sqrt(7)
    assert_equal_up_to_rounding(lse[:, 0], logit, 1e-6)
    assert_equal_up_to_rounding(out[:, 0], (value * value2)[:, 0], 1e-6)


def test_the_logarithm_is_natural():
    query, *rest = inputs(t=9)
    _, lse = attend(jnp.zeros_like(query), *rest, windows=(5, 3), return_lse=True)
    pairs = np.minimum(np.arange(1, 10), 5) * np.minimum(np.arange(1, 10), 3)
    expected = np.broadcast_to(np.log(pairs)[:, None], lse.shape)
    assert_equal_up_to_rounding(lse, expected, 1e-6)


def test_the_two_sets_are_interchangeable():
    windows = (9, 4)
    query, key, value, key2, value2 = inputs(t=20)

    first, second = (key, value), (key2, value2)
    expected = attend(
        query, *first, *second, windows=windows, form="trilinear", return_lse=True
    )
    actual = attend(
        query, *second, *first, windows=windows[::-1], form="trilinear", return_lse=True
    )
    jax.tree.map(assert_equal_up_to_rounding, actual, expected)
    # Two rows of a determinant change places: its sign changes, but for the feature
    # left over.
    query = query.at[..., 6:].set(0)
    expected = attend(
        query, *first, *second, windows=windows, form="determinant", return_lse=True
    )
    actual = attend(
        -query,
        *second,
        *first,
        windows=windows[::-1],
        form="determinant",
        return_lse=True,
    )
    jax.tree.map(assert_equal_up_to_rounding, actual, expected)


@pytest.mark.parametrize("windows", [(6, 3), (3, 6)])
def test_a_constant_second_set_leaves_dense_attention(windows):
    query, key, value, *second = inputs(t=20)
    out, lse = attend(
        query,
        key,
        value,
        *(jnp.ones_like(x) for x in second),
        windows=windows,
        return_lse=True,
    )
    dense, dense_lse = jax.jit(
        functools.partial(jattn.dense_attention, window=windows[0], return_lse=True)
    )(query, key, value)
    # Every key of the first set is counted once for each key of the second.
    counted = np.log(np.minimum(np.arange(1, 21), windows[1]))[:, None]
    assert_equal_up_to_rounding(out, dense)
    assert_equal_up_to_rounding(lse, dense_lse + counted)


@pytest.mark.parametrize(
    ("windows", "form"), [((3, 5), "trilinear"), ((5, 3), "determinant")]
)
def test_biases_are_constants_added_to_the_second_set(windows, form):
    query, key, value, key2, value2 = inputs(t=9)
    run = functools.partial(attend, windows=windows, form=form)
    biased = run(query, key, value, key2, value2, key2_bias=1 / 7, value2_bias=1.0)
    expected = run(query, key, value, key2 + 1 / 7, value2 + 1.0)
    assert_equal_up_to_rounding(biased, expected, 1e-6)


def test_a_window_of_all_keys_is_no_window():
    arguments = inputs(t=11, s=13)
    expected = attend(*arguments, windows=(None, None))
    for windows in [(13, 13), (None, 500)]:
        actual = attend(*arguments, windows=windows)
        assert_equal_up_to_rounding(actual, expected, 1e-6)


def test_a_common_rotation_leaves_the_determinant_form_as_it_is():
    query, key, value, key2, value2 = inputs(t=20, h=8)
    (matrix,) = normal(5, (3, 3))
    rotation, _ = np.linalg.qr(matrix)
    rotation *= np.linalg.det(rotation)

    def rotate(x):
        turned = x[..., :6].reshape(*x.shape[:-1], 2, 3) @ rotation
        return jnp.concatenate([turned.reshape(*x.shape[:-1], 6), x[..., 6:]], axis=-1)

    for form, invariant in [("determinant", True), ("trilinear", False)]:
        run = functools.partial(attend, windows=(6, 4), form=form)
        plain = run(query, key, value, key2, value2)
        turned = run(rotate(query), rotate(key), value, rotate(key2), value2)
        assert np.allclose(plain, turned, rtol=0, atol=1e-5) == invariant


@pytest.mark.parametrize(
    ("windows", "form"),
    [((4, 2), "trilinear"), ((2, 4), "determinant"), ((None, None), "determinant")],
)
def test_gradients_equal_finite_differences(x64, windows, form):
    arguments = inputs(b=2, t=6, n=2, k=1, h=4, v=3, dtype=jnp.float64)

    @jax.jit
    def loss(*arguments):
        out, lse = attend(
            *arguments,
            windows=windows,
            form=form,
            segment_ids=documents(2, 4, batch=2),
            return_lse=True,
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    check_grads(loss, arguments, order=1, modes=["rev"])


def value_and_gradients(arguments, **options):
    def loss(*arguments):
        out, lse = jattn.two_simplicial_attention(
            *arguments, **options, return_lse=True
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse)), (out, lse)

    grads, out = jax.jit(jax.grad(loss, argnums=range(5), has_aux=True))(*arguments)
    return out, grads


@pytest.mark.parametrize(
    ("windows", "form", "tile", "chunk_bytes"),
    [
        ((9, 4), "trilinear", 32, 2**10),  # one query at a time
        ((9, 4), "determinant", 4, 2**17),  # six tiles at a time
    ],
)
def test_chunks_change_nothing(monkeypatch, windows, form, tile, chunk_bytes):
    arguments = inputs(t=61, b=1)
    options = {"windows": windows, "form": form, "segment_ids": documents(20, 41)}
    whole = value_and_gradients(arguments, **options)
    monkeypatch.setattr("jattn.ops.simplicial.TILE", tile)
    monkeypatch.setattr("jattn.ops._common.CHUNK_BYTES", chunk_bytes)
    chunked = value_and_gradients(arguments, **options)
    jax.tree.map(assert_equal_up_to_rounding, chunked, whole)


def test_a_query_that_sees_nothing_gives_zero():
    arguments = inputs(b=1, t=3)

    def pairs(*arguments):
        return attend_pairs(
            *arguments,
            visible=jnp.array([[0, 2, 0]]),
            windows=(3, 2),
            form="trilinear",
            key2_bias=0.0,
            value2_bias=0.0,
            scale=1.0,
        )

    (out, lse), pullback = jax.vjp(jax.jit(pairs), *arguments)
    grads = pullback((jnp.ones_like(out), jnp.ones_like(lse)))
    np.testing.assert_array_equal(out[:, ::2], 0)
    np.testing.assert_array_equal(lse[:, ::2], -np.inf)
    np.testing.assert_array_equal(grads[0][:, ::2], 0)
    assert np.all(np.isfinite(lse[:, 1]))
    for grad in grads:
        assert np.all(np.isfinite(grad))
        assert np.any(grad != 0)
        np.testing.assert_array_equal(grad[:, 2], 0)


def replaced(arguments, at):
    """The arguments with the positions `at` of each drawn anew."""
    others = inputs(seed=1, t=arguments[0].shape[1])
    return [x.at[:, at].set(y[:, at]) for x, y in zip(arguments, others, strict=True)]


@pytest.mark.parametrize(
    ("windows", "form"),
    [((9, 5), "trilinear"), ((5, 9), "determinant"), ((None, None), "trilinear")],
)
def test_the_future_changes_nothing_bit_for_bit(windows, form):
    arguments, cut = inputs(t=40), 23
    run = functools.partial(attend, windows=windows, form=form)
    before = run(*arguments)
    after = run(*replaced(arguments, slice(cut, None)))
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert np.all(np.any(before[:, cut:] != after[:, cut:], axis=(0, 2, 3)))


@pytest.mark.parametrize("windows", [(9, 5), (None, None)])
def test_packed_documents_equal_documents_alone(windows):
    arguments = inputs(t=20)
    run = functools.partial(attend, windows=windows)
    segments = documents(8, 12, batch=2)
    packed = run(*arguments, segment_ids=segments)
    alone = [run(*(x[:, a:b] for x in arguments)) for a, b in [(0, 8), (8, 20)]]
    assert_equal_up_to_rounding(packed, jnp.concatenate(alone, axis=1))
    changed = run(*replaced(arguments, slice(8)), segment_ids=segments)
    np.testing.assert_array_equal(packed[:, 8:], changed[:, 8:])
    assert np.all(np.any(packed[:, :8] != changed[:, :8], axis=(0, 2, 3)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("windows", [(512, 32), (32, 512)])
def test_long_windows_build_no_square(form, windows):
    shapes = [
        jax.ShapeDtypeStruct((1, 8192, n, 64), jnp.float32) for n in (8, 1, 1, 1, 1)
    ]
    run = functools.partial(attend, windows=windows, form=form)
    # Half of what T x T numbers take for a single head.
    assert temporary_bytes(run, *shapes) < 2**27


def test_gradients_of_long_windows_build_no_square():
    shapes = [
        jax.ShapeDtypeStruct((1, 8192, n, 64), jnp.float32) for n in (8, 1, 1, 1, 1)
    ]
    loss = lambda *a: jnp.sum(jattn.two_simplicial_attention(*a))  # noqa: E731
    assert temporary_bytes(jax.grad(loss, argnums=range(5)), *shapes) < 2**28


def test_transformations_agree():
    arguments = inputs(b=2)
    run = functools.partial(jattn.two_simplicial_attention, windows=(4, 3))
    plain = run(*arguments)
    jitted = jax.jit(run)(*arguments)
    mapped = jax.jit(jax.vmap(lambda *a: run(*(x[None] for x in a))[0]))(*arguments)
    sharded = shard_over_batch(run)(*arguments)
    chex.assert_trees_all_close(plain, jitted, mapped, sharded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": (2, 7, 3, 7)}, "N=3, K=2"),
        ({"key": (2, 7, 2, 9)}, r"key must have shape \[B=2, S, K, H=7\]"),
        ({"value": (2, 6, 2, 5)}, r"value must have shape \[B=2, S=7, K=2, V\]"),
        ({"key2": (2, 7, 1, 7)}, r"key2 must have shape \[B=2, S=7, K=2, H=7\]"),
        ({"value2": (2, 7, 2, 6)}, r"value2 must have shape \[B=2, S=7, K=2, V=5\]"),
        ({"query": (2, 9, 4, 7)}, "T may not exceed S"),
    ],
)
def test_wrong_shapes_are_named(changes, message):
    arguments = dict(zip(NAMES, inputs(), strict=True))
    for name, shape in changes.items():
        arguments[name] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(jattn.two_simplicial_attention, **arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"windows": (0, 3)}, ValueError, r"windows\[0\] must be a positive .* got 0"),
        ({"windows": (3, 1.5)}, ValueError, r"windows\[1\] must be a positive .* 1.5"),
        ({"windows": (3,)}, ValueError, r"windows must be a pair, .* got \(3,\)"),
        ({"windows": 512}, ValueError, "windows must be a pair, .* got 512"),
        ({"form": "strassen"}, ValueError, "form must be .* got 'strassen'"),
        ({"implementation": "cuda"}, ValueError, "implementation must be"),
        ({"implementation": "triton"}, NotImplementedError, "it needs a GPU"),
        ({"segment_ids": jnp.zeros((2, 3), jnp.int32)}, ValueError, "segment_ids"),
        ({"value2": jnp.zeros((2, 7, 2, 5), int)}, ValueError, "value2 .* int32"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        jattn.two_simplicial_attention(
            **dict(zip(NAMES, inputs(), strict=True)) | options
        )
