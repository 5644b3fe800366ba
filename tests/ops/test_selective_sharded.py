"""Selective attention on two devices equals that on one."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jattn
from jattn.ops import _common
from jattn.pallas import _triton
from jattn.pallas.selective import work
from tests.support import assert_equal_up_to_rounding, documents, normal

HEADS = PartitionSpec(None, None, "x")
SEQUENCE = PartitionSpec(None, "x")
EVERYWHERE = PartitionSpec()

SEGMENTS = {"one document": None, "documents": documents(3, 6, 1, 4, batch=2)}


def qkv(seed=0, t=14, n=8, k=4, dtype=jnp.float32):
    return normal(seed, (2, t, n, 8), (2, t, k, 8), (2, t, k, 6), dtype=dtype)


def shard(function, in_specs, out_specs):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    function = functools.partial(function, axis_name="x")
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def over_heads(segments, **options):
    out_specs = (HEADS, HEADS, EVERYWHERE)

    def attend(query, key, value, axis_name):
        return jattn.selective_attention_over_heads(
            query,
            key,
            value,
            axis_name=axis_name,
            segment_ids=segments,
            return_lse=True,
            memory_tau=0.8,
            **options,
        )

    return shard(attend, HEADS, out_specs)


def over_sequence(segments, **options):
    def attend(query, key, value, segments, axis_name):
        return jattn.selective_attention_over_sequence(
            query,
            key,
            value,
            axis_name=axis_name,
            segment_ids=segments,
            return_lse=True,
            memory_tau=0.8,
            **options,
        )

    sharded = shard(attend, SEQUENCE, SEQUENCE)
    return lambda query, key, value: sharded(query, key, value, segments)


def on_one_device(segments, **options):
    return functools.partial(
        jattn.selective_attention,
        segment_ids=segments,
        return_lse=True,
        memory_tau=0.8,
        **options,
    )


def with_gradients(attend, seed=7):
    """Outputs and the gradients of a function of all of them."""

    def loss(arrays):
        outputs = attend(*arrays)
        weights = normal(seed, *(x.shape for x in outputs), dtype=arrays[0].dtype)
        total = sum(
            jnp.sum(jnp.sin(x) * w) for x, w in zip(outputs, weights, strict=True)
        )
        return total, outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def assert_same(sharded, single, arrays, tolerance):
    found, expected = with_gradients(sharded)(arrays), with_gradients(single)(arrays)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_equal_up_to_rounding(a, b, tolerance)


@pytest.mark.parametrize("packed", SEGMENTS)
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_heads(x64, packed, kv_heads):
    segments = SEGMENTS[packed]
    arrays = qkv(k=kv_heads, dtype=jnp.float64)
    assert_same(over_heads(segments), on_one_device(segments), arrays, 1e-12)


def test_heads_with_a_budget(x64):
    arrays, segments = qkv(dtype=jnp.float64), SEGMENTS["documents"]
    options = {"budget": 3, "scale": 0.7}
    assert_same(
        over_heads(segments, **options),
        on_one_device(segments, **options),
        arrays,
        1e-12,
    )


@pytest.mark.parametrize("packed", SEGMENTS)
def test_sequence(x64, packed):
    segments = SEGMENTS[packed]
    arrays = qkv(dtype=jnp.float64)
    assert_same(over_sequence(segments), on_one_device(segments), arrays, 1e-12)


def test_the_sequence_in_chunks_of_float32(monkeypatch):
    arrays, segments = qkv(), SEGMENTS["documents"]
    expected = with_gradients(on_one_device(segments, scale=0.7))(arrays)
    monkeypatch.setattr(_common, "CHUNK_BYTES", 3 * 2 * 14 * 4)
    found = with_gradients(over_sequence(segments, scale=0.7))(arrays)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_equal_up_to_rounding(a, b)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels in the interpreter, which is slow: with blocks of 16 tokens."""
    tiling = work.Tiling(16, 16, 1, 1)
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    monkeypatch.setattr(work, "BLOCK", 16)
    monkeypatch.setattr(
        work, "tilings", lambda *_: collections.defaultdict(lambda: tiling)
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("sharded", [over_heads, over_sequence])
def test_kernels(sharded):
    arrays, segments = qkv(n=4, k=2), SEGMENTS["documents"]
    found = with_gradients(sharded(segments, implementation="triton"))(arrays)
    single = on_one_device(segments, implementation="xla")
    expected = with_gradients(single)(arrays)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_equal_up_to_rounding(a, b)


@pytest.mark.usefixtures("kernels")
def test_kernels_over_heads_with_a_budget():
    arrays, options = qkv(n=4, k=2), {"budget": jnp.int32(3)}
    found = jax.jit(over_heads(None, implementation="triton", **options))(*arrays)
    expected = on_one_device(None, implementation="xla", **options)(*arrays)
    for a, b in zip(found, expected, strict=True):
        assert_equal_up_to_rounding(a, b)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("sharded", [over_heads, over_sequence])
def test_kernels_that_skip(sharded):
    # Every query of the selecting head selects all keys by about 3.
    query, key, value = (0.1 * x[:1] for x in qkv(t=64, n=2, k=2))
    query, key = query.at[:, :, 0].add(1), key + 1
    # The last queries skip what the tile from 16 to 32 holds.
    poisoned = value.at[:, 16:32].set(jnp.nan)
    attend = sharded(None, implementation="triton", skip_error=1e-2)
    found = jax.jit(attend)(query, key, poisoned)
    expected = on_one_device(None, implementation="xla")(query, key, value)
    assert_equal_up_to_rounding(found[0][:, 48:], expected[0][:, 48:], 2e-2)
    assert np.all(np.isnan(found[0][:, 16:32]))
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert_equal_up_to_rounding(a, b, 2e-2)


def test_sums_go_from_the_first_device_to_the_second_and_not_back():
    query, key, value = qkv()
    attend = jax.jit(over_sequence(None))
    whole, *_ = attend(query, key, value)
    # Head 0 of the first half has no other influence on the second.
    quiet, *_ = attend(query.at[:, :7, 0].set(0), key, value)
    assert np.max(np.abs(whole[:, 7:] - quiet[:, 7:])) > 1e-2
    later, *_ = attend(*(x.at[:, 7:].set(9) for x in (query, key, value)))
    np.testing.assert_array_equal(whole[:, :7], later[:, :7])


@pytest.mark.parametrize(
    ("function", "specs"),
    [
        (jattn.selective_attention_over_heads, HEADS),
        (jattn.selective_attention_over_sequence, SEQUENCE),
    ],
)
def test_the_output_alone_in_half_precision(function, specs):
    arrays = qkv(dtype=jnp.bfloat16)
    out = jax.jit(shard(function, specs, specs))(*arrays)
    assert out.dtype == jnp.bfloat16
    exact = [x.astype(jnp.float32) for x in arrays]
    assert_equal_up_to_rounding(
        out.astype(jnp.float32), jattn.selective_attention(*exact), 2e-2
    )


@pytest.mark.parametrize(
    ("function", "specs", "message"),
    [
        (jattn.selective_attention_over_heads, HEADS, "N=4, K=3"),
        (jattn.selective_attention_over_sequence, SEQUENCE, "N=8, K=6"),
    ],
)
def test_heads_that_do_not_divide(function, specs, message):
    query, key, value = qkv(k=6)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(shard(function, specs, specs), query, key, value)


def test_a_device_needs_the_queries_of_its_keys():
    query, key, value = qkv()
    attend = shard(jattn.selective_attention_over_sequence, SEQUENCE, SEQUENCE)
    with pytest.raises(ValueError, match=r"queries of its keys .* T=6, S=7"):
        jax.eval_shape(attend, query[:, :12], key, value)
