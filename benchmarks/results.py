"""Runs benchmarks and keeps what they measured."""

import gc
import importlib.metadata
import json
import pathlib
import subprocess
import traceback
from typing import Annotated, Any

import jax
import tyro

from benchmarks import ops
from benchmarks.measure import measure
from benchmarks.table import details

PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "torch", "nvidia-cudnn-cu13")

Names = Annotated[tuple[str, ...], tyro.conf.Positional]


def run(
    names: Names = (),
    /,
    *,
    out: pathlib.Path,
    shapes: tuple[str, ...] = (),
    rounds: int = 5,
    seconds: float = 0.1,
) -> int:
    """Times operations beside what a user would pick instead, in one process.

    Args:
      names: Operations; all of them if none is named.
      out: JSON file, replaced after every shape.
      shapes: Only those whose name contains one of these, such as 64k.
      rounds: Measurements of each program.
      seconds: Least duration of one measurement.

    Returns:
      Exit code: 1 if the cases of a shape could not be made, 2 for an unknown name.
    """
    modules = ops.modules()
    if unknown := set(names) - set(modules):
        print(f"no operation {', '.join(sorted(unknown))}; there are {list(modules)}")
        return 2
    chosen = {
        (op, shape): sizes
        for op in names or modules
        for shape, sizes in ops.shapes(modules[op], shapes).items()
    }
    results = environment() | {"rounds": rounds, "seconds": seconds}
    results |= {"shapes": {}, "rows": []}
    failed = False
    for (op, shape), sizes in chosen.items():
        try:
            rows = measure(modules[op].cases(**sizes), rounds=rounds, seconds=seconds)
        except Exception:  # the next shape is still worth its time
            traceback.print_exc()
            failed = True
            continue
        results["shapes"].setdefault(op, {})[shape] = sizes
        results["rows"] += [{"op": op, "shape": shape, **row} for row in rows]
        replace(out, json.dumps(results, indent=1) + "\n")
        this = {"shapes": {op: {shape: sizes}}}
        print(details(results | this)[op], flush=True)
        # What jit holds on to in cycles would crowd out the next shape.
        gc.collect()
    return int(failed)


def environment() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": jax.devices()[0].device_kind,
        "driver": _driver(),
        "versions": versions,
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.splitlines()[0].strip()


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a file so that whoever kills this finds the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
