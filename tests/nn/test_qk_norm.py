"""The qk_norm of the mixers that have queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests.nn import mixers
from tests.support import assert_equal_up_to_rounding, normal

MIXERS = {
    "dense": jattn.nn.DenseAttention(4, 8, 2, qk_norm=True),
    "moba": jattn.nn.MixtureOfBlockAttention(
        4, 8, 2, block_size=4, top_k=2, qk_norm=True
    ),
    "nsa": jattn.nn.NativeSparseAttention(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        kernel_size=4,
        stride=2,
        block_size=4,
        num_blocks=3,
        window_size=4,
        qk_norm=True,
    ),
    "simplicial": jattn.nn.TwoSimplicialAttention(
        num_heads=4, num_kv_heads=2, head_dim=8, windows=(5, 3), qk_norm=True
    ),
    "selective": jattn.nn.SelectiveAttention(4, 8, 2, qk_norm=True),
}
KEYS = {"simplicial": ("key", "key2")}

by_name = pytest.mark.parametrize("name", MIXERS)


@by_name
def test_decode_equals_parallel(name):
    mixers.check_decode_equals_parallel(MIXERS[name], splits=((5, 1, 7),))


@by_name
def test_gradients_reach_every_parameter(name):
    mixers.check_gradients_reach_every_parameter(MIXERS[name])


@by_name
def test_the_size_of_projections_does_not_matter(name):
    (x,) = normal(0, (2, 13, 16))
    params, apply = mixers.start(MIXERS[name], x)
    expected = apply(params, x)
    for projection in ("query", *KEYS.get(name, ("key",))):
        assert params["params"][f"{projection}_norm"]["scale"].shape == (8,)
        larger = jax.tree.map(lambda x: x, params)
        larger["params"][projection]["kernel"] *= 4
        assert_equal_up_to_rounding(apply(larger, x), expected)


def test_equals_normalised_queries_and_keys(x64):
    del x64
    (x,) = normal(0, (2, 9, 16), dtype=jnp.float64)
    mixer = jattn.nn.DenseAttention(
        4, 8, 2, rope_base=None, param_dtype=jnp.float64, qk_norm=True
    )
    params = mixer.init(jax.random.key(0), x)
    for name in ("query_norm", "key_norm"):
        (scale,) = normal(1, (8,), dtype=jnp.float64)
        params["params"][name]["scale"] = scale
    weights = jax.tree.map(np.asarray, params["params"])

    def heads(name):
        y = np.einsum("btf,fnh->btnh", np.asarray(x), weights[name]["kernel"])
        if name == "value":
            return y
        rms = np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6)
        return y / rms * weights[f"{name}_norm"]["scale"]

    query, key, value = (heads(name) for name in ("query", "key", "value"))
    logits = np.einsum("btnh,bsnh->bnts", query, np.repeat(key, 2, axis=2)) / 8**0.5
    logits = np.where(np.tri(9, dtype=bool), logits, -np.inf)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsnh->btnh", probabilities, np.repeat(value, 2, axis=2))
    expected = np.einsum("btnh,nhf->btf", out, weights["out"]["kernel"])
    np.testing.assert_allclose(mixer.apply(params, x), expected, rtol=1e-10, atol=1e-12)
