"""Launching Triton kernels from JAX: the only file that touches jax-triton.

On a GPU a kernel is compiled to PTX while JAX lowers the call. On a CPU the same
kernel runs in Triton's interpreter on numpy buffers, so that an operation and its
gradients are tested without a GPU. That is far too slow for anything else: a kernel
that was chosen for a GPU warns if it comes to this (see `_device`).
"""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import math
import threading
import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.pallas import _device, _sharding

# The PTX of CUDA 12.8, which every driver from then on can load. By default Triton
# writes the newest version its own ptxas knows, and older drivers refuse that.
PTX_VERSION = 87

# Of arrays, on a GPU and in the interpreter.
DTYPES = (
    *("bfloat16", "float16", "float32", "float64"),
    *("int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
)

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
    return _device.unsupported(*capabilities)


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """An array that a kernel reads through TMA: `descriptor.load([row, column])`.

    Hopper's copy engine then fetches whole tiles, without addresses in registers, and
    gives 0 beyond the array's end. For an output, or an array whose shape is known to
    the kernel only, call `tl.make_tensor_descriptor` in the kernel: it works as well.

    Attributes:
      array: Of at most 5 axes; the bytes of all but the last (its strides) have to be
        multiples of 16.
      block_shape: Shape of a tile: powers of two, at least 16 bytes along the last
        axis, and where a load starts along it has to be a multiple of 16 bytes.

    Raises:
      ValueError: The array or the tile cannot be described.
    """

    array: jax.Array
    block_shape: tuple[int, ...]

    def __post_init__(self):
        shape, itemsize = self.array.shape, self.array.dtype.itemsize
        strides = [math.prod(shape[i:]) * itemsize for i in range(1, len(shape))]
        if not 1 <= len(shape) <= 5 or 0 in shape or any(x % 16 for x in strides):
            raise ValueError(
                "a descriptor needs an array of 1 to 5 axes that is not empty and "
                "whose strides are multiples of 16 bytes; got "
                f"{self.array.dtype} {list(shape)}"
            )
        tile = self.block_shape
        powers = all(x > 0 and x & (x - 1) == 0 for x in tile)
        if len(tile) != len(shape) or not powers or tile[-1] * itemsize < 16:
            raise ValueError(
                f"block_shape must have {len(shape)} powers of two, the last one for "
                f"at least 16 bytes; got {list(tile)} of {self.array.dtype}"
            )


def call(
    kernel: Any,
    *operands: jax.Array | Descriptor | int | float,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int] | tuple[int, int, int],
    updated: Sequence[int] = (),
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
      *operands: Arrays become pointers, or descriptors if they come in a Descriptor;
        Python numbers are compiled into the kernel.
      outputs: Shapes and dtypes. The kernel has to write every element that anyone
        reads: they start out undefined (NaN, or the lowest integer, on a CPU).
      grid: Number of programs along each axis.
      updated: Which operands, arrays, the kernel writes to. Their new values come after
        the outputs; what it does not write stays as it was.
      num_warps: Warps of one program.
      num_stages: Depth of software pipelining.
      max_registers: Registers a thread may have, so that more programs fit on a
        multiprocessor at once; None for as many as the compiler likes.
      flops: Floating-point operations of the call, for profilers.
      **constants: Values of the kernel's tl.constexpr parameters.

    Returns:
      The outputs, then the new values of the updated operands.

    Raises:
      TypeError: An operand is something else, such as a numpy array or number.
      ValueError: The operands and outputs are not as many as the kernel has, one is of
        another dtype than DTYPES, such as bool, an updated operand is not an array, or
        a constant is missing or has a name that the kernel does not have.
    """
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
    _check(kernel, operands, outputs, updated, constants)
    arrays = [
        x.array if isinstance(x, Descriptor) else x
        for x in operands
        if isinstance(x, jax.Array | Descriptor)
    ]
    after: list[Any] = [operands[i] for i in updated]
    after = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in after]
    nbytes = sum(x.size * x.dtype.itemsize for x in (*arrays, *outputs))

    def merge(arrays, describe) -> Iterator[Any]:
        """The operands, with these arrays in place of theirs."""
        remaining = iter(arrays)
        for operand in operands:
            if isinstance(operand, Descriptor):
                yield describe(next(remaining), operand.block_shape)
            elif isinstance(operand, jax.Array):
                yield next(remaining)
            else:
                yield operand

    def launch(*arrays):
        import jax_triton

        _patch_dead_code_elimination()
        arguments = list(merge(arrays, jax_triton.TensorDescriptor.from_array))
        # XLA may make one operation of a call and the slices around it. It reads and
        # writes the whole arrays in place, but forgets that the call does both to one.
        for i in updated:
            arguments[i] = jax.lax.optimization_barrier(arguments[i])
        # References are meant to take the place of aliases, but under shard_map what
        # they become does not know the mesh axes it varies over.
        aliases = {operand: len(outputs) + i for i, operand in enumerate(updated)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "input_output_aliases is deprecated")
            results = jax_triton.triton_call(
                *arguments,
                kernel=kernel,
                input_output_aliases=aliases,
                out_type=[*outputs, *after],
                grid=grid,
                compute_capability=_device.compute_capability(),
                num_warps=num_warps,
                num_stages=num_stages,
                backend_options={
                    "ptx_version": PTX_VERSION,
                    "maxnreg": max_registers,
                    # The default is about to change; kernels are tested with it.
                    "enable_fp_fusion": True,
                },
                cost_estimate={"flops": flops, "bytes_accessed": nbytes},
                **constants,
            )
        new, values = results[: len(outputs)], results[len(outputs) :]
        return [*new, *map(jax.lax.optimization_barrier, values)]

    chosen_for = _device.default_device().platform

    def interpret(*arrays):
        def host(*arrays):
            if chosen_for == "gpu":
                warnings.warn(
                    f"{kernel.fn.__name__}, chosen for a GPU, runs in Triton's "
                    "interpreter on a CPU, which is slow: use implementation='xla', "
                    "or jax.default_device for the CPU",
                    stacklevel=1,
                )
            buffers = [_Buffer(np.array(x)) for x in arrays]
            results = [_poisoned(x) for x in outputs]
            arguments = *merge(buffers, _describe), *map(_Buffer, results)
            _run_interpreter(kernel, grid, arguments, constants)
            return [*results, *(arguments[i].array for i in updated)]

        return jax.pure_callback(host, [*outputs, *after], *arrays)

    @jax.custom_batching.sequential_vmap
    def run(*arrays):
        return jax.lax.platform_dependent(*arrays, cpu=interpret, cuda=launch)

    return _sharding.vary_like(run(*arrays), arrays)


def _check(kernel, operands, outputs, updated, constants):
    """Raises the errors of `call`."""
    name = kernel.fn.__name__
    parameters = [x.name for x in kernel.params if not x.is_constexpr]
    if len(operands) + len(outputs) != len(parameters):
        raise ValueError(
            f"{name} needs operands and outputs for {', '.join(parameters)}; got "
            f"{len(operands)} operands and {len(outputs)} outputs"
        )
    for parameter, x in zip(parameters, operands, strict=False):
        x = x.array if isinstance(x, Descriptor) else x
        if isinstance(x, bool) or not isinstance(x, jax.Array | int | float):
            raise TypeError(
                f"{parameter} of {name} must be a jax.Array, a Descriptor of one, or a "
                f"Python int or float; got {type(x)}"
            )
    for parameter, x in zip(parameters, (*operands, *outputs), strict=True):
        x = x.array if isinstance(x, Descriptor) else x
        if not isinstance(x, int | float) and x.dtype.name not in DTYPES:
            raise ValueError(
                f"{parameter} of {name} must be of one of the dtypes "
                f"{', '.join(DTYPES)}; got {x.dtype}"
            )
    for i in updated:
        if not isinstance(operands[i], jax.Array):
            raise ValueError(
                f"an updated operand of {name} must be a jax.Array; operand {i} is "
                f"{type(operands[i])}"
            )
    optional = {x.name for x in kernel.params if x.is_constexpr and x.has_default}
    needed = {x.name for x in kernel.params if x.is_constexpr} - optional
    missing = sorted(needed - constants.keys())
    unknown = sorted(constants.keys() - needed - optional)
    if missing or unknown:
        raise ValueError(
            f"the constants do not fit {name}: missing {missing}, unknown {unknown}"
        )


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


def _run_interpreter(kernel, grid, arguments, constants):
    """Runs the kernel; what it writes to arguments stays there."""
    from triton.runtime.interpreter import InterpretedFunction

    language = _interpreted_language(kernel.fn.__globals__)
    # A GPU divides by zero and takes log(0) without a word.
    with _interpreter_lock, language, np.errstate(all="ignore"):
        InterpretedFunction(kernel.fn)[grid](*arguments, **constants)


@contextlib.contextmanager
def _interpreted_language(namespace):
    """Replaces the compiled functions that a kernel calls by Python ones.

    They are those that its module names, those that these name in turn, and those that
    triton.language itself is written in, such as tl.max. Left alone, the interpreter
    patches the language again for each of them and never undoes it, and nothing
    compiles afterwards.
    """
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    namespaces = [namespace, tl.__dict__, tl.standard.__dict__]
    functions = []
    for names in namespaces:  # which grows meanwhile
        for name, function in names.items():
            if isinstance(function, triton.JITFunction):
                functions.append((names, name, function))
                if not any(function.fn.__globals__ is x for x in namespaces):
                    namespaces.append(function.fn.__globals__)
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


def _describe(buffer, block_shape):
    """The descriptor that Triton's interpreter takes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(buffer, list(block_shape))


class _Buffer:
    """A numpy array with the methods Triton's interpreter asks of a torch tensor."""

    def __init__(self, array: np.ndarray):
        import triton.language as tl

        name = array.dtype.name.replace("bfloat", "bf").replace("float", "fp")
        self.array = array
        self.shape = array.shape
        self.dtype = tl.dtype(name)

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
