"""The 2-simplicial Mosaic kernel in Pallas' interpreter, and lowered for Hopper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jattn.ops.simplicial import attend_pairs, two_simplicial_attention
from jattn.pallas import _device, _mosaic, _triton, tuning
from jattn.pallas.simplicial import mosaic as kernel
from jattn.pallas.simplicial import unsupported_mosaic
from tests.support import normal, relative_rms

# One thread block goes through all items, and every ring through all of its slots.
SMALL = kernel.Tiling(columns=64, blocks=1, slots=3, few=2, programs=1)

# The same where a tile has several positions, which fit into one step.
WIDE = kernel.Tiling(columns=128, blocks=1, slots=2, few=2, programs=1)


def inputs(b=1, t=3, f=130, m=130, n=64, k=1, h=64, dtype=jnp.bfloat16):
    """Query, keys and values of both sets."""
    few, many = (b, f, k, h), (b, m, k, h)
    return normal(0, (b, t, n, h), few, few, many, many, dtype=dtype)


def run(*arrays, visible=None, tiling=SMALL, few_window=3, many_window=100):
    """Output and log-sum-exp by the kernel, in the interpreter."""
    attend = functools.partial(
        kernel.forward,
        few_window=few_window,
        many_window=many_window,
        scale=arrays[0].shape[-1] ** -0.5,
    )
    with tuning.force("simplicial_forward_mosaic", tiling):
        return jax.jit(attend)(*arrays, visible)


def reference(*arrays, visible=None, few_window=3, many_window=100):
    """Output and log-sum-exp by the jnp form."""
    attend = functools.partial(
        attend_pairs,
        windows=(few_window, many_window),
        form="trilinear",
        key2_bias=0.0,
        value2_bias=0.0,
        scale=arrays[0].shape[-1] ** -0.5,
        implementation="xla",
    )
    return jax.jit(attend)(*arrays, visible=visible)


def assert_close(actual, arrays, **options):
    """Asserts errors of at most twice those of the jnp form in the same dtype."""
    exact = reference(*(x.astype(jnp.float32) for x in arrays), **options)
    plain = reference(*arrays, **options)
    for x, y, expected in zip(actual, plain, exact, strict=True):
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(x[~finite], expected[~finite])
        x, y, expected = (np.asarray(z)[finite] for z in (x, y, expected))
        assert relative_rms(x, expected) <= 2 * relative_rms(y, expected)


@pytest.mark.usefixtures("no_races")
def test_equals_the_jnp_form():
    # Several tiles of heads and thread blocks; an odd number of few keys; steps that
    # the window fills and does not fill.
    arrays = inputs(b=2, t=2, f=70, m=70, n=128)
    tiling = kernel.Tiling(columns=64, blocks=1, slots=3, few=2, programs=3)
    assert_close(run(*arrays, tiling=tiling), arrays)


@pytest.mark.usefixtures("no_races")
def test_the_first_positions_see_less():
    arrays = inputs(t=3, f=3, m=3)
    assert_close(run(*arrays), arrays)


@pytest.mark.usefixtures("no_races")
def test_steps_of_several_blocks_and_sets_of_two_lengths():
    arrays = inputs(t=2, f=9, m=150, h=128, dtype=jnp.float16)
    tiling = kernel.Tiling(columns=64, blocks=2, slots=5, few=4, programs=1)
    options = {
        "few_window": 7,
        "many_window": 140,
        "visible": jnp.array([[149, 150]]),
    }
    assert_close(run(*arrays, tiling=tiling, **options), arrays, **options)


@pytest.mark.usefixtures("no_races")
def test_a_limit_of_what_is_visible_and_what_nobody_sees():
    query, *keys = inputs(k=1)
    visible = jnp.array([[0, 1, 66]])
    without_turns = kernel.Tiling(
        columns=64, blocks=1, slots=3, few=2, programs=1, turns=False
    )
    out, lse = run(query, *keys, visible=visible, tiling=without_turns)
    assert_close((out, lse), (query, *keys), visible=visible)
    assert not np.any(out[:, 0])
    assert np.all(np.isneginf(lse[:, 0]))
    # The last query sees the last 66 of 130 keys.
    keys = [x.at[:, : 130 - 66].set(jnp.nan) for x in keys]
    actual = run(query, *keys, visible=visible)
    jax.tree.map(np.testing.assert_array_equal, actual, (out, lse))


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize(
    ("sizes", "windows"),
    [
        # The last tile is not full, and the first positions see less.
        ({"t": 70, "f": 70, "m": 70, "n": 1}, (3, 100)),
        # Of three steps one is whole; several batch rows and kv heads.
        ({"b": 2, "t": 20, "f": 340, "m": 340, "n": 8, "k": 2}, (4, 300)),
    ],
)
def test_few_heads_share_a_tile_with_neighbours(sizes, windows):
    arrays = inputs(**sizes)
    options = dict(zip(("few_window", "many_window"), windows, strict=True))
    assert_close(run(*arrays, tiling=WIDE, **options), arrays, **options)


@pytest.mark.usefixtures("no_races")
def test_neighbours_see_no_more_than_they_may():
    query, *keys = inputs(t=20, n=4)
    # Of these documents, the first ends before the queries.
    visible = jnp.array([[0, 1, 2, 3, 4, *range(1, 16)]])
    out, lse = run(query, *keys, visible=visible, tiling=WIDE)
    assert_close((out, lse), (query, *keys), visible=visible)
    assert not np.any(out[:, 0])
    assert np.all(np.isneginf(lse[:, 0]))
    # The second query is at 111 and is the first to see a key, its own.
    keys = [x.at[:, :111].set(jnp.nan) for x in keys]
    actual = run(query, *keys, visible=visible, tiling=WIDE)
    jax.tree.map(np.testing.assert_array_equal, actual, (out, lse))


@pytest.mark.usefixtures("no_races")
def test_tiles_of_positions_that_see_nothing():
    query, *keys = inputs(t=20, n=4)
    visible = jnp.zeros((1, 20), jnp.int32).at[:, -1].set(2)
    out, lse = run(query, *keys, visible=visible, tiling=WIDE)
    assert not np.any(out[:, :-1])
    assert np.all(np.isneginf(lse[:, :-1]))
    assert_close((out, lse), (query, *keys), visible=visible)


@pytest.mark.usefixtures("no_races")
def test_a_constant_added_to_what_multiplies_is_not_rounded():
    query, few_key, few_value, *many = inputs(t=2, f=70, m=70)
    few = few_key.astype(jnp.float32) + 1 / 64, few_value.astype(jnp.float32) + 1
    actual = run(query, *few, *many)
    # What is exact in fp32 but not in bf16 is what the two forms differ in.
    rounded = [x.astype(jnp.bfloat16) for x in few]
    exact = reference(*(x.astype(jnp.float32) for x in (query, *few, *many)))
    error, rounded_error = (
        relative_rms(out, exact[0]) for out, _ in (actual, run(query, *rounded, *many))
    )
    assert error < 0.85 * rounded_error


def test_the_operation_runs_it(monkeypatch):
    arrays = inputs(t=1)
    attend = functools.partial(
        two_simplicial_attention, *arrays, windows=(100, 3), return_lse=True
    )
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        attend(implementation="pallas")
    monkeypatch.setattr(_mosaic, "unavailable", lambda: None)
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    monkeypatch.setattr(_device, "multiprocessors", lambda: 1)
    query, key, value, key2, value2 = arrays
    expected = run(query, key2, value2, key, value)
    with tuning.force("simplicial_forward_mosaic", SMALL):
        actual = attend()
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def shapes(b=4, t=8192, s=8192, n=64, k=1, h=128, dtype=jnp.bfloat16):
    keys = shape(b, s, k, h, dtype=dtype)
    return shape(b, t, n, h, dtype=dtype), keys, keys, keys, keys


def full_size(*arrays, few_window=32, many_window=512, out_dtype=None):
    return kernel.forward(
        *arrays[:5],
        arrays[5] if len(arrays) > 5 else None,
        few_window=few_window,
        many_window=many_window,
        scale=0.1,
        out_dtype=out_dtype,
    )


# Lowering fails if a thread block takes more shared memory than there is.
@pytest.mark.parametrize(
    ("arrays", "options"),
    [
        (shapes(), {}),
        ((*shapes(n=128), shape(4, 8192, dtype=jnp.int32)), {}),
        (shapes(h=64, n=256, k=2, dtype=jnp.float16), {}),
        (shapes(t=1000), {"few_window": 100, "many_window": 1100}),
        (shapes(), {"many_window": 64}),
        (shapes(), {"out_dtype": jnp.float32}),
        *((shapes(n=16, k=k), {}) for k in (2, 4, 8, 16)),
        ((*shapes(n=1, h=64), shape(4, 8192, dtype=jnp.int32)), {"few_window": 300}),
    ],
)
def test_lowers_for_hopper(lower_for_h100, arrays, options):
    text = lower_for_h100(functools.partial(full_size, **options), *arrays)
    assert text.count("mosaic_gpu_v2") == 1


@pytest.mark.usefixtures("x64")
def test_lowers_where_types_of_64_bits_are_on(lower_for_h100):
    arrays = *shapes(), shape(4, 8192, dtype=jnp.int64)
    assert "mosaic_gpu_v2" in lower_for_h100(full_size, *arrays)


def test_lowers_under_shard_map_and_vmap():
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = jax.sharding.AbstractMesh(
        (2,), ("data",), (AxisType.Auto,), abstract_device=device
    )
    spec = PartitionSpec("data")
    sharded = jax.shard_map(
        jax.vmap(full_size), mesh=mesh, in_specs=spec, out_specs=spec
    )
    arrays = [shape(4, *x.shape) for x in shapes(b=2, t=300, s=300)]
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(sharded).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu_v2" in lowered.as_text()


@pytest.mark.parametrize(
    ("width", "window", "step"),
    [(128, 512, 256), (128, 513, 128), (128, 384, 128), (64, 64, 64), (64, 10**6, 256)],
)
def test_steps_hardly_reach_beyond_the_window(width, window, step):
    tiling = kernel._tiling(width, window, positions=1)
    assert tiling.step == step
    assert tiling.slots >= 2 * tiling.blocks


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"n": 128}, None),
        ({"h": 64, "dtype": jnp.float16}, None),
        ({"dtype": jnp.float32}, "must be bf16 or fp16, not float32"),
        ({"h": 96}, "must both be 64 or 128 wide, not (96, 96)"),
        ({"limited": True}, None),
        ({"n": 16, "k": 16}, None),
        ({"n": 16, "k": 16, "h": 64}, "for keys 128 wide"),
        ({"n": 16, "k": 16, "limited": True}, "of one document"),
        ({"n": 96}, "one query head or a multiple of 64 must have a kv head, not 96"),
        ({"many_window": 63}, "of at least 64 keys"),
        ({"n": 4, "k": 4, "many_window": 255}, "of at least 256 keys"),
        ({"b": 1, "t": 131}, "131 tiles of 64 rows do not keep the GPU busy"),
        ({"scale": -1.0}, "scale must be positive"),
    ],
)
def test_says_what_it_does_not_support(monkeypatch, changes, reason):
    monkeypatch.setattr(_mosaic, "unavailable", lambda: None)
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    options = {"few_window": 32, "many_window": 512, "scale": 1.0, "limited": False}
    options |= {x: changes[x] for x in options if x in changes}
    sizes = {x: y for x, y in changes.items() if x not in options}
    actual = unsupported_mosaic(*shapes(**sizes), **options)
    assert actual == reason or reason in actual
