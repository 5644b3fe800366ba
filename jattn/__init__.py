"""Sequence mixers beyond plain attention, for JAX and Flax."""

from jattn import nn, ops
from jattn.ops import *  # noqa: F403

__version__ = "0.1.0"

__all__ = ["nn", "ops"]
__all__ += ops.__all__
