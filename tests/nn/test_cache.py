"""What every mixer with heads, or with a cache, refuses."""

import jax
import jax.numpy as jnp
import pytest

from jattn import nn
from tests.support import normal

HEADS = {"num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
MIXERS = {
    "dense": nn.DenseAttention(**HEADS),
    "moba": nn.MixtureOfBlockAttention(**HEADS, block_size=5, top_k=2),
    "monarch": nn.MonarchMixer(features=16, max_length=40),
    "nsa": nn.NativeSparseAttention(**HEADS, window_size=4),
    "selective": nn.SelectiveAttention(**HEADS),
    "simplicial": nn.TwoSimplicialAttention(**HEADS, windows=(None, 4)),
}
RINGS = {
    "dense": MIXERS["dense"].clone(window=4),
    "selective": MIXERS["selective"].clone(budget=4),
    "simplicial": MIXERS["simplicial"].clone(windows=(8, 4)),
}


def call(mixer, *shape, cache=None, **options):
    """Traces a call with x of a shape; parameters are made on the way."""
    (x,) = normal(0, shape)
    return jax.eval_shape(
        lambda x, cache: mixer.init_with_output(
            jax.random.key(0), x, cache=cache, **options
        ),
        x,
        cache,
    )


@pytest.mark.parametrize("name", MIXERS)
def test_only_a_cache_of_the_mixer_is_taken(name):
    mixer = MIXERS[name]
    call(mixer, 2, 20, 16, cache=mixer.init_cache(2, 20, jnp.bfloat16))
    with pytest.raises(ValueError, match=r"^cache\.\S+ must be \S+ \[2, .* \[3, "):
        call(mixer, 2, 20, 16, cache=mixer.init_cache(3, 20))
    other = MIXERS["nsa" if name == "dense" else "dense"]
    message = f"cache must be a .*Cache, made by {type(mixer).__name__}.init_cache; got"
    with pytest.raises(ValueError, match=message):
        call(mixer, 2, 20, 16, cache=other.init_cache(2, 20))


@pytest.mark.parametrize("name", MIXERS)
def test_a_call_must_fit_the_cache(name):
    mixer = MIXERS[name]
    with pytest.raises(ValueError, match="T=21 tokens and the cache max_length=20"):
        call(mixer, 2, 21, 16, cache=mixer.init_cache(2, 20))


@pytest.mark.parametrize("name", RINGS)
def test_a_ring_takes_any_number_of_tokens(name):
    mixer = RINGS[name]
    call(mixer, 2, 21, 16, cache=mixer.init_cache(2, 20))


@pytest.mark.parametrize("name", MIXERS)
def test_inputs_of_other_shapes_are_refused(name):
    for shape in ((5, 16), (1, 2, 5, 16)):
        with pytest.raises(ValueError, match=r"x must have shape \[B, T, .\]; got"):
            call(MIXERS[name], *shape)
    with pytest.raises(ValueError, match=r"segment_ids must be .*; got int32 \[2, 4\]"):
        call(MIXERS[name], 2, 5, 16, segment_ids=jnp.ones((2, 4), jnp.int32))


@pytest.mark.parametrize("field", HEADS)
@pytest.mark.parametrize("name", [name for name in MIXERS if name != "monarch"])
def test_heads_are_of_positive_number_and_width(name, field):
    with pytest.raises(ValueError, match=f"{field} must be .*; got 0|N=0"):
        call(MIXERS[name].clone(**{field: 0}), 2, 5, 16)
