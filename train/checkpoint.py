"""Checkpoints of a run: everything that is needed to continue it bit for bit."""

import contextlib
import logging
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jattn.train.config import TrainConfig, UserError, differences
from jattn.train.step import TrainState


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints in a folder, written in the background.

    A checkpoint is complete or absent: it is written under another name, and renamed
    when all of it is on the disk. Closing waits until that has happened.

    Args:
      folder: Where they are; made if it does not exist.
      keep: Latest checkpoints to keep, besides the one with the least validation
        loss; None to only read.

    Raises:
      UserError: The folder cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike, keep: int | None = None):
        self._folder = Path(folder).absolute()
        self._read_only = keep is None
        logging.getLogger("absl").addFilter(_for_users)
        options = ocp.CheckpointManagerOptions(
            # best_fn makes Orbax store the loss; the policy decides what is kept.
            best_fn=_validation_loss,
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep),
                    policies.BestN(get_metric_fn=_validation_loss, reverse=True, n=1),
                ]
            ),
            read_only=self._read_only,
            cleanup_tmp_directories=not self._read_only,
        )
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except OSError as error:
            logging.getLogger("absl").removeFilter(_for_users)
            raise UserError(
                f"{self._folder} cannot be used for checkpoints: {error.strerror}"
            ) from error

    def __exit__(self, *exc_info) -> None:
        """Waits for the last checkpoint; raises UserError if it cannot be written."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if not self._read_only:  # another process may be writing
                self._remove_unfinished()
            logging.getLogger("absl").removeFilter(_for_users)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The step of the latest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the least validation loss, None if there is no checkpoint."""
        return self._manager.best_step()

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        config: TrainConfig,
        data: dict[str, Any],
        validation_loss: float | None,
    ) -> None:
        """Begins to write a checkpoint, unless there is one of this step already.

        Args:
          step: How many steps the state has seen.
          state: Copied before this returns; it may be donated then.
          config: Of the run.
          data: JSON values that say where in which data the run is.
          validation_loss: Of the state, None if it was not measured.

        Raises:
          UserError: This checkpoint or the one before cannot be written.
        """
        if step == self.latest_step():
            return
        if validation_loss is None or math.isnan(validation_loss):
            validation_loss = math.inf
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise self._cannot_write(
                f"it takes {needed / 2**20:.0f} MiB and the disk has only "
                f"{free / 2**20:.0f} MiB left"
            )
        with self._write_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    rest=ocp.args.StandardSave(state.replace(params=None)),
                    config=ocp.args.JsonSave(config.to_json()),
                    data=ocp.args.JsonSave(data),
                ),
                metrics={"validation_loss": validation_loss},
                force=True,
            )

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk; UserError if it is not."""
        with self._write_errors():
            self._manager.wait_until_finished()

    def restore_config(self, step: int) -> TrainConfig:
        """The configuration of the run that wrote a checkpoint."""
        return TrainConfig.from_json(self._restore(step, config=ocp.args.JsonRestore()))

    def restore(
        self, step: int, state: TrainState, config: TrainConfig
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and the data of a checkpoint.

        Args:
          step: Which checkpoint.
          state: The state's shapes, as of jax.eval_shape.
          config: Of the run that goes on.

        Raises:
          UserError: Another configuration wrote the checkpoint.
        """
        different = differences(self.restore_config(step), config)
        if different:
            raise UserError(
                f"{self._folder} holds checkpoints of another configuration: "
                f"{'; '.join(different)}; choose another folder for this run, or the "
                "values of the one that is there"
            )
        params = self.restore_params(step, state.params)
        rest = self._restore(step, rest=_restore_arrays(state.replace(params=None)))
        return rest.replace(params=params), self._restore(
            step, data=ocp.args.JsonRestore()
        )

    def restore_params(self, step: int, params: Any) -> Any:
        """The parameters of a checkpoint, given their shapes."""
        return self._restore(step, params=_restore_arrays(params))

    def _restore(self, step: int, **item: Any) -> Any:
        """The one named item of a checkpoint."""
        restored = self._manager.restore(step, args=ocp.args.Composite(**item))
        (name,) = item
        return restored[name]

    @contextlib.contextmanager
    def _write_errors(self):
        """Says in one sentence why writing failed."""
        try:
            yield
        except (OSError, ValueError) as error:
            # TensorStore reports the system's error number only in its message.
            number = re.search(r"os_error_code='(\d+)'", str(error))
            if isinstance(error, OSError):
                reason = error.strerror
            elif number:
                reason = os.strerror(int(number[1]))
            else:
                raise
            raise self._cannot_write(reason) from error

    def _remove_unfinished(self) -> None:
        """Removes what a failed write left."""
        for _ in range(20):
            unfinished = list(self._folder.glob("*.orbax-checkpoint-tmp"))
            if not unfinished:
                return
            for folder in unfinished:
                shutil.rmtree(folder, ignore_errors=True)
            # Arrays that were being written when one failed may still appear.
            time.sleep(0.05)

    def _cannot_write(self, reason: str | None) -> UserError:
        return UserError(
            f"a checkpoint cannot be written to {self._folder}: {reason}; earlier "
            "checkpoints there are as they were"
        )


def checkpoints_path(out: str | os.PathLike) -> Path:
    """The folder of a run's checkpoints."""
    return Path(out) / "checkpoints"


def checkpoints_of(out: str | os.PathLike) -> Checkpoints:
    """The checkpoints of a run, to read; UserError if there is no run."""
    folder = checkpoints_path(out)
    if not folder.is_dir():
        raise UserError(f"{out} holds no run; there are no checkpoints in it")
    return Checkpoints(folder)


def _validation_loss(metrics: Any) -> float:
    return metrics["validation_loss"]


def _restore_arrays(shapes: Any) -> ocp.args.StandardRestore:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.args.StandardRestore(
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )
    )


def _for_users(record: logging.LogRecord) -> bool:
    """Drops Orbax's warnings, and tracebacks of errors that it raises as well."""
    of_interest = record.levelno > logging.WARNING and not record.exc_info
    return of_interest or "orbax" not in record.pathname
