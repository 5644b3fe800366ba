"""The selective forward kernel in Mosaic: interpreted, and lowered for Hopper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jattn.ops.selective import selective_attention
from jattn.ops.selective_decode import prefill_selective_attention
from jattn.pallas import _mosaic, _triton, tuning
from jattn.pallas.selective import mosaic, work
from jattn.pallas.selective import triton as kernel
from tests.support import documents, normal, relative_rms

# Sizes by name. Each thread block has several items of work, and the rings go through
# all of their slots.
CASES = {
    "tiles of queries share keys": dict(
        t=200, s=260, tiling=mosaic.Tiling(1, 2, 128, 2, 3, 2, 2)
    ),
    "heads share keys": dict(
        k=1, h=128, memory_tau=0.7, tiling=mosaic.Tiling(2, 1, 64, 1, 4, 2, 2)
    ),
    "thread blocks share keys": dict(
        b=2, n=4, k=1, tiling=mosaic.Tiling(2, 2, 64, 1, 3, 2, 4)
    ),
    "thread blocks share the bias": dict(
        n=4, k=2, chunk_bytes=1, tiling=mosaic.Tiling(2, 2, 128, 1, 3, 2, 2)
    ),
    "documents": dict(
        t=300,
        s=320,
        n=1,
        lengths=(100, 90, 130),
        memory_tau=0.7,
        tiling=mosaic.Tiling(1, 1, 64, 1, 4, 2, 2),
    ),
    "heads that are filled up": dict(
        n=1, h=40, v=56, memory_tau=0.7, tiling=mosaic.Tiling(1, 1, 64, 1, 4, 2, 2)
    ),
    "a budget": dict(
        t=200,
        n=1,
        budget=30,
        memory_tau=0.7,
        tiling=mosaic.Tiling(1, 1, 64, 1, 4, 2, 2),
    ),
}


def inputs(b=1, t=150, s=None, n=2, k=None, h=64, v=None):
    """Query, key, value and first row of F."""
    s, k, v = s or t, k or n, v or h
    *arrays, first_row = normal(
        0, (b, t, n, h), (b, s, k, h), (b, s, k, v), (b, s), dtype=jnp.float16
    )
    # Only keys before the first query are selected before it.
    first_row = jnp.abs(first_row).astype(jnp.float32)
    return *arrays, jnp.where(jnp.arange(s) < s - t, first_row, 0)


@pytest.fixture
def chosen(monkeypatch):
    """Lets the kernel be chosen, as on a GPU."""
    monkeypatch.setattr(_mosaic, "unavailable", lambda: None)
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)


def run(arrays, tiling, **options):
    """The operation's results by the kernel, in the interpreter."""
    attend = functools.partial(
        selective_attention, implementation="triton", return_lse=True, **options
    )
    with tuning.force("selective_forward_mosaic", tiling) as requests:
        results = jax.jit(lambda *x: attend(*x[:3], initial_mask=x[3]))(*arrays)
    assert requests
    return results


@pytest.mark.usefixtures("chosen", "no_races")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_jnp_form(monkeypatch, name):
    case = dict(CASES[name])
    tiling = case.pop("tiling")
    options = {name: case.pop(name, None) for name in ("budget", "memory_tau")}
    chunk_bytes = case.pop("chunk_bytes", work.CHUNK_BYTES)
    monkeypatch.setattr(work, "CHUNK_BYTES", chunk_bytes)
    lengths = case.pop("lengths", None)
    options["segment_ids"] = None if lengths is None else documents(*lengths)
    arrays = inputs(**case)

    def plain(arrays):
        *arrays, first_row = arrays
        return selective_attention(
            *arrays,
            initial_mask=first_row,
            return_lse=True,
            implementation="xla",
            **options,
        )

    actual = run(arrays, tiling, **options)
    exact = plain([x.astype(jnp.float32) for x in arrays])
    for x, y, expected in zip(actual, plain(arrays), exact, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert relative_rms(x, expected) <= max(2 * relative_rms(y, expected), 2e-6)


@pytest.mark.usefixtures("chosen", "no_races")
def test_prompts_may_have_heads_that_are_filled_up():
    *arrays, _ = inputs(n=1, h=40, v=56)

    def prefill(implementation):
        return prefill_selective_attention(
            *arrays,
            jnp.array([150]),
            budget=30,
            skip_error=0.0,
            scale=0.2,
            implementation=implementation,
        )

    with tuning.force(
        "selective_forward_mosaic", mosaic.Tiling(1, 1, 64, 1, 4, 2, 2)
    ) as requests:
        actual = prefill("triton")
    assert requests
    expected = prefill("xla")
    assert actual[0].shape == expected[0].shape
    assert relative_rms(actual[0], expected[0]) <= 1e-3
    assert relative_rms(actual[1], expected[1]) <= 1e-5
    np.testing.assert_array_equal(actual[2], expected[2])


@pytest.mark.usefixtures("chosen", "no_races")
def test_ended_documents_are_not_read():
    query, key, value, first_row = inputs(t=260, n=1)
    run_packed = functools.partial(
        run,
        tiling=mosaic.Tiling(1, 1, 64, 1, 3, 2, 1),
        segment_ids=documents(70, 190),
    )
    expected = run_packed((query, key, value, first_row))
    poisoned = value.at[:, :64].set(jnp.nan)
    actual = run_packed((query, key, poisoned, first_row))
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(x[:, 128:], y[:, 128:])


@pytest.mark.usefixtures("chosen", "no_races")
def test_skipped_values_are_not_read():
    query, key, value, first_row = inputs(t=260, n=1)
    # Every query selects all keys by about 3, but for the first one.
    query, key = 0.1 * query + 0.6, 0.1 * key + 0.6
    error = 1e-3
    skipped, _ = kernel.skipped_tiles(query, key, None, 0.125, error, 64)
    assert skipped > 0
    poisoned = value.at[:, 64:128].set(jnp.nan)
    actual, _ = run(
        (query, key, poisoned, first_row),
        mosaic.Tiling(1, 1, 64, 1, 3, 2, 1),
        skip_error=error,
    )
    expected = selective_attention(query, key, value, implementation="xla")
    difference = np.abs(actual[:, 256:] - expected[:, 256:])
    assert np.max(difference) < 3 * error * np.max(np.abs(value))
    assert np.all(np.isnan(actual[:, 64:128]))


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def shapes(b=1, t=4096, s=None, n=16, k=16, h=64, dtype=jnp.bfloat16):
    keys = shape(b, s or t, k, h, dtype=dtype)
    return shape(b, t, n, h, dtype=dtype), keys, keys


def attend(query, key, value, *, skip):
    """The kernel for a chunk of 256 queries, with the tiling it has on a GPU."""
    batch, queries, heads, width = query.shape
    tiling = mosaic.tiling(width, heads, heads // key.shape[2])
    keys, blocks = key.shape[1], queries // 128
    counts = jnp.zeros((batch, blocks), jnp.int32)
    tiles = jnp.zeros((batch, blocks, keys // tiling.keys), jnp.int32)
    return mosaic.forward(
        query,
        key,
        value,
        jnp.zeros((batch, 256, keys), jnp.float32),
        jnp.zeros(2, jnp.int32),
        (tiles, counts) if skip else None,
        queries=queries,
        offset=keys - queries,
        scale=0.1,
        tiling=tiling,
    )


# Lowering fails if a thread block takes more shared memory than there is.
@pytest.mark.parametrize(
    ("arrays", "skip"),
    [
        (shapes(), False),
        (shapes(n=3, k=3), True),
        (shapes(n=6, k=2, b=2), False),
        (shapes(n=32, k=8, dtype=jnp.float16), True),
        (shapes(t=1024, s=3072, n=3, k=3, h=128, dtype=jnp.float16), False),
        (shapes(n=32, k=8, h=128), True),
        (shapes(h=128), False),
    ],
)
def test_lowers_for_hopper(lower_for_h100, arrays, skip):
    text = lower_for_h100(functools.partial(attend, skip=skip), *arrays)
    assert text.count("mosaic_gpu_v2") == 1


@pytest.mark.usefixtures("x64")
def test_lowers_where_types_of_64_bits_are_on(lower_for_h100):
    text = lower_for_h100(functools.partial(attend, skip=True), *shapes())
    assert "mosaic_gpu_v2" in text


def test_lowers_under_shard_map_and_vmap():
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = jax.sharding.AbstractMesh(
        (2,), ("data",), (AxisType.Auto,), abstract_device=device
    )
    spec = PartitionSpec("data")
    mapped = jax.vmap(functools.partial(attend, skip=True))
    sharded = jax.shard_map(mapped, mesh=mesh, in_specs=spec, out_specs=spec)
    arrays = [shape(4, *x.shape) for x in shapes()]
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(sharded).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu_v2" in lowered.as_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"h": 128, "dtype": jnp.float16}, None),
        ({"dtype": jnp.float32}, "must be bf16 or fp16, not float32"),
        ({"h": 96}, "must both be 64 or 128 wide, not (96, 96)"),
    ],
)
def test_says_what_it_does_not_support(monkeypatch, changes, reason):
    monkeypatch.setattr(_mosaic, "unavailable", lambda: None)
    query, _, value = shapes(**changes)
    actual = _mosaic.unsupported(query, value, packed=False)
    assert actual == reason or reason in actual
