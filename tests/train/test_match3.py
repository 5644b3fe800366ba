"""Match3: its labels, and that attention to pairs of keys learns what others do not."""

import concurrent.futures
import itertools
import multiprocessing

import jax
import numpy as np
import pytest

from jattn.models import BlockStack
from jattn.train import UserError
from jattn.train.match3 import Match3, train_match3


def slow_labels(tokens, task):
    """Labels and counted tokens of one row, pair by pair."""
    labels, counted = [], []
    for i, x in enumerate(tokens):
        found = {"different": False, "repeated": False}
        windows = [range(i, i - window, -1) for window in task.windows]
        inside = all(window[-1] >= 0 for window in windows)
        for j, k in itertools.product(*windows):
            if inside and (x + tokens[j] + tokens[k]) % task.modulus == 0:
                found["different" if len({i, j, k}) == 3 else "repeated"] = True
        labels.append(found["different"])
        counted.append(inside and not found["repeated"])
    return labels, counted


@pytest.mark.parametrize(
    "task", [Match3(), Match3(11, 20, (6, 3)), Match3(5, 9, (2, 4))], ids=str
)
def test_labels(task):
    batch = jax.device_get(task.sample(jax.random.key(0), 8))
    assert batch.tokens.shape == (8, task.length)
    assert batch.tokens.min() == 0
    assert batch.tokens.max() == task.modulus - 1
    slow = [slow_labels(row, task) for row in batch.tokens.tolist()]
    labels, counted = (np.asarray(part) for part in zip(*slow, strict=True))
    np.testing.assert_array_equal(batch.counted, counted)
    np.testing.assert_array_equal(batch.labels[counted], labels[counted])
    assert 0 < labels[counted].mean() < 1


def test_half_of_the_counted_tokens_have_a_match():
    batch = Match3().sample(jax.random.key(1), 1000)
    assert 0.45 < batch.labels[batch.counted].mean() < 0.55
    assert 0.3 < batch.counted.mean() < 0.6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modulus": 0}, "greater than 0; got 0 and 8 and 8"),
        ({"windows": (8, 0)}, "greater than 0; got 32 and 8 and 0"),
        ({"length": 7}, "at least the larger window of 8, .* got 7"),
    ],
)
def test_tasks_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        Match3(**fields)


def one_layer(mixer, num_heads, **options):
    return BlockStack(
        features=64,
        num_layers=1,
        num_heads=num_heads,
        head_dim=16,
        hidden=64,
        mixers=mixer,
        mixer_options={mixer: options},
    )


def train_both():
    task = Match3()
    # Six heads of queries, keys and values instead of four with second keys and values
    # are as many parameters. Dense attention without a window learns still less.
    simplicial = train_match3(task, one_layer("simplicial", 4, windows=task.windows))
    dense = train_match3(task, one_layer("dense", 6, window=max(task.windows)))
    return jax.device_get((vars(simplicial), vars(dense)))


def test_one_2_simplicial_layer_learns_what_one_dense_layer_does_not(monkeypatch):
    # Here it pays to let XLA optimize, which is decided once for a process.
    monkeypatch.delenv("XLA_FLAGS")
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        simplicial, dense = pool.submit(train_both).result()
    assert simplicial["parameter_count"] == dense["parameter_count"]
    assert simplicial["accuracies"].shape == dense["accuracies"].shape == (600,)
    assert simplicial["accuracy"] > 0.95
    assert 0.5 < dense["accuracy"] < 0.75
