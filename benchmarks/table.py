"""Prints results as tables in Markdown, the short one of the README first.

python -m benchmarks.table benchmarks/results/block_sparse_h200.json
"""

import json
import pathlib
import sys
from typing import Any

NAMES = {
    "cudnn": "dense causal (cuDNN)",
    "kernel": "attention to given blocks",
    "operation": "whole operation",
}
DIRECTIONS = ("forward", "forward and backward")


def summary(results: dict[str, Any]) -> str:
    """A row for each scheme and length, with times forward and then for training.

    In brackets how many times faster than dense attention: below 1 dense wins.
    """
    rows = _by_key(results)
    lines = [
        "| heads, T | dense | given blocks | whole "
        "| + backward: dense | given blocks | whole |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for scheme, length in dict.fromkeys((key[0], key[2]) for key in rows):
        cells = [f"{_heads(results, scheme)}, {length // 1024}k"]
        for direction in DIRECTIONS:
            for what in NAMES:
                cells.append(_time(rows, (scheme, what, length, direction)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def details(results: dict[str, Any]) -> str:
    """A row for each scheme, competitor and length.

    Time, useful TFLOP/s with their share of what a large matrix product reaches; first
    forward, then forward and backward; then temporary memory of the latter.
    """
    rows = _by_key(results)
    lines = [
        "| heads | | T | forward ms | TFLOP/s | + backward ms | TFLOP/s "
        "| temporary GiB |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for scheme, what, length in dict.fromkeys(key[:3] for key in rows):
        cells = [_heads(results, scheme), NAMES[what], f"{length // 1024}k"]
        memory = "-"
        for direction in DIRECTIONS:
            row = rows.get((scheme, what, length, direction))
            cells.append(_time(rows, (scheme, what, length, direction)))
            if row is None:
                cells.append("-")
                continue
            rate, ceiling = (row[f"{x}_flops_per_second"] for x in ("useful", "matmul"))
            cells.append(f"{rate / 1e12:.0f} ({rate / ceiling:.0%})")
            memory = f"{row['temporary_bytes'] / 2**30:.1f}"
        lines.append(f"| {' | '.join([*cells, memory])} |")
    return "\n".join(lines)


def _by_key(results):
    """Rows by scheme, competitor, length and direction."""
    return {
        (row["scheme"], row["what"], row["length"], row["direction"]): row
        for row in results["rows"]
    }


def _heads(results, scheme):
    sizes = results["schemes"][scheme]
    return f"{scheme} {sizes['heads']}/{sizes['kv_heads']}"


def _time(rows, key):
    """Milliseconds, and how many times faster than dense attention."""
    if key not in rows:
        return "-"
    scheme, what, length, direction = key
    milliseconds = rows[key]["milliseconds"]
    if what == "cudnn":
        return f"{milliseconds:.2f}"
    dense = rows[scheme, "cudnn", length, direction]["milliseconds"]
    return f"{milliseconds:.2f} ({dense / milliseconds:.2f}x)"


if __name__ == "__main__":
    results = json.loads(pathlib.Path(sys.argv[1]).read_text())
    print(summary(results), details(results), sep="\n\n")
