"""Settings and fixtures every test shares."""

import os

# Two host devices, so that shard_map has something to shard over. Tests compile far
# longer than they compute, so the compiler is told not to try hard.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Pallas' interpreter blocks threads of XLA's pool at barriers. With few of them, all
# may wait for a computation that none is left to run.
os.environ.setdefault("PJRT_NPROC", str(max(8, os.cpu_count() or 1)))

import hypothesis
import jax
import pytest

# Compiling for a new shape takes longer than hypothesis' default deadline; the same
# examples every time keep a red run reproducible.
hypothesis.settings.register_profile(
    "jattn", deadline=None, max_examples=8, derandomize=True, database=None
)
hypothesis.settings.load_profile("jattn")


@pytest.fixture(scope="module", autouse=True)
def _without_what_others_compiled():
    """Drops compiled programs after a module's tests.

    Each takes some of the memory mappings that a process may have, and with those of
    all modules a worker runs out of them: XLA then crashes while it compiles.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Runs a test with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield
