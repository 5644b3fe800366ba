"""The command line: what it prints, what it returns, and what bad input gets."""

import dataclasses
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers

from jattn.train import (
    TrainedModel,
    build_model,
    checkpoint,
    cli,
    config,
    load_tokenizer,
)
from jattn.train.checkpoint import Checkpoints
from jattn.train.compare import CompareConfig
from jattn.train.metrics import read_rows
from tests.train import runs

pytestmark = pytest.mark.usefixtures("compiled_programs")

SMALL = """
--data.context-length 64 --data.batch-size 2 --data.validation-fraction 0.2
--model.num-layers 1 --model.features 32 --model.num-heads 2 --model.hidden 16
--model.moba.block-size 16 --steps 4 --log-every 2 --eval-batches 1
--checkpoint-every 2
""".split()  # noqa: SIM905 (one option a line would be twenty)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(path, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["train", *SMALL, "--data.paths", path, "--out", str(out)]) == 0
    return str(out)


@pytest.fixture
def refused(capfd):
    """Runs a command that has to fail, and returns what it says."""

    def run(*arguments):
        capfd.readouterr()
        assert cli.main(list(arguments)) == 2
        output, errors = capfd.readouterr()
        assert output == ""
        assert re.fullmatch(r"jattn: [^\n]+\n", errors)
        assert "Traceback" not in errors
        return errors.removeprefix("jattn: ").rstrip("\n")

    return run


@pytest.fixture
def train_refused(refused, path, tmp_path):
    """Runs a training that has to fail before it leaves anything."""

    def run(options):
        before = sorted(tmp_path.rglob("*"))
        arguments = [*SMALL, "--data.paths", path, "--out", str(tmp_path / "run")]
        message = refused("train", *arguments, *options.split())
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


def test_a_run_from_training_to_text(path, tmp_path, capsys):
    out = str(tmp_path / "run")
    command = ["train", *SMALL, "--data.paths", path, "--out", out]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^[\d,]+ parameters$", printed, re.M)
    assert "bits per byte (unigram entropy" in " ".join(printed.split())
    assert f"kept in {out}" in printed.replace("\n", "")
    (last,) = [r for r in read_rows(Path(out) / "metrics.jsonl") if len(r) == 3]

    assert cli.main(["eval", out]) == 0
    evaluated = capsys.readouterr().out
    assert evaluated.startswith(f"step 4: {last['validation_bits_per_byte']:.4f} bits")
    assert f"loss {last['validation_loss']:.4f} nats per token" in evaluated
    other = runs.write_text(tmp_path, seed=1)
    assert cli.main(["eval", out, "--paths", other, "--batches", "2"]) == 0
    assert capsys.readouterr().out.split("loss")[1] != evaluated.split("loss")[1]

    generate = ["generate", out, "--prompt", "the ", "--max-new-tokens", "20"]
    assert cli.main(generate) == 0
    text = capsys.readouterr().out
    assert text.startswith("the ")
    assert 8 <= len(text.encode(errors="replace")) <= 4 + 20 * 3 + 1
    assert cli.main([*generate, "--seed", "1"]) == 0
    assert capsys.readouterr().out != text

    # Unless told otherwise, text fills the context: 28 bytes after the prompt's 36.
    prompt = "the quick brown fox jumps over a dog"
    assert cli.main(["generate", out, "--prompt", prompt]) == 0
    written = capsys.readouterr().out.removeprefix(prompt).removesuffix("\n")
    assert 28 // 4 <= len(written) <= 28


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model.scheme best", "model.scheme must be one of dense, moba, .*'best'"),
        ("--model.layers dense,nsa", "model.layers must be one of .*'dense,nsa'"),
        ("--model.scheme nsa --model.nsa.window-size 0", "window_size must be .* 0"),
        ("--model.scheme nsa --model.nsa.stride 7", "stride must divide .*stride=7"),
        ("--model.simplicial.windows 0 4", "windows must both be .* got 0 and 4"),
        ("--model.scheme moba --model.moba.top-k 0", "moba.top_k must be .* got 0"),
        ("--model.scheme moba --model.moba.top-k 5", "top_k may be at most 4, .* 5"),
        ("--model.layers moba --model.moba.top-k 5", "top_k may be at most 4, .* 5"),
        ("--model.num-heads 3", "model.features must be a multiple of .* 32 and 3"),
        ("--model.num-kv-heads 3", "num_heads must be a multiple of .* 2 and 3"),
        ("--model.head-dim 7", "rotary embedding needs an even head width; got 7"),
        ("--model.megabyte.patch-size 0", "patch_size must be greater .* got 0"),
        ("--model.scheme megabyte --model.megabyte.patch-size 5", "multiple .* 64 an"),
        (
            "--model.scheme megabyte --model.megabyte.local-features 40",
            "local_features must be a multiple of .* 40 and 16",
        ),
        ("--model.monarch.filter-order 0", "filter_order must be greater .* got 0"),
        ("--model.scheme m2bert --model.monarch.num-blocks 5", "num_blocks=5 must div"),
        ("--model.experts.num-experts 2 --model.experts.top-k 3", "exceed .* got 3"),
        ("--model.experts.num-shared -1", "num_shared must be 0 or greater; got -1"),
        ("--model.implementation triton", "built: dense_attention with .*'triton'"),
        ("--optimizer.learning-rate nan", "learning_rate must be greater .* got nan"),
        ("--steps 0", "steps must be greater than 0; got 0"),
        ("--seed 9223372036854775808", r"seed must be less than 2\*\*63"),
        ("--data.validation-fraction 1", "validation_fraction must be between 0 and 1"),
        ("--data.paths /no/such/text", "/no/such/text does not exist"),
        ("--data.tokenizer /no/such/file", "a tokenizer file is needed"),
        ("--data.max-bytes 1200 --data.context-length 1024", "there is too little"),
        ("--out /dev/null", "/dev/null/checkpoints cannot be used .*: Not a directory"),
    ],
)
def test_training_that_cannot_be(train_refused, options, message):
    assert re.search(message, train_refused(options))


def test_files_that_cannot_be_trained_on(train_refused, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.touch()
    binary.write_bytes(b"\xff\xfe is not text\n" * 2000)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")
    ).save(str(tokenizer))
    assert "empty.txt is empty" in train_refused(f"--data.paths {empty}")
    options = f"--data.paths {binary} --data.tokenizer {tokenizer}"
    assert "binary.txt is not UTF-8 text" in train_refused(options)
    damaged = tmp_path / "text.gz"
    damaged.write_bytes(b"no gzip")
    assert "text.gz cannot be unpacked" in train_refused(f"--data.paths {damaged}")
    options = f"--data.tokenizer {binary}"
    assert "is not a tokenizer saved by" in train_refused(options)


def test_options_that_are_none_are_refused(capsys):
    for arguments in (["train", "--step", "3"], ["train", "--steps", "x"], ["fly"], []):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_another_configuration_in_the_same_folder(refused, path, trained):
    before = files_of(trained)
    arguments = [*SMALL, "--data.paths", path, "--out", trained, "--seed", "1"]
    assert "seed is 0 there and 1 here" in refused("train", *arguments)
    assert files_of(trained) == before


def files_of(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*") if p.is_file()}


def test_a_full_disk(path, tmp_path, monkeypatch, capfd):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    out = tmp_path / "run"
    assert cli.main(["train", *SMALL, "--data.paths", path, "--out", str(out)]) == 2
    message = r"jattn: [^\n]+ cannot be written [^\n]+ has only 0 MiB left;[^\n]+\n"
    assert re.fullmatch(message, capfd.readouterr().err)
    assert list((out / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--max-new-tokens 0", "max_new_tokens must be a positive integer; got 0"),
        ("--temperature -1", r"temperature must be 0 \(greedy\) or positive; got -1"),
        ("--top-k 0", "top_k must be a positive integer; got 0"),
        ("--top-k 1000", "top_k may not exceed the vocabulary of 256 tokens"),
        ("--top-p 0", r"top_p must be in \(0, 1\]; got 0"),
        ("--seed -1", "seed must be from 0 .* got -1"),
        ("--step 3", "does not hold a checkpoint of step 3; there are: 2, 4"),
        ("--prompt \udcff", "the prompt is not UTF-8 text"),
    ],
)
def test_generation_that_cannot_be(refused, trained, options, message):
    assert re.search(message, refused("generate", trained, *options.split()))


def test_evaluation_that_cannot_be(refused, trained):
    assert "batches must be greater than 0" in refused("eval", trained, "--batches=0")
    assert "does not exist" in refused("eval", trained, "--paths", "/no/such/text")


@pytest.mark.parametrize("command", ["generate", "eval", "prune"])
def test_folders_without_a_run(refused, command, tmp_path):
    assert "holds no run" in refused(command, str(tmp_path))
    assert "holds no run" in refused(command, str(tmp_path / "nothing"))
    (tmp_path / "checkpoints").mkdir()
    assert "does not hold a checkpoint" in refused(command, str(tmp_path))


def test_a_masked_model_does_not_generate(refused, monkeypatch):
    masked = runs.config("", scheme="m2bert")
    run = TrainedModel(masked, build_model(masked, 256), {}, load_tokenizer(None), 1)
    monkeypatch.setattr(cli, "load_run", lambda folder, step: run)
    assert "fills in text and cannot continue it" in refused("generate", "run")


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_run", interrupted)
    assert cli.main(["generate", "run"]) == 130
    assert capsys.readouterr() == ("", "\n")


def start(environment, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "jattn.train.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
        text=True,
    )


def test_the_exit_code_of_the_process(environment):
    process = start(environment, "train", "--model.scheme", "best")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output == ""
    assert re.fullmatch(r"jattn: model\.scheme must be one of [^\n]+\n", errors)


def test_a_stopped_process_exits_with_0_and_can_go_on(environment, path, tmp_path):
    out = str(tmp_path / "run")
    arguments = ["train", *SMALL, "--data.paths", path, "--out", out]
    arguments += ["--checkpoint-every", "1000000", "--eval-every", "1000000"]
    process = start(environment, *arguments, "--steps", "1000000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while len(read_rows(metrics)) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert "run the same command again to go on" in " ".join(output.split())
    (step,) = (int(name) for name in os.listdir(tmp_path / "run" / "checkpoints"))
    assert step >= 4
    assert cli.main([*arguments, "--steps", str(step + 2)]) == 0
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [step, step + 2]
    steps = [row["step"] for row in read_rows(metrics) if "loss" in row]
    assert steps == sorted(set(steps))


def test_a_reader_that_leaves_ends_the_text_quietly(environment, trained):
    process = start(environment, "generate", trained, "--prompt", "0123456789abc")
    assert process.stdout.read(10) == "0123456789"
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")


CONFIGURATIONS = [
    value
    for module in (config, cli)
    for value in vars(module).values()
    if dataclasses.is_dataclass(value) and value.__name__.endswith("Config")
]


def test_every_option_is_described():
    assert CompareConfig in CONFIGURATIONS
    for configuration in CONFIGURATIONS:
        for field in dataclasses.fields(configuration):
            described = rf"^  {field.name}: \S"
            assert re.search(described, inspect.getdoc(configuration), re.M), field


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        (
            "",
            [
                "train",
                "Train a model, or go on",
                "compare",
                "prune",
                "generate",
                "eval",
            ],
        ),
        ("train", ["--model.moba.top-k INT", "its own included. (default: 3)"]),
        (
            "compare",
            [
                "--schemes",
                "dense nsa moba",
                "--run.steps",
                f"(default: {CompareConfig().run.steps})",
            ],
        ),
        ("generate", ["RUN", "--top-p", "(default: 0.8)"]),
        ("eval", ["RUN", "--batches"]),
        ("prune", ["RUN", "--baseline", "(default: 0.0)"]),
    ],
)
def test_help(command, parts, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command.split(), "--help"])
    assert exit_.value.code == 0
    usage, *lines = capsys.readouterr().out.splitlines()
    assert usage.startswith("usage: jattn")
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for part in parts:
        assert part in text
