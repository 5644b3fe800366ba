"""What the gradients of every softmax need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.pallas import _softmax


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_delta_is_of_the_gradient_as_it_is_rounded(dtype):
    rng = np.random.default_rng(0)
    out = jnp.asarray(rng.normal(size=(5, 16)), dtype)
    # Of these, fp16 has denormal numbers.
    wide = rng.normal(size=(5, 16)) * 10.0 ** -np.arange(5)[:, None]
    wide = np.float32(wide * 1e-3)
    lse_gradient = jnp.zeros(5)

    @jax.jit
    def delta(out, wide):
        return _softmax.delta(out, wide.astype(dtype), lse_gradient)

    rounded = np.asarray(jnp.asarray(wide).astype(dtype), np.float64)
    expected = np.sum(np.asarray(out, np.float64) * rounded, axis=-1)
    np.testing.assert_allclose(delta(out, wide), expected, rtol=2e-5, atol=0)
