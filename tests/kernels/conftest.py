"""What tests of kernels share."""

import collections
import types

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jattn.pallas import _mosaic


@pytest.fixture
def beside_a_gpu(monkeypatch):
    """Gives the machine an H100, which JAX computes on unless told otherwise."""
    gpu = types.SimpleNamespace(
        platform="gpu",
        device_kind="NVIDIA H100 PCIe",
        compute_capability="9.0",
        core_count=114,
    )
    cpus = jax.local_devices(backend="cpu")
    monkeypatch.setattr(
        jax, "local_devices", lambda backend=None: cpus if backend == "cpu" else [gpu]
    )


@pytest.fixture
def compiled_triton(monkeypatch):
    """The functions that `compile_triton` has compiled: the keys of this dictionary."""
    from jax_triton import triton_lib

    # A kernel that an earlier test has compiled would not be compiled again.
    caches = collections.defaultdict(dict)
    monkeypatch.setattr(
        triton_lib.TritonFunction, "_kernel_cache", property(lambda x: caches[x.fn])
    )
    return caches


@pytest.fixture
def compile_triton(monkeypatch, tmp_path, compiled_triton):
    """Compiles a function's Triton kernels for an H100, on any machine.

    Returns a function of a function and its argument shapes that gives, for each
    kernel by name, its PTX and its shared memory in bytes: of several forms of one
    kernel, those of the form that needs most.
    """
    from jax_triton import triton_lib

    monkeypatch.setattr(triton_lib, "_JAX_TRITON_DUMP_DIR", str(tmp_path))

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
def without_mosaic_kernels(monkeypatch):
    """Chooses Mosaic kernels as on an H100, but leaves calls of nothing in their place.

    So that `compile_triton` gets the Triton kernels that work beside them: without a
    GPU no program of both can be lowered for one.
    """

    def call(kernel, *operands, outputs, name, **_):
        return list(jax.ffi.ffi_call(name, list(outputs))(*operands))

    monkeypatch.setattr(_mosaic, "unavailable", lambda: None)
    monkeypatch.setattr(_mosaic, "call", call)


@pytest.fixture
def no_races(capsys):
    """Fails a test in whose Mosaic kernels the interpreter has found a race."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out
