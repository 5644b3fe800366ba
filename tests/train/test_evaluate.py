"""jattn.train.evaluate: loss and bits per byte of held-out text."""

import dataclasses

import jax
import numpy as np
import pytest

from jattn.train import build_model, make_evaluator
from jattn.train.data import Batch
from jattn.train.objective import causal_examples, measure
from jattn.train.step import init_params
from tests.train import runs


@pytest.fixture(scope="module")
def setup():
    config = runs.config("")
    model = build_model(config, 256)
    return config, model, jax.jit(lambda: init_params(model, config))()


@pytest.fixture(scope="module")
def batches():
    """Three batches of two documents a row, as of a tokenizer: tokens of 0-4 bytes."""
    rng = np.random.default_rng(0)
    segments = np.tile(np.repeat([1, 2, 0], [10, 15, 7]), (4, 1)).astype(np.int32)
    return [
        Batch(
            rng.integers(0, 256, (4, 32), dtype=np.int32),
            segments,
            rng.integers(0, 5, (4, 32), dtype=np.int32) * (segments > 0),
        )
        for _ in range(3)
    ]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_against_each_document_alone(setup, batches, accumulation):
    config, model, params = setup
    score = jax.jit(
        lambda tokens: model.apply({"params": params}, tokens, method="score")
    )
    nats, count, num_bytes = 0.0, 0, 0
    for tokens in (
        x for batch in batches for x in (batch.tokens[:, :10], batch.tokens[:, 10:25])
    ):
        logits = np.asarray(score(tokens), np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= np.take_along_axis(log_probabilities, tokens[..., None], -1).sum()
        count += tokens.size
    num_bytes = sum(batch.num_bytes.sum() for batch in batches)

    config = dataclasses.replace(config, accumulation=accumulation)
    found = make_evaluator(model, config, 256)(params, batches)
    assert found.tokens == count
    assert found.loss == pytest.approx(nats / count, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-5)


def test_empty_rows_do_not_count(setup, batches):
    config, model, params = setup
    evaluate = make_evaluator(model, config, 256)
    empty = Batch(*(np.zeros_like(x) for x in batches[0]))
    assert evaluate(params, [*batches, empty]) == evaluate(params, batches)
    assert np.isnan(evaluate(params, [empty]).loss)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_auxiliary_losses_are_means_over_rows_with_text(batches, accumulation):
    config = runs.config("", scheme="selective", accumulation=accumulation)
    model = build_model(config, 256)
    params = jax.jit(lambda: init_params(model, config))()
    # Two rows of the last batch are padding.
    last = Batch(*(x * np.array([1, 1, 0, 0])[:, None] for x in batches[2]))
    found = make_evaluator(model, config, 256)(params, [*batches[:2], last])

    @jax.jit
    def memory(row):
        examples = causal_examples(jax.tree.map(lambda x: x[None], row))
        return measure(model, params, examples)[1]["selective_memory"]

    rows = [
        Batch(*(x[i] for x in batch))
        for batch, count in zip(batches, (4, 4, 2), strict=True)
        for i in range(count)
    ]
    alone = [float(memory(row)) for row in rows]
    assert found.auxiliary == {
        "selective_memory": pytest.approx(np.mean(alone), rel=1e-5)
    }
    assert 0 < found.auxiliary["selective_memory"] < 1
