"""The block-sparse forward kernel in Mosaic: interpreted, and lowered for Hopper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.ops.block_sparse import block_sparse_attention
from jattn.ops.nsa import gated_sum
from jattn.pallas import _mosaic, _triton
from jattn.pallas.block_sparse import (
    mosaic,
    mosaic_chunk,
    pairs,
    unsupported,
    unsupported_mosaic,
)
from jattn.pallas.block_sparse import triton as kernel
from jattn.pallas.block_sparse.launch import RowTiling
from tests.kernels.block_sparse_mosaic import (
    chosen,
    lowered_on_shards,
    random_blocks,
)
from tests.support import normal, relative_rms

# Thread blocks with several tiles each, and rings that go through all of their slots.
SMALL = mosaic.Tiling(consumers=2, slots=2, programs=2)
ROWS = RowTiling(rows=32, warps=1, stages=2)

CASES = {
    # Neighbours share their own block and the one before; some choose another.
    "shared": dict(t=6, s=192, g=16, n=3, shared=True),
    "pairs alone": dict(t=9, s=192, g=16, n=2),
    "two kv heads, both": dict(t=5, s=256, k=2, g=8, n=4, shared=True),
    "in chunks": dict(t=70, s=70, g=32, n=2, chunk=64),
}


def inputs(t, s, k=1, g=16, n=2, h=64, shared=False, seed=0):
    """Query, key, value in fp16, and block indices, some of them none or repeated."""
    shapes = (1, t, k * g, h), (1, s, k, h), (1, s, k, h)
    arrays = normal(seed, *shapes, dtype=jnp.float16)
    indices = random_blocks(t, s, k, n, seed)
    if shared:
        own = (np.arange(s - t, s) // 64)[:, None]
        indices[..., 0] = own
        indices[..., 1] = own - 1
    return *arrays, jnp.asarray(indices, jnp.int32)


@pytest.fixture
def in_mosaic(monkeypatch):
    """Makes attend use this kernel, interpreted."""
    tilings = {"block_sparse_forward_mosaic": SMALL, "block_sparse_merge": ROWS}
    with chosen(monkeypatch, kernel, **tilings):
        yield


@pytest.mark.usefixtures("no_races", "in_mosaic")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_jnp_form(monkeypatch, name):
    sizes = dict(CASES[name])
    if (chunk := sizes.pop("chunk", None)) is not None:
        row_bytes = 2 * 64 * sizes["g"] * sizes["n"]
        monkeypatch.setattr(pairs, "PARTIAL_BYTES", chunk * row_bytes)
    *arrays, indices = inputs(**sizes)
    actual = kernel.attend(*arrays, indices, None, 64, 0.125)
    attend = functools.partial(
        block_sparse_attention,
        block_indices=indices,
        block_size=64,
        implementation="xla",
        return_lse=True,
    )
    exact = attend(*(x.astype(jnp.float32) for x in arrays))
    plain = attend(*arrays)
    for x, y, expected in zip(actual, plain, exact, strict=True):
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(x[~finite], expected[~finite])
        x, y, expected = (np.asarray(z)[finite] for z in (x, y, expected))
        assert relative_rms(x, expected) <= max(2 * relative_rms(y, expected), 2e-6)


@pytest.mark.usefixtures("no_races", "in_mosaic")
def test_a_sum_with_what_is_kept_and_without():
    *arrays, indices = inputs(t=5, s=128, n=3, shared=True)
    shape = arrays[0].shape
    terms = normal(1, shape, shape, (*shape[:3], 3), dtype=jnp.float16)
    before, after, gates = addends = kernel.Addends(*terms)
    arguments = *arrays, indices, None, addends, 64, 0.125
    total, lse, out = kernel.forward(*arguments, keep=True)
    expected = gated_sum((before, out, after), gates)
    assert relative_rms(total, expected) <= 1e-3
    plain = kernel.attend(*arguments[:5], 64, 0.125)
    jax.tree.map(np.testing.assert_array_equal, (out, lse), plain)
    in_place = kernel.attend_and_add(*arguments)
    jax.tree.map(np.testing.assert_array_equal, in_place, (total, lse))


def test_tiles_are_shared_out_evenly():
    # Blocks of 5, 0, 1 and 8 pairs are 2, 0, 1 and 2 tiles of up to 4.
    starts = jnp.array([0, 5, 5, 6, 14], jnp.int32)[None, None, None]
    tile_starts, ranges = pairs.split_tiles(starts, 4, 3)
    assert tile_starts[0, 0, 0].tolist() == [0, 2, 2, 3, 5]
    assert ranges[0, 0, 0].tolist() == [[0, 2, 0, 1], [2, 4, 2, 4], [4, 5, 3, 4]]
    _, ranges = pairs.split_tiles(starts * 0, 4, 2)
    assert [x[1] - x[0] for x in ranges[0, 0, 0].tolist()] == [0, 0]
    assert [x[3] - x[2] for x in ranges[0, 0, 0].tolist()] == [0, 0]


@pytest.mark.parametrize("group", [8, 16, 32])
def test_lowers_for_hopper(lower_for_h100, group):
    sizes = mosaic_chunk.Sizes(
        queries=1000,
        kv_heads=2,
        slots=4,
        group=group,
        width=128,
        offset=24,
        length=1024,
        chunks=1,
        rows=2,
        scale_log2=0.1,
    )
    attend = functools.partial(
        mosaic.partial_outputs, sizes=sizes, tiling=mosaic.Tiling(3, 2, 132)
    )
    arrays = [(1, 1000, 2 * group, 128), (1, 1024, 2, 128), (1, 1024, 2, 128)]
    plan = [(2, 16, 1, 4), (2, 4096), (2, 17), (2, 17), (2, 66, 4), (1,)]
    shapes = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in arrays]
    shapes += [jax.ShapeDtypeStruct(x, jnp.int32) for x in plan]
    text = lower_for_h100(attend, *shapes)
    assert "block_sparse_forward" in text
    assert text.count("mosaic_gpu") > 0
    assert lowered_on_shards(attend, *shapes).count("mosaic_gpu_v2") == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": jnp.float32}, "must be bf16 or fp16, not float32"),
        ({"group": 4}, "16 query heads must share a list, not 4"),
        ({"width": 96}, "128 wide, not 96 and 96"),
        ({"block_size": 48}, "a multiple of 64, not 48"),
        ({"slots": 200}, "at most 8192 keys, not 12800"),
        ({"packed": True}, "documents are not supported"),
    ],
)
def test_says_what_it_does_not_support(monkeypatch, changes, reason):
    monkeypatch.setattr(_mosaic, "unavailable", lambda: None)
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    sizes = {"dtype": jnp.bfloat16, "group": 16, "width": 128, "slots": 4}
    sizes |= {"block_size": 64, "packed": False} | changes
    width, dtype = sizes["width"], sizes["dtype"]
    query = jax.ShapeDtypeStruct((1, 300, 2 * sizes["group"], width), dtype)
    key = jax.ShapeDtypeStruct((1, 300, 2, width), dtype)
    indices = jax.ShapeDtypeStruct((1, 300, 2, sizes["slots"]), jnp.int32)
    arguments = query, key, key, indices, sizes["block_size"]
    assert unsupported(*arguments, 0.1) is None
    actual = unsupported_mosaic(*arguments, sizes["packed"])
    assert actual == reason or reason in actual
