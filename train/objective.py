"""What is minimised: cross-entropy of the next token, or of masked tokens."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jattn.train.data import Batch, mask_id

# Part of the tokens a masked language model has to fill in.
TRAIN_MASKED, EVAL_MASKED = 0.3, 0.15


class Examples(NamedTuple):
    """What a model sees and what it is measured on.

    Attributes:
      inputs: int32 [B, T].
      targets: int32 [B, T].
      segment_ids: int32 [B, T], 0 for padding.
      weights: fp32 [B, T], 1 where the model is measured and 0 elsewhere.
      num_bytes: int32 [B, T], bytes of text a target stands for.
    """

    inputs: Any
    targets: Any
    segment_ids: Any
    weights: Any
    num_bytes: Any


def causal_examples(batch: Batch) -> Examples:
    """Every token that is not padding, predicted from what precedes it."""
    return Examples(
        inputs=batch.tokens,
        targets=batch.tokens,
        segment_ids=batch.segment_ids,
        weights=(batch.segment_ids > 0).astype(jnp.float32),
        num_bytes=batch.num_bytes,
    )


def masked_examples(
    batch: Batch, rng: jax.Array, *, fraction: float, vocab_size: int
) -> Examples:
    """A random part of the tokens, predicted from all others.

    Of the tokens to predict the model sees 80 % as the mask token, 10 % as a random
    token and 10 % as they are, as BERT does.
    """
    mask = mask_id(vocab_size)
    chosen_rng, seen_rng, random_rng = jax.random.split(rng, 3)
    shape = batch.tokens.shape
    chosen = jax.random.uniform(chosen_rng, shape) < fraction
    chosen &= batch.segment_ids > 0
    seen = jax.random.uniform(seen_rng, shape)
    random = jax.random.randint(random_rng, shape, 0, vocab_size)
    shown = jnp.where(seen < 0.8, mask, jnp.where(seen < 0.9, random, batch.tokens))
    return Examples(
        inputs=jnp.where(chosen, shown, batch.tokens),
        targets=batch.tokens,
        segment_ids=batch.segment_ids,
        weights=chosen.astype(jnp.float32),
        num_bytes=batch.num_bytes,
    )


class Sums(NamedTuple):
    """Totals over measured tokens, fp32 scalars.

    Attributes:
      nats: Cross-entropy.
      tokens: How many.
      num_bytes: Bytes they stand for.
    """

    nats: Any
    tokens: Any
    num_bytes: Any


def measure(
    model: nn.Module,
    params: Any,
    examples: Examples,
    *,
    masked: bool = False,
    variables: Mapping[str, Any] = MappingProxyType({}),
    collections: Sequence[str] = ("losses",),
) -> tuple[Sums, dict[str, jax.Array]]:
    """Runs the model.

    Args:
      model: A language model of `jattn.models`.
      params: Its parameters.
      examples: What it is measured on.
      masked: Whether the model fills in masks, or scores tokens by what precedes
        them.
      variables: Collections the model has besides its parameters, such as those of
        `jattn.models.DecoderLM.budget_variables`.
      collections: Where the model sows what is wanted: "losses" that belong to what is
        minimised, "metrics" that do not.

    Returns:
      The totals, and by name what the model sows, averaged over layers.
    """
    logits, sown = model.apply(
        {"params": params, **variables},
        examples.inputs,
        segment_ids=examples.segment_ids,
        method="__call__" if masked else "score",
        mutable=list(collections),
    )
    nats = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), examples.targets
    )
    # where, not a product: a token that is not measured may have any logits.
    nats = jnp.where(examples.weights > 0, nats, 0)
    sums = Sums(
        nats=jnp.sum(nats),
        tokens=jnp.sum(examples.weights),
        num_bytes=jnp.sum(examples.weights * examples.num_bytes),
    )
    return sums, _mean_by_name(sown)


def _mean_by_name(sown: Any) -> dict[str, jax.Array]:
    values: dict[str, list[jax.Array]] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(sown):
        name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]
        values.setdefault(name, []).append(value)
    return {name: jnp.mean(jnp.stack(found)) for name, found in values.items()}
