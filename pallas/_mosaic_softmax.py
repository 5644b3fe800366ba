"""The softmax of a consumer in Mosaic GPU, which meets one tile of logits at a time."""

import functools
import operator

import jax.numpy as jnp
from jax import lax

from jattn.pallas import _mosaic
from jattn.pallas._mosaic import COLUMN, LOWEST
from jattn.pallas._softmax import LOG2_E

# Columns of the partial sums of a row's weights.
PARTIAL = 8


def begin(rows: int):
    """Peak [rows] and total [rows, PARTIAL] of a softmax over nothing."""
    return _mosaic.filled(LOWEST, (rows,), COLUMN), _mosaic.zeros((rows, PARTIAL))


def add(scale: float, logits, peak, total):
    """Adds logits to a softmax.

    Args:
      scale: Factor of the logits.
      logits: [rows, keys].
      peak: [rows], in units of log 2.
      total: [rows, PARTIAL].

    Returns:
      What this multiplies earlier results by [rows], the logits' weights, and the new
      peak and total.
    """
    factor, keys = scale * LOG2_E, logits.shape[1]
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=1) * factor)
    decay = jnp.exp2(peak - new_peak)
    base = lax.broadcast_in_dim(new_peak, logits.shape, [0])
    weights = jnp.exp2(logits * factor - base)
    # A thread adds up its own columns; the last of all logits is followed by the sum
    # over threads.
    columns = [weights[:, i : i + PARTIAL] for i in range(0, keys, PARTIAL)]
    decays = lax.broadcast_in_dim(decay, total.shape, [0])
    total = total * decays + functools.reduce(operator.add, columns)
    return decay, weights, new_peak, total
