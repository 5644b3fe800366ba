"""The block-sparse kernel in Triton's interpreter, against the jnp form, in fp32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.ops.block_sparse import block_sparse_attention
from jattn.ops.nsa import gated_sum
from jattn.pallas import _steps, _triton
from jattn.pallas.block_sparse import launch, pairs, unsupported
from jattn.pallas.block_sparse import triton as kernel
from tests.support import (
    assert_equal_up_to_rounding,
    documents,
    normal,
    shard_over_batch,
)

CASES = {
    "one query": dict(b=1, t=1),
    "no multiple of anything": dict(b=2, t=63, g=3, n=3, h=24, v=8),
    "a list for each head": dict(b=1, t=45, g=2, lists=4),
    "packed, queries end the keys": dict(b=2, t=20, s=43, packed=True),
    "blocks of several kernel blocks": dict(b=1, t=111, k=1, n=2, block_size=48),
    "neighbours share blocks": dict(b=2, t=70, g=3, n=5, shared=True),
    "shared by some": dict(t=101, s=110, lists=4, n=5, shared=True, packed=True),
    "long lists": dict(t=17, s=700, k=1, n=40),
    "in chunks": dict(b=2, t=33, packed=True, chunk=8),
    "in a loop of chunks": dict(b=2, t=40, n=4, shared=True, chunk=8, listed=1),
    "in portions": dict(b=2, t=33, chunk=33),
}


def inputs(
    b=1,
    t=33,
    s=None,
    k=2,
    g=2,
    h=16,
    v=16,
    n=2,
    lists=None,
    block_size=16,
    shared=False,
):
    """Query, key, value, and random block indices, some of them none or repeated.

    Shared ones are the own block, the one before, and the first.
    """
    s = s or t
    arrays = normal(0, (b, t, k * g, h), (b, s, k, h), (b, s, k, v))
    rng = np.random.default_rng(1)
    indices = rng.integers(-1, -(-s // block_size), (b, t, lists or k, n))
    if shared:
        own = (np.arange(s - t, s) // block_size)[:, None]
        for i, block in enumerate((own, own - 1, 0)):
            indices[..., i] = block
    return *arrays, jnp.asarray(indices, jnp.int32)


def value_and_gradients(attend, *arrays):
    """Output, log-sum-exp and the gradients of a function of both."""

    def loss(*arrays):
        out, lse = attend(*arrays)
        seen = jnp.where(jnp.isneginf(lse), 0, lse)
        return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.sin(seen)), (out, lse)

    argnums = range(len(arrays))
    gradients, outputs = jax.grad(loss, argnums, has_aux=True)(*arrays)
    return *outputs, *gradients


def kernel_form(indices, block_size=16, segment_ids=None):
    def attend(query, key, value):
        return kernel.attend(
            query, key, value, indices, segment_ids, block_size, query.shape[-1] ** -0.5
        )

    return jax.jit(functools.partial(value_and_gradients, attend))


def xla_form(indices, block_size=16, segment_ids=None):
    attend = functools.partial(
        block_sparse_attention,
        block_indices=indices,
        block_size=block_size,
        segment_ids=segment_ids,
        implementation="xla",
        return_lse=True,
    )
    return jax.jit(functools.partial(value_and_gradients, attend))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_jnp_form(monkeypatch, case):
    sizes = dict(CASES[case])
    packed, chunk = sizes.pop("packed", False), sizes.pop("chunk", None)
    monkeypatch.setattr(_steps, "MAX_LISTED", sizes.pop("listed", 99))
    *arrays, indices = inputs(**sizes)
    b, s = arrays[1].shape[:2]
    options = {
        "block_size": sizes.get("block_size", 16),
        "segment_ids": documents(s // 3, s - s // 3, batch=b) if packed else None,
    }
    if chunk is not None:
        rows = arrays[0].shape[2] // arrays[1].shape[2] * indices.shape[-1]
        row_bytes = 4 * arrays[0].shape[-1]
        monkeypatch.setattr(pairs, "PARTIAL_BYTES", chunk * rows * row_bytes)
    actual = kernel_form(indices, **options)(*arrays)
    expected = xla_form(indices, **options)(*arrays)
    jax.tree.map(assert_equal_up_to_rounding, actual, expected)


@pytest.mark.parametrize("chunk", [None, 8])
def test_a_sum_equals_that_of_the_jnp_form(monkeypatch, chunk):
    *arrays, indices = inputs(b=2, t=37, n=4, shared=True)
    arrays += normal(1, *[arrays[0].shape] * 2, (*arrays[0].shape[:3], 3))
    if chunk is not None:
        monkeypatch.setattr(pairs, "PARTIAL_BYTES", chunk * 2 * 4 * 4 * 16)

    def in_kernel(query, key, value, *addends):
        addends = kernel.Addends(*addends)
        return kernel.attend_and_add(
            query, key, value, indices, None, addends, 16, 0.25
        )

    def by_itself(query, key, value, before, after, gates):
        out, lse = block_sparse_attention(
            query, key, value, indices, block_size=16, return_lse=True
        )
        return gated_sum((before, out, after), gates), lse

    actual, expected = (
        jax.jit(functools.partial(value_and_gradients, form))(*arrays)
        for form in (in_kernel, by_itself)
    )
    jax.tree.map(assert_equal_up_to_rounding, actual, expected)
    # What differentiation needs is kept beside the same sum.
    plain = jax.jit(in_kernel)(*arrays)
    jax.tree.map(np.testing.assert_array_equal, plain, actual[:2])


def test_a_long_row_is_split_and_added_up():
    # Every second query chooses block 0 twice; it has several units of work.
    *arrays, indices = inputs(t=140, k=1, g=32, n=2)
    indices = jnp.zeros_like(indices).at[:, ::2].set(-1)
    tilings = launch.forward_tiling, launch.backward_tiling
    tilings = [tiling(arrays[0], arrays[2], 16, 32) for tiling in tilings]
    unit = max(x.tiles * (x.rows // 32) for x in tilings)
    assert arrays[0].shape[1] / 2 > 2 * unit
    actual = kernel_form(indices)(*arrays)
    expected = xla_form(indices)(*arrays)
    jax.tree.map(assert_equal_up_to_rounding, actual, expected)


def test_blocks_shared_by_a_tile_make_no_pairs():
    *arrays, indices = inputs(t=64, k=1, n=4, shared=True)
    indices = indices.at[0, 37, 0, 2].set(-1)  # that tile does not share block 0
    planned = launch.Launch(*arrays, indices, None, 16, 0.25)
    assert planned.tokens == 16
    blocks, shared = planned.plan(share=True)
    expected = [[0], [1, 0], [2, 1], [3, 2, 0]]
    assert [x[1 : 1 + x[0]].tolist() for x in np.asarray(shared)[0, :, 0]] == expected
    has = (np.asarray(indices)[0, :, 0, :, None] == np.arange(4)).any(axis=1)
    for tile, forced in enumerate(expected):
        rows = slice(16 * tile, 16 * tile + 16)
        own = tile >= np.arange(4)
        makes = has[rows] & own & ~np.isin(np.arange(4), forced)
        made = (np.asarray(blocks)[0, 0, 0, rows, 0, :, None] == np.arange(4)).any(1)
        np.testing.assert_array_equal(made, makes)


def test_neither_order_nor_unseen_memory_nor_an_empty_list_matters():
    *arrays, indices = inputs(t=40, g=1, n=3)
    indices = jnp.where(indices == 1, 2, indices)  # nobody chooses block 1
    indices = indices.at[:, 7].set(-1)
    plain = kernel_form(indices)(*arrays)
    query, *key_value = arrays
    poisoned = [x.at[:, 16:32].set(jnp.nan) for x in key_value]
    changed = kernel_form(indices[..., ::-1])(query, *poisoned)
    jax.tree.map(np.testing.assert_array_equal, changed, plain)
    out, lse, query_gradient, key_gradient, _ = plain
    assert np.all(np.isneginf(lse[:, 7]))
    assert not np.any(out[:, 7])
    assert not np.any(query_gradient[:, 7])
    assert not np.any(key_gradient[:, 16:32])


def test_transformations_agree():
    *arrays, indices = inputs(b=2, t=18, k=1, n=2)

    def gradients(query, key, value, indices):
        return kernel_form(indices)(query, key, value)

    plain = gradients(*arrays, indices)
    mapped = jax.vmap(lambda *x: [y[0] for y in gradients(*(a[None] for a in x))])
    sharded = shard_over_batch(gradients)
    for transformed in (mapped, sharded):
        actual = transformed(*arrays, indices)
        for x, y in zip(actual, plain, strict=True):
            np.testing.assert_array_equal(x, y)


def test_the_operation_runs_it_on_request(monkeypatch):
    *arrays, indices = inputs(t=18, k=1)
    attend = functools.partial(block_sparse_attention, *arrays, indices, block_size=16)
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        attend(implementation="triton")
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    expected = kernel.attend(*arrays, indices, None, 16, 0.25)
    actual = attend(implementation="triton", return_lse=True)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_compiles_to_matrix_instructions_for_hopper(compile_triton):
    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def gradients(query, key, value, indices):
        return kernel_form(indices, block_size=64)(query, key, value)

    kernels = compile_triton(
        gradients,
        shape(1, 1000, 16, 128),
        shape(1, 1000, 1, 128),
        shape(1, 1000, 1, 128),
        shape(1, 1000, 1, 4, dtype=jnp.int32),
    )
    for name in ("forward_kernel", "combine_kernel", "backward_kernel"):
        ptx, shared_bytes = kernels[name]
        assert "wgmma.mma_async" in ptx
        assert shared_bytes <= 227 * 1024


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"block_size": 48}, None),
        ({"block_size": 24}, "block_size must be a multiple of 16, not 24"),
        ({"query": (2, 9, 4, 300), "key": (2, 9, 2, 300)}, "at most 256 wide, not 300"),
        ({"query": (2, 9, 128, 8)}, "at most 32 query heads may share a list, not 64"),
        ({"dtype": jnp.float64}, "must all be bf16, fp16 or fp32, not float64"),
        ({"scale": -0.5}, "scale must be positive, not -0.5"),
        ({"indices": (2, 9, 2, 0)}, "an array is empty"),
        ({"indices": (2, 9, 2, 2**26)}, "32 bits"),
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
    indices = jax.ShapeDtypeStruct(changes.get("indices", (2, 9, 2, 3)), jnp.int32)
    block_size, scale = changes.get("block_size", 64), changes.get("scale", 0.5)
    actual = unsupported(*arrays, indices, block_size, scale)
    assert actual == reason or reason in actual
