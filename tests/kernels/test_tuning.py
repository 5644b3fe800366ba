"""jattn.pallas.tuning: rows of a table, the heuristic, and what the tuner forces."""

import dataclasses

import pytest

from jattn.pallas import tuning


@dataclasses.dataclass(frozen=True)
class Tiling:
    rows: int
    warps: int


HEURISTIC = Tiling(rows=64, warps=4)
SHAPE = {"T": 1024, "dtype": "bfloat16"}


@pytest.fixture
def table(monkeypatch):
    """A table whose rows a test may fill in."""
    kernels = {}
    monkeypatch.setattr(tuning, "table", lambda device: kernels)
    return kernels


def test_a_row_of_this_very_shape_replaces_fields_of_the_heuristic(table):
    table["forward"] = [{"shape": SHAPE, "tiling": {"rows": 128}}]
    assert tuning.choose("forward", SHAPE, HEURISTIC) == Tiling(rows=128, warps=4)
    for other in ({}, SHAPE | {"T": 1025}, SHAPE | {"heads": 1}, {"T": 1024}):
        assert tuning.choose("forward", other, HEURISTIC) is HEURISTIC
    assert tuning.choose("backward", SHAPE, HEURISTIC) is HEURISTIC


def test_a_row_with_an_unknown_field_is_refused(table):
    table["forward"] = [{"shape": SHAPE, "tiling": {"columns": 128}}]
    with pytest.raises(ValueError, match=r"cpu\.json, forward: .*'columns'"):
        tuning.choose("forward", SHAPE, HEURISTIC)


def test_devices_without_a_table_have_no_rows():
    assert tuning.table("cpu") == {}
    assert tuning.choose("forward", SHAPE, HEURISTIC) is HEURISTIC


def test_tables_are_named_after_the_device_and_installed():
    assert tuning.table_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3.json"
    tuning.table.cache_clear()
    assert isinstance(tuning.table("NVIDIA H200"), dict)
    package = tuning.importlib.resources.files(tuning)
    assert (package / tuning.table_name("NVIDIA H200")).is_file()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"kernels": []}',
        '{"kernels": {"forward": {"shape": {}}}}',
        '{"kernels": {"forward": [{"shape": {}}]}}',
        '{"kernels": {"forward": [{"shape": {}, "tiling": 64}]}}',
    ],
)
def test_a_malformed_table_is_refused(text):
    with pytest.raises(ValueError, match=r"^x\.json is no table of tilings: "):
        tuning.parse(text, "x.json")


def test_force_overrides_one_kernel_and_keeps_what_was_asked(table):
    table["forward"] = [{"shape": SHAPE, "tiling": {"rows": 128}}]
    forced = Tiling(rows=16, warps=1)
    with tuning.force("forward", forced) as requests:
        assert tuning.choose("forward", SHAPE, HEURISTIC) is forced
        assert tuning.choose("backward", SHAPE, HEURISTIC) is HEURISTIC
        with tuning.force("backward", forced):
            assert tuning.choose("forward", SHAPE, HEURISTIC) is forced
            assert tuning.choose("backward", SHAPE, HEURISTIC) is forced
    assert requests == [(SHAPE, HEURISTIC)] * 2
    with tuning.force("forward", None):
        assert tuning.choose("forward", SHAPE, HEURISTIC) is HEURISTIC
    assert tuning.choose("forward", SHAPE, HEURISTIC).rows == 128
