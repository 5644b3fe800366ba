"""Tile sizes measured on a kind of GPU, and heuristics where nothing was measured.

A kernel asks `choose` for its tiling while it is traced. `python -m benchmarks tune`
measures and writes the tables, one JSON file for each kind of device: nvidia_h200.json
for an "NVIDIA H200". Tilings change how fast a kernel is, never what it computes.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib.resources
import json
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax

# Of each kernel under `force`: its tiling, and the requests so far.
_forced = contextvars.ContextVar[Mapping[str, tuple[Any, list[Any]]]](
    "forced",
    default=types.MappingProxyType({}),
)


def choose[T](kernel: str, shape: Mapping[str, int | str], heuristic: T) -> T:
    """The tiling measured to be the best one for a kernel and shape, or the heuristic.

    Args:
      kernel: The kernel's name in the tables, such as "block_sparse_forward".
      shape: What the best tiling depends on, such as {"T": 8192, "dtype": "bfloat16"}.
        A row of the table counts only if its shape is this very one, so leave out or
        round up what may take any value, such as a length.
      heuristic: A frozen dataclass of tile sizes.

    Returns:
      The heuristic, with the fields that the table has for this shape replaced.

    Raises:
      ValueError: The table of this kind of device is malformed, or has a field that
        the heuristic has not.
    """
    forced = _forced.get()
    if kernel in forced:
        tiling, requests = forced[kernel]
        requests.append((dict(shape), heuristic))
        return heuristic if tiling is None else tiling
    device = jax.devices()[0].device_kind
    for row in table(device).get(kernel, ()):
        if row["shape"] == shape:
            try:
                return dataclasses.replace(heuristic, **row["tiling"])  # pyright: ignore
            except TypeError as error:
                raise ValueError(f"{table_name(device)}, {kernel}: {error}") from error
    return heuristic


@contextlib.contextmanager
def force(kernel: str, tiling: Any | None) -> Iterator[list[tuple[dict, Any]]]:
    """Makes `choose` give this tiling for a kernel: for the tuner and for tests only.

    It acts while a function is traced. What jit traced before stays as it was, so the
    caller clears JAX's caches first.

    Args:
      kernel: The kernel's name in the tables.
      tiling: What to choose, or None for the heuristic whatever the table says.

    Yields:
      A list that fills with the shape and the heuristic of every request.
    """
    requests = []
    token = _forced.set({**_forced.get(), kernel: (tiling, requests)})
    try:
        yield requests
    finally:
        _forced.reset(token)


def table_name(device: str) -> str:
    """The table's file name for a kind of device: nvidia_h200.json of "NVIDIA H200"."""
    return re.sub(r"\W+", "_", device.lower()).strip("_") + ".json"


@functools.cache
def table(device: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of a kind of device by kernel; empty if nothing was measured on it.

    Raises:
      ValueError: The file is not what this module reads.
    """
    file = importlib.resources.files(__name__) / table_name(device)
    return parse(file.read_text(), table_name(device)) if file.is_file() else {}


def parse(text: str, name: str) -> dict[str, list[dict[str, Any]]]:
    """Reads a table, each kernel's rows of which are {"shape": .., "tiling": ..}.

    Raises:
      ValueError: The text is not a table; the message starts with its name.
    """
    try:
        kernels = json.loads(text)["kernels"]
        for rows in kernels.values():
            for row in rows:
                if not all(isinstance(row[x], dict) for x in ("shape", "tiling")):
                    raise TypeError(f"no mapping in {row}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is no table of tilings: {error!r}") from error
    return kernels
