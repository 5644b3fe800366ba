"""Fixtures of the trainer's tests."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="module")
def compiled_programs(tmp_path_factory):
    """Compiles each program of a module's tests once; the folder of the programs."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = [getattr(jax.config, name) for name in names]
    folder = str(tmp_path_factory.mktemp("compiled"))
    for name, value in zip(names, (folder, 0, -1), strict=True):
        jax.config.update(name, value)
    # JAX looks at the folder once, at the first program it compiles.
    compilation_cache.reset_cache()
    yield folder
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def environment(compiled_programs):
    """Makes another process find those programs."""
    return {
        "JAX_COMPILATION_CACHE_DIR": compiled_programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
