"""jattn.train.train: a run, interrupted or not, and everything it leaves behind."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from jattn.train import UserError, load_run, train
from jattn.train.checkpoint import Checkpoints
from jattn.train.metrics import MetricsLog, read_rows
from tests.train import runs

# Most tests here run the same programs.
pytestmark = pytest.mark.usefixtures("compiled_programs")

# Lines of metrics, evaluations and checkpoints all fall on different steps.
STEPS = dict(steps=10, log_every=4, eval_every=3, checkpoint_every=5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
    """A run that was never interrupted."""
    out = str(tmp_path_factory.mktemp("whole") / "run")
    return train(runs.config(path, out=out, **STEPS))


def assert_same_run(result, expected):
    chex.assert_trees_all_equal(result.params, expected.params)
    assert runs.without_speed(result.rows) == runs.without_speed(expected.rows)
    assert result.validation == expected.validation
    assert result.step == expected.step == 10
    assert not result.interrupted
    written = read_rows(Path(result.config.out) / "metrics.jsonl")
    assert written == result.rows


def test_a_run_reports_and_keeps_what_it_should(whole):
    assert [row["step"] for row in whole.rows] == [3, 4, 6, 8, 9, 10, 10]
    training = [row for row in whole.rows if "loss" in row]
    assert [row["step"] for row in training] == [4, 8, 10]
    assert training[-1]["loss"] < training[0]["loss"] - 0.2
    for row in training:
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / np.log(2))
        assert row["skipped"] == 0
        assert row["tokens_per_second"] > 0
    rates = [row["learning_rate"] for row in training]
    assert rates[0] > rates[1] > rates[2] > 1e-3
    assert whole.validation.loss == whole.rows[-1]["validation_loss"]
    assert whole.validation.tokens == pytest.approx(2 * 4 * 32, rel=0.2)
    assert whole.tokens_per_second > 0
    sizes = sum(x.nbytes for x in jax.tree.leaves(whole.params))
    assert whole.parameter_count * 4 == sizes
    assert whole.peak_bytes > 3 * sizes  # parameters and two moments
    assert set(os.listdir(whole.config.out)) == {
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
    }
    (events,) = (Path(whole.config.out) / "tensorboard").iterdir()
    assert b"validation_loss" in events.read_bytes()


def test_no_folder_no_files_no_output(whole, path, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    result = train(runs.config(path, **STEPS))
    chex.assert_trees_all_equal(result.params, whole.params)
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_told_to_stop_continues_bit_for_bit(
    whole, path, tmp_path, number
):
    config = runs.config(path, out=str(tmp_path), **STEPS)

    def stop(row):
        if row["step"] == 3:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    stopped = train(config, callback=stop)
    assert signal.getsignal(number) == handler
    assert stopped.interrupted
    assert stopped.step == 3
    assert stopped.validation.loss == stopped.rows[-1]["validation_loss"]
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [3]
    seen = []
    assert_same_run(train(config, callback=seen.append), whole)
    assert [row["step"] for row in seen] == [4, 6, 8, 9, 10, 10]


def test_a_killed_run_continues_bit_for_bit(whole, path, tmp_path, environment):
    out = str(tmp_path / "run")
    program = f"""
import os, signal
import tests.conftest
from jattn.train import train
from tests.train import runs

def die(row):
    if row["step"] == 8:
        os.kill(os.getpid(), signal.SIGKILL)

train(runs.config({path!r}, out={out!r}, **{STEPS!r}), callback=die)
"""
    killed = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert_same_run(train(runs.config(path, out=out, **STEPS)), whole)


def test_a_finished_run_is_not_run_again(whole):
    seen = []
    assert_same_run(train(whole.config, callback=seen.append), whole)
    assert seen == []


def test_a_run_can_go_on_for_longer(whole, path, tmp_path):
    short = runs.config(path, out=str(tmp_path), **STEPS | {"steps": 5})
    assert train(short).step == 5
    longer = train(dataclasses.replace(short, steps=10))
    assert longer.step == 10
    assert [row["step"] for row in longer.rows] == [3, 4, 5, 5, 6, 8, 9, 10, 10]


def test_text_that_has_been_read_is_not_read_again(whole, path, monkeypatch):
    monkeypatch.delattr("jattn.train.data.read_corpus")
    again = train(runs.config(path, **STEPS), data=whole.data)
    chex.assert_trees_all_equal(again.params, whole.params)
    for name, there, here in (
        ("seed", 0, 1),
        ("context_length", 32, 64),
        ("align", 1, 2),
        ("tokenizer", None, "elsewhere"),
    ):
        message = f"data was read for another run: {name} is {there} there and {here!r}"
        with pytest.raises(UserError, match=message):
            train(runs.config(path, **STEPS | {name: here}), data=whole.data)


def test_another_configuration_in_the_same_folder_is_refused(whole):
    other = dataclasses.replace(whole.config, seed=1, accumulation=2)
    with pytest.raises(
        UserError, match="accumulation is 1 there and 2 here; seed is 0 there and 1"
    ):
        train(other)


def test_another_text_in_the_same_place_is_refused(tmp_path):
    path = runs.write_text(tmp_path)
    config = runs.config(path, out=str(tmp_path / "run"), **STEPS)
    train(config)
    Path(path).write_bytes(runs.text(20_000, seed=1))
    with pytest.raises(UserError, match=r"training text has changed since .* step 10"):
        train(config)


def test_a_run_that_diverges_stops_and_says_so(path, tmp_path):
    config = runs.config(
        path,
        out=str(tmp_path),
        learning_rate=1e30,
        warmup_steps=0,
        **STEPS | {"steps": 40},
    )
    seen = []
    with pytest.raises(UserError, match=r"last 11 steps up to step 12 .* not finite"):
        train(config, callback=seen.append)
    assert [row["skipped"] for row in seen if "loss" in row] == [3, 7, 11]
    losses = [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")[1:2]]
    assert np.isfinite(losses).all()
    run = load_run(tmp_path, step=12)
    assert run.step == 12


def test_the_loop_learns_the_text(path):
    config = runs.config(path, steps=60, learning_rate=3e-2, batch_size=8)
    result = train(config)
    assert result.validation.bits_per_byte < result.entropies.unigram - 0.5


def test_a_masked_model_is_trained(path):
    config = runs.config(path, scheme="m2bert", **STEPS | {"steps": 6})
    result = train(config)
    # Of two batches of 128 tokens 15 % are measured, give or take.
    assert 15 < result.validation.tokens < 65
    assert result.validation.loss < result.rows[0]["validation_loss"]


def test_a_run_can_be_loaded(whole):
    run = load_run(whole.config.out, step=10)
    assert run.config == whole.config
    assert run.model == whole.model
    assert run.tokenizer.decode([104, 105]) == b"hi"
    chex.assert_trees_all_equal(run.params, whole.params)
    losses = {
        row["step"]: row["validation_loss"]
        for row in whole.rows
        if "validation_loss" in row
    }
    assert load_run(whole.config.out).step == min((10,), key=losses.get)


def test_what_cannot_be_loaded_is_named(whole, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="of step 7; there are: 5, 10"):
        load_run(whole.config.out, step=7)


def test_a_folder_that_cannot_be_made(path, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run/checkpoints cannot be used"):
        train(runs.config(path, out=str(tmp_path / "file" / "run")))


def test_progress_is_shown_on_request(whole, path, capsys):
    train(runs.config(path, **STEPS), progress=True)
    output = capsys.readouterr().out
    for part in (
        "dense",
        "10/10",
        "loss",
        "bits/byte",
        "tok/s",
        "0:00:00",
        "step 9: valid",
    ):
        assert part in output


def test_metrics_that_cannot_be_written(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: Is a dir"):
        MetricsLog(tmp_path, 0)
    (tmp_path / "run").mkdir()
    row = {"step": 1, "loss": 2.0}
    with (
        MetricsLog(tmp_path / "run", 0) as log,
        runs.files_of_at_most(10),
        pytest.raises(UserError, match=r"metrics.jsonl cannot be written: File"),
    ):
        log.write(row)


def test_metrics_of_lost_steps_are_dropped(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": step / 3, "memory": float("nan")})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')  # killed while writing
    with MetricsLog(tmp_path, 2) as log:
        assert [row["step"] for row in log.rows] == [1, 2]
        log.write({"step": 3, "loss": 0.5})
    rows = read_rows(path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["loss"] == 1 / 3
    assert np.isnan(rows[0]["memory"])
    assert rows[2]["loss"] == 0.5
    assert read_rows(tmp_path / "nothing") == []
