"""The Mosaic kernel that scores blocks: interpreted, and lowered for Hopper."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jattn.ops import nsa_selection
from jattn.pallas import _device, _mosaic, _triton, selection, tuning
from jattn.pallas.selection import mosaic as kernel
from jattn.pallas.selection import triton
from tests.kernels.test_selection import (
    FINE,
    log_sum_exp,
    nsa_inputs,
    nsa_kernel,
    nsa_xla,
)

# One thread block goes through all items, and through all slots.
SMALL = kernel.Tiling(
    consumers=2, tiles=1, slots=2, key_slots=1, programs=1, turns=True
)

# Here 128 windows are 512 tokens.
CASES = {
    "several items": (dict(t=70, s=1200, **FINE), {}),
    "three heads": (dict(t=20, s=600, g=3, **FINE), dict(slots=5)),
    "one head": (dict(t=70, s=600, g=1, **FINE), dict(slots=3, turns=False)),
    "one head, longer windows": (
        dict(t=70, s=900, g=1, kernel_size=12, stride=4, block_size=16),
        dict(consumers=3),
    ),
    "three consumers": (dict(t=20, s=1600, **FINE), dict(consumers=3)),
    "several tiles, keys ahead": (
        dict(t=150, s=1200, g=1, **FINE),
        dict(tiles=2, key_slots=2, slots=3),
    ),
    "several thread blocks": (
        dict(b=2, t=20, s=1100, k=2, g=1, **FINE),
        dict(key_slots=2, programs=3),
    ),
    "the paper's sizes": (dict(t=100, s=1000, h=128), {}),
    "no overlap": (dict(t=65, s=900, kernel_size=4, stride=4, block_size=16), {}),
    "one window a block": (dict(t=65, kernel_size=8, stride=8, block_size=8), {}),
    "sixteen windows a block": (
        dict(t=65, s=900, kernel_size=16, stride=4, block_size=64),
        {},
    ),
    "from the first token": (dict(t=65, **FINE), {}),
}


def inputs(**sizes):
    """As nsa_inputs, of bf16 values."""
    query, key_cmp, options = nsa_inputs(**{"h": 64, "k": 1, **sizes})
    query, key_cmp = (x.astype(jnp.bfloat16) for x in (query, key_cmp))
    return query, key_cmp, options


def wide(*arrays):
    return [x.astype(jnp.float32) for x in arrays]


@pytest.fixture(autouse=True)
def available(monkeypatch):
    """Lets the kernel run where Triton's would."""
    monkeypatch.setattr(_mosaic, "unavailable", lambda: None)
    monkeypatch.setattr(_device, "multiprocessors", lambda: 132)
    monkeypatch.setattr(selection, "MIN_TILES", 0)


def run(query, key_cmp, options, tiling=SMALL, lse=None):
    """The lists by the kernel's scores."""
    if lse is None:
        lse = log_sum_exp(*wide(query, key_cmp), options)
    with tuning.force("selection_scores_mosaic", tiling) as requests:
        lists = nsa_kernel(query, key_cmp, lse, **options)
    assert requests
    return lists


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize("case", CASES)
def test_equals_the_jnp_form(case):
    sizes, changes = CASES[case]
    query, key_cmp, options = inputs(**sizes)
    actual = run(query, key_cmp, options, dataclasses.replace(SMALL, **changes))
    np.testing.assert_array_equal(actual, nsa_xla(*wide(query, key_cmp), options))


@pytest.mark.usefixtures("no_races")
def test_in_chunks(monkeypatch):
    query, key_cmp, options = inputs(t=150, s=300, g=1, **FINE)
    # Of 64 queries, each with 48 scores.
    monkeypatch.setattr(triton, "SCORE_BYTES", 70 * 4 * 48)
    expected = nsa_xla(*wide(query, key_cmp), options)
    np.testing.assert_array_equal(run(query, key_cmp, options), expected)


@pytest.mark.usefixtures("no_races")
def test_one_plane_holds_the_sum_of_two(monkeypatch):
    query, key_cmp, options = inputs(t=70, s=900, g=2, **FINE)
    two = run(query, key_cmp, options)
    monkeypatch.setattr(triton, "MAX_JOINED", 2)
    np.testing.assert_array_equal(run(query, key_cmp, options), two)


@pytest.mark.usefixtures("no_races")
def test_memory_nobody_sees_may_hold_anything():
    query, key_cmp, options = inputs(t=70, s=300, **FINE)
    lse = log_sum_exp(*wide(query, key_cmp), options)
    first = nsa_kernel(*wide(query, key_cmp), lse, **options)
    length = options["length"] - 20
    options |= {"length": length}
    query, lse = query[:, :50], lse[:, :50]
    hidden = (length - FINE["kernel_size"]) // FINE["stride"] + 1
    poisoned = key_cmp.at[:, hidden:].set(jnp.nan)
    actual = run(query, poisoned, options, lse=lse)
    np.testing.assert_array_equal(actual, first[:, :50])


def test_the_operation_runs_it_where_it_can(monkeypatch):
    query, key_cmp, options = inputs(t=65, **FINE)
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    lse = log_sum_exp(*wide(query, key_cmp), options)
    select = functools.partial(
        nsa_selection.select_blocks_by_lse, scale=None, implementation=None, **options
    )
    with tuning.force("selection_scores_mosaic", SMALL) as requests:
        actual = select(query, key_cmp, lse)
        assert requests
    np.testing.assert_array_equal(actual, nsa_xla(*wide(query, key_cmp), options))


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def shapes(b=1, t=8192, n=64, k=4, h=128, m=511, dtype=jnp.bfloat16):
    """Query, compressed keys and lse."""
    return (
        shape(b, t, n, h, dtype=dtype),
        shape(b, m, k, h, dtype=dtype),
        shape(b, n, t, dtype=jnp.float32),
    )


def score(query, key_cmp, lse, step, cells=4, planes=2):
    """The kernel's launch for chunks of 4096 queries."""
    b, _, k, width = key_cmp.shape
    return kernel.block_scores(
        query,
        key_cmp,
        lse,
        step,
        None,
        scores=shape(b, k, 4096, planes, 288, dtype=jnp.float32),
        length=8192,
        kernel_size=32,
        stride=16,
        cells=cells,
        scale_log2=0.1,
        tiling=triton.heuristic_mosaic_tiling(width, query.shape[2] // k),
    )


STEP = shape(1, dtype=jnp.int32)


# Lowering fails if a thread block takes more shared memory than there is.
@pytest.mark.parametrize(
    ("arrays", "options"),
    [
        (shapes(), {}),
        (shapes(t=8001, m=600), {"cells": 16}),
        (shapes(h=64, dtype=jnp.float16, n=12), {"cells": 1}),
        (shapes(n=16, k=16), {"planes": 1}),
    ],
)
def test_lowers_for_hopper(lower_for_h100, arrays, options):
    lowered = lower_for_h100(functools.partial(score, **options), *arrays, STEP)
    assert lowered.count("mosaic_gpu_v2") == 1


@pytest.mark.usefixtures("x64")
def test_lowers_where_types_of_64_bits_are_on(lower_for_h100):
    assert "mosaic_gpu_v2" in lower_for_h100(score, *shapes(), STEP)


def test_lowers_under_shard_map_and_vmap():
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = jax.sharding.AbstractMesh(
        (2,), ("data",), (AxisType.Auto,), abstract_device=device
    )
    spec = PartitionSpec("data")
    sharded = jax.shard_map(jax.vmap(score), mesh=mesh, in_specs=spec, out_specs=spec)
    arrays = [shape(4, *x.shape, dtype=x.dtype) for x in (*shapes(), STEP)]
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(sharded).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu_v2" in lowered.as_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"t": 8449}, None),
        ({"n": 12, "h": 64, "t": 9000, "dtype": jnp.float16}, None),
        ({"dtype": jnp.float32}, "must both be bf16 or fp16, not"),
        ({"h": 96}, "must be 64 or 128 wide, not 96"),
        ({"packed": True}, "it knows no documents"),
        ({"cells": 3}, "must be 1, 2, 4, 8 or 16 strides long, not 3"),
        ({"t": 8191}, "512 tiles of queries do not keep the GPU busy"),
    ],
)
def test_says_what_it_does_not_support(monkeypatch, changes, reason):
    monkeypatch.setattr(selection, "MIN_TILES", 4)
    options = {"packed": False, "cells": 4}
    options |= {x: changes[x] for x in options if x in changes}
    sizes = {x: y for x, y in changes.items() if x not in options}
    actual = selection.unsupported_mosaic(*shapes(**sizes)[:2], **options)
    assert actual == reason or reason in actual
