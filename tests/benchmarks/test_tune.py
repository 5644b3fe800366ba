"""python -m benchmarks tune: which tiling wins, and what the table looks like."""

import collections
import dataclasses
import functools
import importlib.resources
import json
import pathlib
import re
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ops, tune
from benchmarks.__main__ import main
from benchmarks.measure import Case
from jattn.pallas import _device, tuning


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One that says by itself how well it does."""

    milliseconds: float
    result: float = 1.0


HEURISTIC = Tiling(100)

DECLARED = {
    kernel: (module, x)
    for module in ops.modules().values()
    for kernel, x in getattr(module, "TUNING", {}).items()
}

# Kernels that ask for a tiling of which no others are listed to be tried.
UNTRIED = {"block_sparse_query_sums", "selective_mask"}


def function(x, sizes):
    """Is x, after a while; asks for a tiling once for each of the sizes."""
    tiling = HEURISTIC
    for n in sizes:
        tiling = tuning.choose("sleep", {"rows": x.shape[0], "n": n}, HEURISTIC)
    if tiling.milliseconds < 0:
        raise ValueError("out of shared memory")

    def host(x):
        time.sleep(tiling.milliseconds / 1e3)
        return np.asarray(x * np.float32(tiling.result))

    return jax.pure_callback(host, x, x)


def operation(candidates, sizes):
    def cases(*, rows):
        return {"jattn": Case(lambda x: function(x, sizes), (jnp.ones(rows),), 1, 0)}

    declared = ops.Tuning(candidates, case="jattn", direction="forward")
    return types.SimpleNamespace(
        SHAPES={"4 rows": {"rows": 4}, "16 rows": {"rows": 16}},
        cases=cases,
        TUNING={"sleep": declared},
    )


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Tunes an operation of these candidates and returns the rows of its table."""
    out = tmp_path / "cpu.json"

    def run(candidates, *arguments, sizes=(1,)):
        module = operation(candidates, sizes)
        monkeypatch.setattr(ops, "modules", lambda: {"sleep": module})
        quick = ["--rounds", "1", "--seconds", "0.001"]
        assert main(["tune", *arguments, "--out", str(out), *quick]) is None
        return tuning.parse(out.read_text(), out.name)["sleep"]

    return run


def test_the_fastest_of_the_right_ones_is_kept(run, capsys):
    candidates = [Tiling(50), Tiling(5), Tiling(1, result=2.0), Tiling(-1)]
    rows = run(candidates, "--shapes", "16")
    (row,) = rows
    assert row["shape"] == {"rows": 16, "n": 1}
    assert row["tiling"] == dataclasses.asdict(Tiling(5))
    assert 5 <= row["milliseconds"] < 100 <= row["heuristic_milliseconds"]
    printed = capsys.readouterr().out
    assert "sleep, 16 rows" in printed
    assert f"{Tiling(1, result=2.0)}: the result differs by 1.0e+00" in printed
    assert f"{Tiling(-1)}: ValueError: out of shared memory" in printed


def test_the_heuristic_stays_unless_something_is_clearly_faster(run):
    (row,) = run([Tiling(150)], "--shapes", "16")
    assert row["tiling"] == dataclasses.asdict(HEURISTIC)
    assert row["milliseconds"] == row["heuristic_milliseconds"]


def test_rows_of_other_shapes_stay(run):
    first = run([Tiling(2)], "sleep")
    assert [row["shape"]["rows"] for row in first] == [4, 16]
    second = run([Tiling(1)], "sleep", "--shapes", "4")
    assert second[0]["tiling"]["milliseconds"] == 1
    assert second[1] == first[1]


def test_a_row_is_measured_once(run, monkeypatch, capsys):
    choose = tuning.choose
    monkeypatch.setattr(tuning, "choose", lambda k, _, x: choose(k, {"any": 1}, x))
    assert [row["shape"] for row in run([Tiling(1)])] == [{"any": 1}]
    assert "16 rows\n  has the row of {'any': 1}, which" in capsys.readouterr().out


def test_a_case_has_to_ask_for_one_tiling(run):
    for sizes in ((1, 2), ()):
        with pytest.raises(ValueError, match="has to ask for one tiling of sleep"):
            run([Tiling(1)], sizes=sizes)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["slep", "--out", "cpu.json"], "no kernel slep; there are ['block_sparse_"),
        (
            ["--out", "nvidia_h200.json"],
            "the table of this cpu is called cpu.json, not nvidia_h200.json",
        ),
        # Other kernels than the one have shapes of that name.
        (
            ["selection_affinities", "--out", "cpu.json", "--shapes", "8k", "nsa"],
            "no shape has 'nsa' in its name; there are ['moba 16/16, 8k', ",
        ),
    ],
)
def test_what_is_not_there_is_named_in_a_sentence(
    capsys, tmp_path, monkeypatch, arguments, problem
):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"benchmarks: {problem}")
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_table_has_a_line_for_each_row_in_a_fixed_order():
    rows = [{"shape": {"T": t, "dtype": "x"}, "tiling": {}} for t in (8, 16, 64, 128)]
    table = {}
    for row in (rows[2], rows[0], rows[3], rows[1], rows[2]):
        tune.merged(table, "b", row)
    tune.merged(table, "a", rows[0])
    text = tune.text(table)
    assert tuning.parse(text, "x.json") == {"a": rows[:1], "b": rows}
    assert [line.strip(" ,") for line in text.splitlines() if "shape" in line] == [
        json.dumps(row) for row in [rows[0], *rows]
    ]


def test_committed_tables_are_as_the_tuner_writes_them():
    declared = {
        kernel: {field.name for field in dataclasses.fields(x.candidates[0])}
        for kernel, (_, x) in DECLARED.items()
    }
    package = importlib.resources.files(tuning)
    for file in package.iterdir():
        if not file.name.endswith(".json"):
            continue
        table = tuning.parse(file.read_text(), file.name)
        assert tune.text(table) == file.read_text()
        for kernel, rows in table.items():
            for row in rows:
                assert set(row["tiling"]) == declared[kernel]


def launch(module, shape, name):
    """Calls a case forward and, if it has gradients, backward."""
    case = module.cases(**module.SHAPES[shape])[name]

    def function(*arrays):
        return case.function(*arrays, *case.constants)

    if not case.backward_flops:
        return function(*case.arrays)
    out, pullback = jax.vjp(function, *case.arrays)
    return pullback(jnp.ones_like(out))


@pytest.fixture(scope="module")
def requests():
    """What each kernel asks for on a GPU, by the module, case and shape it is tuned on.

    A request is the kernel's name and what its tiling depends on. Of the shapes that a
    kernel is tuned on there are the first and the last.
    """
    found = collections.defaultdict(set)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(_device, "unsupported", lambda *_: None)
        for module, declared in DECLARED.values():
            shapes = list(declared.shapes or module.SHAPES)
            for shape in (shapes[0], shapes[-1]):
                key = module, declared.case, shape
                if key in found:
                    continue

                def choose(kernel, sizes, heuristic, key=key):
                    found[key].add((kernel, frozenset(sizes.items())))
                    return heuristic

                monkeypatch.setattr(tuning, "choose", choose)
                jax.clear_caches()
                jax.eval_shape(functools.partial(launch, module, shape, declared.case))
    # What was traced for a GPU is of no use elsewhere.
    jax.clear_caches()
    return found


def test_kernels_that_ask_for_a_tiling_are_declared(requests):
    asked = {kernel for found in requests.values() for kernel, _ in found}
    folder = pathlib.Path(tuning.__file__).parents[1]
    for path in folder.rglob("*.py"):
        asked.update(re.findall(r'tuning\.choose\(\s*"(\w+)"', path.read_text()))
    assert asked == {*DECLARED, *UNTRIED}


@pytest.mark.parametrize("kernel", DECLARED)
def test_kernels_are_launched_where_they_are_tuned(requests, kernel):
    module, declared = DECLARED[kernel]
    shapes = list(declared.shapes or module.SHAPES)
    for shape in (shapes[0], shapes[-1]):
        found = requests[module, declared.case, shape]
        # For one tiling only: `best` tries the others in its place.
        assert [name for name, _ in found].count(kernel) == 1, shape


def test_committed_rows_are_of_what_kernels_ask_for(requests):
    asked = collections.defaultdict(list)
    for found in requests.values():
        for kernel, sizes in found:
            asked[kernel].append(dict(sizes).keys())
    package = importlib.resources.files(tuning)
    for file in package.iterdir():
        if file.name.endswith(".json"):
            for kernel, rows in tuning.parse(file.read_text(), file.name).items():
                for row in rows:
                    assert row["shape"].keys() in asked[kernel], kernel
