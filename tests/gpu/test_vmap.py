"""Operations under vmap and shard_map, and kernels that write to their operands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl
from jax.sharding import AxisType, PartitionSpec

import jattn
from benchmarks import nsa
from jattn.pallas import _triton
from tests.support import normal, relative_rms

T, WIDTH = 1200, 64

ROUNDING = {jnp.bfloat16: 1e-3, jnp.float32: 1e-5}

# The shapes of an operation's arrays [B, T, .., width] after these two axes: queries,
# then keys and values.
HEADS = (4, WIDTH), (2, WIDTH), (2, WIDTH)


def native_sparse(*arrays):
    """Native sparse attention whose gates are all alike."""
    gates = jnp.full((*arrays[0].shape[:3], 3), 0.4)
    return nsa.native_sparse(*arrays, gates)


OPERATIONS = {
    "dense": (functools.partial(jattn.dense_attention, window=300), HEADS),
    "native sparse": (
        native_sparse,
        (*HEADS, *HEADS[1:], *HEADS[1:]),
    ),
    "native sparse, large groups": (
        native_sparse,
        ((16, 128), *[(1, 128)] * 6),
    ),
    "mixture of blocks": (
        functools.partial(jattn.mixture_of_block_attention, block_size=128, top_k=3),
        HEADS,
    ),
    "2-simplicial": (
        functools.partial(jattn.two_simplicial_attention, windows=(64, 16)),
        (*HEADS, *HEADS[1:]),
    ),
    "selective": (
        functools.partial(jattn.selective_attention, skip_error=1e-3),
        HEADS,
    ),
    "selective, fp32": (jattn.selective_attention, HEADS),
}


@triton.jit
def add_kernel(x_ptr, total_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    even = index % 2 == 0
    total = tl.load(total_ptr + index) + tl.load(x_ptr + index)
    tl.store(total_ptr + index, total, mask=even)


def add_to_even(x, total):
    """Total [16] plus x [16] where the index is even."""
    [total] = _triton.call(
        add_kernel, x, total, outputs=[], updated=[1], grid=(1, 1), SIZE=16
    )
    return total


def test_maps_update_what_each_element_has():
    x, total = normal(0, (5, 16), (5, 16))
    actual = jax.jit(jax.vmap(add_to_even))(x, total)
    even = np.arange(16) % 2 == 0
    np.testing.assert_array_equal(actual, np.where(even, total + x, total))


def test_slices_that_are_updated_are_copies():
    x, totals = normal(0, (16,), (5, 16))

    @jax.jit
    def run(i):
        # Nobody else has the array, but it is used once more.
        shifted = totals + 1
        return shifted.at[i + 1].set(add_to_even(x, shifted[i])), shifted

    even = np.arange(16) % 2 == 0
    actual, shifted = run(2)
    np.testing.assert_array_equal(shifted, totals + 1)
    expected = np.array(shifted)
    expected[3] = np.where(even, shifted[2] + x, shifted[2])
    np.testing.assert_array_equal(actual, expected)


def dtype_of(name):
    return jnp.float32 if "fp32" in name else jnp.bfloat16


def gradients_of(operation):
    """A function of arrays: the operation's output and gradients."""

    def gradients(*arrays):
        out, pullback = jax.vjp(operation, *arrays)
        return out, *pullback(jnp.cos(out))

    return gradients


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_map(name):
    operation, shapes = OPERATIONS[name]
    dtype, gradients = dtype_of(name), gradients_of(operation)
    arrays = normal(0, *[(3, 1, T, *shape) for shape in shapes], dtype=dtype)
    actual = jax.jit(jax.vmap(gradients))(*arrays)
    one_by_one = jax.jit(gradients)
    for i in range(3):
        expected = one_by_one(*(x[i] for x in arrays))
        for x, y in zip(actual, expected, strict=True):
            # XLA may add up in another order, and that alone.
            assert relative_rms(x[i], y) <= ROUNDING[dtype]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_shard(name):
    operation, shapes = OPERATIONS[name]
    dtype, gradients = dtype_of(name), gradients_of(operation)
    arrays = normal(0, *[(2, T, *shape) for shape in shapes], dtype=dtype)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=spec, out_specs=spec)
    expected = jax.jit(gradients)(*arrays)
    for x, y in zip(jax.jit(sharded)(*arrays), expected, strict=True):
        assert relative_rms(x, y) <= ROUNDING[dtype]


def test_budgets_map():
    query, key, value = normal(0, *[(2, T, *x) for x in HEADS], dtype=jnp.bfloat16)
    budgets = jnp.array([T, 300, 2])
    attend = functools.partial(jattn.selective_attention, query, key, value)
    actual = jax.jit(jax.vmap(lambda x: attend(budget=x)))(budgets)
    for x, budget in zip(actual, budgets, strict=True):
        np.testing.assert_array_equal(x, jax.jit(attend)(budget=budget))
