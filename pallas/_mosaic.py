"""Where Mosaic GPU kernels run: on a GPU, or interpreted on a CPU.

On a CPU a kernel runs in Pallas' interpreter, which simulates shared memory,
barriers and asynchronous copies, reports races, and fills what nobody has written with
NaN. It keeps its state in global variables: one kernel at a time, so not under
shard_map over several host devices.

Which of the two it is has to be known while JAX traces the call (see `_device`).
Lowered for a CPU all the same, a kernel for a GPU fails: "Only interpret mode is
supported on CPU backend". Such calls need `implementation="xla"`.
"""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jattn.pallas import _device, _sharding

# Mosaic GPU compiles to the instructions of Hopper; later GPUs have others.
CAPABILITY = 90

# Of the heads that kernels for usual ones have.
WIDTHS = (64, 128)

# What a thread block may have, in bytes, but for barriers.
SHARED_MEMORY = 226 * 1024

# How a consumer's threads share a matrix, and a number per row.
MATRIX = plgpu.Layout.WGMMA
COLUMN = MATRIX.reduce(1)

# Below every logit, yet two of them have a difference.
LOWEST = -1e30


def unavailable() -> str | None:
    """Why Mosaic kernels for Hopper cannot run here, or None."""
    return _device.unsupported(CAPABILITY)


def unsupported(query: jax.Array, value: jax.Array, *, packed: bool) -> str | None:
    """Why kernels for one document and usual heads do not support a call, or None.

    Args:
      query: [B, T, N, H].
      value: [B, S, K, V].
      packed: Whether there are several documents.
    """
    if (reason := unavailable()) is not None:
        return reason
    if packed:
        return "it knows no documents"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query, key and value must be bf16 or fp16, not {query.dtype}"
    widths = query.shape[-1], value.shape[-1]
    if widths not in [(width, width) for width in WIDTHS]:
        wanted = " or ".join(map(str, WIDTHS))
        return f"keys and values must both be {wanted} wide, not {widths}"
    return None


def interpretation() -> plgpu.InterpretGPUParams | None:
    """What `plgpu.kernel` takes as interpret: None where it is lowered for a GPU.

    Some instructions cannot be interpreted; a kernel that has them needs another form
    where this is not None.
    """
    # Unlike Triton's, this interpreter cannot be a branch that lowering for a GPU
    # leaves out: its effects would stay.
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = _device.default_device()
    if device.platform == "gpu":
        return None
    return plgpu.InterpretGPUParams(detect_races=True)


def call(
    kernel: functools.partial[None],
    *operands: jax.Array,
    outputs: Sequence[jax.ShapeDtypeStruct],
    memory: Mapping[str, Any],
    grid: Mapping[str, int],
    consumers: int,
    name: str,
    producers: int = 1,
    cluster: Mapping[str, int] = MappingProxyType({}),
    automatic_barriers: bool = True,
) -> list[jax.Array]:
    """Runs a kernel whose thread blocks are consumers and producers, a warpgroup each.

    Args:
      kernel: Takes references to the operands and outputs, and those to memory by name;
        what it is given beforehand, by name and hashable.
      *operands: Arrays.
      outputs: Their shapes and dtypes.
      memory: Types of shared memory and of barriers.
      grid: Thread blocks, or clusters of them, along each axis by its name.
      consumers: Warpgroups of a thread block besides the producers; all are numbered
        along the axis "warpgroup".
      name: Of the kernel, in profiles.
      producers: Warpgroups that load.
      cluster: Thread blocks of a cluster along each axis by its name; of none if empty.
      automatic_barriers: Whether a warpgroup's threads wait for each other before and
        after whatever they store, and before each copy. A kernel that turns this off
        has waits of its own wherever one thread overwrites or reads what another one
        has used or written; the interpreter does not see if one is missing.

    Returns:
      The outputs.
    """
    results = _run(
        *operands,
        kernel=kernel.func,
        constants=tuple(kernel.keywords.items()),
        outputs=tuple(outputs),
        memory=tuple(memory.items()),
        grid=tuple(grid.items()),
        cluster=tuple(cluster.items()),
        warpgroups=consumers + producers,
        name=name,
        automatic_barriers=automatic_barriers,
    )
    return _sharding.vary_like(results, operands)


# A program that launches a kernel often, as in each of its layers, lowers it once.
@functools.partial(
    jax.jit,
    static_argnames=(
        "kernel",
        "constants",
        "outputs",
        "memory",
        "grid",
        "cluster",
        "warpgroups",
        "name",
        "automatic_barriers",
    ),
)
def _run(
    *operands,
    kernel,
    constants,
    outputs,
    memory,
    grid,
    cluster,
    warpgroups,
    name,
    automatic_barriers,
):
    run = plgpu.kernel(
        functools.partial(kernel, **dict(constants)),
        out_type=list(outputs),
        scratch_types=dict(memory),
        grid=tuple(size for _, size in grid),
        grid_names=tuple(axis for axis, _ in grid),
        cluster=tuple(size for _, size in cluster),
        cluster_names=tuple(axis for axis, _ in cluster),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            unsafe_no_auto_barriers=not automatic_barriers,
        ),
        interpret=interpretation(),
    )
    if _sharding.varying_axes(operands):
        run = _traced_apart(run)
    return run(*operands)


def _traced_apart(function):
    """A function of arrays, for which it does not matter that they vary in shard_map.

    In a kernel, what JAX knows of the mesh axes that references vary over gets lost on
    the way, and the types of its loops contradict it.
    """

    def call(function, arrays):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        jaxpr = jax.make_jaxpr(function)(*shapes)
        return jax.extend.core.jaxpr_as_fun(jaxpr)(*arrays)

    @jax.custom_batching.custom_vmap
    def run(*arrays):
        return call(function, arrays)

    @run.def_vmap
    def _(axis_size, in_batched, *arrays):
        in_axes = [0 if is_batched else None for is_batched in in_batched]
        mapped = jax.vmap(function, in_axes, axis_size=axis_size)
        results = call(mapped, arrays)
        return results, [True] * len(results)

    return run


def matrix(*shape: int, dtype: Any) -> Any:
    """Shared memory for operands of matrix instructions, the last two axes theirs."""
    # Their base class is abstract by accident.
    tile = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # pyright: ignore
    swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore
    return plgpu.SMEM(shape, dtype, transforms=(tile, swizzle))


def barriers(number: int, arrivals: int) -> plgpu.Barrier:
    """So many barriers, each of which waits for so many arrivals."""
    return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals)


def store(ref, value) -> None:
    """Writes from registers to global memory, a few bytes of a thread at a time."""
    # JAX 0.12 asks whether that is meant; 0.11 has no function for it.
    function = getattr(plgpu, "store", None)
    if function is None:
        ref[...] = value
    else:
        function(ref, value, optimized=False)


def div_rem(x, divisor: int):
    """Quotient and remainder of an x that is not negative."""
    return lax.div(x, np.int32(divisor)), lax.rem(x, np.int32(divisor))


def ceil_div(x, divisor: int):
    """Quotient, rounded up, of an x that is not negative."""
    return div_rem(x + (divisor - 1), divisor)[0]


def following(slot, slots: int):
    """The slot of a ring of buffers after this one."""
    return jnp.where(slot + 1 == slots, 0, slot + 1)


def padded(x: jax.Array, axis: int, length: int, value: float = 0.0) -> jax.Array:
    """Fills x up to that length with a value."""
    if x.shape[axis] == length:
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, padding, constant_values=value)


def multiple(x: jax.Array, axis: int, divisor: int, least: int = 0) -> jax.Array:
    """Fills x up to a multiple of the divisor, and at least to a length, with zeros."""
    length = max(x.shape[axis], least)
    return padded(x, axis, length + -length % divisor)


def product(x, y):
    """The product of two matrices in shared memory."""

    def multiply(total):
        plgpu.wgmma(total, x, y)
        return total[...]

    shape = x.shape[0], y.shape[1]
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def filled(value: float, shape: tuple[int, ...], layout=MATRIX):
    """An fp32 array in registers, of one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def zeros(shape: tuple[int, int]):
    """An fp32 matrix of zeros in registers."""
    return filled(0, shape)
