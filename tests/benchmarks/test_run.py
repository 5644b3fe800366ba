"""python -m benchmarks run, table and readme."""

import functools
import inspect
import json
import types

import pytest

from benchmarks import ops, results, table
from benchmarks.__main__ import main
from benchmarks.measure import Case, measure
from tests.support import normal

OPERATIONS = ops.modules()


@pytest.fixture
def operation(monkeypatch):
    """An operation of two shapes, the only one there is."""

    def cases(*, size):
        x, y = normal(0, (size, size), (size, size))
        return {
            "product": Case(lambda x, y: x @ y, (x, y), 2 * size**3, 4 * size**3),
            "cudnn": Case(lambda x, y: x @ y @ y, (x, y), 2 * size**3, 0),
        }

    module = types.SimpleNamespace(
        SHAPES={"small": {"size": 4}, "large": {"size": 8}}, cases=cases
    )
    monkeypatch.setattr(ops, "modules", lambda: {"product": module})
    quick = functools.partial(measure, matmul_size=16)
    monkeypatch.setattr(results, "measure", quick)
    return module


def run(out, *arguments):
    quick = ["--rounds", "1", "--seconds", "0.0001"]
    return main(["run", *arguments, "--out", str(out), *quick])


def test_run_writes_and_prints_what_it_measured(operation, tmp_path, capsys):
    out = tmp_path / "folder" / "results.json"
    assert run(out, "product") == 0
    kept = json.loads(out.read_text())
    assert kept["device"] == "cpu"
    assert kept["versions"]["jax"]
    assert kept["rounds"] == 1
    assert kept["shapes"] == {"product": operation.SHAPES}
    assert [row["shape"] for row in kept["rows"]] == ["small"] * 4 + ["large"] * 4
    printed = capsys.readouterr().out
    assert "| large | cudnn | " in printed
    assert main(["table", str(out)]) is None
    printed = capsys.readouterr().out
    assert printed.startswith("results.json, cpu, jax ")
    assert "| small | product | " in printed


def test_run_takes_named_operations_and_shapes_only(operation, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert run(out, "--shapes", "large", "mall") == 0
    assert list(json.loads(out.read_text())["shapes"]["product"]) == ["large"]
    assert run(out, "prodct") == 2
    assert "no operation prodct; there are ['product']" in capsys.readouterr().out


def test_a_run_that_ends_early_leaves_whole_results(operation, tmp_path, capsys):
    cases = operation.cases

    def stop_at_large(*, size):
        if size > 4:
            raise error("stop")
        return cases(size=size)

    operation.cases = stop_at_large
    out = tmp_path / "results.json"
    error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run(out)
    assert list(json.loads(out.read_text())["shapes"]["product"]) == ["small"]
    # A shape whose cases cannot be made does not keep others from being measured.
    out.unlink()
    error = ValueError
    assert run(out) == 1
    assert list(json.loads(out.read_text())["shapes"]["product"]) == ["small"]
    assert "ValueError: stop" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def row(case, direction, milliseconds, shape="8k"):
    return {
        "op": "nsa",
        "shape": shape,
        "case": case,
        "direction": direction,
        "milliseconds": milliseconds,
        "useful_flops_per_second": 200e12,
        "matmul_flops_per_second": 800e12,
        "temporary_bytes": 3 * 2**29,
    }


RESULTS = {
    "shapes": {"nsa": {"8k": {}, "16k": {}}},
    "rows": [
        row("jattn", "forward", 2.0),
        row("jattn", "backward", 250.0),
        row("cudnn", "forward", 1.0),
        row("cudnn", "backward", 1000.0),
        row("jattn", "forward", 0.5, "16k"),
        {
            "op": "nsa",
            "shape": "16k",
            "case": "cudnn",
            "direction": "forward",
            "error": "RuntimeError: none",
        },
    ],
}


def test_summary_says_where_dense_attention_wins():
    assert table.summaries(RESULTS)["nsa"].splitlines() == [
        "| ms | forward: cudnn | jattn | backward: cudnn | jattn |",
        "|---|--:|--:|--:|--:|",
        "| 8k | 1 | 2 (0.50x) | 1000 | 250 (4.00x) |",
        "| 16k | failed | 0.5 | - | - |",
        "",
        "Slower than cuDNN:",
        "",
        "- jattn forward: 8k (0.50x)",
    ]


def test_details():
    assert table.details(RESULTS)["nsa"].splitlines() == [
        "| shape |  | forward ms | TFLOP/s | backward ms | TFLOP/s | temporary GiB |",
        "|---|---|--:|--:|--:|--:|--:|",
        "| 8k | cudnn | 1 | 200 (25%) | 1000 | 200 (25%) | 1.50, 1.50 |",
        "| 8k | jattn | 2 (0.50x) | 200 (25%) | 250 (4.00x) | 200 (25%) | 1.50, 1.50 |",
        "| 16k | cudnn | failed | - | - | - | -, - |",
        "| 16k | jattn | 0.5 | 200 (25%) | - | - | 1.50, - |",
        "",
        "16k, cudnn: RuntimeError: none",
    ]


def test_the_readme_has_the_tables_of_the_committed_results():
    text = (table.ROOT / "README.md").read_text()
    assert table.with_tables(text) == text, "run `python -m benchmarks readme`"
    for path in (table.ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"[{path.name}](benchmarks/results/{path.name})" in text


@pytest.mark.parametrize("name", OPERATIONS)
def test_shapes_are_arguments_of_the_cases(name):
    module = OPERATIONS[name]
    assert module.__doc__
    for sizes in module.SHAPES.values():
        inspect.signature(module.cases).bind(**sizes)
    for tuning in getattr(module, "TUNING", {}).values():
        assert tuning.candidates
        assert tuning.direction in ("forward", "backward")
        assert {type(x) for x in tuning.candidates} == {type(tuning.candidates[0])}
        assert set(tuning.shapes or ()) <= set(module.SHAPES)
