"""What kernels need to know of shard_map."""

from collections.abc import Sequence
from typing import Any

import jax


def vary_like(
    results: Sequence[jax.Array], arrays: Sequence[jax.Array]
) -> list[jax.Array]:
    """Inside shard_map, marks results as varying over the mesh axes that arrays do.

    A kernel cannot say so of its outputs, nor a constant that a scan starts from.
    """
    axes = varying_axes(arrays)
    if not axes:
        return list(results)
    return [jax.lax.pcast(x, tuple(axes), to="varying") for x in results]


def vary_alike(*arrays: Any) -> tuple[Any, ...]:
    """Inside shard_map, lets all arrays vary over the mesh axes that any varies over.

    A custom_vjp may not give a gradient that varies for an argument that does not: keys
    that all devices share, say, while each has heads of its own. That of an argument
    that was made to vary is summed over the axes, as without kernels.

    Args:
      *arrays: Trees of arrays.

    Returns:
      The same trees.
    """
    axes = varying_axes(jax.tree.leaves(arrays))

    def vary(x):
        missing = axes - varying_axes([x])
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(vary, arrays)


def varying_axes(arrays: Sequence[jax.Array]) -> frozenset[str]:
    """The mesh axes over which one of the arrays varies inside shard_map."""
    return frozenset[str]().union(
        *(jax.typeof(x).manual_axis_type.varying for x in arrays)
    )
