"""PyTorch's attention beside ours, in the same process, where a machine has PyTorch.

Arrays are shared with PyTorch and not copied. A call is timed as ours are: by the wall
clock, with many of them under way.
"""

import dataclasses
import importlib.util
from typing import Any

import jax

from benchmarks.dense import cudnn
from benchmarks.measure import Case, Program


class TorchCase(Case):
    """A Case whose function takes and returns PyTorch tensors."""

    def programs(self) -> dict[str, Program]:
        """What to time of it, by direction."""
        import torch

        def forward(*tensors):
            with torch.no_grad():
                return self.function(*tensors)

        def arrays():
            return *self.arrays, *self.constants

        found: dict[str, Program] = {"forward": _TorchProgram(forward, arrays)}
        if not self.backward_flops:
            return found

        def run(*tensors):
            inputs = [x.detach().requires_grad_() for x in tensors[: len(self.arrays)]]
            return self.function(*inputs, *tensors[len(self.arrays) :]), inputs

        def gradients(out, inputs, cotangent, retain_graph):
            return torch.autograd.grad(
                out, inputs, cotangent, retain_graph=retain_graph
            )

        def cotangent():
            torch.manual_seed(3)
            return torch.randn_like(forward(*_tensors(arrays())))

        def saved():
            return *run(*_tensors(arrays())), cotangent(), True

        def both(cotangent, *tensors):
            return gradients(*run(*tensors), cotangent, False)

        found["backward"] = _TorchProgram(gradients, saved)
        found["forward and backward"] = _TorchProgram(
            both, lambda: (cotangent(), *_tensors(arrays()))
        )
        return found


class _TorchProgram(Program):
    """A function of tensors, which is compiled as it is called, if at all."""

    def lower(self) -> None:
        self.compiled = lambda *arguments: self.function(*_tensors(arguments))

    def compile(self) -> None:
        pass

    def memory(self) -> dict[str, int]:
        import torch

        arguments = _tensors(self.arguments())
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = self.function(*arguments)
        peak = torch.cuda.max_memory_allocated() - before
        out_bytes = sum(x.nbytes for x in _leaves(out))
        return {
            "argument_bytes": sum(x.nbytes for x in _leaves(arguments)),
            "output_bytes": out_bytes,
            "temporary_bytes": max(0, peak - out_bytes),
        }

    @staticmethod
    def wait(values: Any) -> Any:
        import torch

        torch.cuda.synchronize()
        return values


def _tensors(values):
    import torch

    return tuple(
        torch.from_dlpack(x) if isinstance(x, jax.Array) else x for x in values
    )


def _leaves(values):
    import torch

    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, tuple | list):
        return [leaf for x in values for leaf in _leaves(x)]
    return []


def available() -> bool:
    """Whether there is PyTorch, with a GPU."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> dict[str, Case]:
    """Dense causal attention as PyTorch chooses it, [B, T, N, H] to [B, T, K, H]."""
    if not available():
        return {}

    def attend(query, key, value):
        import torch

        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query, key, value)),
            is_causal=True,
            enable_gqa=True,
        )
        return out.transpose(1, 2)

    dense = cudnn(query, key, value)
    return {
        "torch dense": dataclasses.replace(TorchCase(**vars(dense)), function=attend)
    }
