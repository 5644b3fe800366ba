"""One training step: a pure function of the state and a batch."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from jattn.train.config import TrainConfig
from jattn.train.data import Batch
from jattn.train.objective import (
    TRAIN_MASKED,
    Examples,
    Sums,
    causal_examples,
    masked_examples,
    measure,
)

# So many steps in a row without a finite loss and gradient, and the run has failed.
MAX_SKIPPED_IN_A_ROW = 10


class Window(struct.PyTreeNode):
    """Totals since the last line of metrics, over steps that were not skipped.

    Attributes:
      sums: Of the training loss.
      auxiliary: By name, summed over steps.
      grad_norm: Summed over steps, before clipping.
      steps: How many steps, fp32.
    """

    sums: Sums
    auxiliary: dict[str, jax.Array]
    grad_norm: jax.Array
    steps: jax.Array


class TrainState(struct.PyTreeNode):
    """All that a step changes.

    The window is part of it so that a run that was interrupted between two lines of
    metrics continues with the same numbers.

    Attributes:
      params: fp32.
      opt_state: Of the optimizer.
      step: int32, steps so far, skipped ones included.
      rng: Key of the whole run; every step derives its own.
      skipped: int32, steps so far that were not taken, because their loss or gradient
        was not finite or MAX_SKIPPED_IN_A_ROW steps before them were not.
      skipped_in_a_row: int32, of those the last ones without a good one between.
      window: Totals for the next line of metrics.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    rng: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    window: Window


def init_params(model: nn.Module, config: TrainConfig) -> Any:
    """Parameters before the first step, from the seed."""
    shape = (1, config.data.context_length)
    variables = model.init(
        jax.random.fold_in(jax.random.key(config.seed), 0),
        jnp.zeros(shape, jnp.int32),
        segment_ids=jnp.ones(shape, jnp.int32),
        method="__call__" if config.model.is_masked else "score",
    )
    return variables["params"]


def masking_key(config: TrainConfig) -> jax.Array:
    """The key that a run's steps derive theirs from, from the seed."""
    return jax.random.fold_in(jax.random.key(config.seed), 1)


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
) -> TrainState:
    """The state before the first step, from the seed."""
    params = init_params(model, config)
    tokens = jnp.zeros((1, config.data.context_length), jnp.int32)
    example = causal_examples(Batch(tokens, tokens + 1, tokens + 1))
    window = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(
            lambda: Window(
                *measure(model, params, example, masked=config.model.is_masked),
                grad_norm=jnp.float32(0),
                steps=jnp.float32(0),
            )
        ),
    )

    def zero():
        # Each a buffer of its own, which a step that takes the state can use again.
        return jnp.zeros((), jnp.int32)

    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        step=zero(),
        rng=masking_key(config),
        skipped=zero(),
        skipped_in_a_row=zero(),
        window=window,
    )


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    vocab_size: int,
) -> Callable[[TrainState, Batch], TrainState]:
    """The function from a state and a batch to the next state.

    The loss is the mean over all measured tokens of the batch, however many parts
    it is computed in, plus the weighted auxiliary losses. A step whose loss or
    gradient is not finite leaves parameters and optimizer as they were.

    Args:
      model: A language model of `jattn.models`.
      optimizer: Of `jattn.train.optimizer`.
      config: Of the run.
      vocab_size: Tokens of the tokenizer.

    Returns:
      A function to be jitted, with its first argument donated.
    """
    masked = config.model.is_masked

    def weights_at(step):
        warmup = jnp.minimum((step + 1) / max(config.memory_loss_warmup, 1), 1)
        return {
            "selective_memory": config.memory_loss_weight * warmup,
            "load_balance": config.load_balance_weight,
        }

    def loss_of_part(params, part: Examples, tokens, weights):
        sums, auxiliary = measure(model, params, part, masked=masked)
        loss = sums.nats / tokens
        for name, value in auxiliary.items():
            loss += weights[name] * value / config.accumulation
        return loss, (sums, auxiliary)

    def loss_and_grads(params, examples: Examples, window: Window, weights):
        tokens = jnp.maximum(jnp.sum(examples.weights), 1)
        parts = jax.tree.map(
            lambda x: x.reshape(config.accumulation, -1, *x.shape[1:]), examples
        )

        def add_part(total, part):
            of_part = jax.value_and_grad(loss_of_part, has_aux=True)
            new = of_part(params, part, tokens, weights)
            return jax.tree.map(jnp.add, total, new), None

        zero = jax.tree.map(
            jnp.zeros_like,
            ((window.steps, (window.sums, window.auxiliary)), params),
        )
        ((loss, (sums, auxiliary)), grads), _ = jax.lax.scan(add_part, zero, parts)
        auxiliary = {k: v / config.accumulation for k, v in auxiliary.items()}
        return loss, sums, auxiliary, grads

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        if masked:
            rng = jax.random.fold_in(state.rng, state.step)
            examples = masked_examples(
                batch, rng, fraction=TRAIN_MASKED, vocab_size=vocab_size
            )
        else:
            examples = causal_examples(batch)
        loss, sums, auxiliary, grads = loss_and_grads(
            state.params, examples, state.window, weights_at(state.step)
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        # So many in a row end the run. The loop sees it only at its next line of
        # metrics, and until then no step may be taken that hides it.
        finite &= state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        def if_finite(new, old):
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        starts = state.step % config.log_every == 0
        window = jax.tree.map(lambda x: jnp.where(starts, 0, x), state.window)
        new = Window(sums, auxiliary, grad_norm, jnp.float32(1))
        return state.replace(
            params=if_finite(params, state.params),
            opt_state=if_finite(opt_state, state.opt_state),
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
            window=if_finite(jax.tree.map(jnp.add, window, new), window),
        )

    return train_step
