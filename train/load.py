"""From a run on disk to its model."""

import dataclasses
import os
from typing import Any

import flax.linen as nn
import jax

from jattn.train.budgets import read_budgets, with_budgets
from jattn.train.build import build_model, model_errors
from jattn.train.checkpoint import checkpoints_of
from jattn.train.config import TrainConfig, UserError
from jattn.train.data import Tokenizer, load_tokenizer
from jattn.train.step import init_params


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What a checkpoint holds, ready to be used.

    Attributes:
      config: Of the run.
      model: Its model.
      params: Its parameters.
      tokenizer: What its tokens mean.
      step: Of the checkpoint.
    """

    config: TrainConfig
    model: nn.Module
    params: Any
    tokenizer: Tokenizer
    step: int


def load_run(out: str | os.PathLike, step: int | None = None) -> TrainedModel:
    """Loads the model of a run, with the budgets `jattn prune` found if it did.

    Args:
      out: Folder of the run, its config.out.
      step: Which checkpoint; the one with the least validation loss if None, the
        latest if none has one.

    Raises:
      UserError: There is no such checkpoint, or the file of budgets is damaged.
    """
    with checkpoints_of(out) as checkpoints:
        steps = checkpoints.steps()
        if step is None:
            step = checkpoints.best_step()
        if step is None or step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
            raise UserError(f"{out} does not hold {wanted}; there are: {there}")
        config = checkpoints.restore_config(step)
        kept = read_budgets(out, step)
        if kept is not None:
            config = with_budgets(config, kept.budgets)
        tokenizer = load_tokenizer(config.data.tokenizer)
        model = build_model(config, tokenizer.vocab_size)
        with model_errors():
            shapes = jax.eval_shape(lambda: init_params(model, config))
        params = checkpoints.restore_params(step, shapes)
    return TrainedModel(config, model, params, tokenizer, step)
