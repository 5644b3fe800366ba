"""Embedding tables: rows as flax's, gradients that are sums in fp32."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jattn.models import embedding
from jattn.models.embedding import Embed, embed
from tests.support import assert_equal_up_to_rounding, normal, relative_rms


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_rows_are_those_of_flax(dtype):
    tokens = jnp.array([[3, 0, 3], [4, 1, 2]])
    ours, flax = Embed(5, 8, dtype=dtype), nn.Embed(5, 8, dtype=dtype)
    params = flax.init(jax.random.key(0), tokens)
    chex.assert_trees_all_equal(ours.init(jax.random.key(0), tokens), params)
    chex.assert_trees_all_equal(ours.apply(params, tokens), flax.apply(params, tokens))


@pytest.mark.parametrize("max_one_hot", [2**26, 5000])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_is_the_sum_over_tokens(monkeypatch, dtype, max_one_hot):
    monkeypatch.setattr(embedding, "_MAX_ONE_HOT", max_one_hot)
    rng = np.random.default_rng(0)
    # As bytes of a text, most tokens are of one kind.
    tokens = rng.choice(7, size=(4, 1000), p=[0.9, 0.05, 0.02, 0.01, 0.01, 0.01, 0])
    table, gradient = normal(1, (7, 8), (4, 1000, 8))
    gradient = (gradient + 1).astype(dtype)
    expected = np.zeros((7, 8))
    np.add.at(expected, tokens, np.asarray(gradient, np.float64))

    @jax.jit
    def pull(table, gradient):
        return jax.vjp(lambda table: embed(table, tokens, dtype), table)[1](gradient)[0]

    actual = pull(table, gradient)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, table)
    assert relative_rms(actual, expected) <= 1e-6
    # Atomics would not add in the same order each time.
    assert "scatter" not in pull.lower(table, gradient).as_text()


def test_devices_share_a_table():
    tokens = jax.random.randint(jax.random.key(0), (4, 50), 0, 7)
    table, gradient = normal(1, (7, 8), (4, 50, 8))

    def pull(tokens, gradient, table):
        return jax.vjp(lambda table: embed(table, tokens), table)[1](gradient)[0]

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = dict(in_specs=(P("data"), P("data"), P()), out_specs=P())
    sharded = jax.jit(jax.shard_map(pull, mesh=mesh, **specs))
    actual = sharded(tokens, gradient, table)
    expected = jax.jit(pull)(tokens, gradient, table)
    assert_equal_up_to_rounding(actual, expected)


def test_a_token_past_the_table_gives_nan():
    rows = embed(jnp.ones((5, 2)), jnp.array([4, 5]))
    np.testing.assert_array_equal(rows, [[1, 1], [np.nan, np.nan]])
