"""The shared memory of the forward kernel in Mosaic, and its tiling.

See `jattn.pallas.selective.mosaic`.
"""

import dataclasses
import functools
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jattn.pallas import _mosaic
from jattn.pallas.selective.mosaic_items import CONSUMERS, ROWS, Sizes

# The axis of the thread blocks that share the bias.
CLUSTER = "cluster"


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      heads: Heads of a thread block, 1 or 2, of one kv head.
      cluster: Thread blocks that share the bias, 1, 2 or 4.
      keys: Keys of a step, 64 or 128.
      query_slots: Tiles of queries of a consumer, 1 or 2.
      slots: Slots of the ring of keys and values, at least 3.
      bias_slots: Slots of the ring of the bias, at least 2.
      programs: Thread blocks.
    """

    heads: int
    cluster: int
    keys: int
    query_slots: int
    slots: int
    bias_slots: int
    programs: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      query: [query_slots, CONSUMERS, ROWS, H].
      ring: [slots, keys, H], keys and values.
      bias: fp32 [bias_slots, queries of an item / 16, keys / 8, NUMBERS], in fragments.
      weights: [CONSUMERS, ROWS, keys], P in the interpreter, else None.
      query_full: Of each slot.
      query_empty: Of each slot.
      ring_full: Of each slot.
      ring_empty: Of each slot, in all thread blocks that share keys and values.
      bias_full: Of each slot.
      bias_empty: Of each slot, in all thread blocks of the cluster.
    """

    query: Any
    ring: Any
    bias: Any
    weights: Any
    query_full: Any
    query_empty: Any
    ring_full: Any
    ring_empty: Any
    bias_full: Any
    bias_empty: Any

    def empty(self, tiling: Tiling):
        """Barriers of empty slots, and how many of them."""
        return (
            (self.query_empty, tiling.query_slots),
            (self.ring_empty, tiling.slots),
            (self.bias_empty, tiling.bias_slots),
        )


def memory_types(tiling: Tiling, sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """The types of Memory's attributes."""
    matrix = functools.partial(_mosaic.matrix, dtype=dtype)

    def full(slots, copies):
        return plgpu.Barrier(num_barriers=slots, num_arrivals=copies)

    def empty(slots, shared):
        if not shared:
            return plgpu.Barrier(num_barriers=slots, num_arrivals=CONSUMERS)
        return plgpu.ClusterBarrier(
            collective_axes=(CLUSTER,), num_barriers=slots, num_arrivals=CONSUMERS
        )

    return {
        "query": matrix(tiling.query_slots, CONSUMERS, ROWS, sizes.width),
        "ring": matrix(tiling.slots, tiling.keys, sizes.width),
        "bias": plgpu.SMEM((tiling.bias_slots, *sizes.bias_shape), jnp.float32),
        "weights": matrix(CONSUMERS, ROWS, tiling.keys)
        if _mosaic.interpretation()
        else None,
        "query_full": full(tiling.query_slots, CONSUMERS),
        "query_empty": empty(tiling.query_slots, shared=False),
        "ring_full": full(tiling.slots, 1),
        "ring_empty": empty(tiling.slots, shared=sizes.keys_shared),
        "bias_full": full(tiling.bias_slots, 1),
        "bias_empty": empty(tiling.bias_slots, shared=sizes.cluster > 1),
    }
