"""jattn.nn.NativeSparseAttention: its decoding, its cache and its errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.nn.nsa import WindowMLP
from jattn.nn.rope import rope
from tests.nn import mixers
from tests.support import (
    assert_equal_up_to_rounding,
    documents,
    normal,
    temporary_bytes,
)

SIZES = {
    "kernel_size": 4,
    "stride": 2,
    "block_size": 4,
    "num_blocks": 4,
    "window_size": 3,
}
OPTIONS = [
    {},
    {"rope_compressed": "before", "stride": 4, "block_size": 8, "num_kv_heads": 1},
    {"compression": "mean", "rope_base": None, "window_size": 100, "value_dim": 6},
]


def make(**options):
    defaults = {"num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
    return jattn.nn.NativeSparseAttention(**defaults | SIZES | options)


@pytest.mark.parametrize("order", ["after", "before"])
def test_parallel_form_is_made_of_the_ops(order):
    """Pooling, roping, selection and gates put together by hand."""
    (x,) = normal(0, (2, 29, 16))
    variables, _ = mixers.start(make(compression="mean"), x)
    mixer = make(compression="mean", rope_compressed=order)
    positions = jnp.tile(jnp.arange(29), (2, 1))
    turn = functools.partial(rope, base=10_000.0)

    @jax.jit
    def by_hand(kernels, x):
        new = {
            name: jnp.tensordot(x, kernel, axes=1)
            for name, kernel in kernels.items()
            if name != "out"
        }
        key, value = (jnp.moveaxis(new[name], 2, 0) for name in ("key", "value"))
        key_cmp, value_cmp = (
            jattn.nsa_windows(x, kernel_size=4, stride=2).mean(axis=2)
            for x in (
                turn(key[0], positions) if order == "before" else key[0],
                value[0],
            )
        )
        if order == "after":
            key_cmp = turn(key_cmp, positions[:, :26:2])
        out = jattn.native_sparse_attention(
            turn(new["query"], positions),
            (key_cmp, value_cmp),
            (turn(key[1], positions), value[1]),
            (turn(key[2], positions), value[2]),
            jax.nn.sigmoid(new["gate"]),
            **SIZES,
        )
        return jnp.einsum("btnv,nvf->btf", out, kernels["out"])

    kernels = {name: p["kernel"] for name, p in variables["params"].items()}
    assert_equal_up_to_rounding(jax.jit(mixer.apply)(variables, x), by_hand(kernels, x))


def test_learned_compression_is_an_mlp_of_the_window_and_its_positions():
    (windows,) = normal(0, (2, 3, 4, 2, 5))
    mlp = WindowMLP()
    params = mlp.init(jax.random.key(0), windows)
    shapes = jax.tree.map(jnp.shape, params["params"])
    assert shapes == {"position": (4, 2, 5), "hidden": (2, 4, 5, 5), "out": (2, 5, 5)}
    position, hidden, out = (
        np.asarray(params["params"][name], np.float64)
        for name in ("position", "hidden", "out")
    )
    expected = np.zeros((2, 3, 2, 5))
    for row, i, head in np.ndindex(2, 3, 2):
        placed = np.asarray(windows)[row, i, :, head] + position[:, head]
        inner = placed.reshape(-1) @ hidden[head].reshape(-1, 5)
        expected[row, i, head] = inner / (1 + np.exp(-inner)) @ out[head]
    assert_equal_up_to_rounding(mlp.apply(params, windows), expected)


def test_decode_equals_parallel_in_any_split():
    mixers.check_decode_equals_parallel(
        make(), length=29, splits=((29,), (1,) * 29, (11, 1, 1, 11, 1, 1, 1, 1, 1))
    )


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_decode_equals_parallel_with(options):
    mixers.check_decode_equals_parallel(
        make(**options), length=29, splits=((11, *(1,) * 7, 11),)
    )


def test_rows_of_different_length():
    mixers.check_ragged_decode(make(), length=29, lengths=(11, 4))


def test_decoding_selects_the_same_blocks_and_compiles_a_step_once():
    (x,) = normal(0, (2, 29, 16))
    mixer = make()
    params, apply = mixers.start(mixer, x, mutable="intermediates")

    def selection(sown):
        return sown["intermediates"]["block_indices"][0]

    _, sown = apply(params, x)
    expected = selection(sown)
    assert expected.shape == (2, 29, 2, 4)
    cache = mixer.init_cache(2, 29)
    (_, cache), sown = apply(params, x[:, :11], cache=cache)
    chosen, compiled = [selection(sown)], apply._cache_size()
    for t in range(11, 29):
        (_, cache), sown = apply(params, x[:, t : t + 1], cache=cache)
        chosen.append(selection(sown))
    np.testing.assert_array_equal(jnp.concatenate(chosen, axis=1), expected)
    assert apply._cache_size() == compiled + 1


def test_padding_leaves_no_trace():
    """Whatever stands behind the real tokens, the cache is the same bit for bit."""
    x, noise = normal(0, (2, 11, 16), (2, 11, 16))
    mixer = make()
    params, apply = mixers.start(mixer, x)
    lengths = jnp.asarray([9, 4])
    real = jnp.arange(11)[:, None] < lengths[:, None, None]
    (_, one), (_, other) = (
        apply(
            params,
            jnp.where(real, x, padding),
            cache=mixer.init_cache(2, 29),
            lengths=lengths,
        )
        for padding in (noise, 1e6)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_padding_may_hold_anything():
    mixers.check_padding_may_hold_anything(make())


def test_cached_calls_map_and_shard():
    mixers.check_cached_calls_map_and_shard(make())


def test_sequences_shorter_than_a_window():
    mixers.check_decode_equals_parallel(make(), length=3, splits=((1, 1, 1),))
    assert make().init_cache(1, 3).compressed[0].shape == (1, 0, 2, 8)


def test_causality():
    mixers.check_causality(make(), length=29, cut=17)


def test_gradients_reach_every_parameter():
    mixers.check_gradients_reach_every_parameter(make(), length=29)


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_packed_documents(options):
    """One document never changes another, and is as it would be in a row alone."""
    x, y = normal(0, (2, 29, 16), (2, 29, 16))
    mixer = make(**options)
    params, apply = mixers.start(mixer, x)
    segments = documents(16, 13, batch=2)
    before = apply(params, x, segment_ids=segments)
    changed = jnp.concatenate([y[:, :16], x[:, 16:]], axis=1)
    after = apply(params, changed, segment_ids=segments)
    np.testing.assert_array_equal(before[:, 16:], after[:, 16:])
    assert np.any(before[:, :16] != after[:, :16])
    assert_equal_up_to_rounding(before[:, 16:], apply(params, x[:, 16:]))


def test_the_cache_holds_what_each_branch_needs():
    mixer = jattn.nn.NativeSparseAttention(
        num_heads=8, num_kv_heads=2, head_dim=24, value_dim=16
    )
    cache = jax.eval_shape(lambda: mixer.init_cache(3, 8192, jnp.bfloat16))
    token = 3 * 2 * (24 + 16) * 2
    assert jattn.nn.cache_bytes(cache.compressed) == 511 * token
    assert jattn.nn.cache_bytes(cache.tail) == 32 * token
    assert jattn.nn.cache_bytes(cache.selected) == 8192 * token
    assert jattn.nn.cache_bytes(cache.window) == 512 * token
    assert jattn.nn.cache_bytes(cache) == (511 + 32 + 8192 + 512) * token + 3 * 4


def test_long_prefill_does_not_build_a_square():
    mixer = jattn.nn.NativeSparseAttention(num_heads=8, num_kv_heads=2, head_dim=32)
    x = jax.ShapeDtypeStruct((1, 8192, 64), jnp.float32)
    params = jax.eval_shape(mixer.init, jax.random.key(0), x)
    cache = jax.eval_shape(lambda: mixer.init_cache(1, 8192))
    needed = temporary_bytes(
        lambda params, x, cache: mixer.apply(params, x, cache=cache), params, x, cache
    )
    assert needed < 256 * 2**20
    assert needed < 8 * 8192**2 * 4 / 8


def test_bf16_computes_in_bf16():
    (x,) = normal(0, (2, 29, 16))
    mixer = make(dtype=jnp.bfloat16)
    params, in_fp32 = mixers.start(make(), x)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(mixer.init, jax.random.key(0), x), params
    )
    apply = jax.jit(mixer.apply)
    out = apply(params, x)
    assert out.dtype == jnp.bfloat16
    assert_equal_up_to_rounding(out, in_fp32(params, x), 2e-2)
    cache = mixer.init_cache(2, 29, jnp.bfloat16)
    decoded, after = jax.eval_shape(apply, params, x, cache=cache)
    assert decoded.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_shapes_and_dtypes(after, cache)


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"num_kv_heads": 3}, {}, "N=4, K=3"),
        ({"head_dim": 7}, {}, "even head width; got 7"),
        ({"compression": "max"}, {}, r"compression must be one of .*; got 'max'"),
        ({"rope_compressed": "never"}, {}, "rope_compressed must be one of"),
        ({"stride": 3}, {}, "stride must divide kernel_size"),
        ({"num_blocks": 2}, {}, "num_blocks counts the forced blocks"),
        ({"window_size": 0}, {}, "window_size must be a positive integer; got 0"),
        ({"window_size": None}, {}, "window_size must be a positive integer; got None"),
        ({"value_dim": 0}, {}, "value_dim must be a positive integer; got 0"),
        ({}, {"lengths": jnp.ones(2, jnp.int32)}, "needs one"),
        (
            {},
            {"segment_ids": jnp.ones((2, 4), int)},
            r"\[B=2, S=5\].*got int32 \[2, 4\]",
        ),
    ],
)
def test_errors_say_what_is_wrong(fields, arguments, message):
    (x,) = normal(0, (2, 5, 16))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda x: make(**fields).init(jax.random.key(0), x, **arguments), x
        )


@pytest.mark.parametrize(
    ("made", "rows", "message"),
    [
        ({"kernel_size": 2}, 2, r"compressed\[0\] must be .* \[2, 14, 2, 8\], as "),
        ({"window_size": 4}, 2, r"window\[0\] must be .* \[2, 3, .* \[2, 4, 2, 8\]"),
        ({"value_dim": 6}, 2, r"compressed\[1\] must be .* \[2, 14, 2, 8\], as .*6\]"),
        ({"num_kv_heads": 4}, 2, r"compressed\[0\] .* got float32 \[2, 14, 4, 8\]"),
        ({}, 3, r"NativeSparseAttention.init_cache\(2, 30\) makes it; got .*\[3, 14,"),
    ],
)
def test_a_cache_of_another_configuration_is_refused(made, rows, message):
    (x,) = normal(0, (2, 5, 16))
    params, _ = mixers.start(make(), x)
    cache = make(**made).init_cache(rows, 30)
    with pytest.raises(ValueError, match=message):
        make().apply(params, x, cache=cache)


def test_a_cache_of_impossible_sizes_is_refused():
    with pytest.raises(ValueError, match="stride must be a positive integer; got 0"):
        make(stride=0).init_cache(1, 8)
