"""jattn.train.prune and budgets: the search, what it keeps, and who uses it."""

import dataclasses
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.train import (
    TrainedModel,
    UserError,
    build_model,
    cli,
    load_run,
    load_tokenizer,
    make_evaluator,
    train,
)
from jattn.train import prune as pruning
from jattn.train.budgets import (
    budgets_path,
    read_budgets,
    with_budgets,
    write_budgets,
)
from jattn.train.checkpoint import Checkpoints
from jattn.train.data import Batch, Dataset
from jattn.train.prune import (
    PruneConfig,
    make_budget_evaluator,
    prune,
    search_budgets,
)
from jattn.train.step import init_params
from tests.train import runs

pytestmark = pytest.mark.usefixtures("compiled_programs")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("corpus"))


def selective(path, **fields):
    fields = {"layers": "dense selective selective", "num_layers": 3} | fields
    return runs.config(path, **fields)


def with_skip_error(config, skip_error):
    options = dataclasses.replace(config.model.selective, skip_error=skip_error)
    model = dataclasses.replace(config.model, selective=options)
    return dataclasses.replace(config, model=model)


@pytest.fixture(scope="module")
def trained(path, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("trained") / "run")
    train(selective(path, out=out))
    return out


@pytest.fixture
def elsewhere(path, monkeypatch):
    """Runs by the name of their folder, beside those on the disk."""
    config = runs.config(path)
    model = build_model(config, 256)
    params = jax.jit(lambda: init_params(model, config))()
    found = {"dense": TrainedModel(config, model, params, load_tokenizer(None), 1)}
    load = pruning.load_run
    monkeypatch.setattr(
        pruning, "load_run", lambda out, step=None: found.get(out) or load(out, step)
    )
    return found


@pytest.fixture
def run(trained):
    """The folder of a run that was never pruned."""
    yield trained
    budgets_path(trained).unlink(missing_ok=True)


# The search by itself.


def slow_search(loss, layers, context, decrement, limit):
    """Greedy search, one candidate at a time."""
    budgets = [context] * layers
    path = [tuple(budgets)]
    while True:
        candidates = []
        for layer in range(layers):
            candidate = list(budgets)
            candidate[layer] = max(2, budgets[layer] - decrement)
            if candidate != budgets:
                tokens = budgets[layer] - candidate[layer]
                cost = (loss(candidate) - loss(budgets)) / tokens
                candidates.append((cost, layer, candidate))
        if not candidates or loss(min(candidates)[2]) > limit:
            return path
        budgets = min(candidates)[2]
        path.append(tuple(budgets))


@pytest.mark.parametrize(
    ("weights", "decrement", "slack"),
    [
        ((1.0, 5.0, 0.2), 4, 1.0),
        ((1.0, 1.0, 1.0), 4, 0.5),  # ties: the first layer
        ((0.0, 0.0, 1.0), 7, 0.0),  # 32 is no multiple of 7
        ((1.0, 2.0, 3.0), 4, 1e9),  # down to the end
    ],
)
def test_the_search_is_greedy(weights, decrement, slack):
    def loss(budgets):
        dropped = 1 - np.asarray(budgets, np.float64) / 32
        return float(np.sum(np.asarray(weights) * dropped**2))

    seen = []

    def losses(candidates):
        seen.append(candidates)
        assert candidates.shape == (1, 3)
        return np.array([loss(candidate) for candidate in candidates])

    found = list(
        search_budgets(
            losses,
            num_layers=3,
            context=32,
            decrement=decrement,
            limit=None,
            slack=slack,
        )
    )
    path = [tuple(int(k) for k in state.budgets) for state in found]
    assert path == slow_search(loss, 3, 32, decrement, slack)
    # Of three layers, often one has to be measured, and at most all.
    assert len(seen) <= 2.2 * len(found) + 3
    assert [state.loss for state in found] == [loss(budgets) for budgets in path]
    assert found[0].lowered is None
    for before, after in itertools.pairwise(found):
        (changed,) = np.flatnonzero(before.budgets != after.budgets)
        assert after.lowered == changed
    assert all(state.loss <= slack for state in found)
    if slack == 1e9:
        assert path[-1] == (2, 2, 2)


def test_the_search_is_coarse_at_first_and_fine_in_the_end():
    calls = []

    def losses(candidates):
        calls.append(candidates)
        return np.sum(np.array([1.0, 4.0]) / candidates, axis=1)

    def search(**options):
        calls.clear()
        found = list(
            search_budgets(losses, num_layers=2, context=1024, limit=0.1, **options)
        )
        assert all(state.loss <= 0.1 for state in found)
        return found, len(calls)

    # The least sum of budgets within the limit is 30 + 60.
    fine, fine_calls = search(decrement=1)
    coarse, coarse_calls = search(decrement=1, fraction=0.5)
    assert fine[-1].budgets.sum() == 90
    assert coarse[-1].budgets.sum() <= 95
    assert coarse_calls < fine_calls / 20

    found, _ = search(decrement=4, fraction=0.5)
    lowered = [
        int(np.sum(before.budgets - after.budgets))
        for before, after in itertools.pairwise(found)
    ]
    assert lowered[0] == 512
    assert min(lowered) == 4


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_the_search_ends_at_a_size(fraction):
    *_, before, last = search_budgets(
        lambda candidates: np.sum(np.array([1.0, 4.0]) / candidates, axis=1),
        num_layers=2,
        context=64,
        decrement=4,
        fraction=fraction,
        end=41,
        limit=9.0,
    )
    assert before.budgets.sum() > last.budgets.sum() == 41
    assert last.loss < 0.5


def test_a_layer_gives_up_what_it_can_before_another_pays_more():
    def losses(budgets):
        # Each token of the one costs ten times as much as those that the other can do
        # without, and that one is not to have less than 40.
        given = 64 - budgets
        return given @ [0.01, 0.001] + 1.0 * (budgets[:, 1] < 40)

    *_, found = search_budgets(
        losses, num_layers=2, context=64, decrement=2, fraction=0.5, limit=0.33
    )
    assert tuple(found.budgets) == (34, 40)


def test_a_loss_that_is_not_a_number_is_never_the_least():
    def losses(candidates):
        return np.where(candidates[:, 0] < 8, np.nan, 1.0)

    search = search_budgets(losses, num_layers=2, context=8, decrement=2, limit=1.0)
    assert tuple(list(search)[-1].budgets) == (8, 2)
    with pytest.raises(UserError, match="a validation loss of nan"):
        next(
            search_budgets(
                lambda x: np.full(2, np.nan),
                num_layers=2,
                context=8,
                decrement=2,
                limit=None,
            )
        )


# What a candidate is measured by.


def random_batches():
    rng = np.random.default_rng(0)
    segments = np.repeat([1, 2, 0], [20, 9, 3])
    segments = np.tile(segments, (4, 1)).astype(np.int32)
    return [
        Batch(
            rng.integers(0, 256, (4, 32), dtype=np.int32),
            segments,
            (segments > 0).astype(np.int32),
        )
        for _ in range(2)
    ]


def test_budgets_as_arrays_equal_budgets_of_the_configuration(monkeypatch):
    config = runs.config("", scheme="selective", num_layers=2, accumulation=2)
    model = build_model(config, 256)
    params = jax.jit(lambda: init_params(model, config))()
    # Selection as strong as a trained model's, so that it matters who is dropped.
    params = jax.tree.map(lambda x: 3 * x if x.ndim == 3 else x, params)
    batches = random_batches()
    traces = []
    measure = pruning.measure
    monkeypatch.setattr(
        pruning, "measure", lambda *a, **k: traces.append(1) or measure(*a, **k)
    )
    losses = make_budget_evaluator(model, config, params, batches)
    candidates = np.array([[32, 32], [5, 32], [32, 3], [2, 11]], np.int32)
    found = losses(candidates)
    assert len(set(found)) == 4
    np.testing.assert_array_equal(losses(candidates[::-1])[::-1], found)
    assert len(traces) == 1
    for budgets, loss in zip([(None, 3), (2, 11)], found[2:], strict=True):
        pruned = with_budgets(config, budgets)
        evaluate = make_evaluator(build_model(pruned, 256), pruned, 256)
        assert evaluate(params, batches).loss == pytest.approx(loss, rel=1e-5)


# A run, its search, and what becomes of it.


def files_of(run):
    folder = budgets_path(run).parent
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_pruned_run_keeps_its_loss_with_less_cache(run):
    before = files_of(run)
    whole = load_run(run)
    states = []
    for state in prune(PruneConfig(run=run, slack=0.002, decrement=6)):
        # As if killed here: nothing has been written yet.
        assert files_of(run) == before
        states.append(state)
    first, *_, last = states
    assert first.budgets == (None, None)
    assert first.share == 1
    assert first.limit == first.loss + 0.002
    assert {state.lowered for state in states} <= {None, 1, 2}
    assert last.loss <= last.limit
    assert last.cache_bytes < last.unpruned_bytes
    budgets = [k or 32 for k in last.budgets]
    assert last.share == pytest.approx(sum(budgets) / 64)

    # The checkpoints are as they were; the one that was pruned is used with budgets.
    assert {p: t for p, t in files_of(run).items() if p in before} == before
    assert set(files_of(run)) - set(before) == {budgets_path(run)}
    pruned = load_run(run)
    assert pruned.step == whole.step == last.step
    assert pruned.config == with_budgets(whole.config, last.budgets)
    cache = pruned.model.init_cache(1, 32)
    assert [x.position.shape[1] for x in cache[1:]] == budgets
    assert last.unpruned_bytes - last.cache_bytes == sum(
        (32 - k) * (2 * 16 + 2) * 4 for k in budgets
    )
    data = Dataset(pruned.config.data, seed=0, align=pruned.config.align)
    evaluate = make_evaluator(pruned.model, pruned.config, 256)
    found = evaluate(pruned.params, data.validation_batches(2))
    assert found.loss == pytest.approx(last.loss, rel=1e-5)


def test_a_run_is_pruned_to_a_size_and_goes_on_with_it(run, path):
    *_, last = prune(PruneConfig(run=run, slack=9.0, decrement=6, share=0.3))
    assert sum(last.budgets) == 19  # of 64
    config = selective(path, resume_from=run, steps=12, memory_loss_weight=0.0)
    config = with_budgets(config, last.budgets)
    tuned = train(config)
    assert tuned.validation.loss < last.loss
    cache = tuned.model.init_cache(1, 32)
    assert tuple(x.position.shape[1] for x in cache[1:]) == last.budgets


def test_other_checkpoints_have_no_budgets(run):
    write_budgets(run, 3, (7, None), loss=1.0, limit=1.1)
    write_budgets(run, 6, (9, 4), loss=1.0, limit=1.1)
    assert read_budgets(run, 3) == ((7, None), 1.0, 1.1)
    assert read_budgets(run, 6) == ((9, 4), 1.0, 1.1)
    assert read_budgets(run, 5) is None
    assert load_run(run, 3).config.model.selective.budgets == (7, None)
    with Checkpoints(budgets_path(run).parent / "checkpoints") as checkpoints:
        assert checkpoints.restore_config(3).model.selective.budgets == ()


def test_the_loss_of_another_run_is_the_limit(run, elsewhere):
    dense = elsewhere["dense"]
    data = Dataset(dense.config.data, seed=0)
    evaluate = make_evaluator(dense.model, dense.config, 256)
    loss = evaluate(dense.params, data.validation_batches(2)).loss
    first = next(prune(PruneConfig(run=run, baseline="dense", slack=0.5)))
    assert first.limit == pytest.approx(loss + 0.5, rel=1e-6)


def test_the_command_line(run, capsys):
    assert cli.main(["eval", run]) == 0
    whole = capsys.readouterr().out.splitlines()
    options = ["--slack", "0.002", "--decrement", "15"]
    assert cli.main(["prune", run, *options]) == 0
    head, titles, *rows, end = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step \d: validation loss [\d.]+ .*, limit [\d.]+", head)
    assert titles.split() == ["lowered", "loss", "cache", "saved", "bytes", "budgets"]
    assert rows[0].split()[1:] == ["100.0%", "0", "all", "all"]
    assert len(rows) > 1
    assert re.match(r" layer [12] +[\d.]+ +\d\d\.\d% ", rows[1])
    assert f"kept in {budgets_path(run)}: " in end
    assert max(map(len, rows)) <= 80

    assert cli.main(["eval", run]) == 0
    pruned = capsys.readouterr().out.splitlines()
    pattern = (
        r"selective layers: memory term 0\.\d{4} of the tokens; budgets (\S+ \S+), "
        r"([\d.]+)% of the context; cache of ([\d,]+) bytes, ([\d,]+) without budgets"
    )
    budgets, share, size, unpruned = re.fullmatch(pattern, whole[1]).groups()
    assert (budgets, share) == ("all all", "100.0")
    assert size == unpruned
    budgets, share, size, same = re.fullmatch(pattern, pruned[1]).groups()
    assert budgets == " ".join(rows[-1].split()[-2:])
    assert f"{share}%" == rows[-1].split()[-4]
    assert f"{size} bytes instead of {unpruned}" in end
    limit, loss = head.split()[-1], rows[-1].split()[-5]
    assert pruned[2] == (
        f"budgets found at a validation loss of {loss}, of at most {limit}"
    )
    assert len(whole) == 2
    assert same == unpruned


def test_what_kernels_skip_is_reported(run, capsys, monkeypatch):
    loaded = load_run(run)
    skipping = with_skip_error(loaded.config, 0.1)
    model = build_model(skipping, loaded.tokenizer.vocab_size)
    loaded = dataclasses.replace(loaded, config=skipping, model=model)
    monkeypatch.setattr(cli, "load_run", lambda *_: loaded)
    shares = itertools.cycle([0.25, 0.5])
    monkeypatch.setattr(
        "jattn.nn.selective.selective_skipped", lambda *_, **__: next(shares)
    )
    assert cli.main(["eval", run]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "selective layers: 37.5% of the tiles of queries and keys skipped, with a "
        "skip_error of 0.1"
    )


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_loss": 1.0, "baseline": "runs/dense"}, "either baseline or max_loss"),
        ({"max_loss": float("nan")}, "max_loss must be greater than 0; got nan"),
        ({"slack": -1.0}, "slack must be 0 or greater; got -1"),
        ({"slack": float("nan")}, "slack must be 0 or greater; got nan"),
        ({"decrement": 0}, "decrement must be greater than 0; got 0"),
        ({"fraction": 1.0}, "fraction must be at least 0 and less than 1; got 1"),
        ({"share": -0.1}, r"share must be at least 0 and less than 1; got -0\.1"),
        ({"batches": 0}, "batches must be greater than 0; got 0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        PruneConfig(run="runs/a", **options)


@pytest.mark.usefixtures("elsewhere")
def test_runs_that_cannot_be_pruned(run, tmp_path):
    with pytest.raises(UserError, match="has no selective layers"):
        next(prune(PruneConfig(run="dense")))
    with pytest.raises(UserError, match="holds no run"):
        next(prune(PruneConfig(run=run, baseline=str(tmp_path))))
    with pytest.raises(UserError, match=r"not within the limit of 0\.1000"):
        next(prune(PruneConfig(run=run, max_loss=0.1)))


@pytest.mark.parametrize(
    ("part", "field", "message"),
    [
        ("data", {"tokenizer": "a.json"}, r"another tokenizer \(a\.json, not bytes\)"),
        ("model", {"scheme": "m2bert"}, "fills in masks"),
    ],
)
def test_baselines_of_another_kind(run, elsewhere, part, field, message):
    dense = elsewhere["dense"]
    changed = dataclasses.replace(getattr(dense.config, part), **field)
    config = dataclasses.replace(dense.config, **{part: changed})
    elsewhere["other"] = dataclasses.replace(dense, config=config)
    with pytest.raises(UserError, match=message):
        next(prune(PruneConfig(run=run, baseline="other")))


@pytest.mark.parametrize("content", ["{", "[]", '{"6": {}}', '{"6": {"budgets": [3]}}'])
def test_a_damaged_file_is_named(run, content):
    budgets_path(run).write_text(content)
    with pytest.raises(UserError, match=r"budgets\.json is damaged; without the file"):
        load_run(run)
    with pytest.raises(UserError, match="is damaged"):
        write_budgets(run, 3, (7, None), loss=1.0, limit=1.1)
    assert budgets_path(run).read_text() == content


def test_what_is_kept_is_json(run):
    write_budgets(run, 6, (np.int32(9).item(), None), loss=1.5, limit=1.75)
    assert json.loads(budgets_path(run).read_text()) == {
        "6": {"budgets": [9, None], "loss": 1.5, "limit": 1.75}
    }


def test_budgets_of_the_configuration():
    config = with_budgets(selective(""), (9, None))
    cache = build_model(config, 256).init_cache(1, 32, jnp.float32)
    assert [x.position.shape[1] for x in cache[1:]] == [9, 32]
    same = build_model(with_budgets(config, (9,)), 256).init_cache(1, 32)
    assert [x.position.shape[1] for x in same[1:]] == [9, 9]
    with pytest.raises(UserError, match="3 budgets for 2 layers"):
        build_model(with_budgets(config, (9, 9, 9)), 256)
    with pytest.raises(UserError, match=r"budgets must be at least 2.* got 1"):
        with_budgets(config, (1,))
