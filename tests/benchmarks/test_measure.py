"""benchmarks.measure: what is timed, and what becomes of what fails."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.measure import Case, Program, measure
from tests.support import normal

QUICK = {"rounds": 3, "seconds": 1e-3, "matmul_size": 32}


def scaled_product(x, y, factor):
    return factor * jnp.sin(x) @ y


def case(function=scaled_product, backward_flops=2000):
    x, y = normal(0, (8, 16), (16, 4))
    return Case(function, (x, y), 1000, backward_flops, constants=(jnp.float32(3),))


def test_the_three_programs_compute_value_and_gradients():
    product = case()
    forward, backward, both = product.programs().values()
    for program in (forward, backward, both):
        program.lower()
        program.compile()
    arguments = (*product.arrays, *product.constants)
    np.testing.assert_array_equal(
        forward.compiled(*forward.arguments()), scaled_product(*arguments)
    )
    cotangent = both.arguments()[0]
    _, pullback = jax.vjp(lambda x, y: scaled_product(x, y, 3.0), *product.arrays)
    for program in (backward, both):
        gradients = program.compiled(*program.arguments())
        for actual, expected in zip(gradients, pullback(cotangent), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_figures():
    rows = measure({"product": case()}, **QUICK)
    useful = {"forward": 1000, "backward": 2000, "forward and backward": 3000}
    assert [row["direction"] for row in rows] == list(useful)
    for row in rows:
        assert row["case"] == "product"
        seconds = row["milliseconds"] / 1e3
        assert row["useful_flops_per_second"] * seconds == pytest.approx(
            useful[row["direction"]]
        )
        assert (
            0
            < row["fastest_milliseconds"]
            <= row["milliseconds"]
            <= row["slowest_milliseconds"]
        )
        assert row["matmul_flops_per_second"] == rows[0]["matmul_flops_per_second"] > 0
        assert row["temporary_bytes"] >= 0
    # Two matrices and a number in; besides, gradients need the cotangent.
    assert rows[0]["argument_bytes"] >= 4 * (8 * 16 + 16 * 4 + 1)
    assert rows[0]["output_bytes"] >= 4 * 8 * 4
    assert rows[2]["output_bytes"] >= 4 * (8 * 16 + 16 * 4)


def test_figures_are_of_one_step(monkeypatch):
    def sixteen_seconds(program):
        program.times.append(16.0)

    monkeypatch.setattr(Program, "time", sixteen_seconds)
    cases = {"one": case(), "eight": dataclasses.replace(case(), steps=8)}
    one, eight = itertools.batched(measure(cases, **QUICK), 3)
    for whole, step in zip(one, eight, strict=True):
        for key in ("milliseconds", "fastest_milliseconds", "slowest_milliseconds"):
            assert (whole[key], step[key]) == (16e3, 2e3)
    assert [row["useful_flops_per_second"] for row in eight] == [500, 1000, 1500]


def test_backward_is_timed_only_where_it_has_flops():
    rows = measure({"product": case(backward_flops=0)}, **QUICK)
    assert [row["direction"] for row in rows] == ["forward"]


def test_what_fails_is_reported_and_the_others_are_timed():
    def refuse(x, y, factor):
        raise ValueError("not on this machine\nat all")

    def stop(x, y, factor):
        def host(x):
            raise RuntimeError("no")

        return jax.pure_callback(host, jax.ShapeDtypeStruct((), jnp.float32), x)

    cases = {"refuses": case(refuse), "stops": case(stop, 0), "works": case()}
    rows = measure(cases, **QUICK)
    by_case = {name: [r for r in rows if r["case"] == name] for name in cases}
    for row in by_case["refuses"]:
        assert row["error"] == "ValueError: not on this machine"
        assert "milliseconds" not in row
    assert [set(row) for row in by_case["stops"]] == [{"case", "direction", "error"}]
    assert len(by_case["works"]) == 3
    assert all("milliseconds" in row for row in by_case["works"])
