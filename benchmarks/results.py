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

from benchmarks import files, ops
from benchmarks.measure import measure
from benchmarks.table import ROOT, details

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
      out: JSON file, replaced after every shape; rows of other shapes stay.
      shapes: Only those whose name contains one of these, such as 64k.
      rounds: Measurements of each program.
      seconds: Least duration of one measurement.

    Returns:
      Exit code: 1 if the cases of a shape could not be made.

    Raises:
      ops.UsageError: There is no such operation or shape, or the file has something
        else in it.
    """
    modules = ops.modules()
    ops.check_names("operation", names, modules)
    names = names or tuple(modules)
    ops.check_parts(shapes, [x for op in names for x in modules[op].SHAPES])
    chosen = {
        (op, shape): sizes
        for op in names
        for shape, sizes in ops.shapes(modules[op], shapes).items()
    }
    results = {"shapes": {}, "measured_with": {}, "rows": []}
    if out.exists():
        results = files.load(out)
    measured_with = environment() | {"rounds": rounds, "seconds": seconds}
    failed = False
    for (op, shape), sizes in chosen.items():
        try:
            rows = measure(modules[op].cases(**sizes), rounds=rounds, seconds=seconds)
        except Exception:  # the next shape is still worth its time
            traceback.print_exc()
            failed = True
            continue
        new = {
            "shapes": {op: {shape: sizes}},
            "measured_with": {op: {shape: measured_with}},
            "rows": [{"op": op, "shape": shape, **row} for row in rows],
        }
        results = files.merged(results, new, modules)
        replace(out, json.dumps(results, indent=1) + "\n")
        print(details(new)[op], flush=True)
        # What jit holds on to in cycles would crowd out the next shape.
        gc.collect()
    return int(failed)


def environment() -> dict[str, Any]:
    """Device, driver, versions, and the commit if this is a checkout."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    driver = _output(
        "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    )
    found = {
        "device": jax.devices()[0].device_kind,
        "driver": driver and driver.splitlines()[0].strip(),
        "versions": versions,
    }
    if commit := _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"):
        sources = ("status", "--porcelain", "jattn", "pallas")
        changed = _output("git", "-C", str(ROOT), *sources)
        found["commit"] = commit + (" with changes" if changed else "")
    return found


def _output(*command: str) -> str | None:
    """What a command prints, or None if it is not there or fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a file so that whoever kills this finds the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
