"""Windows of tokens, their means, and attention to what they are compressed to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests.support import assert_equal_up_to_rounding, normal


def test_windows_are_those_of_equation_7():
    (x,) = normal(0, (2, 23, 3, 5))
    windows = jattn.nsa_windows(x, kernel_size=6, stride=2)
    assert windows.shape == (2, 9, 6, 3, 5)
    for i in range(9):
        np.testing.assert_array_equal(windows[:, i], x[:, 2 * i : 2 * i + 6])


@pytest.mark.parametrize(("length", "kernel_size"), [(23, 6), (24, 2), (5, 6)])
def test_means_of_windows(length, kernel_size):
    (x,) = normal(0, (2, length, 3, 5))
    windows = {"kernel_size": kernel_size, "stride": 2}
    expected = jattn.nsa_windows(x, **windows).mean(axis=2)
    actual = jattn.nsa_window_means(x, **windows)
    assert_equal_up_to_rounding(actual, expected, 1e-6)
    assert jattn.nsa_window_means(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="x must have a floating-point dtype"):
        jattn.nsa_window_means(x.astype(jnp.int32))


def test_a_window_is_seen_from_its_last_token_on():
    query, key, value = normal(0, (1, 9, 2, 4), (1, 3, 2, 4), (1, 3, 2, 4))

    @jax.jit
    def attend(query, key, value):
        return jattn.compressed_attention(
            query, key, value, kernel_size=4, stride=2, return_lse=True
        )

    out, lse = attend(query, key, value)
    np.testing.assert_array_equal(out[:, :3], 0)
    assert np.all(np.isneginf(lse[:, :3]))
    # Only the first window is in sight of positions 3 and 4.
    assert_equal_up_to_rounding(out[:, 3:5], jnp.repeat(value[:, :1], 2, axis=1))
    assert np.all(out[:, 5] != value[:, 0])
    grads = jax.grad(lambda *a: jnp.sum(attend(*a)[0][:, :3]), argnums=(0, 1, 2))(
        query, key, value
    )
    jax.tree.map(lambda grad: np.testing.assert_array_equal(grad, 0), grads)
