"""Work that goes through in steps, all of which write to the same arrays."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.pallas import _triton

# Steps up to which a program lists them one by one. XLA's loops wait for the host at
# each of theirs; more steps than these take so long that it no longer matters.
MAX_LISTED = 128


def each_step[T](count: int, run: Callable[[jax.Array, T | None], T]) -> T:
    """Runs steps 0 to count - 1 in order.

    Args:
      count: Number of steps, at least 1.
      run: Of the step, int32 [1], and the results so far, None in the first one, gives
        the results.
    """
    results = run(jnp.asarray(np.zeros(1, np.int32)), None)
    if count > MAX_LISTED:
        return jax.lax.fori_loop(1, count, lambda i, x: run(i[None], x), results)
    for step in range(1, count):
        results = run(jnp.asarray(np.full(1, step, np.int32)), results)
    return results


def write(
    kernel: Any,
    *operands: jax.Array | int | float,
    results: Sequence[jax.Array | jax.ShapeDtypeStruct],
    **options: Any,
) -> list[jax.Array]:
    """Calls a Triton kernel that writes to arrays, or makes them in the first step.

    Steps share their temporaries: a kernel that only reads one takes it as a result as
    well, so that the next step overwrites it after that.

    Args:
      kernel: Its parameters are the operands, pointers to the results, and constants.
      *operands: See `_triton.call`.
      results: Arrays to write to, and after them shapes and dtypes of new ones.
      **options: See `_triton.call`.

    Returns:
      The results, written.
    """
    arrays = [x for x in results if isinstance(x, jax.Array)]
    new: list[Any] = list(results[len(arrays) :])
    values = _triton.call(
        kernel,
        *operands,
        *arrays,
        outputs=new,
        updated=range(len(operands), len(operands) + len(arrays)),
        **options,
    )
    return values[len(new) :] + values[: len(new)]
