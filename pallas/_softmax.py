"""What every softmax needs, and its gradients."""

import math

import jax
import jax.numpy as jnp

# GPUs have exponentials in base 2: kernels take logits in units of log 2.
LOG2_E = math.log2(math.e)


def delta(
    out: jax.Array, out_gradient: jax.Array, lse_gradient: jax.Array
) -> jax.Array:
    """The row sums of P ∘ dP, less the gradient of the log-sum-exp: dS = P ∘ (dP - it).

    Args:
      out: [..., V], the output P V'.
      out_gradient: [..., V], in the dtype in which kernels compute dP from it.
      lse_gradient: [...], of the natural log-sum-exp.

    Returns:
      fp32 [...].
    """
    # The kernels see the gradient as rounded to its dtype: delta has to be of that one,
    # and not of one that XLA knows in higher precision, for the two to cancel.
    if out_gradient.dtype == jnp.bfloat16:
        # Leaves XLA free to sum where it computes the gradient.
        wide = jax.lax.reduce_precision(out_gradient.astype(jnp.float32), 8, 7)
    else:
        # Rounding to fp16 that way would drop denormal numbers.
        wide = jax.lax.optimization_barrier(out_gradient).astype(jnp.float32)
    return jnp.sum(out.astype(jnp.float32) * wide, axis=-1) - lse_gradient
