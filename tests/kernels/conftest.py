"""What tests of kernels share."""

import collections

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh


@pytest.fixture
def compile_triton(monkeypatch, tmp_path):
    """Compiles a function's Triton kernels for an H100, on any machine.

    Returns a function of a function and its argument shapes that gives, for each
    kernel by name, its PTX and its shared memory in bytes: of several forms of one
    kernel, those of the form that needs most.
    """
    from jax_triton import triton_lib

    monkeypatch.setattr(triton_lib, "_JAX_TRITON_DUMP_DIR", str(tmp_path))
    # A kernel that an earlier test has compiled would not be compiled again.
    caches = collections.defaultdict(dict)
    monkeypatch.setattr(
        triton_lib.TritonFunction, "_kernel_cache", property(lambda x: caches[x.fn])
    )

    def compile_triton(function, *shapes):
        jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
        kernels = {}
        for path in tmp_path.rglob("*.ptx"):
            info = path.with_suffix(".compile_info").read_text()
            shared_bytes = int(info.split()[-1])
            if shared_bytes >= kernels.get(path.stem, ("", 0))[1]:
                kernels[path.stem] = path.read_text(), shared_bytes
        return kernels

    return compile_triton


@pytest.fixture
def lower_for_h100():
    """Lowers a function with Mosaic kernels for an H100, on any machine.

    Returns a function of a function and its argument shapes that gives the module's
    text. This proves that Pallas can lower the kernels, no more: ptxas sees them only
    on a GPU.
    """
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)

    def lower_for_h100(function, *shapes):
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(function).trace(*shapes)
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    return lower_for_h100


@pytest.fixture
def no_races(capsys):
    """Fails a test in whose Mosaic kernels the interpreter has found a race."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out
