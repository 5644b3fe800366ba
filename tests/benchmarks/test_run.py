"""python -m benchmarks run, table and readme."""

import functools
import inspect
import json
import pathlib
import re
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
    assert kept["shapes"] == {"product": operation.SHAPES}
    for measured_with in kept["measured_with"]["product"].values():
        assert measured_with["device"] == "cpu"
        assert measured_with["versions"]["jax"]
        assert measured_with["rounds"] == 1
    assert [row["shape"] for row in kept["rows"]] == ["small"] * 4 + ["large"] * 4
    printed = capsys.readouterr().out
    assert "| large | cudnn | " in printed
    assert main(["table", str(out)]) is None
    printed = capsys.readouterr().out
    assert "| small | product | " in printed
    assert "\n\nresults.json: cpu, jax " in printed
    assert printed.endswith("medians of 1 rounds.\n\n")


def test_run_takes_named_operations_and_shapes_only(operation, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert run(out, "--shapes", "large") == 0
    assert list(json.loads(out.read_text())["shapes"]["product"]) == ["large"]


def test_rows_of_other_shapes_stay(operation, tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    monkeypatch.setattr(results, "environment", lambda: MACHINE)
    operation.SHAPES["gone"] = {"size": 3}
    assert run(out, "--shapes", "large", "gone") == 0
    (first, *_) = json.loads(out.read_text())["rows"]
    assert first["shape"] == "large"
    # This one has another size from now on.
    operation.SHAPES["gone"] = {"size": 2}
    monkeypatch.setattr(results, "environment", lambda: MACHINE | {"commit": "f00"})
    assert run(out, "--shapes", "small") == 0
    kept = json.loads(out.read_text())
    assert [row["shape"] for row in kept["rows"]] == ["small"] * 4 + ["large"] * 4
    assert kept["rows"][4] == first
    measured_with = kept["measured_with"]["product"]
    assert list(kept["shapes"]["product"]) == list(measured_with) == ["small", "large"]
    assert [x.get("commit") for x in measured_with.values()] == ["f00", None]
    # A shape measured again has the new rows only.
    assert run(out, "--shapes", "large") == 0
    again = json.loads(out.read_text())
    assert again["rows"][:4] == kept["rows"][:4]
    assert len(again["rows"]) == 8
    assert again["rows"][4] != first


def test_rows_of_a_file_with_one_environment_keep_it(operation, tmp_path):
    old = MACHINE | {"rounds": 7, "seconds": 0.1}
    shapes = {"product": {"large": {"size": 8}}}
    rows = [row("cudnn", "forward", 1.0, "large") | {"op": "product"}]
    out = tmp_path / "results.json"
    out.write_text(json.dumps(old | {"shapes": shapes, "rows": rows}))
    assert run(out, "--shapes", "small") == 0
    kept = json.loads(out.read_text())
    assert kept["rows"][4:] == rows
    assert kept["measured_with"]["product"]["large"] == old
    assert kept["measured_with"]["product"]["small"]["rounds"] == 1


def test_the_commit_is_kept_with_a_word_on_changes(monkeypatch):
    answers = {"rev-parse": "8ac6398", "status": "", "nvidia-smi": "580.1\n580.1"}

    def output(*command):
        (answer,) = (x for name, x in answers.items() if name in command)
        return answer

    monkeypatch.setattr(results, "_output", output)
    found = results.environment()
    assert (found["driver"], found["commit"]) == ("580.1", "8ac6398")
    answers["status"] = " M pallas/_triton.py"
    assert results.environment()["commit"] == "8ac6398 with changes"
    monkeypatch.setattr(results, "_output", lambda *_: None)
    found = results.environment()
    assert found["driver"] is None
    assert "commit" not in found


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["run", "prodct", "--out", "x"], "no operation prodct; there are ['product']"),
        (
            ["run", "product", "--out", "x", "--shapes", "large", "mall"],
            "no shape has 'mall' in its name; there are ['small', 'large']",
        ),
        (["run", "--out", "none.json"], "none.json has no results in it: KeyError("),
        (["profile", "prodct"], "no operation prodct; there are ['product']"),
        (["profile", "product", "--shapes", "mall"], "no shape has 'mall' in its name"),
        (["table", "nowhere.json"], "cannot read nowhere.json: No such file or"),
        (["table", "none.json"], "none.json has no results in it: KeyError("),
        (["tune", "--out", "x", "kernel"], "no kernel kernel; there are []"),
    ],
)
def test_what_is_not_there_is_named_in_a_sentence(
    operation, tmp_path, monkeypatch, capsys, arguments, problem
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("none.json").write_text("{}")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"benchmarks: {problem}")
    assert captured.err.count("\n") == 1
    assert [x.name for x in tmp_path.iterdir()] == ["none.json"]
    assert pathlib.Path("none.json").read_text() == "{}"


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


MACHINE = {"device": "H200", "driver": "580.1", "versions": {"jax": "0.11.2"}}


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


def test_losses_are_those_of_jattn_that_print_as_such():
    rows = [
        row("torch dense", "forward", 3.0),
        row("cudnn window", "forward", 3.0),
        row("jattn", "forward", 1.004),
        row("jattn packed", "forward", 1.01),
        row("cudnn", "forward", 1.0),
    ]
    lines = table.summaries({"shapes": {"nsa": {"8k": {}}}, "rows": rows})["nsa"]
    assert "1 (1.00x)" in lines
    *_, heading, _, losses = lines.splitlines()
    assert heading == "Slower than cuDNN:"
    assert losses == "- jattn packed forward: 8k (0.99x)"


def test_the_readme_says_which_rows_were_measured_with_what(monkeypatch, tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    path = folder / "nsa.json"
    old = MACHINE | {"rounds": 2, "seconds": 0.1}
    monkeypatch.setattr(table, "ROOT", tmp_path)

    def source(environment):
        path.write_text(json.dumps(RESULTS | environment))
        text = table.with_tables(f"{table.START}old{table.END}")
        return text.split("[nsa.json](benchmarks/results/nsa.json)")[1].splitlines()

    measured_with = {"8k": old, "16k": old | {"commit": "f00"}}
    assert source({"measured_with": {"nsa": measured_with}})[:4] == [
        ":",
        "",
        "- 8k: H200, driver 580.1, jax 0.11.2, medians of 2 rounds.",
        "- 16k: H200, driver 580.1, jax 0.11.2, commit f00, medians of 2 rounds.",
    ]
    measured_with["16k"] = old
    agreed = source({"measured_with": {"nsa": measured_with}})
    assert agreed[0] == ": H200, driver 580.1, jax 0.11.2, medians of 2 rounds."
    # As it was before files said so of each shape.
    assert source(old) == agreed


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
    # Its readers do not have the module's names at hand.
    names = {x for x in vars(module) if "_" in x or x.isupper()}
    assert not names & set(re.findall(r"\w+", module.__doc__))
    for sizes in module.SHAPES.values():
        inspect.signature(module.cases).bind(**sizes)
    for tuning in getattr(module, "TUNING", {}).values():
        assert tuning.candidates
        assert tuning.direction in ("forward", "backward")
        assert {type(x) for x in tuning.candidates} == {type(tuning.candidates[0])}
        assert set(tuning.shapes or ()) <= set(module.SHAPES)
