"""jattn.pallas._triton: one launch for GPUs and for Triton's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from jax._src.interpreters import partial_eval
from jax_triton import triton_lib

from jattn.pallas import _triton
from tests.support import shard_over_batch


@triton.jit
def _scaled(x, factor):
    return x * factor


@triton.jit
def _scale_kernel(x_ptr, factor, size, y_ptr, peak_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size, other=-float("inf"))
    y = _scaled(x, factor)
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


def test_compiles_for_any_cuda_from_12_8_on_after_interpreting(compile_triton):
    scale(jnp.arange(24.0))
    shape = jax.ShapeDtypeStruct((24,), jnp.float32)
    ptx, _ = compile_triton(scale, shape)["_scale_kernel"]
    assert ".version 8.7" in ptx
    assert ".target sm_90a" in ptx


def test_lowers_inside_shard_map(compile_triton):
    shape = jax.ShapeDtypeStruct((2, 24), jnp.float32)
    sharded = shard_over_batch(lambda x: scale(x[0])[0][None])
    assert "_scale_kernel" in compile_triton(sharded, shape)


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


def test_says_what_is_missing(monkeypatch):
    assert "needs a GPU, and JAX runs on 'cpu'" in _triton.unavailable(90)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_triton, "compute_capability", lambda: 80)
    assert "tested on compute capability 9.0 only" in _triton.unavailable(90)
    assert _triton.unavailable(80, 90) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'jattn[gpu]'" in _triton.unavailable(80)
