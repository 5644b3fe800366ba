"""Where a run starts: at its latest checkpoint, at another run's, or at the seed."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.core
import jax.extend as jex
import jax.numpy as jnp
import optax
from jax.interpreters import partial_eval

from jattn.train.build import build_model, model_errors
from jattn.train.checkpoint import Checkpoints, checkpoints_of, checkpoints_path
from jattn.train.config import TrainConfig, UserError
from jattn.train.data import Dataset, load_tokenizer
from jattn.train.optimizer import make_optimizer
from jattn.train.step import TrainState, init_state, masking_key


class Start(NamedTuple):
    """What a run begins with.

    Attributes:
      state: After the steps that were made before.
      step: How many those are.
      position: Of the data's iterator after them; None for the beginning.
    """

    state: TrainState
    step: int
    position: Any


def find_start(
    config: TrainConfig,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    data: Dataset,
) -> Start:
    """Where a run starts. Nothing is written.

    Args:
      config: Of the run.
      model: Its model.
      optimizer: Its optimizer.
      data: Its text.

    Raises:
      UserError: The sizes of the model do not fit each other, or the run does not fit
        the checkpoints that it would start from.
    """
    with model_errors():
        program, shapes = jax.make_jaxpr(
            lambda: init_state(model, optimizer, config), return_shape=True
        )()
    start = _continued(config, shapes, data) or _resumed(config, shapes, data)
    if start is None:
        leaves = _compute_in_parts(program)
        state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
        start = Start(state, step=0, position=None)
    return start


def _continued(config: TrainConfig, shapes: TrainState, data: Dataset) -> Start | None:
    """At the latest checkpoint of the run itself, if there is one."""
    if config.out is None or not checkpoints_path(config.out).is_dir():
        return None
    with Checkpoints(checkpoints_path(config.out)) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            return None
        state, there = checkpoints.restore(step, shapes, config)
    if there["fingerprint"] != data.fingerprint:
        raise UserError(
            f"the training text has changed since the checkpoint of step {step} in "
            f"{config.out} was written; choose another folder for this run"
        )
    return Start(state, step, there["iterator"])


def _resumed(config: TrainConfig, shapes: TrainState, data: Dataset) -> Start | None:
    """At the latest checkpoint of the run to resume from, if there is such a run."""
    if config.resume_from is None:
        return None
    with checkpoints_of(config.resume_from) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise UserError(f"{config.resume_from} does not hold a checkpoint")
        other = checkpoints.restore_config(step)
        _check_resumable(config, other, step)
        state, there = checkpoints.restore(step, _state_shapes(other), other)
    _check_same_parameters(config, state.params, shapes.params)
    state = state.replace(
        rng=masking_key(config),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        window=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.window),
    )
    same_text = there["fingerprint"] == data.fingerprint
    same_order = _reading_order(other) == _reading_order(config)
    return Start(state, step, there["iterator"] if same_text and same_order else None)


def _check_resumable(config: TrainConfig, other: TrainConfig, step: int) -> None:
    """Checks options that decide whether a run can resume from another one's."""
    names = other.optimizer.name, config.optimizer.name
    if names[0] != names[1]:
        raise UserError(
            f"this run cannot resume from {config.resume_from}: optimizer.name is "
            f"{names[0]!r} there and {names[1]!r} here"
        )
    if config.steps <= step:
        raise UserError(
            f"{config.resume_from} has made {step} steps, which steps include; they "
            f"must be more, got {config.steps}"
        )


def _check_same_parameters(config: TrainConfig, there: Any, here: Any) -> None:
    """Checks that parameters have the names and the shapes of another run's."""
    shapes = _shapes_by_name(there), _shapes_by_name(here)
    for name in sorted(shapes[0] | shapes[1]):
        in_each = [x.get(name, "absent") for x in shapes]
        if in_each[0] != in_each[1]:
            raise UserError(
                f"this run cannot resume from {config.resume_from}: {name} is "
                f"{in_each[0]} there and {in_each[1]} here"
            )


def _shapes_by_name(params: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _state_shapes(config: TrainConfig) -> TrainState:
    """The shapes of a run's state, from its configuration alone."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = build_model(config, tokenizer.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.steps)
    with model_errors():
        return jax.eval_shape(lambda: init_state(model, optimizer, config))


def _reading_order(config: TrainConfig) -> tuple[int, ...]:
    """What decides which part of a text is in which batch."""
    data = config.data
    return config.seed, config.align, data.context_length, data.batch_size


def _compute_in_parts(program: jex.core.ClosedJaxpr) -> list[jax.Array]:
    """What a program without arguments returns, each operation compiled by itself.

    Hundreds of random arrays in one program are fused into kernels that take minutes to
    compile for a GPU, while by themselves arrays of one shape share a program.
    """
    used = [True] * len(program.jaxpr.outvars)
    jaxpr, _ = partial_eval.dce_jaxpr(program.jaxpr, used)  # leaves out the model's run
    return jax.core.eval_jaxpr(jaxpr, program.consts)
