"""The training loop: from a configuration to a trained model."""

import contextlib
import dataclasses
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jattn.train.build import build_model, parameter_count
from jattn.train.checkpoint import Checkpoints, checkpoints_path
from jattn.train.config import TrainConfig, UserError
from jattn.train.corpus import Entropies
from jattn.train.data import Dataset
from jattn.train.evaluate import Evaluation, make_evaluator, summarize
from jattn.train.metrics import MetricsLog, Progress, Row
from jattn.train.optimizer import make_optimizer, make_schedule
from jattn.train.start import find_start
from jattn.train.step import MAX_SKIPPED_IN_A_ROW, Window, make_train_step


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
      config: Of the run.
      model: What was trained.
      params: Its parameters after the last step.
      step: The last step; less than config.steps if the run was interrupted.
      interrupted: Whether a signal ended it.
      parameter_count: Trained numbers.
      validation: After the last step; None if the run was interrupted before it.
      data: What it was trained on.
      rows: The lines of metrics, those of earlier parts of the run included.
      tokens_per_second: Median over the lines of metrics; NaN if there are none.
      peak_bytes: What the compiled training step holds at most, state included.
      skipped: Steps whose loss or gradient was not finite.
    """

    config: TrainConfig
    model: nn.Module
    params: Any
    step: int
    interrupted: bool
    parameter_count: int
    validation: Evaluation | None
    data: Dataset
    rows: list[Row]
    tokens_per_second: float
    peak_bytes: int
    skipped: int

    @property
    def entropies(self) -> Entropies:
        """Of the validation text, for comparison."""
        return self.data.entropies


def train(
    config: TrainConfig,
    *,
    data: Dataset | None = None,
    progress: bool = False,
    callback: Callable[[Row], None] | None = None,
) -> TrainResult:
    """Trains the model of a configuration, or continues a run that was interrupted.

    With config.out, a checkpoint there is continued bit for bit as if the run had
    never stopped, and SIGTERM or Ctrl-C write one before the function returns.

    Args:
      config: What to do.
      data: The text of config.data if it has been read, such as the `data` of a run
        before; read if None.
      progress: Whether to show a line on the terminal.
      callback: Called with every line of metrics.

    Raises:
      UserError: The configuration, the data or what is in config.out or
        config.resume_from does not allow it, the disk is full, or ten steps in a row
        were not finite.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        data = Dataset.of(config, data)
        model = build_model(config, data.vocab_size)
        optimizer = make_optimizer(config.optimizer, config.steps)
        schedule = make_schedule(config.optimizer, config.steps)
        evaluate = make_evaluator(model, config, data.vocab_size)
        step_function = make_train_step(model, optimizer, config, data.vocab_size)
        batches = data.train_iterator()
        held_out = data.validation_batches(config.eval_batches)

        # Before there is a folder, because this finds what does not fit.
        state, step, position = find_start(config, model, optimizer, data)
        if position is not None:
            batches.set_state(position)
        checkpoints = _open_checkpoints(config, stack)
        rows, report = _open_logs(config, step, progress, callback, stack)

        def save(validation: Evaluation | None) -> None:
            if checkpoints is not None:
                checkpoints.save(
                    step,
                    state,
                    config=config,
                    data={
                        "iterator": batches.get_state(),
                        "fingerprint": data.fingerprint,
                    },
                    validation_loss=None if validation is None else validation.loss,
                )

        # Compiled ahead, so that tokens per second do not count it.
        train_step = (
            jax.jit(step_function, donate_argnums=0).lower(state, held_out[0]).compile()
        )
        validation, clock_step, clock = None, step, time.perf_counter()
        while step < config.steps and not stop.requested:
            # The device may lag behind by many steps: only what reports a number or
            # writes a checkpoint waits for it.
            state = train_step(state, next(batches))
            step, validation = step + 1, None
            is_last = step == config.steps
            if step % config.log_every == 0 or is_last:
                skipped, skipped_in_a_row, window = jax.device_get(
                    (state.skipped, state.skipped_in_a_row, state.window)
                )
                seconds = time.perf_counter() - clock
                tokens = (step - clock_step) * held_out[0].tokens.size
                clock_step, clock = step, clock + seconds
                report(
                    {
                        "step": step,
                        **_means(window),
                        "learning_rate": np.asarray(
                            schedule(step - 1 - skipped)
                        ).item(),
                        "skipped": int(skipped),
                        "tokens_per_second": tokens / seconds,
                    }
                )
                if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                    save(None)
                    raise UserError(_diverged(step, int(skipped_in_a_row), config))
            if step % config.eval_every == 0 or is_last:
                validation = evaluate(state.params, held_out)
                report(_validation_row(step, validation))
                clock_step, clock = step, time.perf_counter()
            if step % config.checkpoint_every == 0 or is_last:
                save(validation)
        interrupted = step < config.steps
        if interrupted:
            save(validation)
        elif validation is None:  # the run was complete before
            validation = evaluate(state.params, held_out)

    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return TrainResult(
        config=config,
        model=model,
        params=state.params,
        step=step,
        interrupted=interrupted,
        parameter_count=parameter_count(state.params),
        validation=validation,
        data=data,
        rows=rows,
        tokens_per_second=statistics.median(speeds) if speeds else math.nan,
        peak_bytes=_peak_bytes(train_step),
        skipped=int(state.skipped),
    )


def _open_checkpoints(
    config: TrainConfig, stack: contextlib.ExitStack
) -> Checkpoints | None:
    if config.out is None:
        return None
    folder = checkpoints_path(config.out)
    return stack.enter_context(Checkpoints(folder, config.keep_checkpoints))


def _open_logs(
    config: TrainConfig,
    step: int,
    progress: bool,
    callback: Callable[[Row], None] | None,
    stack: contextlib.ExitStack,
) -> tuple[list[Row], Callable[[Row], None]]:
    """The rows so far, and a function that sends a row everywhere it belongs."""
    rows: list[Row] = []
    sinks: list[Callable[[Row], None]] = [rows.append]
    if config.out is not None:
        log = stack.enter_context(MetricsLog(config.out, step))
        rows.extend(log.rows)
        sinks.append(log.write)
    if progress:
        description = config.model.layers or config.model.scheme
        display = stack.enter_context(Progress(config.steps, step, description))
        sinks.append(display.write)
    if callback is not None:
        sinks.append(callback)

    def report(row: Row) -> None:
        for sink in sinks:
            sink(row)

    return rows, report


def _means(window: Window) -> dict[str, float]:
    """Means over the steps of a window, NaN if all of them were skipped."""
    steps = float(window.steps) or math.nan
    auxiliary = {name: float(x) / steps for name, x in window.auxiliary.items()}
    training = summarize(window.sums, auxiliary)
    return {
        "loss": training.loss,
        "bits_per_byte": training.bits_per_byte,
        **training.auxiliary,
        "grad_norm": float(window.grad_norm) / steps,
    }


def _validation_row(step: int, validation: Evaluation) -> Row:
    return {
        "step": step,
        "validation_loss": validation.loss,
        "validation_bits_per_byte": validation.bits_per_byte,
    }


def _diverged(step: int, skipped: int, config: TrainConfig) -> str:
    kept = f"; the checkpoint of step {step} is in {config.out}" if config.out else ""
    return (
        f"of the last {skipped} steps up to step {step} none could be taken, because "
        "the loss or the gradient is not finite; try a smaller "
        f"optimizer.learning_rate than {config.optimizer.learning_rate:g}{kept}"
    )


def _peak_bytes(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes  # the donated state is written in place
    )


class StopSignal(contextlib.AbstractContextManager):
    """Turns the first SIGTERM or Ctrl-C into a request to stop.

    A second one acts as it would without this. Python allows handlers in the main
    thread only; elsewhere nothing is changed.

    Attributes:
      requested: Whether there was a signal.
    """

    def __init__(self):
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        """Takes the signals over."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info) -> None:
        """Gives them back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number, frame) -> None:
        del number, frame
        self.requested = True
        self.__exit__()
