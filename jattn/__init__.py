"""Sequence mixers beyond plain attention, for JAX and Flax."""

from jattn import models, nn, ops
from jattn.models import generate
from jattn.ops import *  # noqa: F403

__version__ = "0.1.0"

__all__ = ["generate", "models", "nn", "ops"]
__all__ += ops.__all__
