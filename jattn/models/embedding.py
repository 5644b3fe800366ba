"""Embedding tables whose gradients are fp32 sums in a fixed order.

JAX's own gradient of ``table[tokens]`` adds rows by atomics in the dtype of the rows.
On a GPU thousands of tokens wait for each other to add to the row of a frequent byte,
the order of the sum changes from run to run, and a sum in 16 bits stops growing at a
few hundred of them.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jattn.pallas._sharding import vary_alike

# Elements of the one-hot matrix that the gradient multiplies by, at most at a time.
_MAX_ONE_HOT = 2**26


def embed(table: jax.Array, tokens: jax.Array, dtype: Any = None) -> jax.Array:
    """Rows of a table, with a gradient that sums in fp32 what each row gets.

    Args:
      table: [R, D].
      tokens: int [...], smaller than R; one that is not gives NaN.
      dtype: Of the result; the table's if None.

    Returns:
      [..., D].
    """
    return _embed(*vary_alike(table, tokens), dtype or table.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _embed(table, tokens, dtype):
    return jnp.take(table, tokens, axis=0).astype(dtype)


def _forward(table, tokens, dtype):
    return _embed(table, tokens, dtype), (table, tokens)


def _backward(_, saved, gradient):
    table, tokens = saved
    rows, width = table.shape
    tokens = tokens.reshape(-1)  # [N]
    gradient = gradient.reshape(-1, width)  # [N, D]
    count = min(rows, max(1, _MAX_ONE_HOT // max(1, tokens.size)))

    def sum_rows(first):
        one_hot = jax.nn.one_hot(tokens - first, count, dtype=gradient.dtype)  # [N, C]
        return jnp.einsum(
            "nc,nd->cd",
            one_hot,
            gradient,
            # Or the gradients would be rounded to TF32 where they are fp32.
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    sums = jax.lax.map(sum_rows, jnp.arange(0, rows, count))
    return sums.reshape(-1, width)[:rows].astype(table.dtype), None


_embed.defvjp(_forward, _backward)


class Embed(nn.Embed):
    """`flax.linen.Embed` with the gradient of `embed`."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Embeds tokens int [...] as [..., features] in dtype."""
        return embed(self.embedding, inputs, self.dtype)
