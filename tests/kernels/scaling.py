"""Triton functions that a kernel of another module calls."""

import triton


@triton.jit
def _times(x, factor):
    return x * factor


@triton.jit
def scaled(x, factor):
    return _times(x, factor)
