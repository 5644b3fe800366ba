"""python -m benchmarks profile, with made-up times: CUPTI needs a GPU."""

import types

from benchmarks import ops, profile
from benchmarks.__main__ import main
from benchmarks.measure import Case
from tests.support import normal


def test_kernels_are_added_up_by_name(monkeypatch, capsys):
    def cases():
        works = Case(lambda x: 2 * x, tuple(normal(0, (3,))), 1, 0, steps=8)
        fails = Case(lambda x: x @ x @ x, tuple(normal(0, (3, 4))), 1, 0)
        return {"works": works, "fails": fails, "unasked": works}

    def measure(program, *, aggregate, iterations):
        assert not aggregate
        launches = [("dot", 0.5), ("sort", 2.0), ("dot", 1.25)]
        return lambda x: (program(x), [[("slow", 9.0)]] * (iterations - 1) + [launches])

    module = types.SimpleNamespace(SHAPES={"8k": {}, "128k": {}}, cases=cases)
    monkeypatch.setattr(ops, "modules", lambda: {"op": module})
    monkeypatch.setattr(profile.profiler, "measure", measure)
    main(["profile", "op", "--shapes", "8k", "--cases", "works", "fails"])
    works, fails = capsys.readouterr().out.strip().split("\n\n")
    assert works.splitlines() == [
        "8k, works, forward, 8 steps",
        "    3.750 ms in all",
        "    2.000 ms      1 x sort",
        "    1.750 ms      2 x dot",
    ]
    assert fails.splitlines()[0] == "8k, fails, forward"
    assert fails.splitlines()[1].startswith("TypeError: ")
