"""benchmarks.selective_memory: the experiment at toy size."""

import dataclasses
import json

import pytest

from benchmarks import selective_memory
from jattn.train import TrainConfig
from tests.train import runs


@pytest.fixture
def experiment(tmp_path, compiled_programs, monkeypatch):
    """Runs it with a seed; what the file of results says then."""
    del compiled_programs
    config = runs.config(runs.write_text(tmp_path), steps=12)
    out = tmp_path / "results.json"

    def run(seed):
        changed = dataclasses.replace(config, seed=seed)
        monkeypatch.setattr(selective_memory, "recipe", lambda *_, **__: changed)
        folder = tmp_path / "runs"
        assert not selective_memory.main(out=out, context=32, seed=seed, folder=folder)
        return json.loads(out.read_text())["results"]

    return run


def test_it_trains_prunes_and_keeps_what_it_found(experiment):
    (result,) = experiment(1)
    for scheme in ("dense", "selective"):
        run = result["runs"][scheme]
        assert TrainConfig.from_json(run["config"]).model.scheme == scheme
        losses = [x["validation_loss"] for x in run["rows"] if "validation_loss" in x]
        assert len(losses) == 4
        assert losses[-1] < losses[0]
    assert result["runs"]["dense"]["parameters"] == run["parameters"]

    measured, steps = result["measured"], result["search"]["steps"]
    assert steps[0]["budgets"] == [None]
    assert steps[-1]["loss"] <= steps[-1]["limit"]
    assert steps[-1]["cache_bytes"] == measured["pruned"]["cache_bytes"]
    assert measured["pruned"]["cache_bytes"] < measured["selective"]["cache_bytes"]
    assert measured["pruned"]["loss"] != measured["selective"]["loss"]
    assert measured["dense"]["memory"] is None

    # Other seeds stay; the same one is replaced, and its search does not count.
    other, same = experiment(0)
    assert same == result
    again = experiment(1)
    assert again[0] == other
    assert again[1]["measured"] == measured
