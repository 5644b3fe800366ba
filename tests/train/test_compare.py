"""jattn.train.compare: the same for every scheme, and nothing is done twice."""

import dataclasses
import html
import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path
from unittest import mock

import chex
import pytest

from jattn.train import UserError, cli, compare
from jattn.train.compare import CompareConfig, scheme_runs
from jattn.train.config import _flatten
from jattn.train.corpus import read_corpus
from jattn.train.data import Dataset
from jattn.train.metrics import read_rows
from tests.train import runs

pytestmark = pytest.mark.usefixtures("compiled_programs")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("corpus"))


def config(path, out, schemes=("dense", "selective"), prompt="the ", **fields):
    run = runs.config(
        path,
        **dict(context_length=64, features=32, hidden=64, steps=4, eval_every=2)
        | dict(checkpoint_every=2)
        | fields,
    )
    return CompareConfig(out=str(out), schemes=schemes, run=run, prompt=prompt)


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
    """A comparison that was never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    with mock.patch("jattn.train.data.read_corpus", wraps=read_corpus) as read:
        comparison = compare.compare(config(path, out))
    read.assert_called_once()  # the text of all schemes is the same
    return config(path, out), comparison


@pytest.fixture
def trained(monkeypatch):
    """Lists the schemes that are trained, and shows their rows to a function."""
    seen, train = [], compare.train

    def patch(watch=lambda scheme, row: None):
        def spy(run, **options):
            scheme = run.model.scheme
            seen.append(scheme)
            return train(run, **options, callback=lambda row: watch(scheme, row))

        monkeypatch.setattr(compare, "train", spy)
        return seen

    return patch


def without_speed(results):
    speed = dict(training_tokens_per_second=0.0, decode_tokens_per_second=0.0)
    return [dataclasses.replace(result, **speed) for result in results]


def assert_same(comparison, expected):
    assert without_speed(comparison.results) == without_speed(expected.results)
    assert comparison.references == expected.references
    assert comparison.report is not None


def times(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*") if p.is_file()}


def test_every_scheme_has_the_same_data_and_as_many_parameters(path):
    demo = CompareConfig()
    data = dataclasses.replace(demo.run.data, paths=(path,), batch_size=2)
    demo = dataclasses.replace(demo, run=dataclasses.replace(demo.run, data=data))
    found = scheme_runs(demo)
    assert list(found) == list(demo.schemes)
    counts = [compare._parameters(run, 256) for run in found.values()]
    assert max(abs(count - counts[0]) for count in counts) <= 0.05 * counts[0]
    # All that differs is the scheme, where it is kept and the width that evens out.
    for scheme, run in found.items():
        assert run.model.scheme == scheme
        model = dataclasses.replace(run.model, scheme="dense", hidden=None)
        run = dataclasses.replace(run, model=model, out=found["dense"].out)
        assert run == found["dense"]
    datasets = [
        Dataset(run.data, seed=run.seed, align=run.align)
        for run in (found["dense"], found["megabyte"])
    ]
    iterators = [dataset.train_iterator() for dataset in datasets]
    for one, two in itertools.islice(zip(*iterators, strict=True), 3):
        chex.assert_trees_all_equal(one, two)
    one, two = (dataset.validation_batches(2) for dataset in datasets)
    chex.assert_trees_all_equal(one, two)


def test_what_a_comparison_finds(whole):
    config, comparison = whole
    dense, selective = comparison.results
    assert (dense.scheme, selective.scheme) == ("dense", "selective")
    assert dense.parameters == selective.parameters
    for result in comparison.results:
        assert [step for step, _ in result.curve] == [2, 4]
        assert result.curve[-1][1] == result.validation_bits_per_byte
        assert result.training_tokens_per_second > 0
        assert result.decode_tokens_per_second > 0
        assert result.peak_bytes > 3 * 4 * result.parameters
        assert result.skipped_steps == 0
        assert result.sample.startswith("the ")
        # 60 tokens of a context of 64 are left, three pieces of 16.
        assert 20 < len(result.sample) <= 4 + 48
        rows = read_rows(Path(config.out, result.scheme, "metrics.jsonl"))
        assert rows[-1]["validation_bits_per_byte"] == result.validation_bits_per_byte
    # One layer of fp32 keys and values of two heads of 16, and what is selected.
    assert dense.cache_bytes == pytest.approx(2 * 64 * 32 * 4, rel=0.01)
    assert selective.cache_bytes > dense.cache_bytes
    assert list(comparison.references) == ["unigram entropy", "bigram entropy"]
    assert 0 < comparison.references["bigram entropy"] < 4


def test_the_report_has_all_of_it(whole):
    config, comparison = whole
    assert comparison.report == Path(config.out, "report.html")
    page = comparison.report.read_bytes().decode()
    for result in comparison.results:
        bits = f"{result.validation_bits_per_byte:.3f}"
        row = f"<td>{result.scheme}</td><td>{result.parameters:,}</td><td>{bits}</td>"
        assert row in page
        assert html.escape(result.sample) in page
    for name, value in comparison.references.items():
        assert f"<td>{name}</td><td></td><td>{value:.3f}</td>" in page
    assert {p.name for p in Path(config.out).iterdir()} == {
        *("dense", "selective", "report.html", "curves.png", "trade_off.png")
    }


def test_a_finished_comparison_is_only_shown_again(whole, trained, capfd):
    config, comparison = whole
    results = [Path(config.out, s, "result.json") for s in ("dense", "selective")]
    before = [path.stat().st_mtime_ns for path in results]
    seen = trained()
    assert compare.compare(config).results == comparison.results
    assert seen == []
    assert [path.stat().st_mtime_ns for path in results] == before
    assert capfd.readouterr() == ("", "")


class Killed(BaseException):
    pass


def test_a_killed_comparison_goes_on(whole, path, tmp_path, trained):
    def kill(scheme, row):
        if scheme == "selective" and row["step"] == 4:
            raise Killed

    again = config(path, tmp_path)
    seen = trained(kill)
    with pytest.raises(Killed):
        compare.compare(again)
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / "selective" / "result.json").exists()
    before = times(tmp_path / "dense")
    seen.clear()
    trained()
    assert_same(compare.compare(again), whole[1])
    assert seen == ["selective"]
    assert times(tmp_path / "dense") == before


def test_a_signal_inside_a_run_stops_the_comparison(path, tmp_path, trained):
    def stop(scheme, row):
        if "loss" in row and row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    seen = trained(stop)
    stopped = compare.compare(config(path, tmp_path))
    assert stopped == compare.Comparison([], {}, None)
    assert seen == ["dense"]
    assert [p.name for p in (tmp_path / "dense" / "checkpoints").iterdir()] == ["2"]
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_a_signal_between_two_schemes(whole, path, tmp_path, monkeypatch):
    def stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(*arguments)

    measure = compare._measure
    with monkeypatch.context() as patch:
        patch.setattr(compare, "_measure", stop)
        handler = signal.getsignal(signal.SIGTERM)
        stopped = compare.compare(config(path, tmp_path))
        assert signal.getsignal(signal.SIGTERM) == handler
    assert stopped.report is None
    assert without_speed(stopped.results) == without_speed(whole[1].results[:1])
    assert (tmp_path / "dense" / "result.json").exists()
    assert not (tmp_path / "selective").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"fields"])
def test_damaged_and_foreign_results_count_as_none(whole, tmp_path, content):
    config, comparison = whole
    run = scheme_runs(config)["dense"]
    written = Path(config.out, "dense", "result.json").read_bytes()
    path = tmp_path / "result.json"
    path.write_bytes(written)
    found = compare._read_result(path, run, config.prompt)
    assert found.result == comparison.results[0]
    longer = dataclasses.replace(run, steps=run.steps + 1)
    assert compare._read_result(path, longer, config.prompt) is None
    assert compare._read_result(path, run, "else") is None
    if content == b"fields":
        content = written.replace(b'"parameters"', b'"size"')
    path.write_bytes(content)
    assert compare._read_result(path, run, config.prompt) is None


def test_a_damaged_result_is_measured_anew(whole, trained):
    config, comparison = whole
    path = Path(config.out, "dense", "result.json")
    checkpoints = times(Path(config.out, "dense", "checkpoints"))
    written = json.loads(path.read_bytes())
    path.write_bytes(path.read_bytes()[:100])
    rows = []
    seen = trained(lambda scheme, row: rows.append(row))
    assert_same(compare.compare(config), comparison)
    assert seen == ["dense"]
    assert rows == []  # no step was repeated
    assert times(Path(config.out, "dense", "checkpoints")) == checkpoints
    assert json.loads(path.read_bytes())["config"] == written["config"]


def test_another_prompt_gives_another_sample(whole, path, tmp_path, trained):
    out = shutil.copytree(whole[0].out, tmp_path / "out")
    rows = []
    trained(lambda scheme, row: rows.append(row))
    (result,) = compare.compare(config(path, out, ("dense",), prompt="mat ")).results
    assert rows == []
    assert result.sample.startswith("mat ")
    assert result.curve == whole[1].results[0].curve


def test_a_full_disk_leaves_the_report_as_it_was(whole):
    config, comparison = whole
    before = comparison.report.read_bytes()
    files = set(Path(config.out).iterdir())
    message = r"(curves.png|report.html) cannot be written: File too large"
    with runs.files_of_at_most(100), pytest.raises(UserError, match=message):
        compare.compare(config)
    assert comparison.report.read_bytes() == before
    assert set(Path(config.out).iterdir()) == files


def test_a_comparison_on_the_command_line(whole, path, trained, capsys):
    config, comparison = whole
    arguments = ["compare", "--out", config.out, "--schemes", "dense", "selective"]
    arguments += ["--prompt", config.prompt]
    wanted, default = (_flatten(c.run.to_json()) for c in (config, CompareConfig()))
    for name, value in wanted.items():
        if value != default[name]:
            values = value if isinstance(value, tuple) else (value,)
            arguments += [f"--run.{name}", *map(str, values)]
    seen = trained()
    assert cli.main(arguments) == 0
    assert seen == []
    output, errors = capsys.readouterr()
    assert errors == ""
    table, report = output.split("report: ")
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    assert report.replace("\n", "") == str(comparison.report)
    best, worst, unigram, bigram = (line.split() for line in lines[2:])
    results = {result.scheme: result for result in comparison.results}
    for cells in (best, worst):
        result = results.pop(cells[0])
        assert cells[1] == f"{result.parameters:,}"
        assert cells[2] == f"{result.validation_bits_per_byte:.3f}"
        assert len(cells) == 8
    assert float(best[2]) <= float(worst[2])
    assert unigram[:2] == ["unigram", "entropy"]
    assert bigram[:2] == ["bigram", "entropy"]


def test_a_table_of_large_numbers_fits(whole, monkeypatch, capsys):
    comparison = whole[1]
    large = [
        dataclasses.replace(
            result,
            scheme="simplicial",
            parameters=9_876_543,
            training_tokens_per_second=123_456.0,
            decode_tokens_per_second=12_345.0,
            cache_bytes=9_999 * 1024,
            peak_bytes=9_999 * 2**20,
        )
        for result in comparison.results
    ]
    monkeypatch.setattr(
        cli,
        "compare",
        lambda config, progress: dataclasses.replace(comparison, results=large),
    )
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["compare"]) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    for cell in ("9,876,543", "123,456", "12,345", "9,999.0", "simplicial"):
        assert cell in output


def test_a_comparison_that_was_stopped_at_once(monkeypatch, capsys):
    stopped = compare.Comparison([], {}, None)
    monkeypatch.setattr(cli, "compare", lambda config, progress: stopped)
    assert cli.main(["compare"]) == 0
    expected = "stopped; run the same command again to go on\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--schemes", "schemes is empty"),
        ("--schemes dense dense", "schemes names one twice: dense dense"),
        ("--schemes dense m2bert", "m2bert fills in masked text"),
        ("--schemes dense best", "model.scheme must be one of .* 'best'"),
        ("--run.data.context-length 32", "context of 32 .* prompt and 32 .* has 4"),
        ("--schemes moba --run.model.moba.top-k 9", "top_k may be at most 8, .* got 9"),
        ("--schemes dense --run.model.head-dim 7", "even head width; got 7"),
        (
            "--schemes dense monarch --run.model.hidden 8 --run.model.features 32",
            r"monarch has [\d,]+ parameters at the closest, more than 5% off",
        ),
        ("--schemes dense --run.data.paths /no/such/text", "does not exist"),
    ],
)
def test_comparisons_that_cannot_be(tmp_path, capfd, options, message):
    out = tmp_path / "out"
    arguments = [*options.split(), "--out", str(out)]
    assert cli.main(["compare", *arguments]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert re.fullmatch(r"jattn: [^\n]+\n", errors)
    assert re.search(message, errors)
    assert not out.exists()


def test_a_folder_that_is_a_file(path, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used for checkpoints: Not a dir"):
        compare.compare(config(path, tmp_path / "file"))
