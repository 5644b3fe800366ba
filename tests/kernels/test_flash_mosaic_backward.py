"""The Mosaic kernels for gradients, in Pallas' interpreter, and lowered for Hopper."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jattn.ops.compressed import compressed_attention, num_windows
from jattn.ops.dense import dense_attention
from jattn.pallas import _mosaic, tuning
from jattn.pallas.flash import (
    mosaic_backward,
    mosaic_key_gradient,
    mosaic_query_gradient,
    triton,
)
from jattn.pallas.flash.units import Visibility, split_rows
from tests.support import normal, relative_rms

# Every ring goes through all of its slots; one thread block goes through all tiles of
# rows, and tiles of keys are not split.
SMALL = {
    "flash_query_gradient_mosaic": mosaic_query_gradient.Tiling(slots=2, programs=1),
    "flash_key_gradient_mosaic": mosaic_key_gradient.Tiling(slots=2, programs=1),
}
OTHER = {
    "flash_query_gradient_mosaic": mosaic_query_gradient.Tiling(slots=3, programs=2),
    "flash_key_gradient_mosaic": mosaic_key_gradient.Tiling(slots=3, programs=9),
}

# Sizes by name; kernel_size and stride for attention to compressed tokens.
CASES = {
    "one query": dict(t=1, g=16),
    "two tiles of keys": dict(t=9, s=150, g=16),
    "a window": dict(b=2, t=5, s=137, g=32, window=9),
    "a window wider than a tile": dict(t=90, g=8, window=75),
    "the last tile of rows is not full": dict(t=21, g=8, k=2),
    "few heads on one": dict(t=30, g=3, k=2),
    "one head on one": dict(t=70, s=75, g=1, k=2),
    "compressed": dict(t=90, g=8, h=128, kernel_size=32, stride=16),
    "compressed, queries see nothing": dict(t=70, g=4, kernel_size=64, stride=2),
}


def inputs(b=1, t=33, s=None, k=1, g=16, h=64, window=None, kernel_size=None, stride=1):
    """Query, key, value and the output's gradient; the operation; what keys it sees."""
    s = s or t
    m = s if kernel_size is None else num_windows(s, kernel_size, stride)
    query, keys = (b, t, k * g, h), (b, m, k, h)
    arrays = normal(0, query, keys, keys, query, dtype=jnp.float16)
    options = dict(implementation="xla", return_lse=True)
    if kernel_size is None:
        operation = functools.partial(dense_attention, window=window, **options)
    else:
        operation = functools.partial(
            compressed_attention,
            kernel_size=kernel_size,
            stride=stride,
            length=s,
            **options,
        )
    return arrays, operation, Visibility(kernel_size or 1, stride, window, s)


@functools.partial(jax.jit, static_argnums=0)
def gradients(operation, arrays, lse_gradient):
    """The output, its log-sum-exp, and gradients of query, key and value."""
    *arrays, out_gradient = arrays
    (out, lse), pullback = jax.vjp(operation, *arrays)
    return out, lse, *pullback((out_gradient.astype(out.dtype), lse_gradient))


@pytest.fixture
def backward(monkeypatch):
    """Gradients of query, key and value by the kernels."""
    monkeypatch.setattr(_mosaic, "unavailable", lambda: None)

    def backward(arrays, out, lse, lse_gradient, sight, tilings=SMALL):
        *arrays, out_gradient = arrays
        with contextlib.ExitStack() as stack:
            for name, tiling in tilings.items():
                stack.enter_context(tuning.force(name, tiling))
            return triton.backward(
                *arrays,
                None,
                out.astype(out_gradient.dtype),
                lse,
                out_gradient,
                lse_gradient,
                visibility=sight,
                scale=out.shape[-1] ** -0.5,
            )

    return backward


def run(backward, case, tilings=SMALL):
    """Gradients by the kernels, the jnp form, and the jnp form in fp32."""
    arrays, operation, sight = inputs(**case)
    (lse_gradient,) = normal(1, arrays[0].shape[:3])
    exact = [x.astype(jnp.float32) for x in arrays]
    out, lse, *expected = gradients(operation, exact, lse_gradient)
    _, _, *plain = gradients(operation, arrays, lse_gradient)
    actual = backward(arrays, out, lse, lse_gradient, sight, tilings)
    return actual, plain, expected


def assert_close(actual, plain, expected):
    """Asserts errors of at most twice those of the jnp form in the same dtype."""
    for x, y, exact in zip(actual, plain, expected, strict=True):
        assert x.dtype == y.dtype
        if np.any(exact):
            assert relative_rms(x, exact) <= max(2 * relative_rms(y, exact), 1e-3)
        else:
            np.testing.assert_array_equal(x, exact)


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize("case", CASES)
def test_equals_the_jnp_form(backward, case):
    assert_close(*run(backward, CASES[case]))


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize("case", ["a window", "compressed"])
def test_tilings_change_nothing(backward, case):
    assert_close(*run(backward, CASES[case], OTHER))


@pytest.mark.usefixtures("no_races")
def test_keys_nobody_sees_may_hold_anything(backward):
    arrays, operation, sight = inputs(t=4, s=150, g=16, window=9)
    (lse_gradient,) = normal(1, arrays[0].shape[:3])
    out, lse, *_ = gradients(operation, arrays, lse_gradient)
    hidden = 150 - 4 - 9 + 1
    query, key, value, out_gradient = arrays
    poisoned = query, *(x.at[:, :hidden].set(jnp.nan) for x in (key, value))
    plain = backward(arrays, out, lse, lse_gradient, sight)
    changed = backward((*poisoned, out_gradient), out, lse, lse_gradient, sight)
    jax.tree.map(np.testing.assert_array_equal, changed, plain)
    for gradient in plain[1:]:
        assert not np.any(gradient[:, :hidden])
        assert np.any(gradient[:, hidden])


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("programs", [1, 50])
def test_units_begin_where_copies_may(alignment, programs):
    units = split_rows(
        Visibility(32, 16, 1000, 5000),
        queries=4999,
        keys=num_windows(5000, 32, 16),
        group=3,
        kv_rows=1,
        rows=64,
        tile_keys=128,
        programs=programs,
        alignment=alignment,
    )
    assert len(units) > 3 or programs == 1
    begin, end = units[:, 1], units[:, 2]
    assert np.all(begin[begin < end] % alignment == 0)
    # Units of the same length go by what rows they read.
    same = np.diff(end - begin) == 0
    assert np.all(np.diff(end)[same] >= 0)
    in_order = units[np.argsort(units[:, 3])]
    same = in_order[1:, 0] == in_order[:-1, 0]
    np.testing.assert_array_equal(in_order[1:, 1][same], in_order[:-1, 2][same])


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def full_size(query, key, value, *others, kernel_size=32, stride=16, window=None):
    """What the Mosaic kernels give, of units of work where tiles are split."""
    sight = Visibility(kernel_size, stride, window, query.shape[1])
    launch = triton._Launch(query, value, None, sight, 0.1)
    sizes = launch.mosaic_sizes()
    per_row = mosaic_backward.statistics(*others, sizes)
    arrays = query, key, value, per_row, others[0]
    tiling = launch.mosaic_query_gradient_tiling()
    query_gradient = mosaic_query_gradient.query_gradient(
        *arrays, sizes=sizes, tiling=tiling
    )
    tiling = launch.mosaic_key_gradient_tiling()
    units = launch.units(tiling, mosaic_backward.ALIGNMENT)
    return query_gradient, mosaic_key_gradient.key_gradients(
        *arrays, units, sizes=sizes, tiling=tiling
    )


def shapes(b=1, t=32768, m=2047, n=64, k=4, h=128, dtype=jnp.bfloat16):
    query, keys = shape(b, t, n, h, dtype=dtype), shape(b, m, k, h, dtype=dtype)
    per_row = shape(b, t, n, dtype=jnp.float32)
    return query, keys, keys, query, per_row, query, per_row


DENSE = dict(kernel_size=1, stride=1)


# Lowering fails if a thread block takes more shared memory than there is.
@pytest.mark.parametrize(
    ("arrays", "options"),
    [
        (shapes(), {}),
        (shapes(m=32768), DENSE | {"window": 512}),
        (shapes(t=8000, m=8000, n=16, k=16), DENSE),
        (shapes(h=64, dtype=jnp.float16), {}),
        (shapes(t=1000, m=1000, n=12), DENSE | {"window": 9}),
    ],
)
def test_lowers_for_hopper(lower_for_h100, arrays, options):
    text = lower_for_h100(functools.partial(full_size, **options), *arrays)
    assert text.count("mosaic_gpu_v2") == 2


@pytest.mark.usefixtures("x64")
def test_lowers_where_types_of_64_bits_are_on(lower_for_h100):
    assert "mosaic_gpu_v2" in lower_for_h100(full_size, *shapes())


def test_lowers_under_shard_map_and_vmap():
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = jax.sharding.AbstractMesh(
        (2,), ("data",), (AxisType.Auto,), abstract_device=device
    )
    spec = PartitionSpec("data")
    sharded = jax.shard_map(
        jax.vmap(full_size), mesh=mesh, in_specs=spec, out_specs=spec
    )
    arrays = [shape(4, *x.shape, dtype=x.dtype) for x in shapes(b=2, t=3000, m=186)]
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(sharded).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu_v2" in lowered.as_text()


@pytest.mark.parametrize(
    ("changes", "packed", "reason"),
    [
        ({}, False, None),
        ({"n": 12}, False, None),
        ({"h": 64, "dtype": jnp.float16}, False, None),
        ({}, True, "it knows no documents"),
        ({"dtype": jnp.float32}, False, "must be bf16 or fp16, not float32"),
        ({"h": 96}, False, "must both be 64 or 128 wide, not (96, 96)"),
    ],
)
def test_says_what_it_does_not_support(monkeypatch, changes, packed, reason):
    query, _, value = shapes(**changes)[:3]
    assert "needs a GPU" in _mosaic.unsupported(query, value, packed=packed)
    monkeypatch.setattr(_mosaic, "unavailable", lambda: None)
    actual = _mosaic.unsupported(query, value, packed=packed)
    assert actual == reason or reason in actual
