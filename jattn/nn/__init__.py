"""Flax (linen) modules: parameters and wiring around one operation each."""

from collections.abc import Mapping

import flax.linen as nn

from jattn.nn.cache import cache_bytes
from jattn.nn.dense import DenseAttention
from jattn.nn.moba import MixtureOfBlockAttention
from jattn.nn.monarch import BlockDiagonalLinear, BlockDiagonalMLP, MonarchMixer
from jattn.nn.nsa import NativeSparseAttention
from jattn.nn.selective import SelectiveAttention
from jattn.nn.simplicial import TwoSimplicialAttention

MIXERS: Mapping[str, type[nn.Module]] = {
    "dense": DenseAttention,
    "moba": MixtureOfBlockAttention,
    "monarch": MonarchMixer,
    "nsa": NativeSparseAttention,
    "selective": SelectiveAttention,
    "simplicial": TwoSimplicialAttention,
}

__all__ = [
    "MIXERS",
    "BlockDiagonalLinear",
    "BlockDiagonalMLP",
    "DenseAttention",
    "MixtureOfBlockAttention",
    "MonarchMixer",
    "NativeSparseAttention",
    "SelectiveAttention",
    "TwoSimplicialAttention",
    "cache_bytes",
]
