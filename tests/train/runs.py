"""A run small enough for tests, and text for it."""

import contextlib
import dataclasses
import resource
from collections.abc import Iterable

from jattn.train import (
    DataConfig,
    MoBAConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from jattn.train.metrics import Row

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "dog", "eat")


def text(size: int, seed: int = 0) -> bytes:
    """Lines of words in an order that a model can learn something about."""
    lines, length, word = [], 0, seed
    while length < size:
        line = []
        for _ in range(5 + len(lines) % 3):
            line.append(WORDS[word % len(WORDS)])
            word = word * 5 + len(line) + len(lines) % 7
            word %= 1009
        lines.append(" ".join(line) + "\n")
        length += len(lines[-1])
    return "".join(lines).encode()[:size]


def write_text(folder, size: int = 20_000, seed: int = 0) -> str:
    path = folder / f"text{seed}.txt"
    path.write_bytes(text(size, seed))
    return str(path)


def without_speed(rows: Iterable[Row]) -> list[Row]:
    """Lines of metrics without what differs from run to run."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def config(path: str, **fields) -> TrainConfig:
    """A configuration; fields may be those of any of its parts."""
    values = {
        "model": dict(
            num_layers=1,
            features=16,
            num_heads=2,
            hidden=16,
            moba=MoBAConfig(block_size=8),
        ),
        "data": dict(
            paths=(path,), context_length=32, batch_size=4, validation_fraction=0.2
        ),
        "optimizer": dict(learning_rate=1e-2, warmup_steps=2),
    }
    run = dict(steps=6, log_every=2, eval_every=3, eval_batches=2, checkpoint_every=3)
    classes = {"model": ModelConfig, "data": DataConfig, "optimizer": OptimizerConfig}
    for name, value in fields.items():
        for part, cls in classes.items():
            if name in {field.name for field in dataclasses.fields(cls)}:
                values[part][name] = value
                break
        else:
            run[name] = value
    parts = {part: cls(**values[part]) for part, cls in classes.items()}
    return TrainConfig(**parts, **run)


@contextlib.contextmanager
def files_of_at_most(size):
    """No file of this process can grow larger, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
