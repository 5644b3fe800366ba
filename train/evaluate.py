"""How well a model predicts held-out text."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jattn.train.config import TrainConfig
from jattn.train.data import PADDING_SEGMENT, Batch
from jattn.train.objective import (
    EVAL_MASKED,
    Sums,
    causal_examples,
    masked_examples,
    measure,
)


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
      loss: Nats per measured token.
      bits_per_byte: Of the text those tokens stand for.
      tokens: How many tokens were measured.
      auxiliary: What the model sows, its additions to the loss and its metrics, by
        name: means over layers and over rows that hold text.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    auxiliary: dict[str, float]


def summarize(sums: Sums, auxiliary: Mapping[str, float]) -> Evaluation:
    """Means of totals; NaN where nothing was measured."""
    nats, tokens, num_bytes = (float(x) for x in jax.device_get(sums))
    return Evaluation(
        loss=nats / tokens if tokens else math.nan,
        bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else math.nan,
        tokens=round(tokens),
        auxiliary=dict(auxiliary),
    )


class _Totals(NamedTuple):
    """Of some rows: what was measured, what was sown times rows, rows with text."""

    sums: Sums
    auxiliary: dict[str, Any]
    rows: Any


def make_evaluator(
    model: nn.Module, config: TrainConfig, vocab_size: int
) -> Callable[[Any, Sequence[Batch]], Evaluation]:
    """The function from parameters and batches to an `Evaluation`.

    Causal models are measured on every token; masked language models on 15 % of
    them, the same ones whenever the same batches are given. No more rows are held
    at a time than in training.
    """
    masked = config.model.is_masked

    @jax.jit
    def totals(params, batch: Batch, index) -> _Totals:
        if masked:
            rng = jax.random.fold_in(jax.random.key(0), index)
            examples = masked_examples(
                batch, rng, fraction=EVAL_MASKED, vocab_size=vocab_size
            )
        else:
            examples = causal_examples(batch)
        parts = jax.tree.map(
            lambda x: x.reshape(config.accumulation, -1, *x.shape[1:]), examples
        )

        def part_totals(part):
            sums, auxiliary = measure(
                model, params, part, masked=masked, collections=("losses", "metrics")
            )
            rows = jnp.sum(jnp.any(part.segment_ids != PADDING_SEGMENT, axis=1))
            return _Totals(sums, {k: v * rows for k, v in auxiliary.items()}, rows)

        return jax.tree.map(jnp.sum, jax.lax.map(part_totals, parts))

    def evaluate(params: Any, batches: Sequence[Batch]) -> Evaluation:
        found = [totals(params, batch, index) for index, batch in enumerate(batches)]
        total = jax.device_get(jax.tree.map(lambda *x: sum(x), *found))
        rows = float(total.rows) or math.nan
        return summarize(
            total.sums, {k: float(v) / rows for k, v in total.auxiliary.items()}
        )

    return evaluate
