"""Times functions side by side in one process.

The data is on the device, all programs are compiled before the first is timed, and
rounds go through all of them, so that a clock that changes meets them all alike. The
figures are medians over the rounds, of wall-clock time with many calls under way: a
program that a GPU finishes sooner than the next one is sent to it is timed as it is
sent. `profile` sees the GPU's time alone.
"""

import concurrent.futures
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Case:
    """A function to time.

    Attributes:
      function: Of the arrays, then the constants; returns one array.
      arrays: What it is differentiated in.
      flops: Floating-point operations a step of it needs, whoever computes it and
        however.
      backward_flops: Those that its gradients need on top; 0 to time it forward only.
      constants: Its other arguments.
      steps: How many times in a row the function does what is to be timed.
    """

    function: Callable[..., jax.Array]
    arrays: tuple[jax.Array, ...]
    flops: int
    backward_flops: int
    constants: tuple[jax.Array, ...] = ()
    steps: int = 1

    def programs(self) -> dict[str, "Program"]:
        """What to time of it, by direction."""
        arguments = (*self.arrays, *self.constants)
        programs = {"forward": Program(self.function, lambda: arguments)}
        if not self.backward_flops:
            return programs

        @functools.cache
        def cotangent():
            out = jax.eval_shape(self.function, *arguments)
            return jax.random.normal(jax.random.key(3), out.shape).astype(out.dtype)

        def save(*arguments):
            count = len(self.arrays)
            arrays, constants = arguments[:count], arguments[count:]
            _, pullback = jax.vjp(lambda *x: self.function(*x, *constants), *arrays)
            return pullback

        def gradients(cotangent, *arguments):
            return save(*arguments)(cotangent)

        programs["backward"] = _Backward(Program(save, lambda: arguments), cotangent)
        programs["forward and backward"] = Program(
            gradients, lambda: (cotangent(), *arguments)
        )
        return programs


def measure(
    cases: Mapping[str, Case],
    *,
    rounds: int = 5,
    seconds: float = 0.1,
    matmul_size: int = 8192,
) -> list[dict[str, Any]]:
    """Times cases forward and backward, in turns with a large matrix product.

    Three programs are timed of each case: "forward"; "backward", which takes what a
    forward pass has saved for it and gives the gradients; and "forward and backward",
    which does both, so that the compiler may save less or fuse more.

    Args:
      cases: What to time, by name.
      rounds: Measurements of each program.
      seconds: Least duration of one measurement, which calls its program repeatedly.
      matmul_size: Rows and columns of the bf16 matrices whose product is the ceiling
        that speeds are compared with.

    Returns:
      A row for each program: "case", "direction", "milliseconds" of a step (the
      median), "fastest_milliseconds", "slowest_milliseconds",
      "useful_flops_per_second", "matmul_flops_per_second", "argument_bytes" (of a
      backward program what forward saved, the inputs included), "output_bytes" and
      "temporary_bytes". A program that could not be compiled or run has "error"
      instead of figures.

    Raises:
      RuntimeError: The matrix product itself failed.
    """
    square = jax.random.normal(
        jax.random.key(2), (matmul_size, matmul_size), jnp.bfloat16
    )
    product = Program(jnp.matmul, lambda: (square, square))
    named = {
        (name, direction): program
        for name, case in cases.items()
        for direction, program in case.programs().items()
    }
    # This compiles the Triton kernels, which threads would not make faster.
    for program in (product, *named.values()):
        program.attempt(program.lower)
    race([product, *named.values()], rounds, seconds)
    if product.error is not None:
        raise RuntimeError(f"the matrix product failed: {product.error}")
    ceiling = 2 * matmul_size**3 / statistics.median(product.times)
    rows = []
    for (name, direction), program in named.items():
        row = {"case": name, "direction": direction}
        if program.error is None:
            case = cases[name]
            flops = {"forward": case.flops, "backward": case.backward_flops}
            useful = sum(n for part, n in flops.items() if part in direction)
            row |= program.figures(useful, case.steps) | {
                "matmul_flops_per_second": ceiling
            }
        else:
            row["error"] = program.error
        rows.append(row)
    return rows


def race(programs: Sequence["Program"], rounds: int, seconds: float) -> None:
    """Compiles lowered programs, then times all of them in every round.

    Args:
      programs: Those that fail keep the error and take no further part.
      rounds: Measurements of each program.
      seconds: Least duration of one measurement.
    """
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda x: x.attempt(x.compile), programs))
    for program in programs:
        program.attempt(functools.partial(program.calibrate, seconds))
    for _ in range(rounds):
        for program in programs:
            program.attempt(program.time)


class Program:
    """A function on its way from Python to times.

    Attributes:
      arguments: Makes what it is called with.
      lowered: The function as JAX lowers it, after `lower`.
      compiled: The function as XLA compiles it, after `compile`.
      error: What went wrong, if anything did.
      times: Seconds per call, of each measurement.
    """

    lowered: jax.stages.Lowered
    compiled: jax.stages.Compiled

    def __init__(self, function: Callable[..., Any], arguments: Callable[[], tuple]):
        self.function = function
        self.arguments = arguments
        self.error: str | None = None
        self.times: list[float] = []
        self._calls = 1

    def attempt(self, step: Callable[[], None]) -> None:
        """Takes a step unless an earlier one failed; keeps what went wrong."""
        if self.error is not None:
            return
        try:
            step()
        # Whatever befalls one competitor, the others are still to be timed.
        except Exception as error:
            message = str(error).strip().splitlines() or [""]
            self.error = f"{type(error).__name__}: {message[0]}"[:300]

    def lower(self) -> None:
        """Traces and lowers the function."""
        self.lowered = jax.jit(self.function).lower(*self.arguments())

    def compile(self) -> None:
        """Compiles what was lowered."""
        self.compiled = self.lowered.compile()

    def calibrate(self, seconds: float) -> None:
        """Finds how many calls take that long; the first calls also warm up."""
        self._measure()
        self._calls = 2
        self._calls = math.ceil(seconds / self._measure())

    def time(self) -> None:
        """Takes one measurement."""
        self.times.append(self._measure())

    def figures(self, flops: int, steps: int) -> dict[str, float]:
        """What is reported of the program, each step of which does useful operations.

        Args:
          flops: Useful operations of a step.
          steps: How many there are.
        """
        times = [x / steps for x in self.times]
        median = statistics.median(times)
        return {
            "milliseconds": 1e3 * median,
            "fastest_milliseconds": 1e3 * min(times),
            "slowest_milliseconds": 1e3 * max(times),
            "useful_flops_per_second": flops / median,
            **self.memory(),
        }

    def memory(self) -> dict[str, int]:
        """Bytes of arguments, results and, at most at a time, temporaries."""
        memory = self.compiled.memory_analysis()
        return {
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        }

    @staticmethod
    def wait(values: Any) -> Any:
        """Returns the values when they are there."""
        return jax.block_until_ready(values)

    def _measure(self) -> float:
        """Seconds of wall-clock time per call, of several calls in a row."""
        arguments = self.wait(self.arguments())
        # The first calls still run at the clock that the program before left behind.
        for _ in range(2):
            start = time.perf_counter()
            for _ in range(self._calls):
                out = self.compiled(*arguments)
            self.wait(out)
            elapsed = time.perf_counter() - start
        return elapsed / self._calls


class _Backward(Program):
    """The gradients from what forward saved, which is computed anew for each time.

    Kept all along, it would fill the memory that other programs need.
    """

    def __init__(self, forward: Program, cotangent: Callable[[], jax.Array]):
        def arguments():
            return forward.compiled(*forward.arguments()), cotangent()

        super().__init__(lambda pullback, cotangent: pullback(cotangent), arguments)
        self.forward = forward
        self.cotangent = cotangent

    def lower(self) -> None:
        self.forward.lower()
        pullback = self.forward.lowered.out_info
        self.lowered = jax.jit(self.function).lower(pullback, self.cotangent())

    def compile(self) -> None:
        self.forward.compile()
        super().compile()
