"""Flax (linen) modules: parameters and wiring around one operation each."""

from collections.abc import Mapping

import flax.linen as nn

from jattn.nn.cache import cache_bytes
from jattn.nn.dense import DenseAttention

MIXERS: Mapping[str, type[nn.Module]] = {
    "dense": DenseAttention,
}

__all__ = ["MIXERS", "DenseAttention", "cache_bytes"]
