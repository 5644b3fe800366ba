"""The cache budgets that `jattn prune` found for the checkpoints of a run.

They are kept beside the checkpoints, one entry for each, and replace the budgets of the
configuration when a checkpoint is loaded to be used. Checkpoints stay as they were
written, so a run that goes on training does so without them.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jattn.train.config import TrainConfig, UserError
from jattn.train.files import write_atomically

Budgets = Sequence[int | None]


class Kept(NamedTuple):
    """What was found for a checkpoint.

    Attributes:
      budgets: Of each selective layer, None for the whole context.
      loss: Validation loss with them, in nats per token.
      limit: The loss they were allowed.
    """

    budgets: tuple[int | None, ...]
    loss: float
    limit: float


def budgets_path(out: str | os.PathLike) -> Path:
    """The file of a run's budgets."""
    return Path(out) / "budgets.json"


def read_budgets(out: str | os.PathLike, step: int) -> Kept | None:
    """The budgets of a checkpoint and their loss, None if none were found for it.

    Args:
      out: Folder of the run.
      step: Of the checkpoint.

    Raises:
      UserError: The file is damaged or cannot be read.
    """
    entry = _read(out).get(str(step))
    if entry is None:
        return None
    return Kept(tuple(entry["budgets"]), entry["loss"], entry["limit"])


def write_budgets(
    out: str | os.PathLike, step: int, budgets: Budgets, *, loss: float, limit: float
) -> None:
    """Keeps budgets for a checkpoint; those of other checkpoints stay.

    Args:
      out: Folder of the run.
      step: Of the checkpoint.
      budgets: One for each selective layer, None for whole contexts.
      loss: Validation loss with them.
      limit: Validation loss they were allowed.

    Raises:
      UserError: The file is damaged or cannot be written; it is as it was.
    """
    entries = _read(out)
    entries[str(step)] = {"budgets": list(budgets), "loss": loss, "limit": limit}
    write_atomically(budgets_path(out), json.dumps(entries, indent=1).encode())


def with_budgets(config: TrainConfig, budgets: Budgets) -> TrainConfig:
    """The configuration with other budgets."""
    selective = dataclasses.replace(config.model.selective, budgets=tuple(budgets))
    model = dataclasses.replace(config.model, selective=selective)
    return dataclasses.replace(config, model=model)


def _read(out: str | os.PathLike) -> dict[str, dict]:
    path = budgets_path(out)
    try:
        entries = json.loads(path.read_bytes())
        for entry in entries.values():
            kinds = {"budgets": list, "loss": float, "limit": float}
            if not all(isinstance(entry[name], x) for name, x in kinds.items()):
                raise ValueError("an entry holds something else")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged; without the file, the run has its whole cache"
        ) from error
    return entries
