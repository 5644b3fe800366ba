"""What is measured: the modules of this package that have SHAPES and cases.

benchmarks/OP.py declares

- SHAPES, sizes by name: the arguments of `cases`;
- cases(**sizes), what to time side by side, by name: of jattn and of what a user would
  pick instead. REFERENCE is what the others are compared with;
- TUNING, if the operation has kernels to be tuned: a `Tuning` by the kernel's name.
"""

import dataclasses
import importlib
import pathlib
import re
import types
from collections.abc import Iterable, Sequence
from typing import Any, Literal

# The name of dense attention by cuDNN among the cases.
REFERENCE = "cudnn"
# With these start the names of other libraries' cases, whose losses are not jattn's.
PEERS = ("cudnn", "torch")


class UsageError(Exception):
    """There is not what was asked for; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What tilings of a kernel to try, and on what.

    Attributes:
      candidates: Tilings, beside the heuristic one.
      case: The one of the module's cases that launches the kernel.
      direction: Of what to time: where the kernel is launched.
      shapes: Those of SHAPES to tune for; None for all.
    """

    candidates: Sequence[Any]
    case: str
    direction: Literal["forward", "backward"]
    shapes: Sequence[str] | None = None


def modules() -> dict[str, types.ModuleType]:
    """All of them by name, in alphabetical order."""
    names = sorted(x.stem for x in pathlib.Path(__file__).parent.glob("[!_]*.py"))
    found = {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    return {name: x for name, x in found.items() if hasattr(x, "SHAPES")}


def shapes(module: types.ModuleType, parts: Sequence[str]) -> dict[str, dict]:
    """Those shapes of a module whose name contains one of the parts; all if none.

    A part is of whole words: "8k" is no part of "nsa 64/4, 128k".
    """
    return {
        name: sizes
        for name, sizes in module.SHAPES.items()
        if not parts or any(_contains(name, part) for part in parts)
    }


def check_names(kind: str, asked: Iterable[str], there: Iterable[str]) -> None:
    """Raises UsageError if a name of that kind was asked for that is not there."""
    if unknown := set(asked) - set(there):
        names = ", ".join(sorted(unknown))
        raise UsageError(f"no {kind} {names}; there are {list(there)}")


def check_parts(parts: Iterable[str], names: Iterable[str]) -> None:
    """Raises UsageError if one of the parts is in no name of a shape; see `shapes`."""
    names = list(dict.fromkeys(names))
    for part in parts:
        if not any(_contains(name, part) for name in names):
            raise UsageError(f"no shape has {part!r} in its name; there are {names}")


def _contains(name, part) -> bool:
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", name) is not None
