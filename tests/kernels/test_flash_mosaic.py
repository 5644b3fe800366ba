"""The flash forward kernel in Mosaic: interpreted, and lowered for Hopper."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jattn.ops.compressed import compressed_attention, num_windows
from jattn.ops.dense import dense_attention
from jattn.pallas import _device, _mosaic, _triton, tuning
from jattn.pallas.flash import mosaic as kernel
from jattn.pallas.flash import mosaic_items, unsupported_mosaic_forward
from tests.support import normal, relative_rms

# One thread block goes through all items, and the ring through all of its slots.
SMALL = kernel.Tiling(consumers=2, cluster=1, keys=64, edge=64, slots=3, programs=1)


def inputs(b=1, t=9, s=None, k=1, g=16, h=64, dtype=jnp.bfloat16, **sight):
    """Query, key and value, and which keys a query sees."""
    sight = {"kernel_size": 1, "stride": 1, "window": None, "length": s or t} | sight
    m = num_windows(sight["length"], sight["kernel_size"], sight["stride"])
    return normal(0, (b, t, k * g, h), *[(b, m, k, h)] * 2, dtype=dtype), sight


def run(arrays, sight, tiling=SMALL):
    """Output and log-sum-exp by the kernel, in the interpreter."""
    attend = functools.partial(
        kernel.forward, **sight, scale=arrays[0].shape[-1] ** -0.5
    )
    with tuning.force("flash_forward_mosaic", tiling):
        return jax.jit(attend)(*arrays)


def operation(sight):
    """The public one that sees these keys."""
    options = {"return_lse": True}
    if sight["kernel_size"] == 1:
        return functools.partial(dense_attention, window=sight["window"], **options)
    windows = {x: sight[x] for x in ("kernel_size", "stride", "length")}
    return functools.partial(compressed_attention, **windows, **options)


def assert_close(actual, arrays, sight):
    """Asserts errors of at most twice those of the jnp form in the same dtype."""
    attend = jax.jit(functools.partial(operation(sight), implementation="xla"))
    exact = attend(*(x.astype(jnp.float32) for x in arrays))
    plain = attend(*arrays)
    for x, y, expected in zip(actual, plain, exact, strict=True):
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(x[~finite], expected[~finite])
        x, y, expected = (np.asarray(z)[finite] for z in (x, y, expected))
        assert relative_rms(x, expected) <= max(2 * relative_rms(y, expected), 2e-6)


@pytest.mark.usefixtures("no_races")
def test_equals_the_jnp_form():
    # Both ends of the window in one block of keys, and in several; the last tile ends
    # beyond the queries; one thread block has an item more than the other.
    arrays, sight = inputs(t=21, s=150, k=1, window=70)
    tiling = dataclasses.replace(SMALL, slots=4, programs=2)
    assert_close(run(arrays, sight, tiling), arrays, sight)


@pytest.mark.usefixtures("no_races")
def test_strided_windows_and_queries_that_see_nothing():
    arrays, sight = inputs(
        b=2, t=5, g=64, h=128, dtype=jnp.float16, kernel_size=4, stride=2
    )
    out, lse = run(arrays, sight)
    assert_close((out, lse), arrays, sight)
    assert not np.any(out[:, :3])
    assert np.all(np.isneginf(lse[:, :3]))


@pytest.mark.usefixtures("no_races")
def test_thread_blocks_that_share_keys_and_a_short_first_step():
    arrays, sight = inputs(t=20, s=250, k=2, window=180)
    tiling = dataclasses.replace(SMALL, cluster=2, keys=128, programs=4)
    assert_close(run(arrays, sight, tiling), arrays, sight)


@pytest.mark.usefixtures("no_races")
def test_three_consumers():
    arrays, sight = inputs(t=30, window=20)
    tiling = dataclasses.replace(SMALL, consumers=3)
    assert_close(run(arrays, sight, tiling), arrays, sight)


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize("group", [1, 4])
def test_small_groups(group):
    arrays, sight = inputs(t=69, k=2, g=group, window=40)
    assert_close(run(arrays, sight), arrays, sight)


@pytest.mark.usefixtures("no_races")
def test_memory_nobody_sees_may_hold_anything():
    (query, *keys), sight = inputs(t=5, s=121, g=8, window=40)
    hidden = 121 - 5 - 40 + 1
    poisoned = [x.at[:, :hidden].set(jnp.nan) for x in keys]
    actual = run((query, *poisoned), sight)
    assert_close(actual, (query, *keys), sight)


@pytest.mark.parametrize("edge", [64, 128])
@pytest.mark.parametrize("group", [1, 16, 64])
@pytest.mark.parametrize(
    "sight",
    [
        dict(kernel_size=1, stride=1, window=None),
        dict(kernel_size=1, stride=1, window=100),
        dict(kernel_size=1, stride=1, window=1),
        dict(kernel_size=32, stride=16, window=None),
        dict(kernel_size=6, stride=3, window=40),
    ],
)
def test_items_meet_every_key_once_and_mask_what_some_row_does_not_see(
    edge, group, sight
):
    queries, length, step = 301, 1000, 128
    sizes = mosaic_items.Sizes(
        queries=queries,
        kv_rows=1,
        kv_heads=1,
        group=group,
        width=64,
        keys=num_windows(length, sight["kernel_size"], sight["stride"]),
        offset=length - queries,
        scale=1.0,
        tiles=2,
        step=step,
        edge=edge,
        **sight,
    )
    tokens = sizes.tokens * sizes.tiles
    assert sizes.items == -(-queries // tokens)
    for index in range(sizes.items):
        item = mosaic_items.item_at(jnp.int32(index), sizes)
        first = int(item.tile) * tokens
        position = np.arange(first, min(first + tokens, queries)) + sizes.offset
        key = np.arange(sizes.keys) * sight["stride"]
        seen = key + sight["kernel_size"] - 1 <= position[:, None]
        seen &= key > position[:, None] - (sight["window"] or length)
        starts = [int(item.first_key(x, step)) for x in range(int(item.steps))]
        lengths = [edge] + [step] * int(item.blocks)
        keys = [np.arange(x, x + y) for x, y in zip(starts, lengths, strict=True)]
        met = np.concatenate(keys)
        assert np.unique(met).size == met.size
        assert set(np.nonzero(seen.any(axis=0))[0]) <= set(met)
        assert all(x % mosaic_items.ALIGNMENT == 0 for x in starts)
        least = 0 if edge == step else 1
        wanted = seen.any(axis=0).sum() + mosaic_items.ALIGNMENT - 1 - edge
        assert int(item.blocks) <= max(least, -(-wanted // step))
        for x in keys[int(item.masked) :]:
            assert np.all(seen[:, x])


def test_attention_runs_it_where_it_can(monkeypatch):
    arrays, sight = inputs(t=20, kernel_size=4, stride=2)
    monkeypatch.setattr(_mosaic, "unavailable", lambda: None)
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    monkeypatch.setattr(_device, "multiprocessors", lambda: 1)
    expected = run(arrays, sight)
    with tuning.force("flash_forward_mosaic", SMALL):
        actual = operation(sight)(*arrays)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def shapes(b=2, t=8192, s=8192, n=64, k=4, h=128, dtype=jnp.bfloat16):
    keys = shape(b, s, k, h, dtype=dtype)
    return shape(b, t, n, h, dtype=dtype), keys, keys


DENSE = {"kernel_size": 1, "stride": 1, "window": None, "length": 8192}
NSA = {"kernel_size": 32, "stride": 16, "window": None, "length": 8192}


# Lowering fails if a thread block takes more shared memory than there is.
@pytest.mark.parametrize(
    ("arrays", "sight"),
    [
        (shapes(s=511), NSA),
        (shapes(), DENSE | {"window": 512}),
        (shapes(t=1001), DENSE),
        (shapes(t=1001, n=4), DENSE),
        (shapes(h=64, n=256, dtype=jnp.float16), DENSE | {"window": 100}),
    ],
)
def test_lowers_for_hopper(lower_for_h100, arrays, sight):
    attend = functools.partial(kernel.forward, **sight, scale=0.1)
    assert lower_for_h100(attend, *arrays).count("mosaic_gpu_v2") == 1


@pytest.mark.usefixtures("x64")
def test_lowers_where_types_of_64_bits_are_on(lower_for_h100):
    attend = functools.partial(kernel.forward, **DENSE | {"window": 512}, scale=0.1)
    assert "mosaic_gpu_v2" in lower_for_h100(attend, *shapes())


def test_lowers_under_shard_map_and_vmap():
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = jax.sharding.AbstractMesh(
        (2,), ("data",), (AxisType.Auto,), abstract_device=device
    )
    spec = PartitionSpec("data")
    attend = functools.partial(kernel.forward, **DENSE | {"length": 300}, scale=0.1)
    sharded = jax.shard_map(jax.vmap(attend), mesh=mesh, in_specs=spec, out_specs=spec)
    arrays = [shape(4, *x.shape) for x in shapes(t=300, s=300)]
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(sharded).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu_v2" in lowered.as_text()


@pytest.mark.parametrize(
    ("group", "window", "offset", "cluster", "edge"),
    [
        (16, None, 0, 2, 128),
        (16, 512, 0, 2, 64),
        (16, 600, 0, 2, 128),
        (1, 600, 0, 1, 128),
        # The keys of 128 queries are 639, of which the first is one past an eighth.
        (1, 512, 0, 1, 128),
        (1, 512, 1, 1, 64),
        (2, 512, 0, 1, 64),
    ],
)
def test_heuristic_steps_hardly_reach_beyond_the_window(
    group, window, offset, cluster, edge
):
    tiling = kernel._tiling(128, group, 4096, 1, 1, window, offset)
    assert (tiling.cluster, tiling.edge) == (cluster, edge)


def test_heuristic_steps_are_small_where_there_are_few_keys():
    steps = [
        kernel._tiling(128, 16, keys, 32, 16, None, 0).keys for keys in (1023, 2047)
    ]
    assert steps == [64, 128]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"n": 4}, None),
        ({"n": 256, "h": 64, "dtype": jnp.float16}, None),
        ({"dtype": jnp.float32}, "must be bf16 or fp16, not float32"),
        ({"h": 96}, "must both be 64 or 128 wide, not (96, 96)"),
        ({"n": 12}, "must divide 64, not be 3"),
        ({"n": 512}, "must divide 64, not be 128"),
        ({"packed": True}, "it knows no documents"),
        ({"kernel_size": 8, "window": 7}, "no query sees a key"),
        ({"b": 1, "t": 131}, "68 tiles of rows do not keep the GPU busy"),
    ],
)
def test_says_what_it_does_not_support(monkeypatch, changes, reason):
    monkeypatch.setattr(_mosaic, "unavailable", lambda: None)
    options = {"packed": False, **DENSE}
    options |= {x: changes[x] for x in options if x in changes}
    sizes = {x: y for x, y in changes.items() if x not in options}
    actual = unsupported_mosaic_forward(*shapes(**sizes), **options)
    assert actual == reason or reason in actual
