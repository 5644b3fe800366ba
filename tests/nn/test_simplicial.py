"""jattn.nn.TwoSimplicialAttention: its decoding, its rings, its positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests.nn import mixers
from tests.support import assert_equal_up_to_rounding, documents, normal

ROTARY = {"form": "determinant", "rope_base": 100.0}


def make(**options):
    defaults = {"num_heads": 4, "head_dim": 8, "windows": (5, 3)}
    return jattn.nn.TwoSimplicialAttention(**defaults | options)


def test_the_registry_names_it():
    assert jattn.nn.MIXERS["simplicial"] is jattn.nn.TwoSimplicialAttention


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "windows": (1, 100), "key2_bias": 0.1, "value2_bias": 1.0},
        {"windows": (None, 3)} | ROTARY,
    ],
)
def test_decode_equals_parallel(options):
    mixers.check_decode_equals_parallel(make(**options))


@pytest.mark.parametrize(
    "options", [{"num_kv_heads": 2}, {"windows": (None, None)} | ROTARY]
)
def test_rows_of_different_length(options):
    mixers.check_ragged_decode(make(**options))
    mixers.check_padding_may_hold_anything(make(**options))


def test_causality():
    mixers.check_causality(make())


@pytest.mark.parametrize("options", [{"num_kv_heads": 1}, ROTARY])
def test_gradients_reach_every_parameter(options):
    mixers.check_gradients_reach_every_parameter(make(**options))


def test_the_cache_is_two_rings_whatever_the_length():
    mixer = make(num_kv_heads=2, windows=(10, 4))
    per_token = 2 * 2 * 8 * 2  # key and value, 2 heads of 8 numbers of 2 bytes
    lengths = 3 * 4
    for max_length in (10, 100, 10**6):
        cache = jax.eval_shape(
            lambda n=max_length: mixer.init_cache(3, n, jnp.bfloat16)
        )
        assert jattn.nn.cache_bytes(cache) == 3 * (10 + 4) * per_token + lengths
    unlimited = make(num_kv_heads=2, windows=(None, 4)).init_cache(3, 50, jnp.bfloat16)
    assert jattn.nn.cache_bytes(unlimited) == 3 * (50 + 4) * per_token + lengths


def test_the_output_is_the_projected_op():
    (x,) = normal(0, (2, 9, 16))
    mixer = make(num_kv_heads=2, form="determinant", value2_bias=1.0)
    params, apply = mixers.start(mixer, x)
    kernels = {name: part["kernel"] for name, part in params["params"].items()}
    projected = {
        name: jnp.einsum("btf,fnh->btnh", x, kernels[name])
        for name in ("query", "key", "value", "key2", "value2")
    }
    attend = functools.partial(
        jattn.two_simplicial_attention,
        windows=(5, 3),
        form="determinant",
        value2_bias=1.0,
    )
    out = jax.jit(attend)(**projected)
    expected = jnp.einsum("btnh,nhf->btf", out, kernels["out"])
    assert_equal_up_to_rounding(apply(params, x), expected)


def test_rotary_positions_are_relative():
    """A document gives the same wherever it stands, but its order matters."""
    x, other = normal(0, (1, 9, 16), (1, 7, 16))
    mixer = make(windows=(None, None), **ROTARY)
    params, apply = mixers.start(mixer, x)
    expected = apply(params, x)
    both = jnp.concatenate([other, x], axis=1)
    packed = apply(params, both, segment_ids=documents(7, 9))
    assert_equal_up_to_rounding(packed[:, 7:], expected)

    swapped = x[:, jnp.array([1, 0, *range(2, 9)])]
    _, unordered = mixers.start(make(windows=(None, None), form="determinant"), x)
    assert_equal_up_to_rounding(
        unordered(params, swapped)[:, -1], unordered(params, x)[:, -1]
    )
    assert not np.allclose(apply(params, swapped)[:, -1], expected[:, -1], atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "N=4, K=3"),
        ({"rope_base": 1e4}, "rope_base must be None for form='trilinear'"),
        (ROTARY | {"head_dim": 2}, "at least 3; got 2"),
        ({"windows": (0, 3)}, r"windows\[0\] must be a positive integer; got 0"),
        ({"form": "bilinear"}, "got 'bilinear'"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    (x,) = normal(0, (2, 5, 16))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: make(**fields).init(jax.random.key(0), x), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": jnp.ones(2, jnp.int32)}, "needs one"),
        (
            {"segment_ids": documents(5, batch=2), "cache": make().init_cache(2, 5)},
            "cannot be combined",
        ),
    ],
)
def test_arguments_that_exclude_each_other(arguments, message):
    (x,) = normal(0, (2, 5, 16))
    with pytest.raises(ValueError, match=message):
        make().init(jax.random.key(0), x, **arguments)
