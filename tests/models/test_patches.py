"""jattn.models.patches: attention that reaches into the previous patch, by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.models.patches import CrossPatchAttention
from jattn.nn import DenseAttention
from tests.support import assert_equal_up_to_rounding, normal


def make(**options):
    options = dict(num_heads=2, head_dim=4, patch_size=4, overlap=2) | options
    return CrossPatchAttention(**options)


def initialised(mixer, t=11):
    [x] = normal(0, (2, t, 6))
    return x, jax.jit(mixer.init)(jax.random.key(1), x)


def test_a_cache_gives_what_one_call_gives():
    mixer = make()
    x, params = initialised(mixer)
    whole = jax.jit(mixer.apply)(params, x)
    cached = jax.jit(lambda x, cache: mixer.apply(params, x, cache=cache))
    cache = mixer.init_cache(2, 11)
    first, cache = cached(x[:, :7], cache)
    second, _ = cached(x[:, 7:], cache)
    assert_equal_up_to_rounding(jnp.concatenate([first, second], axis=1), whole)


def test_padding_leaves_no_trace():
    mixer = make()
    x, params = initialised(mixer)
    apply = jax.jit(
        lambda x, lengths: mixer.apply(
            params, x, cache=mixer.init_cache(2, 11), lengths=lengths
        )
    )
    lengths = jnp.array([11, 5])
    padding = jnp.arange(11) >= lengths[:, None]
    poisoned = jnp.where(padding[..., None], jnp.nan, x)
    found, expected = apply(poisoned, lengths), apply(x, lengths)
    real = ~np.asarray(padding)
    np.testing.assert_array_equal(found[0][real], expected[0][real])
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 5}, "overlap may be at most patch_size=4; got 5"),
        ({"overlap": 0}, "overlap must be"),
        ({"patch_size": 0}, "patch_size must be"),
        ({"num_heads": 0}, "num_heads must be"),
    ],
)
def test_wrong_options_are_named(options, message):
    mixer = make(**options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 8, 6)))


def test_wrong_arguments_are_named():
    mixer = make()
    x, params = initialised(mixer)

    def call(x=x, **arguments):
        jax.eval_shape(lambda: mixer.apply(params, x, **arguments))

    with pytest.raises(ValueError, match=r"x must have shape \[B, T, F\]"):
        call(x[0])
    dense = DenseAttention(num_heads=2, head_dim=4).init_cache(2, 16)
    with pytest.raises(ValueError, match="cache must be a CrossPatchCache"):
        call(cache=dense)
    with pytest.raises(ValueError, match=r"cache.key must be float32 \[2, 5, 2, 4\]"):
        call(cache=make(overlap=3).init_cache(2, 16))
    with pytest.raises(ValueError, match="lengths must be integers of shape"):
        call(cache=mixer.init_cache(2, 16), lengths=jnp.ones(3, jnp.int32))
