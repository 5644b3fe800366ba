"""Where the time of a program goes, kernel by kernel."""

import collections
from typing import Annotated

import tyro
from jax.experimental.mosaic.gpu import profiler

from benchmarks import ops
from benchmarks.torch_peers import TorchCase

REPETITIONS = 3


def profile(
    name: Annotated[str, tyro.conf.Positional],
    /,
    *,
    shapes: tuple[str, ...] = (),
    cases: tuple[str, ...] = (),
    top: int = 12,
) -> None:
    """Prints the GPU time of each kernel that an operation launches, by CUPTI.

    Args:
      name: The operation.
      shapes: Only those whose name contains one of these, such as 64k.
      cases: Only these competitors. Those in PyTorch are left out.
      top: Kernels to print of each program, those that take longest.

    Raises:
      ops.UsageError: There is no such operation or shape.
    """
    modules = ops.modules()
    ops.check_names("operation", [name], modules)
    module = modules[name]
    ops.check_parts(shapes, module.SHAPES)
    for shape, sizes in ops.shapes(module, shapes).items():
        for case, function in module.cases(**sizes).items():
            if (cases and case not in cases) or isinstance(function, TorchCase):
                continue
            for direction, program in function.programs().items():
                for step in (program.lower, program.compile):
                    program.attempt(step)
                steps = f", {function.steps} steps" if function.steps > 1 else ""
                print(f"\n{shape}, {case}, {direction}{steps}")
                if program.error is not None:
                    print(program.error)
                    continue
                run = profiler.measure(
                    program.compiled, aggregate=False, iterations=REPETITIONS
                )
                _, repetitions = run(*program.arguments())
                milliseconds, launches = collections.Counter(), collections.Counter()
                # The last repetition: the first ones warm the caches.
                for kernel, time in repetitions[-1]:
                    milliseconds[kernel] += time
                    launches[kernel] += 1
                print(f"{milliseconds.total():9.3f} ms in all")
                for kernel, time in milliseconds.most_common(top):
                    print(f"{time:9.3f} ms {launches[kernel]:6} x {kernel[:100]}")
