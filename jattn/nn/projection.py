"""The linear maps into heads and out of them that every attention module has.

They belong to the module whose ``__call__`` uses them and take its dtypes.
"""

from typing import Any

import flax.linen as nn
import jax


def to_heads(
    module: Any, name: str, x: jax.Array, *shape: int, norm: bool = False
) -> jax.Array:
    """Maps x [B, T, features] to [B, T, *shape], such as (N, H), without bias.

    With a norm, what every head gets has an RMS of one before a learned scale [H].
    """
    x = nn.DenseGeneral(
        shape,
        use_bias=False,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        name=name,
    )(x)
    if norm:
        x = nn.RMSNorm(
            dtype=module.dtype, param_dtype=module.param_dtype, name=f"{name}_norm"
        )(x)
    return x


def from_heads(module: Any, out: jax.Array, features: int) -> jax.Array:
    """Maps what the heads give [B, T, N, V] to [B, T, features], without bias."""
    return nn.DenseGeneral(
        features,
        axis=(-2, -1),
        use_bias=False,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        name="out",
    )(out)
