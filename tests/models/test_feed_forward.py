"""jattn.models.SwiGLU and MixtureOfExperts against loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jattn.models import MixtureOfExperts, SwiGLU
from tests.models import slow
from tests.support import assert_equal_up_to_rounding, normal


def make(num_experts=4, experts_per_token=2, **options):
    return MixtureOfExperts(num_experts, experts_per_token, hidden=6, **options)


@functools.partial(jax.jit, static_argnums=0)
def apply(layer, params, x):
    """The output, and the load-balance loss if there is one."""
    out, sown = layer.apply(params, x, mutable=["losses"])
    return out, sown["losses"]["load_balance"][0] if sown else None


def slow_experts(params, x, experts_per_token):
    """One token, one expert at a time; and the load-balance loss."""
    params, x = slow.float64((params, x))
    tokens = x.reshape(-1, x.shape[-1])
    num_experts = params["router"].shape[1]
    out, counts = np.zeros_like(tokens), np.zeros(num_experts)
    probabilities = np.array([slow.softmax(row @ params["router"]) for row in tokens])
    for row, scores in enumerate(probabilities):
        for e in np.argsort(-scores, kind="stable")[:experts_per_token]:
            expert = {k: {"kernel": params[k][e]} for k in ("gate", "up", "down")}
            out[row] += scores[e] * slow.swiglu(expert, tokens[row])
            counts[e] += 1
        if "shared" in params:
            out[row] += slow.swiglu(params["shared"], tokens[row])
    shares = counts / counts.sum()
    loss = num_experts * np.sum(shares * probabilities.mean(axis=0))
    return out.reshape(x.shape), loss


def test_swiglu_equals_its_formula(x64):
    (x,) = normal(0, (2, 5, 4), dtype=jnp.float64)
    layer = SwiGLU(6, param_dtype=jnp.float64)
    params = slow.random_params(layer, x)
    expected = slow.swiglu(slow.float64(params["params"]), np.asarray(x))
    assert_equal_up_to_rounding(apply(layer, params, x)[0], expected, 1e-14)


@pytest.mark.parametrize(
    ("num_experts", "experts_per_token", "shared"),
    [(4, 2, 0), (4, 2, 2), (3, 1, 1), (3, 3, 0), (1, 1, 0)],
)
def test_experts_equal_the_loop(x64, num_experts, experts_per_token, shared):
    (x,) = normal(0, (2, 7, 4), dtype=jnp.float64)
    layer = make(
        num_experts,
        experts_per_token,
        num_shared_experts=shared,
        param_dtype=jnp.float64,
    )
    params = slow.random_params(layer, x)
    out, loss = apply(layer, params, x)
    expected, expected_loss = slow_experts(params["params"], x, experts_per_token)
    assert_equal_up_to_rounding(out, expected, 1e-13)
    assert_equal_up_to_rounding(loss, expected_loss, 1e-13)


def test_no_token_is_dropped_when_all_choose_one_expert(x64):
    (x,) = normal(0, (1, 9, 4), dtype=jnp.float64)
    x = jnp.abs(x)
    layer = make(4, 1, param_dtype=jnp.float64)
    params = slow.random_params(layer, x)
    params["params"]["router"] = jnp.zeros((4, 4)).at[:, 2].set(5.0)
    out, loss = apply(layer, params, x)
    assert loss > 3.9
    assert_equal_up_to_rounding(out, slow_experts(params["params"], x, 1)[0], 1e-13)


def test_tokens_do_not_depend_on_each_other():
    x, y = normal(0, (1, 9, 4), (1, 9, 4))
    layer = make(num_shared_experts=1)
    params = slow.random_params(layer, x)
    changed = jnp.concatenate([x[:, :5], y[:, 5:]], axis=1)
    np.testing.assert_array_equal(
        apply(layer, params, x)[0][:, :5], apply(layer, params, changed)[0][:, :5]
    )


@pytest.mark.parametrize("experts_per_token", [1, 2])
def test_gradients_equal_finite_differences(x64, experts_per_token):
    (x,) = normal(0, (1, 5, 3), dtype=jnp.float64)
    layer = make(3, experts_per_token, num_shared_experts=1, param_dtype=jnp.float64)
    params = slow.random_params(layer, x)

    def loss(params, x):
        out, load_balance = apply(layer, params, x)
        return jnp.sum(jnp.sin(out)) + load_balance

    check_grads(loss, (params, x), order=1, modes=["rev"], eps=1e-6)


def test_bf16_routes_in_fp32():
    (x,) = normal(0, (2, 8, 16), dtype=jnp.bfloat16)
    layer = make(dtype=jnp.bfloat16)
    params = slow.random_params(layer, x)
    out, loss = apply(layer, params, x)
    assert out.dtype == jnp.bfloat16
    assert loss.dtype == jnp.float32
    assert_equal_up_to_rounding(out, slow_experts(params["params"], x, 2)[0], 1e-2)


def test_init_gives_parameters_only():
    (x,) = normal(0, (1, 3, 4))
    assert set(slow.random_params(make(), x)) == {"params"}


@pytest.mark.parametrize(
    ("num_experts", "experts_per_token", "message"),
    [
        (2, 3, "experts_per_token may not exceed num_experts=2; got 3"),
        (2, 0, "experts_per_token must be a positive integer; got 0"),
    ],
)
def test_errors_say_what_is_wrong(num_experts, experts_per_token, message):
    (x,) = normal(0, (1, 3, 4))
    with pytest.raises(ValueError, match=message):
        slow.random_params(make(num_experts, experts_per_token), x)
