"""Rotary position embedding."""

import jax
import jax.numpy as jnp


def rope(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + H/2}) by ``position * base ** (-2i / H)``.

    Args:
      x: [B, T, N, H] with even H.
      positions: int [B, T].
      base: Longest wavelength over 2π.

    Returns:
      [B, T, N, H] in x's dtype; the rotation is computed in fp32 (fp64 for fp64 x).
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"rotary embedding needs an even head width; got {width}")
    dtype = jnp.result_type(jnp.float32, x.dtype)
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=dtype) / width)
    angles = positions[..., None, None].astype(dtype) * frequencies  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
