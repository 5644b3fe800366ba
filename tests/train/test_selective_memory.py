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

    def run(seed, **options):
        def recipe(*_, tokenizer, **__):
            data = dataclasses.replace(config.data, tokenizer=tokenizer)
            model = dataclasses.replace(config.model, scheme="selective")
            return dataclasses.replace(config, model=model, data=data, seed=seed)

        monkeypatch.setattr(selective_memory, "recipe", recipe)
        options |= {"context": 32, "seed": seed, "folder": tmp_path / "runs"}
        assert not selective_memory.main(out=out, **options)
        return json.loads(out.read_text())["results"]

    return run


def test_it_trains_prunes_and_keeps_what_it_found(experiment, tmp_path):
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
    chosen = steps[result["search"]["chosen"]]
    assert chosen["cache_bytes"] == measured["pruned"]["cache_bytes"]
    assert chosen["whole_text_loss"] == pytest.approx(measured["pruned"]["loss"])
    kept = measured[result["search"]["kept"]]["loss"]
    assert measured["pruned"]["loss"] <= kept + 1e-6
    assert measured["dense"]["memory"] is None
    assert str(tmp_path) not in json.dumps(result)

    # Other seeds stay; the same one is replaced, and its search does not count.
    other, same = experiment(0)
    assert same == result
    again = experiment(1)
    assert again[0] == other
    assert again[1]["measured"] == measured


def test_it_trains_a_tokenizer(experiment):
    (result,) = experiment(2, vocabulary=300)
    for run in result["runs"].values():
        assert TrainConfig.from_json(run["config"]).data.tokenizer == "tokenizer.json"
    tokens = result["measured"]["dense"]["tokens"]
    assert tokens < result["text"]["validation_bytes"]
