"""Match3, a task for attention to pairs of keys, and how well one layer learns it.

A token of Match3 asks for two other tokens that sum with it to a multiple of a modulus.
Whether there are any is no matter of pairs, so that a layer of attention to single keys
has to bring all of them to where its feed-forward can compare them; arXiv 2306.02896
bounds how wide it must be for that. One head of 2-simplicial attention sees every two
of them together (theorem 5.1 of arXiv 2507.02754).
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jattn.models import BlockStack
from jattn.models.embedding import Embed
from jattn.train.build import parameter_count
from jattn.train.config import UserError

# Batches that a trained model is measured on.
TEST_BATCHES = 32


class Match3Batch(NamedTuple):
    """Tokens and what there is to say about them.

    Attributes:
      tokens: int32 [B, T].
      labels: bool [B, T], whether two other tokens in the windows match this one.
      counted: bool [B, T], the tokens to be labelled.
    """

    tokens: Any
    labels: Any
    counted: Any


@dataclasses.dataclass(frozen=True)
class Match3:
    """Uniformly random tokens, of which each may have a match in two windows.

    Token i has a match if there are j and k, all three different, with
    ``x_i + x_j + x_k = 0 mod modulus``, ``0 <= i - j < windows[0]`` and
    ``0 <= i - k < windows[1]``. Counted are tokens whose windows lie inside of the row
    and that take part in no sum with one of its tokens twice: what two tokens decide,
    attention to single keys would find. With the default sizes half of the counted
    tokens have a match.

    Attributes:
      modulus: Tokens are 0 to modulus - 1.
      length: Tokens of a row, T.
      windows: As of `jattn.two_simplicial_attention`.
    """

    modulus: int = 32
    length: int = 32
    windows: tuple[int, int] = (8, 8)

    def __post_init__(self):
        """Checks the values; see `UserError`."""
        if self.modulus < 1 or min(self.windows) < 1:
            raise UserError(
                "modulus and windows must be greater than 0; got "
                f"{self.modulus} and {self.windows[0]} and {self.windows[1]}"
            )
        if self.length < max(self.windows):
            raise UserError(
                f"length must be at least the larger window of {max(self.windows)}, "
                f"or no token counts; got {self.length}"
            )

    def sample(self, rng: jax.Array, batch_size: int) -> Match3Batch:
        """Draws batch_size rows."""
        shape = (batch_size, self.length)
        return self.label(jax.random.randint(rng, shape, 0, self.modulus))

    def label(self, tokens: jax.Array) -> Match3Batch:
        """Labels tokens, int [B, T]; labels are right where tokens are counted."""
        back, back2 = (jnp.arange(window) for window in self.windows)
        position = jnp.arange(tokens.shape[1])

        def looking_back(distances):
            return tokens[:, jnp.maximum(position[:, None] - distances, 0)]

        # [B, T, windows[0], windows[1]]
        sums = looking_back(back)[..., None] + looking_back(back2)[:, :, None]
        matches = (tokens[..., None, None] + sums) % self.modulus == 0
        back = back[:, None]
        different = (back > 0) & (back2 > 0) & (back != back2)
        repeated = jnp.any(matches & ~different, axis=(2, 3))
        return Match3Batch(
            tokens=tokens,
            labels=jnp.any(matches & different, axis=(2, 3)),
            counted=~repeated & (position >= max(self.windows) - 1),
        )


class TokenClassifier(nn.Module):
    """Embedding, blocks, and one logit a token.

    Attributes:
      vocab_size: Tokens.
      blocks: The layers.
    """

    vocab_size: int
    blocks: BlockStack

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens [B, T] to logits [B, T]."""
        embed = Embed(
            self.vocab_size,
            self.blocks.features,
            embedding_init=nn.initializers.normal(1.0),
            name="embedding",
        )
        return nn.Dense(1, name="head")(self.blocks(embed(tokens)))[..., 0]


@dataclasses.dataclass(frozen=True)
class Match3Result:
    """What training came to.

    Accuracies are means of that of tokens with a match and that of tokens without one,
    so that 0.5 is worth nothing.

    Attributes:
      parameter_count: Trained numbers.
      accuracy: After training, on rows that were not trained on.
      accuracies: fp32 [steps], of each training batch before it is trained on.
    """

    parameter_count: int
    accuracy: float
    accuracies: jax.Array


def train_match3(
    task: Match3,
    blocks: BlockStack,
    *,
    steps: int = 600,
    batch_size: int = 64,
    learning_rate: float = 6e-3,
    seed: int = 0,
) -> Match3Result:
    """Trains a classifier on new rows in every step, with Adam.

    The learning rate rises for a tenth of the steps and falls along a cosine to 0.

    Args:
      task: What to learn.
      blocks: The layers between embedding and logits.
      steps: Updates.
      batch_size: Rows of a step.
      learning_rate: Its peak.
      seed: Of parameters and rows.
    """
    model = TokenClassifier(task.modulus, blocks)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, steps // 10, steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98)
    )
    init_rng, train_rng, test_rng = jax.random.split(jax.random.key(seed), 3)
    params = model.init(init_rng, jnp.zeros((1, task.length), jnp.int32))

    def measure(params, rng):
        batch = task.sample(rng, batch_size)
        logits: Any = model.apply(params, batch.tokens)
        losses = optax.sigmoid_binary_cross_entropy(logits, batch.labels)
        loss = jnp.mean(losses, where=batch.counted)
        return loss, _balanced_accuracy(logits > 0, batch)

    def step(carry, rng):
        params, state = carry
        (_, accuracy), grads = jax.value_and_grad(measure, has_aux=True)(params, rng)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), accuracy

    @jax.jit
    def train_and_test(params):
        (params, _), accuracies = jax.lax.scan(
            step,
            (params, optimizer.init(params)),
            jax.random.split(train_rng, steps),
        )
        tests = jax.random.split(test_rng, TEST_BATCHES)
        tested = jax.lax.map(lambda rng: measure(params, rng)[1], tests)
        return accuracies, jnp.mean(tested)

    accuracies, accuracy = train_and_test(params)
    return Match3Result(parameter_count(params), float(accuracy), accuracies)


def _balanced_accuracy(found: jax.Array, batch: Match3Batch) -> jax.Array:
    right = found == batch.labels
    with_match = jnp.mean(right, where=batch.counted & batch.labels)
    without = jnp.mean(right, where=batch.counted & ~batch.labels)
    return (with_match + without) / 2
