"""Sequence mixers beyond plain attention, for JAX and Flax."""

from jattn import nn, ops
from jattn.ops import *  # noqa: F403
from jattn.ops import __all__ as _operations

__version__ = "0.1.0"

__all__ = [*_operations, "nn", "ops"]
