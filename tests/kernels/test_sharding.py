"""Operations inside shard_map where some arrays are shared by the devices."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jattn
from jattn.pallas import _mosaic, _triton
from tests.support import assert_equal_up_to_rounding, normal

T, WIDTH = 512, 64


def two_simplicial(query, key, value, **options):
    return jattn.two_simplicial_attention(
        query, key, value, key, value, windows=(64, 16), **options
    )


def native_sparse(query, key, value, **options):
    means = (jattn.nsa_window_means(x) for x in (key, value))
    gates = jnp.full((*query.shape[:3], 3), 0.4)
    return jattn.native_sparse_attention(
        query,
        tuple(means),
        (key, value),
        (key, value),
        gates,
        num_blocks=4,
        window_size=64,
        **options,
    )


# The first ones do with each query head what they do with it among others.
OPERATIONS = {
    "dense": jattn.dense_attention,
    "mixture of blocks": functools.partial(
        jattn.mixture_of_block_attention, block_size=64, top_k=2
    ),
    "2-simplicial": two_simplicial,
    "native sparse": native_sparse,
    "selective": jattn.selective_attention,
    "selective with a budget": functools.partial(
        jattn.selective_attention, budget=jnp.int32(9)
    ),
}


def value_and_gradients(operation, *arrays):
    out, pullback = jax.vjp(operation, *arrays)
    return out, *pullback(jnp.cos(out))


def over_heads(operation):
    """Each of two devices has half of the query heads and all keys and values."""
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,))
    heads = P(None, None, "heads")
    return jax.shard_map(
        functools.partial(value_and_gradients, operation),
        mesh=mesh,
        in_specs=(heads, P(), P()),
        out_specs=(heads, heads, P(), P()),
    )


@pytest.mark.parametrize("name", list(OPERATIONS)[:3])
def test_gradients_of_what_is_shared_are_sums(name):
    operation = functools.partial(OPERATIONS[name], implementation="xla")
    arrays = normal(0, (1, T, 4, 8), (1, T, 1, 8), (1, T, 1, 8))
    actual = jax.jit(over_heads(operation))(*arrays)
    expected = jax.jit(functools.partial(value_and_gradients, operation))(*arrays)
    for x, y in zip(actual, expected, strict=True):
        assert_equal_up_to_rounding(x, y)


@pytest.mark.parametrize("mosaic", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_kernels_can_be_traced(monkeypatch, name, mosaic):
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    if mosaic:
        monkeypatch.setattr(_mosaic, "unavailable", lambda: None)
    operation = functools.partial(OPERATIONS[name], implementation="triton")
    shapes = (1, T, 32, WIDTH), (1, T, 1, WIDTH), (1, T, 1, WIDTH)
    arrays = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in shapes]
    found = jax.eval_shape(over_heads(operation), *arrays)
    assert [x.shape for x in found] == [shapes[0], *shapes]
