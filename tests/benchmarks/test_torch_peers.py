"""PyTorch's attention beside ours, with something else in the place of PyTorch."""

import contextlib
import sys
import types

import numpy as np
import pytest

from benchmarks import nsa, torch_peers
from benchmarks.measure import measure
from tests.support import normal

SMALL = dict(length=64, heads=2, kv_heads=1, width=16)


@pytest.fixture
def torch(monkeypatch):
    """Its tensors are NumPy's arrays, and it averages where it should attend."""
    calls = []

    def attend(query, key, value, *, is_causal, enable_gqa):
        assert is_causal
        assert enable_gqa
        calls.append([x.shape for x in (query, key, value)])
        return Tensor(query.array + value.array.mean(axis=(1, 2), keepdims=True))

    class Tensor:
        def __init__(self, array):
            self.array = np.asarray(array)
            self.shape, self.nbytes = self.array.shape, self.array.nbytes

        def transpose(self, *axes):
            return Tensor(self.array.swapaxes(*axes))

    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        synchronize=lambda: None,
        memory_allocated=lambda: 1000,
        max_memory_allocated=lambda: 1_000_000,
        reset_peak_memory_stats=lambda: None,
    )
    module = types.ModuleType("torch")
    module.__spec__ = types.SimpleNamespace()
    module.Tensor, module.from_dlpack, module.cuda = Tensor, Tensor, cuda
    module.no_grad = contextlib.nullcontext
    module.nn = types.SimpleNamespace(
        functional=types.SimpleNamespace(scaled_dot_product_attention=attend)
    )
    module.calls = calls
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


def test_without_pytorch_there_is_no_such_case(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert list(nsa.cases(**SMALL)) == ["jattn", "cudnn"]


def test_without_a_gpu_for_pytorch_there_is_no_such_case(torch):
    torch.cuda.is_available = lambda: False
    assert list(nsa.cases(**SMALL)) == ["jattn", "cudnn"]


def test_attention_by_pytorch_is_timed(torch):
    arrays = normal(0, (1, 64, 2, 16), *[(1, 64, 1, 16)] * 2)
    (case,) = torch_peers.attention(*arrays).values()
    assert case.backward_flops
    forward = case.programs()["forward"]
    forward.lower()
    forward.compile()
    out = forward.compiled(*forward.arguments())
    assert out.shape == (1, 64, 2, 16)
    # Heads come before tokens.
    assert torch.calls == [[(1, 2, 64, 16), (1, 1, 64, 16), (1, 1, 64, 16)]]
    rows = measure({"torch dense": case}, rounds=1, seconds=1e-3, matmul_size=16)
    assert [row["direction"] for row in rows] == [*case.programs()]
    assert rows[0]["milliseconds"] > 0
    assert rows[0]["argument_bytes"] == 4 * 64 * 16 * (2 + 1 + 1)
    assert rows[0]["output_bytes"] == 4 * 64 * 16 * 2
    # What this PyTorch cannot do is an error in the rows.
    assert all("AttributeError" in row["error"] for row in rows[1:])
