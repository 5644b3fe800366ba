"""Monarch matrices against their index formulas in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

import jattn
from tests.support import assert_equal_up_to_rounding, normal

digit = st.integers(1, 4)


def dense2(left, right):
    """M[i1 I + i0, j1 J + j0] = left[i0, i1, j0] right[j0, i0, j1], entry by entry."""
    (i_, p, j_), q = left.shape, right.shape[2]
    matrix = np.zeros((p * i_, q * j_), np.result_type(left, right))
    for i1, i0, j1, j0 in np.ndindex(p, i_, q, j_):
        matrix[i1 * i_ + i0, j1 * j_ + j0] = left[i0, i1, j0] * right[j0, i0, j1]
    return matrix


def dense3(left, middle, right):
    """The same with three digits."""
    (i_, p, r, j_), k, q = left.shape, middle.shape[3], right.shape[3]
    matrix = np.zeros((r * p * i_, q * k * j_))
    for i2, i1, i0, j2, j1, j0 in np.ndindex(r, p, i_, q, k, j_):
        matrix[(i2 * p + i1) * i_ + i0, (j2 * k + j1) * j_ + j0] = (
            left[i0, i1, i2, j0] * middle[j0, i0, i1, j1] * right[j0, j1, i0, j2]
        )
    return matrix


def dft(size):
    steps = np.arange(size)
    return np.exp(-2j * np.pi * np.outer(steps, steps) / size)


@given(i=digit, p=digit, j=digit, q=digit, batch=st.sampled_from([(), (2,), (2, 3)]))
def test_order_2_equals_its_entries(i, p, j, q, batch):
    left, right, x = normal(0, (i, p, j), (j, i, q), (*batch, q * j))
    y = jattn.monarch_matmul(x, left, right)
    expected = np.float64(x) @ dense2(np.float64(left), np.float64(right)).T
    assert_equal_up_to_rounding(y, expected, 1e-6)


@given(i=digit, p=digit, r=digit, j=digit, k=digit, q=digit)
def test_order_3_equals_its_entries(i, p, r, j, k, q):
    shapes = (i, p, r, j), (j, i, p, k), (j, k, i, q), (2, q * k * j)
    left, middle, right, x = normal(1, *shapes)
    y = jattn.monarch_matmul(x, left, middle, right)
    matrix = dense3(*(np.float64(factor) for factor in (left, middle, right)))
    assert_equal_up_to_rounding(y, np.float64(x) @ matrix.T, 1e-6)


def test_order_3_holds_the_fourier_transform(x64):
    # Digits of N = 2 · 3 · 4, the input's first one being the output's last one.
    n2, n1, n0 = 2, 3, 4
    size = n2 * n1 * n0
    w = lambda order, power: np.exp(-2j * np.pi * power / order)  # noqa: E731
    i0, i1, i2 = np.ogrid[:n2, :n1, :n0]
    j0, j1, j2 = np.arange(n0), np.arange(n1), np.arange(n2)
    left = w(size, ((i2 * n1 + i1) * n2 + i0)[..., None] * j0)
    middle = w(n1 * n2, (i1 * n2 + i0)[..., 0, None] * j1)
    right = w(n2, i0[:, 0] * j2)
    middle = np.broadcast_to(middle, (n0, n2, n1, n1))
    right = np.broadcast_to(right, (n0, n1, n2, n2))
    (x,) = normal(0, (5, size), dtype=jnp.float64)
    y = jattn.monarch_matmul(x, *(jnp.asarray(f) for f in (left, middle, right)))
    chex.assert_trees_all_close(y, np.asarray(x) @ dft(size), rtol=0, atol=1e-12)


def test_dtypes_of_products():
    left, right, x = normal(0, (4, 4, 4), (4, 4, 4), (16,))
    half = [a.astype(jnp.bfloat16) for a in (x, left, right)]
    assert jattn.monarch_matmul(*half).dtype == jnp.bfloat16
    assert jattn.monarch_matmul(x, left + 0j, right).dtype == jnp.complex64
    assert_equal_up_to_rounding(
        jattn.monarch_matmul(*half).astype(jnp.float32),
        dense2(*(np.float64(a) for a in half[1:])) @ np.float64(half[0]),
        5e-3,
    )


def test_gradients_of_products_equal_finite_differences(x64):
    shapes = (2, 3, 2), (2, 2, 3), (6,), (2, 2, 2, 2), (2, 2, 2, 2), (2, 2, 2, 2), (8,)
    left, right, x, left3, middle3, right3, x3 = normal(0, *shapes, dtype=jnp.float64)

    def loss(*arguments):
        return jnp.sum(jnp.sin(jattn.monarch_matmul(*arguments)))

    check_grads(loss, (x, left, right), order=1)
    check_grads(loss, (x3, left3, middle3, right3), order=1)


def test_transformations_of_products_agree():
    left, right, x = normal(0, (3, 2, 4), (4, 3, 2), (5, 8))
    plain = jattn.monarch_matmul(x, left, right)
    jitted = jax.jit(jattn.monarch_matmul)(x, left, right)
    mapped = jax.vmap(lambda x: jattn.monarch_matmul(x, left, right))(x)
    chex.assert_trees_all_close(plain, jitted, mapped, rtol=1e-5, atol=1e-6)


def test_projection_recovers_a_monarch_matrix(x64):
    left, right = normal(0, (3, 2, 4), (4, 3, 5), dtype=jnp.float64)
    matrix = dense2(np.asarray(left), np.asarray(right))
    found = jattn.monarch_from_dense(
        jnp.asarray(matrix), row_digits=(2, 3), column_digits=(5, 4)
    )
    chex.assert_shape(found, [(3, 2, 4), (4, 3, 5)])
    np.testing.assert_allclose(dense2(*map(np.asarray, found)), matrix, atol=1e-13)


def test_projection_recovers_the_fourier_transform(x64):
    left, right = jattn.monarch_from_dense(jnp.asarray(dft(16)))
    matrix = dense2(np.asarray(left), np.asarray(right))
    np.testing.assert_allclose(matrix, dft(16), atol=1e-13)
    # All its entries have absolute value 1, and the factors share that.
    np.testing.assert_allclose(np.abs(left), 1, atol=1e-13)
    np.testing.assert_allclose(np.abs(right), 1, atol=1e-13)


def test_projection_is_the_nearest_monarch_matrix(x64):
    (matrix,) = normal(0, (9, 9), dtype=jnp.float64)
    left, right = jattn.monarch_from_dense(matrix)
    # Eckart and Young: what is lost are the smaller singular values of every slice.
    lost = 0.0
    for i0, j0 in np.ndindex(3, 3):
        rows, columns = i0 + 3 * np.arange(3), j0 + 3 * np.arange(3)
        singular = np.linalg.svd(np.asarray(matrix)[np.ix_(rows, columns)])[1]
        lost += np.sum(singular[1:] ** 2)
    error = np.sum((dense2(np.asarray(left), np.asarray(right)) - matrix) ** 2)
    np.testing.assert_allclose(error, lost, rtol=1e-12)


def test_projection_of_nothing_is_nothing():
    left, right = jattn.monarch_from_dense(jnp.zeros((4, 4)))
    assert not np.any(left)
    assert not np.any(right)


def coefficients(j, q, seed=0, scale=0.3, dtype=jnp.float64):
    """Random ones around the Fourier transform, as drawn: also those to be ignored."""
    left, right = normal(seed, (j, j), (j, q, q), dtype=dtype)
    return jnp.eye(j) + scale * left, jnp.eye(q) + scale * right


def slow_causal_factors(left, right):
    """M[i, j1 J + j0] = l_j0(w^i) r_j0,j1(w^(i J)), power by power."""
    j_, q = right.shape[:2]
    size = j_ * q
    matrix = np.zeros((size, size), complex)
    for i, j1, j0 in np.ndindex(size, q, j_):
        z = np.exp(-2j * np.pi * i / size)
        powers = [a for a in range(j1, q) if j1 >= q // 2 or a < q // 2]
        first = sum(left[j0, a] * z**a for a in range(j0, j_))
        second = sum(right[j0, j1, a] * z ** (j_ * a) for a in powers)
        matrix[i, j1 * j_ + j0] = first * second
    return matrix


@pytest.mark.parametrize(("j", "q"), [(4, 4), (3, 6), (6, 2), (1, 8)])
def test_causal_factors_are_values_of_polynomials(x64, j, q):
    arguments = coefficients(j, q)
    factors = jattn.causal_monarch_factors(*arguments)
    matrix = dense2(*map(np.asarray, factors))
    expected = slow_causal_factors(*map(np.asarray, arguments))
    np.testing.assert_allclose(matrix, expected, atol=1e-12)


@pytest.mark.parametrize(("j", "q"), [(4, 4), (3, 6), (8, 8)])
def test_causal_monarch_convolution(x64, j, q):
    half = j * q // 2
    arguments = coefficients(j, q)
    u, kernel = normal(1, (2, half, 3), (half, 3), dtype=jnp.float64)
    y = jattn.causal_monarch_conv(u, kernel, *arguments)
    assert y.dtype == jnp.float64
    matrix = slow_causal_factors(*map(np.asarray, arguments))
    for channel in range(3):
        image = matrix[:, :half] @ np.asarray(kernel[:, channel])
        mixing = np.linalg.solve(matrix, image[:, None] * matrix)[:half, :half]
        # The property itself: no entry above the diagonal, and none that is complex.
        np.testing.assert_allclose(np.triu(mixing, 1), 0, atol=1e-11)
        np.testing.assert_allclose(mixing.imag, 0, atol=1e-11)
        expected = np.asarray(u[:, :, channel]) @ mixing.real.T
        np.testing.assert_allclose(y[:, :, channel], expected, atol=1e-11)


@pytest.mark.parametrize("cut", [1, 5, 17])
def test_the_future_changes_only_rounding_of_the_causal_monarch(x64, cut):
    u, other, kernel = normal(2, (1, 18, 2), (1, 18, 2), (18, 2), dtype=jnp.float64)
    changed = jnp.concatenate([u[:, :cut], other[:, cut:]], axis=1)
    before, after = (
        jattn.causal_monarch_conv(x, kernel, *coefficients(6, 6)) for x in (u, changed)
    )
    np.testing.assert_allclose(before[:, :cut], after[:, :cut], rtol=0, atol=1e-12)
    assert np.all(np.abs(before - after)[:, cut] > 1e-3)


@pytest.mark.parametrize(("length", "taps"), [(18, 18), (7, 18), (18, 3)])
def test_the_causal_monarch_of_fourier_is_the_long_convolution(length, taps):
    u, kernel = normal(3, (2, length, 3), (taps, 3))
    left, right = jnp.eye(6), jnp.broadcast_to(jnp.eye(6), (6, 6, 6))
    factors = jattn.causal_monarch_factors(left, right)
    np.testing.assert_allclose(dense2(*map(np.asarray, factors)), dft(36), atol=1e-5)
    y = jattn.causal_monarch_conv(u, kernel, left, right)
    assert_equal_up_to_rounding(y, jattn.long_conv(u, kernel), 1e-6)


def test_gradients_of_the_causal_monarch_equal_finite_differences(x64):
    u, kernel = normal(4, (1, 8, 1), (8, 1), dtype=jnp.float64)

    def loss(*arguments):
        return jnp.sum(jnp.sin(jattn.causal_monarch_conv(*arguments)))

    arguments = (u, kernel, *coefficients(4, 4, scale=0.1))
    check_grads(jax.jit(loss), arguments, order=1, modes=["rev"])
    # What would break causality is not used, and gets no gradient.
    left, right = jax.grad(loss, (2, 3))(*arguments)
    assert not np.any(np.tril(left, -1))
    assert not np.any(np.tril(right, -1))
    assert not np.any(right[:, :2, 2:])


@pytest.mark.parametrize(
    ("function", "shapes", "message"),
    [
        (jattn.monarch_matmul, [(4,), (2, 2, 2)], r"two factors .* got 1"),
        (jattn.monarch_matmul, [(4,), (2, 2, 2), (2, 3, 2)], r"right must have shape"),
        (jattn.monarch_matmul, [(5,), (2, 2, 2), (2, 2, 2)], r"\[\.\.\., 4\].*\[5\]"),
        (jattn.monarch_matmul, [(8,), *[(2, 2, 2)] * 3], r"left must have shape"),
        (jattn.monarch_from_dense, [(4,)], "two axes"),
        (jattn.monarch_from_dense, [(6, 4)], "square number of rows; got 6"),
        (jattn.causal_monarch_factors, [(2, 3), (2, 2, 2)], "left_coefficients must"),
        (jattn.causal_monarch_factors, [(2, 2), (2, 3, 3)], "even Q.*got Q=3"),
        (
            jattn.causal_monarch_conv,
            [(1, 3, 1), (3, 1), (2, 2), (2, 2, 2)],
            "at most N/2=2 .* N=4; got L=3",
        ),
    ],
)
def test_errors_say_what_is_wrong(function, shapes, message):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(function, *arguments)


def test_digits_must_multiply_to_the_size():
    with pytest.raises(ValueError, match=r"2 x 3 rows; got 4"):
        jattn.monarch_from_dense(jnp.zeros((4, 4)), row_digits=(2, 3))
