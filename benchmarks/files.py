"""Files of results: what they hold, and how new rows come in.

A file has

- "shapes", by operation and name the sizes of each shape;
- "measured_with", likewise what a shape was measured with: see `results.environment`.
  Older files have that once for all their shapes instead;
- "rows", those of `measure` with their "op" and "shape".
"""

import json
import pathlib
import types
from collections.abc import Mapping
from typing import Any

from benchmarks import ops

SHARED = ("device", "driver", "versions", "rounds", "seconds")


def load(path: pathlib.Path) -> dict[str, Any]:
    """Reads a file, and gives each shape of an older one what it was measured with.

    Raises:
      ops.UsageError: There is none, or it has something else in it.
    """
    try:
        found = json.loads(path.read_text())
        results = {x: found[x] for x in ("shapes", "rows")}
        results["measured_with"] = found.get("measured_with") or {
            op: {shape: {x: found[x] for x in SHARED} for shape in shapes}
            for op, shapes in found["shapes"].items()
        }
    except OSError as error:
        raise ops.UsageError(f"cannot read {path}: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ops.UsageError(f"{path} has no results in it: {error!r}") from error
    return results


def merged(
    kept: Mapping[str, Any],
    new: Mapping[str, Any],
    modules: Mapping[str, types.ModuleType],
) -> dict[str, Any]:
    """Results with new ones in the place of those of the same shapes.

    Shapes come in the order of the modules and their SHAPES; those that a module no
    longer has, or has with other sizes, are left out.
    """
    results = {"shapes": {}, "measured_with": {}, "rows": []}
    for op, module in modules.items():
        for shape, sizes in module.SHAPES.items():
            for source in (new, kept):
                if source["shapes"].get(op, {}).get(shape) == sizes:
                    for x in ("shapes", "measured_with"):
                        results[x].setdefault(op, {})[shape] = source[x][op][shape]
                    results["rows"] += [
                        row
                        for row in source["rows"]
                        if (row["op"], row["shape"]) == (op, shape)
                    ]
                    break
    return results
