"""Prints results as tables in Markdown, the short ones into the README."""

import collections
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import tyro

from benchmarks import files, ops

DIRECTIONS = ("forward", "backward", "forward and backward")
ROOT = pathlib.Path(__file__).parents[1]
START = "<!-- python -m benchmarks readme: start -->\n"
END = "<!-- python -m benchmarks readme: end -->\n"

Paths = Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional]


def table(paths: Paths, /) -> None:
    """Prints everything that was measured.

    Args:
      paths: Files that `run` wrote.

    Raises:
      ops.UsageError: A file is not there, or has something else in it.
    """
    for path, results in [(path, files.load(path)) for path in paths]:
        for op, lines in details(results).items():
            source = _source(results, op)
            print(f"{op}\n\n{lines}\n\n{path.name}{source}\n")


def readme() -> None:
    """Writes the tables of benchmarks/results into the README."""
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))


def with_tables(text: str) -> str:
    """The README's text with what stands between the two comments made anew."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    modules = ops.modules()
    sections = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        results = files.load(path)
        for op, lines in summaries(results).items():
            about = modules[op].__doc__.strip()
            source = f"[{path.name}](benchmarks/results/{path.name})"
            source += _source(results, op)
            sections.append(f"**{op}**: {about}\n\n{lines}\n\n{source}\n")
    return before + START + "\n" + "\n".join(sections) + "\n" + END + after


def details(results: dict[str, Any]) -> dict[str, str]:
    """A table for each operation, a row for each competitor and shape.

    Milliseconds, how many times faster than dense attention, useful TFLOP/s and their
    share of what a large matrix product reaches; then temporary memory.
    """
    tables = {}
    for op, shapes in results["shapes"].items():
        rows = _by_key(results, op)
        directions = _directions(rows)
        header = ["shape", "", *_pairs(directions, "ms"), "temporary GiB"]
        lines = _header(header, left=2)
        errors = {}
        for shape in shapes:
            for case in _cases(x for x in rows if x[0] == shape):
                cells, memory = [shape, case], []
                for direction in directions:
                    row = rows.get((shape, case, direction), {})
                    cells.append(_time(rows, shape, case, direction))
                    cells.append(_rate(row))
                    memory.append(_gibibytes(row))
                    if "error" in row:
                        errors[shape, case] = row["error"]
                lines.append(_line([*cells, ", ".join(memory)]))
        notes = [f"\n{', '.join(key)}: {x}" for key, x in errors.items()]
        tables[op] = "\n".join([*lines, *notes])
    return tables


def summaries(results: dict[str, Any]) -> dict[str, str]:
    """A table for each operation, a row for each shape, and where dense attention wins.

    Milliseconds, in brackets how many times faster than dense attention or, where that
    does other work, useful TFLOP/s.
    """
    tables = {}
    for op, shapes in results["shapes"].items():
        rows = _by_key(results, op)
        cases = _cases(rows)
        directions = _directions(rows)
        if "backward" in directions:  # then the last is their sum, or nearly
            directions = directions[:2]
        names = [f"{direction}: {cases[0]}" for direction in directions]
        comparable = ops.REFERENCE in cases
        header = ["ms" if comparable else "ms (TFLOP/s)"]
        header += [x for name in names for x in (name, *cases[1:])]
        lines = _header(header, left=1)
        for shape in shapes:
            cells = []
            for direction, case in itertools.product(directions, cases):
                cell = _time(rows, shape, case, direction)
                row = rows.get((shape, case, direction), {})
                if not comparable and "milliseconds" in row:
                    cell += f" ({row['useful_flops_per_second'] / 1e12:.3g})"
                cells.append(cell)
            lines.append(_line([shape, *cells]))
        slower = []
        own = [x for x in cases if not x.startswith(ops.PEERS)]
        for case, direction in itertools.product(own, directions):
            ratios = {x: _ratio(rows, x, case, direction) for x in shapes}
            where = [
                f"{x} ({r:.2f}x)" for x, r in ratios.items() if r and round(r, 2) < 1
            ]
            if where:
                slower.append(f"- {case} {direction}: {'; '.join(where)}")
        verdict = ["Slower than cuDNN:", "", *slower] if slower else []
        tables[op] = "\n".join([*lines, "", *verdict]).rstrip()
    return tables


def _source(results, op) -> str:
    """What an operation was measured with: what follows the name of the file.

    It is a list where the shapes do not agree.
    """
    shapes = collections.defaultdict(list)
    for shape in results["shapes"][op]:
        shapes[_environment(results["measured_with"][op][shape])].append(shape)
    if len(shapes) == 1:
        return f": {next(iter(shapes))}."
    lines = [f"- {'; '.join(names)}: {x}." for x, names in shapes.items()]
    return "\n".join([":", "", *lines])


def _environment(measured_with) -> str:
    parts = [measured_with["device"]]
    if driver := measured_with["driver"]:
        parts.append(f"driver {driver}")
    parts += [f"{k} {v}" for k, v in measured_with["versions"].items() if v]
    if commit := measured_with.get("commit"):
        parts.append(f"commit {commit}")
    return ", ".join([*parts, f"medians of {measured_with['rounds']} rounds"])


def _by_key(results, op) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Rows of an operation by shape, competitor and direction."""
    return {
        (row["shape"], row["case"], row["direction"]): row
        for row in results["rows"]
        if row["op"] == op and row["shape"] in results["shapes"][op]
    }


def _directions(rows) -> list[str]:
    found = {direction for _, _, direction in rows}
    return [x for x in DIRECTIONS if x in found]


def _cases(keys) -> list[str]:
    """The competitors, the one that others are compared with first."""
    names = dict.fromkeys(case for _, case, _ in keys)
    return sorted(names, key=lambda name: name != ops.REFERENCE)


def _ratio(rows, shape, case, direction) -> float | None:
    """How many times faster than dense attention, if both were measured."""
    own, dense = (
        rows.get((shape, x, direction), {}).get("milliseconds")
        for x in (case, ops.REFERENCE)
    )
    comparable = case != ops.REFERENCE and None not in (own, dense)
    return dense / own if comparable else None


def _time(rows, shape, case, direction) -> str:
    row = rows.get((shape, case, direction), {})
    if "milliseconds" not in row:
        return "failed" if "error" in row else "-"
    ratio = _ratio(rows, shape, case, direction)
    milliseconds = row["milliseconds"]
    digits = f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"
    return digits + (f" ({ratio:.2f}x)" if ratio else "")


def _rate(row) -> str:
    if not row.get("useful_flops_per_second"):
        return "-"
    rate, ceiling = (row[f"{x}_flops_per_second"] for x in ("useful", "matmul"))
    return f"{rate / 1e12:.3g} ({rate / ceiling:.0%})"


def _gibibytes(row) -> str:
    size = row.get("temporary_bytes")
    return "-" if size is None else f"{size / 2**30:.2f}"


def _pairs(directions: Iterable[str], unit: str) -> list[str]:
    return [x for name in directions for x in (f"{name} {unit}", "TFLOP/s")]


def _header(cells: Sequence[str], left: int) -> list[str]:
    """The first two lines of a table whose first columns are flush left."""
    return [_line(cells), f"|{'---|' * left}{'--:|' * (len(cells) - left)}"]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
