"""The GPU that JAX computes on, if there is one.

Kernels are chosen while JAX traces a function, for the device that it computes on by
default. Other choices of a device are not known then: on a machine with a GPU, arrays
committed to a CPU or `jax.jit(backend="cpu")` take a kernel chosen for the GPU to the
CPU. Such calls need `implementation="xla"`, or `jax.default_device` for the CPU.
"""

from typing import Any

import jax

# What a machine without a GPU compiles for.
DEFAULT_CAPABILITY = 90
DEFAULT_MULTIPROCESSORS = 132


def default_device() -> jax.Device:
    """That of jax.default_device, or the first one."""
    config: Any = jax.config
    device = config.jax_default_device
    if device is None or isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device


def compute_capability() -> int:
    """That of the GPU, such as 90; DEFAULT_CAPABILITY without a GPU."""
    device = default_device()
    if device.platform != "gpu":
        return DEFAULT_CAPABILITY
    return int(device.compute_capability.replace(".", ""))


def multiprocessors() -> int:
    """Those of the GPU; those of an H100 or H200 without a GPU."""
    return getattr(default_device(), "core_count", None) or DEFAULT_MULTIPROCESSORS


def unsupported(*capabilities: int) -> str | None:
    """Why a kernel tested on these compute capabilities cannot run here, or None."""
    device = default_device()
    if device.platform != "gpu":
        return f"it needs a GPU, and JAX runs on {device.platform!r}"
    if compute_capability() not in capabilities:
        tested = ", ".join(f"{c / 10}" for c in capabilities)
        return (
            f"it was tested on compute capability {tested} only, and this GPU "
            f"({device.device_kind}) has {compute_capability() / 10}"
        )
    return None
