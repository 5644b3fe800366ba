"""Tests of kernels on a GPU; a machine without one collects none of them."""

import jax

collect_ignore_glob = [] if jax.default_backend() == "gpu" else ["test_*.py"]
