"""The selective gradients in Mosaic: interpreted, and lowered for Hopper.

Whole gradients are tested: with the kernels of F, which Triton's interpreter runs.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jattn.ops._common import document_starts
from jattn.ops.selective import selective_attention
from jattn.pallas import _mosaic, _triton, tuning
from jattn.pallas.selective import (
    by_keys,
    mosaic_key_gradient,
    mosaic_query_gradient,
)
from jattn.pallas.selective import triton as kernel
from jattn.pallas.selective import work as shared
from jattn.pallas.selective.work import Work
from tests.support import documents, normal, relative_rms

# Sizes by name. Rings go through all of their slots.
CASES = {
    "one head": dict(n=1),
    "a head for each kv head": dict(t=70, n=2, k=2, memory_tau=0.7),
    "heads share a kv head": dict(b=2, t=64, n=4, slices=2),
    "many heads share a kv head": dict(n=8, t=33, s=150),
    "wide, a head for each kv head": dict(t=300, n=2, k=2, h=128, slices=2),
    "in chunks": dict(t=140, s=300, n=2, k=2, chunk_bytes=1, slices=2),
    "wide, in chunks": dict(t=140, s=300, n=4, k=2, h=128, chunk_bytes=1, slices=3),
    "documents": dict(t=300, s=320, n=2, lengths=(100, 90, 130)),
    "wide documents with a memory term": dict(
        t=150, h=128, lengths=(20, 60, 70), memory_tau=0.7
    ),
}


@pytest.fixture
def backward(monkeypatch):
    """The gradients of query, key, value and first row by the kernels."""
    monkeypatch.setattr(_mosaic, "unavailable", lambda: None)

    def backward(
        arrays,
        out,
        lse,
        cotangents,
        *,
        segment_ids=None,
        slices=1,
        skip_error=0.0,
        tau=None,
    ):
        query, key, value, first_row = arrays
        heads, group = query.shape[2], query.shape[2] // key.shape[2]
        width = query.shape[-1]
        starts = None if segment_ids is None else document_starts(segment_ids)
        work = Work(query, key, value, starts, width**-0.5, skip_error, tau)
        monkeypatch.setattr(mosaic_key_gradient, "_slices", lambda *_: slices)
        forced = {
            "selective_key_gradient_mosaic": dataclasses.replace(
                mosaic_key_gradient.tiling(width, heads, group), slots=2
            ),
            "selective_query_gradient_mosaic": dataclasses.replace(
                mosaic_query_gradient.tiling(width, heads, group),
                slots=2,
                programs=2,
            ),
        }
        with contextlib.ExitStack() as stack:
            requests = [stack.enter_context(tuning.force(*x)) for x in forced.items()]
            # Not under jit, which would run both kernels at the same time. While a
            # kernel of F is interpreted, no other can be traced.
            carries, _ = jax.block_until_ready(work.carries(first_row))
            results = kernel.backward(
                work, carries, out.astype(query.dtype), lse, *cotangents
            )
        assert all(requests)
        return results

    return backward


def inputs(b=1, t=130, s=None, n=2, k=1, h=64):
    """Query, key, value and first row of F; cotangents."""
    s = s or t
    arrays = normal(0, (b, t, n, h), (b, s, k, h), (b, s, k, h), dtype=jnp.float16)
    (first_row,) = normal(1, (b, s))
    # Only keys before the first query are selected before it.
    first_row = jnp.where(jnp.arange(s) < s - t, jnp.abs(first_row), 0)
    cotangents = normal(2, (b, t, n, h), (b, t, n), (b, t))
    cotangents[0] = cotangents[0].astype(jnp.float16)
    return (*arrays, first_row), cotangents


@functools.partial(jax.jit, static_argnames="memory_tau")
def plain(arrays, cotangents, memory_tau=None, segment_ids=None):
    """Outputs and gradients of the jnp form."""

    def attend(*arrays):
        return selective_attention(
            *arrays[:3],
            initial_mask=arrays[3],
            segment_ids=segment_ids,
            memory_tau=memory_tau,
            return_lse=True,
            implementation="xla",
        )

    outputs, pullback = jax.vjp(attend, *arrays)
    cotangents = [x.astype(y.dtype) for x, y in zip(cotangents, outputs, strict=False)]
    return outputs, pullback(tuple(cotangents))


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_jnp_form(monkeypatch, backward, name):
    case = dict(CASES[name])
    tau, slices = case.pop("memory_tau", None), case.pop("slices", 1)
    lengths = case.pop("lengths", None)
    segment_ids = None if lengths is None else documents(*lengths)
    for limit in ("CHUNK_BYTES", "GRADIENT_BYTES"):
        size = case.get("chunk_bytes", getattr(shared, limit))
        monkeypatch.setattr(shared, limit, size)
    case.pop("chunk_bytes", None)
    arrays, cotangents = inputs(**case)
    exact = [x.astype(jnp.float32) for x in arrays]
    (out, lse, *_), expected = plain(exact, cotangents, tau, segment_ids)
    _, same_dtype = plain(arrays, cotangents, tau, segment_ids)
    if tau is None:
        cotangents[2] = None
        # What the kernel keeps is all that the gradient through F needs.
        monkeypatch.delattr(by_keys, "_selection_by_products")
    actual = backward(
        arrays, out, lse, cotangents, segment_ids=segment_ids, slices=slices, tau=tau
    )
    for x, y, z in zip(actual, same_dtype, expected, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert relative_rms(x, z) <= 2 * relative_rms(y, z)


@pytest.mark.usefixtures("no_races")
def test_skipped_keys_are_not_read(backward):
    arrays, cotangents = inputs(t=390, n=1)
    cotangents[2] = None
    # Every query selects all keys by about 3.
    query, key, value, first_row = arrays
    query, key = 0.1 * query + 0.6, 0.1 * key + 0.6
    skipped, _ = kernel.skipped_tiles(query, key, None, 0.125, 1e-3, 64)
    assert skipped > 0
    (out, lse), expected = plain((query, key, value, first_row), cotangents)
    run = functools.partial(
        backward, out=out, lse=lse, cotangents=cotangents, skip_error=1e-3
    )
    actual = run((query, key, value, first_row))
    for x, y in zip(actual, expected, strict=True):
        assert relative_rms(x, y) <= 5e-3
    # Nobody forgets the first key, and the last queries need none of these.
    changed = run((query, key, value.at[:, 128:256].set(jnp.nan), first_row))
    np.testing.assert_array_equal(changed[0][:, 384:, 0], actual[0][:, 384:, 0])


@pytest.mark.usefixtures("no_races")
def test_heads_may_be_filled_up(monkeypatch):
    monkeypatch.setattr(_mosaic, "unavailable", lambda: None)
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    arrays = normal(0, (1, 130, 2, 40), (1, 130, 1, 40), (1, 130, 1, 56))
    (cotangent,) = normal(1, (1, 130, 2, 56))

    def gradients(implementation, dtype):
        attend = functools.partial(selective_attention, implementation=implementation)
        _, pullback = jax.vjp(attend, *(x.astype(dtype) for x in arrays))
        return pullback(cotangent.astype(dtype))

    names = "selective_query_gradient_mosaic", "selective_key_gradient_mosaic"
    tilings = (
        mosaic_query_gradient.tiling(64, 2, 2),
        mosaic_key_gradient.tiling(64, 2, 2),
    )
    with contextlib.ExitStack() as stack:
        requests = [
            stack.enter_context(tuning.force(*x))
            for x in zip(names, tilings, strict=True)
        ]
        actual = gradients("triton", jnp.float16)
    assert all(requests)
    plain, exact = (gradients("xla", x) for x in (jnp.float16, jnp.float32))
    for x, y, expected in zip(actual, plain, exact, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert relative_rms(x, expected) <= 2 * relative_rms(y, expected)


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def shapes(b=1, t=4096, n=16, k=16, h=64, dtype=jnp.bfloat16):
    query, keys = shape(b, t, n, h, dtype=dtype), shape(b, t, k, h, dtype=dtype)
    per_row = shape(b, t, n, dtype=jnp.float32)
    return query, keys, keys, query, per_row, per_row


def of_a_chunk(query, key, value, out_gradient, shift, delta, skip=False):
    """What the kernels give of the first 512 queries, and of as many keys."""
    batch, length, heads, width = query.shape
    group = heads // key.shape[2]
    options = dict(queries=length, offset=0, scale=0.1)
    region = jnp.zeros(2, jnp.int32)
    bias = jnp.zeros((batch, 512, length), jnp.float32)
    blocks = length // shared.BLOCK
    tiles = jnp.zeros((batch, blocks, length // 64), jnp.int32)

    def run(function, tiling, tiles, **more):
        per_row = jnp.stack([shift, delta], axis=2)
        per_row = per_row.reshape(batch, heads // tiling.pack, 2, -1)
        arrays = query, key, value, bias, per_row, out_gradient, tiles, region
        return function(*arrays, tiling=tiling, **options, **more)

    return run(
        mosaic_query_gradient.query_gradient,
        mosaic_query_gradient.tiling(width, heads, group),
        (tiles, tiles[:, :, 0]) if skip else None,
        block=shared.BLOCK,
    ), run(
        mosaic_key_gradient.key_gradients,
        mosaic_key_gradient.tiling(width, heads, group),
        tiles[:, :, 0],
    )


# Lowering fails if a thread block takes more shared memory than there is.
@pytest.mark.parametrize(
    ("arrays", "options"),
    [
        (shapes(b=4), {}),
        (shapes(t=1024, n=3, k=3, h=128, dtype=jnp.float16), {}),
        (shapes(n=32, k=8, h=128), dict(skip=True)),
        (shapes(n=32, k=2), {}),
        (shapes(n=8, k=1, h=128), {}),
    ],
)
def test_lowers_for_hopper(lower_for_h100, arrays, options):
    text = lower_for_h100(functools.partial(of_a_chunk, **options), *arrays)
    assert text.count("mosaic_gpu_v2") == 2


@pytest.mark.usefixtures("x64")
def test_lowers_where_types_of_64_bits_are_on(lower_for_h100):
    function = functools.partial(of_a_chunk, skip=True)
    assert "mosaic_gpu_v2" in lower_for_h100(function, *shapes())


def test_lowers_under_shard_map_and_vmap():
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = jax.sharding.AbstractMesh(
        (2,), ("data",), (AxisType.Auto,), abstract_device=device
    )
    spec = PartitionSpec("data")
    sharded = jax.shard_map(
        jax.vmap(of_a_chunk), mesh=mesh, in_specs=spec, out_specs=spec
    )
    arrays = [shape(4, *x.shape, dtype=x.dtype) for x in shapes(b=2, t=1024)]
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(sharded).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu_v2" in lowered.as_text()
