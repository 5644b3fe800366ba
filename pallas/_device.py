"""The GPU that JAX runs on, if there is one."""

import functools

import jax

# What a machine without a GPU compiles for.
DEFAULT_CAPABILITY = 90
DEFAULT_MULTIPROCESSORS = 132


@functools.cache
def compute_capability() -> int:
    """That of the first GPU, such as 90; DEFAULT_CAPABILITY without a GPU."""
    if jax.default_backend() != "gpu":
        return DEFAULT_CAPABILITY
    return int(jax.devices()[0].compute_capability.replace(".", ""))


def multiprocessors() -> int:
    """Those of the first GPU; those of an H100 or H200 without a GPU."""
    return getattr(jax.devices()[0], "core_count", None) or DEFAULT_MULTIPROCESSORS


def unsupported(*capabilities: int) -> str | None:
    """Why a kernel tested on these compute capabilities cannot run here, or None."""
    if jax.default_backend() != "gpu":
        return f"it needs a GPU, and JAX runs on {jax.default_backend()!r}"
    if compute_capability() not in capabilities:
        tested = ", ".join(f"{c / 10}" for c in capabilities)
        return (
            f"it was tested on compute capability {tested} only, and this GPU "
            f"({jax.devices()[0].device_kind}) has {compute_capability() / 10}"
        )
    return None
