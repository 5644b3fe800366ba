"""What tests of kernels share."""

import jax
import pytest


@pytest.fixture
def compile_triton(monkeypatch, tmp_path):
    """Compiles a function's Triton kernels for an H100, on any machine.

    Returns a function of a function and its argument shapes that gives, for each
    kernel by name, its PTX and its shared memory in bytes.
    """
    from jax_triton import triton_lib

    monkeypatch.setattr(triton_lib, "_JAX_TRITON_DUMP_DIR", str(tmp_path))
    # A kernel that an earlier test has compiled would not be compiled again.
    monkeypatch.setattr(
        triton_lib.TritonFunction, "_kernel_cache", property(lambda _: {})
    )

    def compile_triton(function, *shapes):
        jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
        kernels = {}
        for path in tmp_path.rglob("*.ptx"):
            info = path.with_suffix(".compile_info").read_text()
            kernels[path.stem] = path.read_text(), int(info.split()[-1])
        return kernels

    return compile_triton
