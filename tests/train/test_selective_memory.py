"""benchmarks.selective_memory: the experiment at toy size."""

import dataclasses
import json

import pytest

from benchmarks import selective_memory
from jattn.train import TrainConfig, UserError
from tests.train import runs


@pytest.fixture
def experiment(tmp_path, compiled_programs, monkeypatch):
    """Runs it with a seed; what the file of results says then."""
    del compiled_programs
    fields = dict(steps=12, log_every=3, schedule="wsd", decay_fraction=0.25)
    config = runs.config(runs.write_text(tmp_path), **fields)
    out = tmp_path / "results.json"

    def run(seed, **options):
        def recipe(*_, tokenizer, **__):
            data = dataclasses.replace(config.data, tokenizer=tokenizer)
            model = dataclasses.replace(config.model, scheme="selective")
            return dataclasses.replace(config, model=model, data=data, seed=seed)

        monkeypatch.setattr(selective_memory, "recipe", recipe)
        options = {"context": 32, "share": 0.3, "seed": seed} | options
        options["folder"] = tmp_path / "runs"
        assert not selective_memory.main(out=out, **options)
        return json.loads(out.read_text())["results"]

    return run


def test_it_trains_prunes_goes_on_and_keeps_what_it_found(experiment, tmp_path):
    (result,) = experiment(1)
    configs, budgets = {}, result["search"]["steps"][-1]["budgets"]
    for name, evaluations in (("dense", 4), ("selective", 3), ("tuned", 1)):
        run = result["runs"][name]
        assert run["parameters"] == result["runs"]["dense"]["parameters"]
        configs[name] = TrainConfig.from_json(run["config"])
        losses = [x["validation_loss"] for x in run["rows"] if "validation_loss" in x]
        assert len(losses) == evaluations
        assert losses[-1] == min(losses)
    dense, selective, tuned = configs.values()
    assert dense.model.scheme == "dense"
    assert selective.model.scheme == tuned.model.scheme == "selective"
    assert dense.steps == tuned.steps > selective.steps
    assert dense.optimizer == tuned.optimizer
    assert selective.model.selective.budgets == ()
    assert tuned.model.selective.budgets == tuple(budgets)
    assert tuned.resume_from == "selective_0.1_0_1"

    # The steps of both parts are those of the dense run.
    rates = {
        name: [
            (x["step"], x["learning_rate"]) for x in run["rows"] if "learning_rate" in x
        ]
        for name, run in result["runs"].items()
    }
    assert rates["selective"] + rates["tuned"] == rates["dense"]

    measured, steps = result["measured"], result["search"]["steps"]
    assert steps[0]["budgets"] == [None]
    assert sum(steps[-1]["budgets"]) == 9  # of 32
    assert steps[-1]["cache_bytes"] == measured["pruned"]["cache_bytes"]
    assert measured["tuned"]["cache_bytes"] == measured["pruned"]["cache_bytes"]
    assert measured["selective"]["cache_bytes"] == steps[0]["cache_bytes"]
    assert measured["tuned"]["loss"] < measured["pruned"]["loss"]
    assert measured["dense"]["memory"] is None
    assert str(tmp_path) not in json.dumps(result)

    # Other seeds stay; the same one is replaced by what its folders hold.
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


def test_a_share_out_of_range_is_found_before_the_training(experiment, tmp_path):
    with pytest.raises(UserError, match=r"share must be .* less than 1; got 1.5"):
        experiment(1, share=1.5)
    assert not (tmp_path / "runs").exists()
