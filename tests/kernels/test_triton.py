"""jattn.pallas._triton: one launch for GPUs and for Triton's interpreter."""

import functools
import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl
from jax._src.interpreters import partial_eval
from jax_triton import triton_lib

from jattn.ops.dense import dense_attention
from jattn.pallas import _device, _triton
from tests.kernels.scaling import scaled
from tests.support import (
    assert_equal_up_to_rounding,
    normal,
    shard_over_batch,
)


@triton.jit
def _scale_kernel(x_ptr, factor, size, y_ptr, peak_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size, other=-float("inf"))
    y = scaled(x, factor)
    tl.store(y_ptr + index, y, mask=index < size)
    tl.store(peak_ptr + tl.program_id(0), tl.max(y))


def scale(x, factor=3.0, programs=2):
    """X times factor, and the maximum of each block of 16."""
    return _triton.call(
        _scale_kernel,
        x,
        factor,
        x.size,
        outputs=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((2,), jnp.float32),
        ],
        grid=(programs, 1),
        BLOCK=16,
    )


def test_interpreter_runs_the_kernel_and_its_helpers():
    x = np.arange(24, dtype=np.float32)
    y, peaks = scale(jnp.asarray(x))
    np.testing.assert_array_equal(y, 3 * x)
    np.testing.assert_array_equal(peaks, [45, 69])


def test_memory_nobody_writes_is_poisoned():
    y, peaks = scale(jnp.arange(24.0), programs=1)
    assert np.all(np.isnan(y[16:]))
    assert np.isnan(peaks[1])


def test_transformations_agree():
    x = jnp.arange(48.0).reshape(2, 24)
    expected = jnp.stack([scale(row)[1] for row in x])
    loop = jax.lax.scan(lambda _, row: (None, scale(row)[1]), None, x)[1]
    batched = jax.jit(jax.vmap(lambda row: scale(row)[1]))(x)
    sharded = shard_over_batch(lambda x: scale(x[0])[1][None])(x)
    for actual in (loop, batched, sharded):
        np.testing.assert_array_equal(actual, expected)


@triton.jit
def _matmul_kernel(
    x,  # descriptor [M, K]
    y,  # descriptor [K, N]
    rows,
    columns,
    out_ptr,  # [M, N]
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK
    column = tl.program_id(1) * BLOCK
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, INNER, STEP):
        total = tl.dot(x.load([row, start]), y.load([start, column]), total)
    out = tl.make_tensor_descriptor(
        out_ptr, shape=[rows, columns], strides=[columns, 1], block_shape=[BLOCK, BLOCK]
    )
    out.store([row, column], total.to(out_ptr.dtype.element_ty))


def matmul(x, y, block=16):
    """The product of x [M, K] and y [K, N]."""
    rows, columns = x.shape[0], y.shape[1]
    [out] = _triton.call(
        _matmul_kernel,
        _triton.Descriptor(x, (block, block)),
        _triton.Descriptor(y, (block, block)),
        rows,
        columns,
        outputs=[jax.ShapeDtypeStruct((rows, columns), x.dtype)],
        grid=(triton.cdiv(rows, block), triton.cdiv(columns, block)),
        INNER=x.shape[1],
        BLOCK=block,
        STEP=block,
    )
    return out


def test_descriptors_read_and_write_tiles():
    # No size is a multiple of a tile's; a row is one of 16 bytes.
    x, y = normal(0, (2, 40, 24), (2, 24, 28))
    expected = jnp.matmul(x, y, precision="highest")
    for actual in (
        jnp.stack([matmul(*pair) for pair in zip(x, y, strict=True)]),
        jax.jit(jax.vmap(matmul))(x, y),
        shard_over_batch(lambda x, y: matmul(x[0], y[0])[None])(x, y),
    ):
        assert_equal_up_to_rounding(actual, expected)


def test_descriptors_compile_to_tensor_copies_for_hopper(compile_triton):
    shape = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    matmul_of_tiles = functools.partial(matmul, block=64)
    ptx, shared_bytes = compile_triton(matmul_of_tiles, shape, shape)["_matmul_kernel"]
    assert "cp.async.bulk.tensor.2d.shared" in ptx
    assert "cp.async.bulk.tensor.2d.global.shared" in ptx
    assert "wgmma.mma_async" in ptx
    assert shared_bytes <= 227 * 1024


@pytest.mark.parametrize(
    ("shape", "tile", "message"),
    [
        ((40, 6), (16, 4), "strides are multiples of 16 bytes; got float32 [40, 6]"),
        ((0, 8), (16, 8), "not empty"),
        ((2,) * 5 + (8,), (1,) * 5 + (8,), "1 to 5 axes"),
        ((40, 8), (16,), "block_shape must have 2 powers of two"),
        ((40, 8), (16, 6), "powers of two"),
        ((40, 8), (16, 2), "at least 16 bytes; got [16, 2] of float32"),
    ],
)
def test_says_what_no_descriptor_can_describe(shape, tile, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _triton.Descriptor(jnp.zeros(shape), tile)


@triton.jit
def _add_kernel(x_ptr, total_ptr, size, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    mask = (index < size) & (index % 2 == 0)
    total = tl.load(total_ptr + index, mask=mask) + tl.load(x_ptr + index, mask=mask)
    tl.store(total_ptr + index, total, mask=mask)


def add_to_even(x, total):
    """Total plus x where the index is even."""
    [total] = _triton.call(
        _add_kernel, x, total, x.size, outputs=[], updated=[1], grid=(1, 1), BLOCK=32
    )
    return total


def test_updated_operands_keep_what_is_not_written():
    x, total = jnp.arange(24.0), jnp.full(24, 100.0)
    expected = np.where(np.arange(24) % 2, 100, 100 + np.arange(24))
    np.testing.assert_array_equal(jax.jit(add_to_even)(x, total), expected)
    np.testing.assert_array_equal(total, np.full(24, 100))
    shape = jax.ShapeDtypeStruct((24,), jnp.float32)
    traced = jax.jit(add_to_even).trace(shape, shape)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    [alias] = re.findall(r"#stablehlo.output_operand_alias<([^>]*)>", lowered)
    assert "operand_index = 1" in alias
    # Before and after the call, to keep slices apart from it.
    assert lowered.count("optimization_barrier") == 2


def test_updated_operands_under_transformations():
    x, total = jnp.arange(48.0).reshape(2, 24), jnp.full((2, 24), 100.0)
    expected = jnp.stack([add_to_even(*row) for row in zip(x, total, strict=True)])
    sharded = shard_over_batch(lambda x, total: add_to_even(x[0], total[0])[None])
    for actual in (
        jax.jit(jax.vmap(add_to_even))(x, total),
        jax.vmap(add_to_even, in_axes=(0, None))(x, total[0]),
        sharded(x, total),
    ):
        np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(total, np.full((2, 24), 100))


def call_scale(x, factor=3.0, size=24, dtype=jnp.float32, **options):
    outputs = [jax.ShapeDtypeStruct((24,), dtype), jax.ShapeDtypeStruct((2,), dtype)]
    options = {"outputs": outputs, "BLOCK": 16} | options
    return _triton.call(_scale_kernel, x, factor, size, grid=(2, 1), **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": np.zeros(24, np.float32)}, TypeError, "x_ptr of _scale_kernel must be"),
        ({"size": np.int32(24)}, TypeError, "got <class 'numpy.int32'>"),
        ({"factor": True}, TypeError, "factor of _scale_kernel must be"),
        ({"x": jnp.zeros(24, bool)}, ValueError, "uint64; got bool"),
        ({"dtype": jnp.float8_e5m2}, ValueError, "y_ptr of _scale_kernel must be of"),
        ({"outputs": []}, ValueError, "y_ptr, peak_ptr; got 3 operands and 0 outputs"),
        ({"updated": [2]}, ValueError, "operand 2 is <class 'int'>"),
        ({"block": 16}, ValueError, "missing [], unknown ['block']"),
    ],
)
def test_says_what_a_call_cannot_be_made_with(arguments, error, message):
    assert len(call_scale(jnp.zeros(24))) == 2
    with pytest.raises(error, match=re.escape(message)):
        call_scale(**{"x": jnp.zeros(24)} | arguments)


def test_says_which_constants_are_missing():
    x, total = jnp.zeros(24), jnp.zeros(24)
    with pytest.raises(ValueError, match=r"_add_kernel: missing \['BLOCK'\]"):
        _triton.call(_add_kernel, x, total, 24, outputs=[], updated=[1], grid=(1, 1))


def test_compiles_for_any_cuda_from_12_8_on_after_interpreting(compile_triton):
    scale(jnp.arange(24.0))
    shape = jax.ShapeDtypeStruct((24,), jnp.float32)
    ptx, _ = compile_triton(scale, shape)["_scale_kernel"]
    assert ".version 8.7" in ptx
    assert ".target sm_90a" in ptx


def test_lowers_inside_shard_map_and_vmap(compile_triton):
    row = jax.ShapeDtypeStruct((2, 24), jnp.float32)
    sharded = shard_over_batch(lambda x: scale(x[0])[0][None])
    mapped = jax.vmap(lambda x: scale(x)[0])
    assert "_scale_kernel" in compile_triton(lambda x: sharded(x) + mapped(x), row)
    matrix = jax.ShapeDtypeStruct((2, 32, 32), jnp.float32)
    sharded = shard_over_batch(lambda x: matmul(x[0], x[0])[None])
    assert "_matmul_kernel" in compile_triton(sharded, matrix)


def test_dead_code_elimination_knows_both_conventions(monkeypatch):
    # JAX 0.12 calls these rules with one more argument than 0.11.
    primitive = triton_lib.triton_kernel_call_p
    monkeypatch.setitem(partial_eval.dce_rules, primitive, lambda used, equation: None)
    monkeypatch.setattr(partial_eval, "_default_dce_rule", lambda used, live, eqn: None)
    _triton._patch_dead_code_elimination.cache_clear()
    _triton._patch_dead_code_elimination()
    _triton._patch_dead_code_elimination.cache_clear()
    equation = jax.make_jaxpr(lambda x, y: x + y)(1.0, 2.0).eqns[0]
    live, kept = partial_eval.dce_rules[primitive]([False], [True], equation)
    assert (live, kept) == ([True, True], equation)


def test_says_what_is_missing(monkeypatch, request):
    assert "needs a GPU, and JAX runs on 'cpu'" in _triton.unavailable(90)
    request.getfixturevalue("beside_a_gpu")
    assert "8.0 only, and this GPU (NVIDIA H100 PCIe)" in _triton.unavailable(80)
    assert _triton.unavailable(80, 90) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'jattn[gpu]'" in _triton.unavailable(80)


def test_extras_for_gpus_differ_in_cuda_only():
    path = pathlib.Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(path.read_text())["project"]["optional-dependencies"]
    jax_for_gpus, *triton_packages = extras["gpu"]
    jax_for_cuda12 = jax_for_gpus.replace("cuda13", "cuda12")
    assert jax_for_cuda12 != jax_for_gpus
    assert extras["gpu-cuda12"] == [jax_for_cuda12, *triton_packages]
    assert set(triton_packages) <= set(extras["dev"])


@pytest.mark.usefixtures("beside_a_gpu")
def test_a_default_device_is_what_kernels_are_chosen_for():
    query = jax.ShapeDtypeStruct((1, 40, 2, 16), jnp.float32)

    def chosen_kernels():
        jaxpr = jax.jit(lambda *x: dense_attention(*x)).trace(query, query, query).jaxpr
        return re.findall(r"\w+_kernel", str(jaxpr))

    assert _device.multiprocessors() == 114
    assert "forward_kernel" in chosen_kernels()
    for device in ("cpu", jax.devices("cpu")[1]):
        with jax.default_device(device):
            assert "JAX runs on 'cpu'" in _triton.unavailable(90)
            assert _device.multiprocessors() == _device.DEFAULT_MULTIPROCESSORS
            assert _device.compute_capability() == _device.DEFAULT_CAPABILITY
            assert chosen_kernels() == []


@pytest.mark.usefixtures("beside_a_gpu")
def test_warns_where_a_kernel_for_a_gpu_gets_to_a_cpu():
    x = jnp.arange(24.0)
    with pytest.warns(match=r"_scale_kernel, chosen for a GPU.*implementation='xla'"):
        jax.block_until_ready(scale(x))
    with jax.default_device("cpu"):
        jax.block_until_ready(scale(x))
