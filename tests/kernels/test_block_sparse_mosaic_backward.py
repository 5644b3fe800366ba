"""The block-sparse gradient kernel in Mosaic: interpreted, and lowered for Hopper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.ops.block_sparse import block_sparse_attention
from jattn.pallas.block_sparse import backward, mosaic_backward, mosaic_chunk, pairs
from jattn.pallas.block_sparse.launch import RowTiling
from tests.kernels.block_sparse_mosaic import (
    chosen,
    lowered_on_shards,
    random_blocks,
)
from tests.support import normal, relative_rms

# Consumers with several tiles each, and rings that go through all of their slots.
SMALL = mosaic_backward.Tiling(programs=1)
ROWS = RowTiling(rows=32, warps=1, stages=2)

CASES = {
    "tiles of one block and two": dict(t=9, s=192, g=16, n=3),
    "two kv heads, both": dict(t=4, s=130, k=2, g=32, n=3),
    "in chunks": dict(t=37, s=70, g=32, n=2, chunk=16),
    # Of two consumers, each begins one of its blocks at another tile than the first.
    "blocks from the middle": dict(t=10, s=320, g=32, n=6),
}


def inputs(t, s, k=1, g=16, n=2, h=128, seed=0):
    """Query, key, value in fp16, cotangents, and block indices, some of them none."""
    query, key = (1, t, k * g, h), (1, s, k, h)
    arrays = normal(seed, query, key, key, query, dtype=jnp.float16)
    [lse_gradient] = normal(seed + 1, query[:3])
    indices = random_blocks(t, s, k, n, seed)
    # A query that sees nothing, and own blocks.
    indices[..., 0] = np.arange(s - t, s)[:, None] // 64
    indices[:, 1] = -1
    return arrays[:3], (arrays[3], lse_gradient), jnp.asarray(indices, jnp.int32)


@pytest.fixture
def in_mosaic(monkeypatch):
    """Makes the gradients of attend use this kernel, interpreted."""
    tilings = {
        "block_sparse_backward_mosaic": SMALL,
        "block_sparse_query_sums": ROWS,
    }
    with chosen(monkeypatch, backward, **tilings):
        yield


@pytest.mark.usefixtures("no_races", "in_mosaic")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_gradients_of_the_jnp_form(monkeypatch, name):
    sizes = dict(CASES[name])
    if (chunk := sizes.pop("chunk", None)) is not None:
        row_bytes = 2 * 128 * sizes["g"] * sizes["n"]
        monkeypatch.setattr(pairs, "PARTIAL_BYTES", chunk * row_bytes)
    arrays, (out_gradient, lse_gradient), indices = inputs(**sizes)
    attend = functools.partial(
        block_sparse_attention,
        block_indices=indices,
        block_size=64,
        implementation="xla",
        return_lse=True,
    )

    @jax.jit
    def exact(arrays, out_gradient):
        results, pull = jax.vjp(attend, *arrays)
        return results, pull((out_gradient, lse_gradient))

    wide = [x.astype(jnp.float32) for x in (*arrays, out_gradient)]
    (out, lse), expected = exact(wide[:3], wide[3])
    actual = backward.backward(
        *arrays,
        indices,
        None,
        out,
        lse,
        out_gradient,
        lse_gradient,
        block_size=64,
        scale=128**-0.5,
    )
    # That of numbers in fp16, and of sums of them.
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == jnp.float16
        assert relative_rms(x, y) <= 5e-4


def test_units_are_numbered_in_the_order_of_their_tiles():
    # Blocks of 5, 0, 1 and 8 pairs are 2, 0, 1 and 2 tiles of up to 4.
    starts = jnp.array([0, 5, 5, 6, 14], jnp.int32)[None, None, None]
    for programs, unit_starts, first_units in [
        (3, [0, 1, 1, 2, 4], [0, 1, 3]),
        (2, [0, 1, 1, 2, 3], [0, 2]),
        # One has nothing to do.
        (6, [0, 2, 2, 3, 5], [0, 1, 2, 3, 4]),
    ]:
        tiles = pairs.split_tiles(starts, 4, programs)
        by_block, by_range = pairs.split_units_of_ranges(*tiles)
        assert by_block[0, 0, 0].tolist() == unit_starts
        assert by_range[0, 0, 0, : len(first_units)].tolist() == first_units


@pytest.mark.parametrize("group", [16, 32])
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
    gradients = functools.partial(
        mosaic_backward.partial_gradients,
        units=16 + 132,
        sizes=sizes,
    )
    rows = (1, 1000, 2 * group, 128)
    arrays = [rows, (1, 1024, 2, 128), (1, 1024, 2, 128), rows]
    plan = [(2, 4096), (2, 17), (2, 17), (2, 132, 5), (1,)]
    shapes = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in arrays]
    shapes += [jax.ShapeDtypeStruct((1, 1000, 2, 2 * group), jnp.float32)]
    shapes += [jax.ShapeDtypeStruct(x, jnp.int32) for x in plan]
    text = lower_for_h100(gradients, *shapes)
    assert "block_sparse_backward" in text
    assert text.count("mosaic_gpu") > 0
    assert lowered_on_shards(gradients, *shapes).count("mosaic_gpu_v2") == 2
