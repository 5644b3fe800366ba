"""jattn.nn.MonarchMixer and the block-diagonal feed-forward, against their formulas."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests.nn import mixers
from tests.support import assert_equal_up_to_rounding, documents, normal

OPTIONS = [
    {},
    {"bidirectional": True},
    {"input_norm": True},
]


def make(**options):
    fields = {"features": 16, "max_length": 20, "filter_order": 8}
    return jattn.nn.MonarchMixer(**fields | options)


def randomised(mixer, dtype=jnp.float32):
    """Parameters of N(0, 0.3²) numbers, biases too."""
    x = jax.ShapeDtypeStruct((1, 2, 16), dtype)
    leaves, tree = jax.tree.flatten(jax.eval_shape(mixer.init, jax.random.key(0), x))
    noise = normal(5, *(leaf.shape for leaf in leaves), dtype=dtype)
    return jax.tree.unflatten(tree, [0.3 * leaf for leaf in noise])


@functools.partial(jax.jit, static_argnums=0)
def apply(mixer, params, x, **arguments):
    return mixer.apply(params, x, **arguments)


def slow_filter(params, direction, length, max_length, features):
    """One tap at a time, from the learned positions."""
    time = np.linspace(0, 1, max_length)
    decay = np.abs(np.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, features))
    kernel = np.zeros((length, features))
    for n in range(length):
        h = params["position_features"][n]
        for i in range(3):
            weight, bias = (params[f"{direction}_{s}_{i}"] for s in ("kernel", "bias"))
            h = np.sin(params["frequency"] * (h @ weight + bias))
        kernel[n] = h @ params[f"{direction}_kernel_3"] * np.exp(-time[n] * decay)
    return kernel


def slow_mixer(params, x, *, bidirectional=False, input_norm=False, max_length=20):
    """The released wiring, one row and one token at a time."""
    params = jax.tree.map(np.asarray, params["params"])
    x = np.asarray(x)
    out = np.zeros_like(x)
    length, d = x.shape[1:]
    for row, u in enumerate(x):
        if input_norm:
            centred = u - u.mean(1, keepdims=True)
            u = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
            u = u * params["input_norm"]["scale"] + params["input_norm"]["bias"]
        projected = u @ params["in_projection"]["kernel"]
        projected = projected + params["in_projection"]["bias"]
        short = np.tile(params["short_bias"], (length, 1))
        for t in range(length):
            for i in range(3):
                if t - 2 + i >= 0:
                    short[t] += params["short_kernel"][i] * projected[t - 2 + i]
        x1, x2, v = short[:, :d], short[:, d : 2 * d], short[:, 2 * d :]

        def convolve(z, name):
            p = params[name]
            h = slow_filter(p, "forward", length, max_length, d)
            y = p["skip"] * z
            for t in range(length):
                for j in range(t + 1):
                    y[t] += h[t - j] * z[j]
            if bidirectional:
                h_rev = slow_filter(p, "reverse", length, max_length, d)
                for t in range(length):
                    for j in range(t + 1, length):
                        y[t] += h_rev[j - t - 1] * z[j]
            return y

        y = convolve(v * x1, "gated_filter") * x2 + convolve(u, "input_filter")
        out[row] = y @ params["out_projection"]["kernel"]
        out[row] += params["out_projection"]["bias"]
    return out


@pytest.mark.parametrize(
    ("options", "length"), [*((options, 13) for options in OPTIONS), ({}, 1), ({}, 20)]
)
def test_equals_the_released_wiring(x64, options, length):
    (x,) = normal(0, (2, length, 16), dtype=jnp.float64)
    mixer = make(**options, param_dtype=jnp.float64)
    params = randomised(mixer, jnp.float64)
    y = apply(mixer, params, x)
    assert y.dtype == jnp.float64
    assert_equal_up_to_rounding(y, slow_mixer(params, x, **options), 1e-12)


def test_filters_begin_as_released(x64):
    mixer = make(bidirectional=True, param_dtype=jnp.float64)
    params = mixer.init(jax.random.key(0), jnp.zeros((1, 20, 16)))["params"]
    for name in ("gated_filter", "input_filter"):
        n, angle = np.arange(20), 2 * np.pi * np.arange(20) / 20
        expected = [n / 19, np.cos(1e-4 * angle), np.cos(angle)]
        expected += [-np.sin(1e-4 * angle), -np.sin(angle)]
        positions = params[name]["position_features"]
        np.testing.assert_allclose(positions, np.stack(expected, 1), atol=1e-12)
        np.testing.assert_array_equal(params[name]["frequency"], np.full(8, 10.0))


def test_the_released_size():
    mixer = make(features=768, max_length=128, filter_order=128, bidirectional=True)
    x = jax.ShapeDtypeStruct((1, 8, 768), jnp.float32)
    params = jax.eval_shape(mixer.init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2_903_040


def test_decode_equals_parallel():
    mixers.check_decode_equals_parallel(make(input_norm=True))


def test_decode_equals_parallel_in_float64(x64):
    (x,) = normal(0, (2, 11, 16), dtype=jnp.float64)
    mixer = make(param_dtype=jnp.float64)
    params = randomised(mixer, jnp.float64)
    cache = mixer.init_cache(2, 12, jnp.float64)
    outputs = []
    for part in jnp.split(x, [4, 5, 6, 9], axis=1):
        y, cache = apply(mixer, params, part, cache=cache)
        outputs.append(y)
    expected = apply(mixer, params, x)
    assert_equal_up_to_rounding(jnp.concatenate(outputs, axis=1), expected, 1e-13)


def test_rows_of_different_length():
    mixers.check_ragged_decode(make())


def test_rows_of_one_and_no_token():
    mixers.check_ragged_decode(make(), lengths=(1, 0), length=6)


def test_a_reused_cache_forgets_the_text_before():
    (x,) = normal(0, (1, 9, 16))
    mixer = make()
    params = randomised(mixer)
    _, cache = apply(mixer, params, x, cache=mixer.init_cache(1, 20))
    fresh = jax.tree.map(jnp.zeros_like, cache)
    again, _ = apply(mixer, params, x, cache=fresh)
    assert_equal_up_to_rounding(again, apply(mixer, params, x))


def test_causality():
    mixers.check_causality(make())


def test_both_sides_are_seen_if_bidirectional():
    (x,) = normal(0, (1, 9, 16))
    mixer = make(bidirectional=True)
    params = randomised(mixer)
    jacobian = jax.jacobian(lambda x: jnp.sum(apply(mixer, params, x)[0], -1))(x)
    seen = np.any(np.asarray(jacobian) != 0, axis=(1, 3))
    assert np.all(seen)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_reach_every_parameter(options):
    mixers.check_gradients_reach_every_parameter(make(**options, max_length=13))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_documents(bidirectional):
    x, other = normal(0, (1, 20, 16), (1, 20, 16))
    mixer = make(bidirectional=bidirectional)
    params = randomised(mixer)
    segments = documents(7, 1, 12)
    packed = apply(mixer, params, x, segment_ids=segments)
    alone = [apply(mixer, params, x[:, a:b]) for a, b in [(0, 7), (7, 8), (8, 20)]]
    assert_equal_up_to_rounding(packed, jnp.concatenate(alone, axis=1))
    changed = apply(
        mixer,
        params,
        jnp.where(segments[..., None] == 2, other, x),
        segment_ids=segments,
    )
    np.testing.assert_array_equal(packed[:, :7], changed[:, :7])
    np.testing.assert_array_equal(packed[:, 8:], changed[:, 8:])
    assert np.all(packed[:, 7] != changed[:, 7])


@pytest.mark.parametrize("real", [slice(0, 13), slice(4, 20), slice(3, 15)])
def test_padding_enters_no_convolution(real):
    x, other = normal(0, (1, 20, 16), (1, 20, 16))
    mixer = make(bidirectional=True, input_norm=True)
    params = randomised(mixer)
    mask = jnp.zeros((1, 20), bool).at[:, real].set(True)
    padded = apply(mixer, params, x, mask=mask)
    changed = apply(mixer, params, jnp.where(mask[..., None], x, other), mask=mask)
    np.testing.assert_array_equal(padded[:, real], changed[:, real])
    assert_equal_up_to_rounding(padded[:, real], apply(mixer, params, x[:, real]))


def test_bf16_computes_in_bf16_but_filters_in_fp32():
    (x,) = normal(0, (2, 20, 16))
    params = randomised(make())
    exact = apply(make(), params, x)
    rounded = apply(make(dtype=jnp.bfloat16), params, x)
    assert rounded.dtype == jnp.bfloat16
    assert_equal_up_to_rounding(rounded.astype(jnp.float32), exact, 2e-2)


def test_the_cache_holds_two_inputs_a_token():
    cache = make().init_cache(3, 20, jnp.bfloat16)
    tokens = 3 * 20 * (16 + 16) * 2
    kernels = 2 * 20 * 16 * 4
    assert jattn.nn.cache_bytes(cache) == tokens + kernels + 3 * 2 * 48 * 2 + 3 * 4


def test_a_step_is_traced_once_and_evaluates_no_filter():
    (x,) = normal(0, (2, 6, 16))
    mixer = make()
    params = randomised(mixer)
    step = jax.jit(
        chex.assert_max_traces(
            lambda params, x, cache: mixer.apply(params, x, cache=cache), n=1
        )
    )
    cache = mixer.init_cache(2, 20)
    for t in range(4):
        y, cache = step(params, x[:, t : t + 1], cache)
    # Later steps read the kernels of the cache: other filters change nothing.
    broken = jax.tree.map(lambda p: p, params)
    for name in ("gated_filter", "input_filter"):
        broken["params"][name]["frequency"] = jnp.full(8, jnp.nan, jnp.float32)
    y, cache = step(broken, x[:, 4:5], cache)
    assert_equal_up_to_rounding(y[:, 0], apply(mixer, params, x)[:, 4])


@pytest.mark.parametrize(
    ("fields", "shape", "arguments", "message"),
    [
        ({}, (2, 21, 16), {}, "T=21 positions and the mixer max_length=20"),
        ({}, (2, 5, 15), {}, "features=16 channels; got 15"),
        ({}, (5, 16), {}, r"x must have shape \[B, T, D\]"),
        ({}, (2, 5, 16), {"segment_ids": jnp.ones((2, 4), jnp.int32)}, "segment_ids"),
        ({}, (2, 5, 16), {"mask": jnp.ones((2, 4), bool)}, "mask must be bool"),
        ({}, (2, 5, 16), {"mask": jnp.ones((2, 5))}, "mask must be bool"),
        ({}, (2, 5, 16), {"lengths": jnp.ones(2, jnp.int32)}, "needs one"),
        ({}, (2, 5, 16), {"cache": make().init_cache(2, 4)}, "cache max_length=4"),
        (
            {"bidirectional": True},
            (2, 5, 16),
            {"cache": make().init_cache(2, 20)},
            "has no cache",
        ),
        (
            {},
            (2, 5, 16),
            {"cache": make().init_cache(2, 20), "mask": jnp.ones((2, 5), bool)},
            "mask cannot be combined",
        ),
    ],
)
def test_errors_say_what_is_wrong(fields, shape, arguments, message):
    x = jnp.zeros(shape)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda x: make(**fields).init(jax.random.key(0), x, **arguments), x
        )


def test_errors_of_caches():
    with pytest.raises(ValueError, match=r"max_length=21 exceeds .* max_length=20"):
        make().init_cache(2, 21)
    with pytest.raises(ValueError, match="needs bidirectional=False"):
        make(bidirectional=True).init_cache(2, 20)


def dense_of(blocks):
    """The matrix of blocks [k, inputs, outputs]."""
    k, inputs, outputs = blocks.shape
    matrix = np.zeros((k * inputs, k * outputs))
    for i, block in enumerate(blocks):
        matrix[i * inputs :, i * outputs :][:inputs, :outputs] = block
    return matrix


def test_the_feed_forward_equals_dense_blocks(x64):
    (x,) = normal(0, (2, 3, 8), dtype=jnp.float64)
    mlp = jattn.nn.BlockDiagonalMLP(hidden=12, param_dtype=jnp.float64)
    params = mlp.init(jax.random.key(0), x)
    weights = jax.tree.map(np.asarray, params["params"])
    h = np.asarray(x) @ dense_of(weights["in"]["kernel"])
    erf = np.vectorize(math.erf)
    h = h[..., :12] * 0.5 * (1 + erf(h[..., :12] / math.sqrt(2))) * h[..., 12:]
    expected = h @ dense_of(weights["out"]["kernel"]) + weights["out"]["bias"]
    assert_equal_up_to_rounding(mlp.apply(params, x), expected, 1e-14)
    assert set(weights["in"]) == {"kernel"}


def test_gate_and_value_see_different_halves_as_released():
    (x,) = normal(0, (1, 8))
    linear = jattn.nn.BlockDiagonalLinear(24, use_bias=False)
    params = linear.init(jax.random.key(0), x)
    seen = np.asarray(jax.jacobian(lambda x: linear.apply(params, x)[0])(x))[:, 0] != 0
    assert not np.any(seen[:12, 4:])
    assert not np.any(seen[12:, :4])


def test_dropout_is_of_hidden_activations():
    (x,) = normal(0, (4, 8))
    mlp = jattn.nn.BlockDiagonalMLP(hidden=12, dropout_rate=1.0)
    params = mlp.init(jax.random.key(0), x)
    key = {"dropout": jax.random.key(1)}
    dropped = mlp.apply(params, x, deterministic=False, rngs=key)
    np.testing.assert_array_equal(
        dropped, jnp.broadcast_to(params["params"]["out"]["bias"], (4, 8))
    )
    assert np.all(mlp.apply(params, x) != dropped)


@pytest.mark.parametrize(
    ("features", "hidden", "message"),
    [(6, 12, "num_blocks=4 must divide .* 6 and 24"), (8, 6, "6 and 8")],
)
def test_blocks_must_divide(features, hidden, message):
    mlp = jattn.nn.BlockDiagonalMLP(hidden=hidden)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(mlp.init, jax.random.key(0), jnp.zeros((1, features)))
