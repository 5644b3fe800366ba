"""jattn.train.PRESETS: that they are what they say, build, and train."""

import dataclasses

import jax
import numpy as np
import pytest

from jattn.train import PRESETS, build_model, cli, parameter_count, train
from jattn.train.loop import TrainResult
from jattn.train.metrics import read_rows
from jattn.train.optimizer import make_schedule
from jattn.train.step import init_params
from tests.train import runs

SHRINK = """
--model.num-layers 4 --model.features 32 --model.num-heads 4 --model.head-dim 8
--model.hidden 16 --model.simplicial.windows 8 4 --model.experts.num-experts 2
--data.context-length 32 --data.batch-size 2 --data.validation-fraction 0.2
--accumulation 1 --steps 1 --eval-batches 1
""".split()  # noqa: SIM905 (one option a line would be twenty)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    config = PRESETS[name]
    model = build_model(config, 256)
    assert parameter_count(jax.eval_shape(lambda: init_params(model, config))) > 0


def test_the_simplicial_transformer():
    config = PRESETS["simplicial-transformer"]
    model = build_model(config, 256)
    params = jax.eval_shape(lambda: init_params(model, config))

    layers = [params["blocks"][f"layer_{n}"] for n in range(config.model.num_layers)]
    simplicial = ["key2" in layer["mixer"] for layer in layers]
    assert simplicial == [False, False, False, True] * 4
    assert config.model.simplicial.windows == (512, 32)
    assert config.model.simplicial.form == "trilinear"
    for layer in layers:
        assert layer["mixer"]["query"]["kernel"].shape[1] == 64
        assert layer["mixer"]["key"]["kernel"].shape[1] == 1
        assert layer["feed_forward"]["gate"].shape == (8, 1024, 1024)
    # Parameters, gradients and two moments in fp32 fill a quarter of 80 GB at most.
    assert 0.4e9 < parameter_count(params) < 20e9 / 16

    optimizer = config.optimizer
    assert (optimizer.name, optimizer.weight_decay) == ("adamw", 0.0125)
    schedule = make_schedule(optimizer, config.steps)
    found = [schedule(step) for step in (0, 2000, 4000, 12_000, config.steps)]
    middle = (4e-3 + 4e-5) / 2
    np.testing.assert_allclose(found, [0, 2e-3, 4e-3, middle, 4e-5], rtol=1e-5)


def test_options_change_a_preset_and_it_trains(tmp_path, monkeypatch):
    results: list[TrainResult] = []

    def remember(config, **options):
        results.append(train(config, **options))
        return results[-1]

    monkeypatch.setattr(cli, "train", remember)
    path, out = runs.write_text(tmp_path), str(tmp_path / "run")
    preset = ["--preset", "simplicial-transformer"]
    arguments = [*SHRINK, "--data.paths", path, "--out", out]
    assert cli.main(["train", *arguments[:2], *preset, *arguments[2:]]) == 0

    (result,) = results
    assert result.step == 1
    assert result.skipped == 0
    (row,) = [row for row in read_rows(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert np.isfinite([row["loss"], row["grad_norm"], row["load_balance"]]).all()
    mixers = [result.params["blocks"][f"layer_{n}"]["mixer"] for n in range(4)]
    assert ["key2" in mixer for mixer in mixers] == [False, False, False, True]
    # What no option named is the preset's.
    expected = PRESETS["simplicial-transformer"]
    assert result.config.optimizer == expected.optimizer
    assert result.config.dtype == "bfloat16"
    assert result.config.model.experts == dataclasses.replace(
        expected.model.experts, num_experts=2
    )


def test_help_shows_a_preset(capsys):
    for preset, steps in ([], "500"), (["--preset=simplicial-transformer"], "20000"):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["train", *preset, "--help"])
        assert exit_.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "below, or of --preset {simplicial-transformer}." in text
        assert f"resume_from included. (default: {steps})" in text


@pytest.mark.parametrize("arguments", [["--preset", "simplicial"], ["--preset"]])
def test_presets_that_are_none(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", *arguments])
    assert exit_.value.code == 2
    assert "argument --preset" in capsys.readouterr().err
