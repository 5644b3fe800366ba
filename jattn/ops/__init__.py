"""What each scheme computes: pure functions of arrays, without parameters."""

from jattn.ops.dense import dense_attention

__all__ = ["dense_attention"]
