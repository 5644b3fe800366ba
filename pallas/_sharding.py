"""What kernels need to know of shard_map."""

from collections.abc import Sequence

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


def varying_axes(arrays: Sequence[jax.Array]) -> frozenset[str]:
    """The mesh axes over which one of the arrays varies inside shard_map."""
    return frozenset[str]().union(
        *(jax.typeof(x).manual_axis_type.varying for x in arrays)
    )
