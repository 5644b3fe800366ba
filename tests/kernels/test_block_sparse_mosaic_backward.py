"""The block-sparse gradient kernel in Mosaic: interpreted, and lowered for Hopper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.ops.block_sparse import block_sparse_attention
from jattn.pallas import tuning
from jattn.pallas.block_sparse import mosaic, mosaic_backward, pairs
from jattn.pallas.block_sparse import triton as kernel
from jattn.pallas.block_sparse.launch import RowTiling
from tests.support import normal, relative_rms

# Consumers with several tiles each, and rings that go through all of their slots.
SMALL = mosaic_backward.Tiling(slots=2, programs=2)
ROWS = RowTiling(rows=32, warps=1, stages=2)

CASES = {
    "tiles of one block and two": dict(t=9, s=192, g=16, n=3),
    "two kv heads, both": dict(t=5, s=256, k=2, g=32, n=4),
    "in chunks": dict(t=70, s=70, g=32, n=2, chunk=64),
}


def inputs(t, s, k=1, g=16, n=2, h=64, seed=0):
    """Query, key, value in fp16, cotangents, and block indices, some of them none."""
    query, key = (1, t, k * g, h), (1, s, k, h)
    arrays = normal(seed, query, key, key, query, dtype=jnp.float16)
    [lse_gradient] = normal(seed + 1, query[:3])
    rng = np.random.default_rng(seed)
    indices = rng.integers(-1, -(-s // 64), (1, t, k, n))
    # A query that sees nothing, and own blocks.
    indices[..., 0] = np.arange(s - t, s)[:, None] // 64
    indices[:, 1] = -1
    return arrays[:3], (arrays[3], lse_gradient), jnp.asarray(indices, jnp.int32)


@pytest.fixture
def in_mosaic(monkeypatch):
    """Makes the gradients of attend use this kernel, interpreted."""
    monkeypatch.setattr(kernel, "unsupported_mosaic", lambda *_: None)
    with (
        tuning.force("block_sparse_backward_mosaic", SMALL),
        tuning.force("block_sparse_query_sums", ROWS),
    ):
        yield


def gradients(attend, arrays, cotangents):
    """Those of query, key and value, for a function with a log-sum-exp."""
    _, pull = jax.vjp(attend, *arrays)
    return pull(cotangents)


@pytest.mark.usefixtures("no_races", "in_mosaic")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_gradients_of_the_jnp_form(monkeypatch, name):
    sizes = dict(CASES[name])
    if (chunk := sizes.pop("chunk", None)) is not None:
        row_bytes = 2 * 64 * sizes["g"] * sizes["n"]
        monkeypatch.setattr(pairs, "PARTIAL_BYTES", chunk * row_bytes)
    arrays, (out_gradient, lse_gradient), indices = inputs(**sizes)
    attend = functools.partial(
        block_sparse_attention,
        block_indices=indices,
        block_size=64,
        implementation="xla",
        return_lse=True,
    )
    out, lse = attend(*arrays)
    actual = kernel.backward(
        *arrays,
        indices,
        None,
        out,
        lse,
        out_gradient,
        lse_gradient,
        block_size=64,
        scale=0.125,
    )
    plain = gradients(attend, arrays, (out_gradient, lse_gradient))
    arrays, out_gradient = jax.tree.map(
        lambda x: x.astype(jnp.float32), (arrays, out_gradient)
    )
    exact = gradients(attend, arrays, (out_gradient, lse_gradient))
    for x, y, expected in zip(actual, plain, exact, strict=True):
        assert relative_rms(x, expected) <= max(2 * relative_rms(y, expected), 1e-3)


@pytest.mark.parametrize("group", [16, 32])
def test_lowers_for_hopper(lower_for_h100, group):
    sizes = mosaic.Sizes(
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
        tiling=mosaic_backward.Tiling(slots=2, programs=132),
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
