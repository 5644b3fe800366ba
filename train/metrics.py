"""Where a run's numbers go: a JSONL file, TensorBoard, and the terminal."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import rich.progress
import tensorboardX

from jattn.train.config import UserError

Row = Mapping[str, float]


def read_rows(path: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of a JSONL file; none if there is no file.

    A last line that breaks off, as a killed run may leave it, is left out.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append({k: _number(v) for k, v in json.loads(line).items()})
    return rows


class MetricsLog(contextlib.AbstractContextManager):
    """Appends rows to metrics.jsonl and to TensorBoard's event files in a folder.

    Rows past the step a run continues from are dropped, so that none is there twice.

    Args:
      folder: Of the run; it has to exist.
      step: The step the run starts from.

    Attributes:
      rows: What was written so far, by earlier parts of the run too.

    Raises:
      UserError: The folder cannot be written to; when a row is written, too.
    """

    def __init__(self, folder: str | os.PathLike, step: int):
        self._path = Path(folder) / "metrics.jsonl"
        with self._write_errors():
            self.rows = [row for row in read_rows(self._path) if row["step"] <= step]
            # Written anew beside the old file, which stays whole until it is replaced.
            rewritten = self._path.with_suffix(".jsonl.tmp")
            rewritten.write_text("".join(_line(row) for row in self.rows))
            rewritten.replace(self._path)
            self._file = self._path.open("a")
            self._board = tensorboardX.SummaryWriter(
                str(Path(folder) / "tensorboard"), purge_step=step + 1
            )

    def __exit__(self, *exc_info) -> None:
        """Closes the files."""
        with self._write_errors():
            self._board.close()
            self._file.close()

    def write(self, row: Row) -> None:
        """Writes a row; its "step" says where it belongs."""
        self.rows.append(dict(row))
        with self._write_errors():
            self._file.write(_line(row))
            self._file.flush()
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(row["step"]))

    @contextlib.contextmanager
    def _write_errors(self):
        """Says in one sentence why writing failed."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error.strerror}"
            ) from error


class Progress(contextlib.AbstractContextManager):
    """A line on the terminal that follows a run, evaluations above it.

    Args:
      steps: Of the whole run.
      start: Step it starts from.
      description: What is being trained.
    """

    def __init__(self, steps: int, start: int, description: str):
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=10),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            rich.progress.TimeRemainingColumn(),
        )
        self._task = self._progress.add_task(
            description, total=steps, completed=start, numbers="compiling"
        )

    def __enter__(self) -> "Progress":
        """Begins to show the line."""
        self._progress.start()
        return self

    def __exit__(self, *exc_info) -> None:
        """Leaves the line as it is."""
        self._progress.stop()

    def write(self, row: Row) -> None:
        """Shows the numbers of a row."""
        if "validation_loss" in row:
            self._progress.console.print(
                f"step {row['step']:,}: validation {row['validation_loss']:.4f} nats, "
                f"{row['validation_bits_per_byte']:.4f} bits/byte"
            )
            return
        numbers = (
            f"loss {row['loss']:.3f} {row['bits_per_byte']:.3f} bits/byte "
            f"{row['tokens_per_second']:,.0f} tok/s"
        )
        if row["skipped"]:
            numbers += f" [red]{row['skipped']} skipped[/red]"
        self._progress.update(self._task, completed=row["step"], numbers=numbers)


def _line(row: Row) -> str:
    # JSON has no NaN and no infinity: such values are null.
    values = {k: v if math.isfinite(v) else None for k, v in row.items()}
    return json.dumps(values) + "\n"


def _number(value: float | None) -> float:
    return math.nan if value is None else value
