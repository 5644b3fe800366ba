"""The training loop: from a configuration to a trained model."""

import contextlib
import dataclasses
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.core
import jax.extend as jex
import numpy as np
from jax.interpreters import partial_eval

from jattn.train.budgets import read_budgets, with_budgets
from jattn.train.build import build_model, model_errors, parameter_count
from jattn.train.checkpoint import Checkpoints, checkpoints_path, has_checkpoint
from jattn.train.config import TrainConfig, UserError
from jattn.train.corpus import Entropies
from jattn.train.data import Dataset, Tokenizer, load_tokenizer
from jattn.train.evaluate import Evaluation, make_evaluator, summarize
from jattn.train.metrics import MetricsLog, Progress, Row
from jattn.train.optimizer import make_optimizer, make_schedule
from jattn.train.step import (
    MAX_SKIPPED_IN_A_ROW,
    TrainState,
    Window,
    init_params,
    init_state,
    make_train_step,
)


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
      UserError: The configuration, the data or what is in config.out does not allow
        it, the disk is full, or ten steps in a row were not finite.
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

        # Before there is a folder, because these two find what does not fit.
        with model_errors():
            initial, shapes = jax.make_jaxpr(
                lambda: init_state(model, optimizer, config), return_shape=True
            )()

        params = None
        if config.init is not None and not has_checkpoint(config.out):
            params = _params_of(config.init, shapes.params)

        checkpoints = _open_checkpoints(config, stack)
        state, step = _restore_or_init(
            initial, shapes, config, checkpoints, data, batches
        )
        if params is not None:
            state = state.replace(params=params)
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
    folder = checkpoints_path(out)
    if not folder.is_dir():
        raise UserError(f"{out} holds no run; there are no checkpoints in it")
    with Checkpoints(folder) as checkpoints:
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


def _params_of(out: str, shapes: Any) -> Any:
    """The parameters of a run, for a model with parameters of these shapes."""
    params = load_run(out).params
    there, here = _shapes_by_name(params), _shapes_by_name(shapes)
    for name in sorted(there | here):
        if there.get(name) != here.get(name):
            raise UserError(
                f"this run cannot begin with the parameters of {out}: {name} is "
                f"{there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
            )
    return params


def _shapes_by_name(params: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _open_checkpoints(
    config: TrainConfig, stack: contextlib.ExitStack
) -> Checkpoints | None:
    if config.out is None:
        return None
    folder = checkpoints_path(config.out)
    return stack.enter_context(Checkpoints(folder, config.keep_checkpoints))


def _restore_or_init(
    initial: jex.core.ClosedJaxpr,
    shapes: TrainState,
    config: TrainConfig,
    checkpoints: Checkpoints | None,
    data: Dataset,
    batches: grain.DatasetIterator,
) -> tuple[TrainState, int]:
    """The state and step of the latest checkpoint, or those before the first step."""
    step = None if checkpoints is None else checkpoints.latest_step()
    if checkpoints is None or step is None:
        leaves = _compute_in_parts(initial)
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves), 0
    state, position = checkpoints.restore(step, shapes, config)
    if position["fingerprint"] != data.fingerprint:
        raise UserError(
            f"the training text has changed since the checkpoint of step {step} in "
            f"{config.out} was written; choose another folder for this run"
        )
    batches.set_state(position["iterator"])
    return state, step


def _compute_in_parts(program: jex.core.ClosedJaxpr) -> list[jax.Array]:
    """What a program without arguments returns, each operation compiled by itself.

    Hundreds of random arrays in one program are fused into kernels that take minutes to
    compile for a GPU, while by themselves arrays of one shape share a program.
    """
    used = [True] * len(program.jaxpr.outvars)
    jaxpr, _ = partial_eval.dce_jaxpr(program.jaxpr, used)  # leaves out the model's run
    return jax.core.eval_jaxpr(jaxpr, program.consts)


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
