"""Launching Triton kernels from JAX: the only file that touches jax-triton.

On a GPU a kernel is compiled to PTX while JAX lowers the call. On a CPU the same
kernel runs in Triton's interpreter on numpy buffers, so that an operation and its
gradients are tested without a GPU.
"""

import contextlib
import functools
import importlib.util
import inspect
import threading
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The PTX of CUDA 12.8, which every driver from then on can load. By default Triton
# writes the newest version its own ptxas knows, and older drivers refuse that.
PTX_VERSION = 87

# What a machine without a GPU compiles for.
DEFAULT_CAPABILITY = 90

# Triton's interpreter keeps the position in the grid in one global object.
_interpreter_lock = threading.Lock()


def unavailable(*capabilities: int) -> str | None:
    """Why Triton kernels cannot run here, or None.

    Args:
      *capabilities: Compute capabilities the caller's kernel was tested on, such as
        90 for an H100 or H200.
    """
    if any(importlib.util.find_spec(n) is None for n in ("jax_triton", "triton")):
        return "it needs the packages jax-triton and triton (pip install 'jattn[gpu]')"
    if jax.default_backend() != "gpu":
        return f"it needs a GPU, and JAX runs on {jax.default_backend()!r}"
    if compute_capability() not in capabilities:
        tested = ", ".join(f"{c / 10}" for c in capabilities)
        return (
            f"it was tested on compute capability {tested} only, and this GPU "
            f"({jax.devices()[0].device_kind}) has {compute_capability() / 10}"
        )
    return None


@functools.cache
def compute_capability() -> int:
    """That of the first GPU, such as 90; DEFAULT_CAPABILITY without a GPU."""
    if jax.default_backend() != "gpu":
        return DEFAULT_CAPABILITY
    return int(jax.devices()[0].compute_capability.replace(".", ""))


def call(
    kernel: Any,
    *operands: jax.Array | int | float,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int] | tuple[int, int, int],
    num_warps: int = 4,
    num_stages: int = 3,
    max_registers: int | None = None,
    flops: int = 0,
    **constants: Any,
) -> list[jax.Array]:
    """Calls a Triton kernel.

    Works under jit, scan, shard_map and vmap. A batch axis added by vmap becomes a
    loop of launches: an operation that wants it in the grid gives its kernel a batch
    axis of its own. Has no derivative.

    Args:
      kernel: A function decorated with triton.jit. Its parameters are the operands,
        then one pointer for each output, then constants (tl.constexpr).
      *operands: Arrays become pointers; Python numbers are compiled into the kernel.
      outputs: Shapes and dtypes. The kernel has to write every element that anyone
        reads: they start out undefined (NaN, or the lowest integer, on a CPU).
      grid: Number of programs along each axis.
      num_warps: Warps of one program.
      num_stages: Depth of software pipelining.
      max_registers: Registers a thread may have, so that more programs fit on a
        multiprocessor at once; None for as many as the compiler likes.
      flops: Floating-point operations of the call, for profilers.
      **constants: Values of the kernel's tl.constexpr parameters.
    """
    arrays = [x for x in operands if isinstance(x, jax.Array)]
    is_array = [isinstance(x, jax.Array) for x in operands]
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
    nbytes = sum(x.size * x.dtype.itemsize for x in (*arrays, *outputs))

    def merge(arrays):
        remaining = iter(arrays)
        pairs = zip(operands, is_array, strict=True)
        return [next(remaining) if array else number for number, array in pairs]

    def launch(*arrays):
        import jax_triton

        _patch_dead_code_elimination()
        return jax_triton.triton_call(
            *merge(arrays),
            kernel=kernel,
            out_type=outputs,
            grid=grid,
            compute_capability=compute_capability(),
            num_warps=num_warps,
            num_stages=num_stages,
            backend_options={
                "ptx_version": PTX_VERSION,
                "maxnreg": max_registers,
                # Triton's default is about to change; kernels are tested with it on.
                "enable_fp_fusion": True,
            },
            cost_estimate={"flops": flops, "bytes_accessed": nbytes},
            **constants,
        )

    def interpret(*arrays):
        def host(*arrays):
            buffers = [np.array(x) for x in arrays]
            results = [_poisoned(x) for x in outputs]
            _run_interpreter(kernel, grid, merge(buffers), results, constants)
            return results

        return jax.pure_callback(host, outputs, *arrays)

    @jax.custom_batching.sequential_vmap
    def run(*arrays):
        return jax.lax.platform_dependent(*arrays, cpu=interpret, cuda=launch)

    return vary_like(run(*arrays), arrays)


def vary_like(
    results: Sequence[jax.Array], arrays: Sequence[jax.Array]
) -> list[jax.Array]:
    """Inside shard_map, marks results as varying over the mesh axes that arrays do.

    A kernel cannot say so of its outputs, nor a constant that a scan starts from.
    """
    axes = frozenset[str]().union(
        *(jax.typeof(x).manual_axis_type.varying for x in arrays)
    )
    if not axes:
        return list(results)
    return [jax.lax.pcast(x, tuple(axes), to="varying") for x in results]


@functools.cache
def _patch_dead_code_elimination() -> None:
    """Lets jax-triton 0.4.1 run on JAX 0.12.

    That calls the rules of dead code elimination with one more argument. To be removed
    with the first jax-triton that knows of it.
    """
    from jax._src.interpreters import partial_eval
    from jax_triton import triton_lib

    def parameters(rule):
        return len(inspect.signature(rule).parameters)

    primitive = triton_lib.triton_kernel_call_p
    rules: dict[Any, Any] = partial_eval.dce_rules
    default = parameters(partial_eval._default_dce_rule)
    if default == 3 and parameters(rules[primitive]) == 2:
        rules[primitive] = lambda used, live, equation: (
            [True] * len(equation.invars),
            equation,
        )


def _poisoned(output: jax.ShapeDtypeStruct) -> np.ndarray:
    """What no kernel would write."""
    floating = jnp.issubdtype(output.dtype, jnp.floating)
    fill = np.nan if floating else np.iinfo(output.dtype).min
    return np.full(output.shape, fill, output.dtype)


def _run_interpreter(kernel, grid, operands, results, constants):
    """Runs the kernel on numpy arrays; what it writes to results stays there."""
    from triton.runtime.interpreter import InterpretedFunction

    arguments = [
        _Buffer(x) if isinstance(x, np.ndarray) else x for x in (*operands, *results)
    ]
    language = _interpreted_language(kernel.fn.__globals__)
    # A GPU divides by zero and takes log(0) without a word.
    with _interpreter_lock, language, np.errstate(all="ignore"):
        InterpretedFunction(kernel.fn)[grid](*arguments, **constants)


@contextlib.contextmanager
def _interpreted_language(namespace):
    """Replaces the compiled functions that a kernel calls by Python ones.

    They are the helpers of its module and those that triton.language itself is written
    in, such as tl.max. Left alone, the interpreter patches the language again for each
    of them and never undoes it, and nothing compiles afterwards.
    """
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    functions = [
        (names, name, function)
        for names in (namespace, tl.__dict__, tl.standard.__dict__)
        for name, function in list(names.items())
        if isinstance(function, triton.JITFunction)
    ]
    language = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    scope = interpreter._patch_lang(language)
    for names, name, function in functions:
        names[name] = interpreter.InterpretedFunction(function.fn).rewrite()
    try:
        yield
    finally:
        for names, name, function in functions:
            names[name] = function
        scope.restore()


class _Buffer:
    """A numpy array with the methods Triton's interpreter asks of a torch tensor."""

    def __init__(self, array: np.ndarray):
        import triton.language as tl

        names = {"float": "fp", "bfloat": "bf", "int": "int", "uint": "uint"}
        kind = array.dtype.name.rstrip("0123456789")
        bits = array.dtype.name.removeprefix(kind)
        self.array = array
        self.dtype = tl.dtype(names[kind] + bits)

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def new_empty(self, *_, **__):
        return _Buffer(self.array)

    def set_(self, *_):
        return self

    def copy_(self, _):
        """The interpreter's copy back to the device: it worked on this very array."""
