"""The flash kernel in Triton's interpreter, against the jnp forms, in fp32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.ops._common import document_starts
from jattn.ops.compressed import compressed_attention, num_windows
from jattn.ops.dense import dense_attention
from jattn.pallas import _triton, tuning
from jattn.pallas.flash import triton as kernel
from jattn.pallas.flash import unsupported
from jattn.pallas.flash.units import Visibility, split_rows
from tests.support import (
    assert_equal_up_to_rounding,
    documents,
    normal,
    shard_over_batch,
)

# Sizes by name; kernel_size and stride for attention to compressed tokens.
CASES = {
    "one query": dict(t=1),
    "no multiple of anything": dict(b=2, t=63, g=3, h=24, v=8),
    "many heads on one": dict(t=9, k=1, g=48),
    "a window": dict(t=90, g=3, k=1, window=17),
    "a window of one": dict(t=40, window=1),
    "queries end the keys": dict(b=2, t=20, s=83),
    "packed": dict(b=2, t=50, s=77, packed=True),
    "packed, a window": dict(t=77, g=3, k=1, packed=True, window=9),
    "compressed": dict(t=200, k=1, g=4, kernel_size=32, stride=16),
    "compressed, no overlap": dict(b=2, t=63, s=111, kernel_size=16, stride=16),
    "compressed, packed": dict(t=150, g=3, kernel_size=24, stride=8, packed=True),
    "compressed, one key": dict(t=37, kernel_size=32, stride=16),
    "compressed, queries see nothing": dict(t=70, kernel_size=64, stride=2),
}


def inputs(
    b=1,
    t=33,
    s=None,
    k=2,
    g=1,
    h=16,
    v=16,
    packed=False,
    window=None,
    kernel_size=None,
    stride=1,
):
    """Query, key and value; options of the operation; arguments of the kernel."""
    s = s or t
    m = s if kernel_size is None else num_windows(s, kernel_size, stride)
    arrays = normal(0, (b, t, k * g, h), (b, m, k, h), (b, m, k, v))
    lengths = (s // 4, s // 3 - s // 4, s - s // 3)
    segment_ids = documents(*lengths, batch=b) if packed else None
    options = dict(segment_ids=segment_ids, implementation="xla", return_lse=True)
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
    starts = None if segment_ids is None else document_starts(segment_ids)[:, s - t :]
    attend = functools.partial(
        kernel.attend,
        document_starts=starts,
        kernel_size=kernel_size or 1,
        stride=stride,
        window=window,
        length=s,
        scale=h**-0.5,
    )
    return arrays, operation, attend


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, *arrays):
    """Output, log-sum-exp and the gradients of a function of both."""

    def loss(*arrays):
        out, lse = attend(*arrays)
        seen = jnp.where(jnp.isneginf(lse), 0, lse)
        return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.sin(seen)), (out, lse)

    gradients, outputs = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return *outputs, *gradients


@pytest.mark.parametrize("case", CASES)
def test_equals_the_jnp_form(case):
    arrays, operation, attend = inputs(**CASES[case])
    actual = value_and_gradients(attend, *arrays)
    expected = value_and_gradients(operation, *arrays)
    jax.tree.map(assert_equal_up_to_rounding, actual, expected)


@pytest.mark.parametrize("case", ["a window", "compressed", "packed"])
def test_tilings_change_nothing(case):
    arrays, _, attend = inputs(**CASES[case])
    expected = value_and_gradients(attend, *arrays)
    with (
        tuning.force("flash_forward", kernel.Tiling(16, 16, 4, 1)),
        tuning.force("flash_query_gradient", kernel.Tiling(32, 16, 4, 1)),
        tuning.force("flash_key_gradient", kernel.SplitTiling(16, 64, 4, 1, 1)),
    ):
        jax.clear_caches()
        actual = value_and_gradients(attend, *arrays)
    jax.tree.map(assert_equal_up_to_rounding, actual, expected)


@pytest.mark.parametrize("programs", [1, 7, 100])
@pytest.mark.parametrize(
    ("window", "kernel_size", "stride", "queries"),
    [(None, 1, 1, 100), (20, 1, 1, 64), (None, 32, 16, 1000), (None, 64, 16, 70)],
)
def test_units_cover_the_rows_that_see_a_tile_once(
    window, kernel_size, stride, queries, programs
):
    length, group = max(100, queries), 3
    keys = num_windows(length, kernel_size, stride)
    units = split_rows(
        Visibility(kernel_size, stride, window, length),
        queries=queries,
        keys=keys,
        group=group,
        kv_rows=2,
        rows=16,
        tile_keys=32,
        programs=programs,
    )
    key, position = np.arange(keys), np.arange(length - queries, length)[:, None]
    seen = key * stride + kernel_size - 1 <= position
    if window is not None:
        seen &= key * stride > position - window
    seen = np.repeat(seen, group, axis=0)  # [rows, keys]
    covered = np.zeros((seen.shape[0], -(-keys // 32)), int)
    for tile, begin, end, _ in units:
        covered[begin:end, tile] += 1
    for tile in range(covered.shape[1]):
        rows = np.any(seen[:, 32 * tile : 32 * (tile + 1)], axis=1)
        np.testing.assert_array_equal(covered[:, tile], rows)
    # A kernel without partial results takes the only unit of a tile for the tile's.
    in_order = units[np.argsort(units[:, 3])]
    assert np.all(np.diff(in_order[:, 0]) >= 0)
    assert set(units[:, 0]) == set(range(covered.shape[1]))
    assert np.all(np.diff(units[:, 2] - units[:, 1]) <= 0)
    if programs == 1:
        assert len(units) == covered.shape[1]


@pytest.mark.parametrize("case", ["window", "packed", "compressed"])
def test_memory_nobody_sees_may_hold_anything(case):
    sizes = {
        "window": dict(t=20, s=90, window=9),
        "packed": dict(t=20, s=90, packed=True),
        "compressed": dict(t=20, s=300, kernel_size=16, stride=4, packed=True),
    }[case]
    arrays, _, attend = inputs(b=2, **sizes)
    plain = value_and_gradients(attend, *arrays)
    query, *key_value = arrays
    # Keys before the window or document that the first query is in.
    hidden = {"window": 90 - 20 - 9 + 1, "packed": 30, "compressed": 25}[case]
    poisoned = [x.at[:, :hidden].set(jnp.nan) for x in key_value]
    changed = value_and_gradients(attend, query, *poisoned)
    jax.tree.map(np.testing.assert_array_equal, changed, plain)
    for gradient in plain[3:]:
        assert not np.any(gradient[:, :hidden])
        assert np.any(gradient[:, hidden])


def test_a_query_that_sees_nothing_gives_zeros():
    arrays, _, attend = inputs(t=70, kernel_size=64, stride=2)
    out, lse, query_gradient, *_ = value_and_gradients(attend, *arrays)
    assert not np.any(out[:, :63])
    assert np.all(np.isneginf(lse[:, :63]))
    assert not np.any(query_gradient[:, :63])
    assert np.all(np.isfinite(lse[:, 63:]))


def test_transformations_agree():
    arrays, *_ = inputs(b=2, t=18)
    starts = jnp.asarray([[0] * 18, [0] * 7 + [7] * 11])

    def gradients(query, key, value, starts):
        attend = functools.partial(
            kernel.attend,
            document_starts=starts,
            kernel_size=1,
            stride=1,
            window=None,
            length=18,
            scale=0.25,
        )
        return value_and_gradients(attend, query, key, value)

    plain = gradients(*arrays, starts)
    mapped = jax.vmap(lambda *x: [y[0] for y in gradients(*(a[None] for a in x))])
    for transformed in (mapped, shard_over_batch(gradients)):
        actual = transformed(*arrays, starts)
        jax.tree.map(np.testing.assert_array_equal, list(actual), list(plain))


@pytest.mark.parametrize("case", ["packed, a window", "compressed, packed"])
def test_the_operations_run_it_on_request(monkeypatch, case):
    arrays, operation, attend = inputs(**CASES[case])
    operation = functools.partial(operation, *arrays)
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        operation(implementation="triton")
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    expected = attend(*arrays)
    actual = operation(implementation="triton")
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    out = operation(implementation=None, return_lse=False)
    np.testing.assert_array_equal(out, expected[0])


@pytest.mark.parametrize("group", [3, 16])
def test_compiles_to_matrix_instructions_for_hopper(compile_triton, group):
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

    attend = functools.partial(
        kernel.attend,
        document_starts=None,
        kernel_size=32,
        stride=16,
        window=None,
        length=4096,
        scale=0.1,
    )
    kernels = compile_triton(
        functools.partial(value_and_gradients, attend),
        shape(1, 4096, group, 192),
        shape(1, 255, 1, 192),
        shape(1, 255, 1, 128),
    )
    for name in ("forward", "query_gradient", "key_gradient"):
        ptx, shared_bytes = kernels[f"{name}_kernel"]
        assert "wgmma.mma_async" in ptx
        assert shared_bytes <= 227 * 1024
    assert "add_units_kernel" in kernels


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"query": (2, 9, 4, 300), "key": (2, 9, 2, 300)}, "at most 256 wide, not 300"),
        ({"query": (2, 9, 4, 12), "key": (2, 9, 2, 12)}, "multiples of 16 bytes"),
        ({"value": (2, 9, 2, 20)}, "multiples of 16 bytes"),
        ({"dtype": jnp.float64}, "must all be bf16, fp16 or fp32, not float64"),
        ({"key": (2, 0, 2, 8), "value": (2, 0, 2, 8)}, "an array is empty"),
        ({"scale": -1.0}, "scale must be positive, not -1.0"),
        ({"query": (2, 2**20, 1024, 8)}, "32 bits"),
        ({"stride": 2**26}, "32 bits"),
    ],
)
def test_says_what_it_does_not_support(monkeypatch, changes, reason):
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    shapes = {"query": (2, 9, 4, 8), "key": (2, 9, 2, 8), "value": (2, 9, 2, 8)}
    dtype = changes.get("dtype", jnp.bfloat16)
    arrays = [
        jax.ShapeDtypeStruct(changes.get(name, shape), dtype)
        for name, shape in shapes.items()
    ]
    options = {name: changes.get(name, 1) for name in ("stride", "scale")}
    actual = unsupported(*arrays, **options)
    assert actual == reason or reason in actual
