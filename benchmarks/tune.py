"""Measures tilings of kernels and keeps the best in a table."""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks import ops
from benchmarks.measure import Case, Program, race
from benchmarks.results import replace
from jattn.pallas import tuning

# A candidate has to be this much faster than the heuristic, or noise would choose.
GAIN = 1.02

# Relative RMS difference of results in bf16 that two tilings may have.
DIFFERENCE = 5e-3


def tune(
    kernels: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    out: pathlib.Path,
    shapes: tuple[str, ...] = (),
    rounds: int = 5,
    seconds: float = 0.05,
) -> None:
    """Times the candidate tilings of kernels and writes the best into a table.

    A candidate that cannot be compiled or run, or that gives another result than the
    heuristic tiling does, is reported and left out. Rows of other kernels and shapes
    stay as they are; of shapes that ask for the same row the first is measured.

    Args:
      kernels: Their names in TUNING; all of them if none is named.
      out: The table, replaced after every shape: pallas/tuning/DEVICE.json.
      shapes: Only those whose name contains one of these, such as 64k.
      rounds: Measurements of each candidate.
      seconds: Least duration of one measurement.

    Raises:
      ops.UsageError: There is no such kernel or shape, or the table is of another
        device.
    """
    known = {
        kernel: (module, x)
        for module in ops.modules().values()
        for kernel, x in getattr(module, "TUNING", {}).items()
    }
    ops.check_names("kernel", kernels, sorted(known))
    kernels = kernels or tuple(known)
    ops.check_parts(
        shapes,
        [
            shape
            for module, declared in (known[kernel] for kernel in kernels)
            for shape in declared.shapes or module.SHAPES
        ],
    )
    device = jax.devices()[0].device_kind
    if out.name != tuning.table_name(device):
        name = tuning.table_name(device)
        raise ops.UsageError(f"the table of this {device} is called {name}, not {out}")
    table = tuning.parse(out.read_text(), out.name) if out.exists() else {}
    for kernel in kernels:
        module, declared = known[kernel]
        done = []
        for name, sizes in ops.shapes(module, shapes).items():
            if declared.shapes is not None and name not in declared.shapes:
                continue
            print(f"{kernel}, {name}", flush=True)
            cases = module.cases(**sizes)
            row = best(kernel, declared, cases, rounds, seconds, done)
            if row is not None:
                done.append(row["shape"])
                replace(out, text(merged(table, kernel, row)))


def best(
    kernel: str,
    declared: ops.Tuning,
    cases: Mapping[str, Case],
    rounds: int,
    seconds: float,
    done: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any] | None:
    """Times the tilings of a kernel on one shape.

    Args:
      kernel: Its name.
      declared: What to try.
      cases: Those of the shape.
      rounds: Measurements of each candidate.
      seconds: Least duration of one measurement.
      done: Shapes, as the kernel asks for them, not to measure again.

    Returns:
      The row for the table, or None if the shape is done, or not even the heuristic
      tiling works.

    Raises:
      ValueError: The case does not launch the kernel, or for several shapes.
    """
    attempts: dict[Any, Program] = {}
    request = None
    # None is the heuristic, which the first trace reveals.
    for tiling in (None, *declared.candidates):
        program = cases[declared.case].programs()[declared.direction]
        # Nothing may be left of the trace with another tiling.
        jax.clear_caches()
        with tuning.force(kernel, tiling) as requests:
            program.attempt(program.lower)
        if tiling is None and program.error is None:
            if not requests or any(x != requests[0] for x in requests):
                raise ValueError(
                    f"{declared.case!r} {declared.direction} has to ask for one tiling "
                    f"of {kernel}; it asked for {requests}"
                )
            request = requests[0]
            if request[0] in done:
                print(f"  has the row of {request[0]}, which is measured")
                return None
        attempts[tiling] = program
    race(list(attempts.values()), rounds, seconds)
    _compare_results(attempts)

    for tiling, program in sorted(attempts.items(), key=lambda x: _median(x[1])):
        outcome = program.error or f"{1e3 * _median(program):.4g} ms"
        print(f"  {tiling or 'heuristic'}: {outcome}", flush=True)
    if request is None or attempts[None].error is not None:
        return None
    shape, heuristic = request
    fastest = min(attempts, key=lambda x: _median(attempts[x]))
    if _median(attempts[None]) < GAIN * _median(attempts[fastest]):
        fastest = None
    return {
        "shape": shape,
        "tiling": dataclasses.asdict(fastest or heuristic),
        "milliseconds": round(1e3 * _median(attempts[fastest]), 4),
        "heuristic_milliseconds": round(1e3 * _median(attempts[None]), 4),
    }


def _median(program: Program) -> float:
    return math.inf if program.error else statistics.median(program.times)


def _compare_results(attempts: dict[Any, Program]) -> None:
    """Gives an error to every program whose result differs from the heuristic's."""
    if attempts[None].error is not None:
        return
    expected = jax.tree.leaves(attempts[None].compiled(*attempts[None].arguments()))
    for program in attempts.values():
        if program.error is not None:
            continue
        actual = jax.tree.leaves(program.compiled(*program.arguments()))
        for x, y in zip(actual, expected, strict=True):
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
            difference = jnp.linalg.norm(x - y) / jnp.linalg.norm(y)
            if not difference <= DIFFERENCE:  # nor is NaN
                program.error = f"the result differs by {difference:.1e}"


def merged(
    table: dict[str, list[dict[str, Any]]], kernel: str, row: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Puts a row into a table, in the place of the one for the same shape."""
    rows = [x for x in table.get(kernel, ()) if x["shape"] != row["shape"]]
    rows.append(row)
    rows.sort(key=lambda x: sorted((k, str(type(v)), v) for k, v in x["shape"].items()))
    table[kernel] = rows
    return table


def text(table: dict[str, list[dict[str, Any]]]) -> str:
    """A table as JSON, with a line for each row."""
    kernels = []
    for kernel in sorted(table):
        rows = ",\n  ".join(json.dumps(row) for row in table[kernel])
        kernels.append(f" {json.dumps(kernel)}: [\n  {rows}\n ]")
    inside = ",\n".join(kernels)
    return '{"kernels": {\n' + inside + "\n}}\n" if inside else '{"kernels": {}}\n'
