"""jattn.nn.MixtureOfBlockAttention: its decoding, its cache, its switch to dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests.nn import mixers
from tests.support import assert_equal_up_to_rounding, documents, normal

SIZES = {"num_heads": 4, "head_dim": 8, "block_size": 3, "top_k": 2}


def make(**options):
    return jattn.nn.MixtureOfBlockAttention(**SIZES | options)


class RandomConvolution(jattn.nn.MixtureOfBlockAttention):
    """The module with a key convolution that is not the identity it starts as."""

    def init(self, *arguments, **options):
        params = super().init(*arguments, **options)["params"]
        (weight,) = normal(9, params["key_conv"].shape)
        return {"params": params | {"key_conv": weight}}


def make_convolved(**options):
    return RandomConvolution(
        **SIZES | {"num_kv_heads": 2, "key_conv_width": 3} | options
    )


def test_decode_equals_parallel():
    mixers.check_decode_equals_parallel(make_convolved(), splits=((1,) * 13, (6, 1, 6)))


def test_a_sequence_shorter_than_a_block_is_seen_whole():
    mixers.check_decode_equals_parallel(make(block_size=64), splits=((1,) * 13,))


def test_rows_of_different_length():
    mixers.check_ragged_decode(make_convolved())


def test_padding_may_hold_anything():
    mixers.check_padding_may_hold_anything(make_convolved())


def test_cached_calls_map_and_shard():
    mixers.check_cached_calls_map_and_shard(make_convolved())


def test_causality():
    mixers.check_causality(make_convolved())


def test_gradients_reach_every_parameter():
    mixers.check_gradients_reach_every_parameter(make(key_conv_width=3))


def test_the_switch_to_dense_takes_a_dense_checkpoint():
    (x,) = normal(0, (2, 13, 16))
    dense = jattn.nn.DenseAttention(num_heads=4, num_kv_heads=2, head_dim=8)
    params, apply_dense = mixers.start(dense, x)
    own_params, apply_sparse = mixers.start(make(num_kv_heads=2), x)
    jax.tree.map(np.testing.assert_array_equal, own_params, params)
    _, apply_full = mixers.start(make(num_kv_heads=2), x, full_attention=True)
    _, apply_to_all_blocks = mixers.start(make(num_kv_heads=2, top_k=5), x)
    segments = documents(4, 9, batch=2)
    expected = apply_dense(params, x, segment_ids=segments)
    np.testing.assert_array_equal(apply_full(params, x, segment_ids=segments), expected)
    assert_equal_up_to_rounding(
        apply_to_all_blocks(params, x, segment_ids=segments), expected
    )
    sparse = apply_sparse(params, x, segment_ids=segments)
    assert np.max(np.abs(sparse - expected)) > 1e-3


def test_calls_on_one_cache_may_alternate_between_sparse_and_dense():
    (x,) = normal(0, (1, 12, 16))
    mixer = make()
    params, sparse = mixers.start(mixer, x)
    _, full = mixers.start(mixer, x, full_attention=True)
    cache = mixer.init_cache(1, 12)
    for i, apply in enumerate((full, sparse, full, sparse)):
        part = np.arange(3 * i, 3 * i + 3)
        out, cache = apply(params, x[:, part], cache=cache)
        assert_equal_up_to_rounding(out, apply(params, x)[:, part])


def test_documents_do_not_leak_through_selection_or_convolution():
    x, other = normal(0, (1, 14, 16), (1, 14, 16))
    params, apply = mixers.start(make_convolved(key_conv_width=5), x)
    segments = documents(7, 7)  # the second one starts inside a block
    packed = apply(params, x, segment_ids=segments)
    for inside in (slice(0, 7), slice(7, 14)):
        changed = x.at[:, inside].set(other[:, inside])
        changed = apply(params, changed, segment_ids=segments)
        same = np.all(changed == packed, axis=(0, 2))
        assert not np.any(same[inside])
        assert np.sum(same) == 7


def test_packed_documents_equal_documents_alone():
    (x,) = normal(0, (1, 12, 16))
    params, apply = mixers.start(make_convolved(rope_base=None), x)
    packed = apply(params, x, segment_ids=documents(6, 6))
    alone = [apply(params, part) for part in (x[:, :6], x[:, 6:])]
    assert_equal_up_to_rounding(packed, jnp.concatenate(alone, axis=1))


def test_the_convolution_starts_as_the_identity():
    (x,) = normal(0, (2, 13, 16))
    plain_params, plain = mixers.start(make(), x, full_attention=True)
    params, convolved = mixers.start(make(key_conv_width=3), x, full_attention=True)
    np.testing.assert_array_equal(convolved(params, x), plain(plain_params, x))


def test_cache_bytes():
    mixer = make(num_kv_heads=2, block_size=8, key_conv_width=5)
    cache = mixer.init_cache(3, 100, jnp.bfloat16)
    blocks = 13
    keys_and_values = 3 * blocks * 8 * 2 * (8 + 8) * 2
    block_sums = 3 * blocks * 2 * 8 * 4
    raw_keys = 3 * 4 * 2 * 8 * 2
    lengths = 3 * 4
    assert jattn.nn.cache_bytes(cache) == (
        keys_and_values + block_sums + raw_keys + lengths
    )


def test_bf16_decode_keeps_sums_in_fp32():
    (x,) = normal(0, (2, 64, 16), dtype=jnp.bfloat16)
    mixer = make(dtype=jnp.bfloat16, block_size=24)
    params, apply = mixers.start(mixer, x)
    cache = mixer.init_cache(2, 64, jnp.bfloat16)
    for part in jnp.split(x, 4, axis=1):
        _, cache = apply(params, part, cache=cache)
    assert cache.block_sum.dtype == jnp.float32
    keys = np.asarray(cache.kv.key, np.float64).reshape(2, 3, 24, 4, 8)
    assert_equal_up_to_rounding(cache.block_sum, keys.sum(axis=2), 1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "N=4, K=3"),
        ({"block_size": 0}, "block_size must be a positive integer; got 0"),
        ({"top_k": 0}, "top_k must be a positive integer; got 0"),
        ({"key_conv_width": 0}, "key_conv_width must be a positive integer; got 0"),
    ],
)
def test_errors_say_what_is_wrong(fields, message):
    (x,) = normal(0, (2, 5, 16))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: make(**fields).init(jax.random.key(0), x), x)


def test_a_cache_excludes_segments():
    (x,) = normal(0, (1, 5, 16))
    mixer = make()
    params, apply = mixers.start(mixer, x)
    with pytest.raises(ValueError, match="cannot be combined"):
        apply(params, x, segment_ids=documents(5), cache=mixer.init_cache(1, 5))
