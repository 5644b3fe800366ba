"""jattn.nn.DenseAttention: its decoding, its cache and its errors."""

import jax
import jax.numpy as jnp
import pytest

import jattn
from tests.nn import mixers
from tests.support import documents, normal

WINDOWS = [None, 4]


def make(**options):
    return jattn.nn.DenseAttention(**{"num_heads": 4, "head_dim": 8} | options)


@pytest.mark.parametrize("window", WINDOWS)
def test_decode_equals_parallel(window):
    mixers.check_decode_equals_parallel(make(num_kv_heads=2, window=window))


@pytest.mark.parametrize("window", WINDOWS)
def test_rows_of_different_length(window):
    mixers.check_ragged_decode(make(window=window))


@pytest.mark.parametrize("window", WINDOWS)
def test_padding_may_hold_anything(window):
    mixers.check_padding_may_hold_anything(make(window=window))


@pytest.mark.parametrize("window", WINDOWS)
def test_cached_calls_map_and_shard(window):
    mixers.check_cached_calls_map_and_shard(make(window=window))


def test_causality():
    mixers.check_causality(make())


def test_gradients_reach_every_parameter():
    mixers.check_gradients_reach_every_parameter(make())


def test_a_window_bounds_the_cache():
    grown = make(num_kv_heads=2).init_cache(3, 100, jnp.bfloat16)
    ring = make(num_kv_heads=2, window=10).init_cache(3, 100, jnp.bfloat16)
    lengths = 3 * 4
    assert jattn.nn.cache_bytes(grown) == 3 * 100 * 2 * (8 + 8) * 2 + lengths
    assert jattn.nn.cache_bytes(ring) == 3 * 10 * 2 * (8 + 8) * 2 + lengths


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"num_kv_heads": 3}, {}, "N=4, K=3"),
        ({"head_dim": 7}, {}, "even head width; got 7"),
        ({}, {"lengths": jnp.ones(2, jnp.int32)}, "needs one"),
    ],
)
def test_errors_say_what_is_wrong(fields, arguments, message):
    (x,) = normal(0, (2, 5, 16))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda x: make(**fields).init(jax.random.key(0), x, **arguments), x
        )


def test_a_cache_excludes_segments():
    (x,) = normal(0, (1, 5, 16))
    mixer = make()
    params = mixer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="cannot be combined"):
        mixer.apply(params, x, segment_ids=documents(5), cache=mixer.init_cache(1, 5))
