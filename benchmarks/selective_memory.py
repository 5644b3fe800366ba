"""How small Selective Attention's cache gets at a dense model's validation loss.

python -m benchmarks.selective_memory --context 512 --out FILE --text FOLDER

trains a dense and a selective model of one size on a text, the selective one with the
memory loss, and prunes it down to the validation loss of the dense one. Everything is
what these commands do, with the options of `recipe`, and a slack of what the selective
model gains over the dense one:

jattn train --model.scheme dense --out runs/dense
jattn train --model.scheme selective --out runs/selective
jattn prune runs/selective --slack 0.0123 --fraction 0.125 --decrement 2 --batches 2
jattn eval runs/selective
"""

import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
import tyro

from benchmarks.results import environment, replace
from jattn.train import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SelectiveConfig,
    TrainConfig,
    TrainedModel,
    build_model,
    load_run,
    make_evaluator,
    train,
)
from jattn.train.budgets import budgets_path, with_budgets
from jattn.train.build import context_cache_bytes
from jattn.train.corpus import read_corpus, split_corpus
from jattn.train.data import Batch, Dataset
from jattn.train.metrics import Row
from jattn.train.prune import PruneConfig, make_budget_evaluator, prune

# More batches than the held-out text has.
_ALL = 10**6

# Steps of a search that are measured at once on the whole held-out text.
_SIDE_BY_SIDE = 8


def recipe(
    context: int,
    *,
    text: tuple[str, ...] = (),
    tokenizer: str | None = None,
    layers: int = 6,
    heads: int = 6,
    memory_loss_weight: float = 0.1,
    memory_loss_warmup: int = 0,
    memory_tau: float = 4.0,
    steps: int = 2000,
    seed: int = 0,
) -> TrainConfig:
    """The selective run's configuration but for the folder.

    Queries and keys are normalised as in the paper.

    Args:
      context: Tokens of a row; a batch has 65536.
      text: Files and folders; the source of Python's standard library if there are
        none.
      tokenizer: Its file; bytes are the tokens if None.
      layers: Of each of the two models.
      heads: Likewise, of 64 each.
      memory_loss_weight: See `TrainConfig`.
      memory_loss_warmup: Likewise.
      memory_tau: See `jattn.train.SelectiveConfig`.
      steps: Of each of the two models.
      seed: Of parameters and of the order of the data.
    """
    return TrainConfig(
        model=ModelConfig(
            scheme="selective",
            num_layers=layers,
            features=64 * heads,
            num_heads=heads,
            qk_norm=True,
            selective=SelectiveConfig(memory_tau=memory_tau),
        ),
        data=DataConfig(
            paths=text,
            tokenizer=tokenizer,
            context_length=context,
            batch_size=2**16 // context,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        steps=steps,
        seed=seed,
        dtype="bfloat16",
        memory_loss_weight=memory_loss_weight,
        memory_loss_warmup=memory_loss_warmup,
        log_every=20,
        eval_every=100,
        eval_batches=4,
        checkpoint_every=500,
        keep_checkpoints=1,
    )


def train_tokenizer(
    text: tuple[str, ...], vocabulary: int, path: pathlib.Path
) -> pathlib.Path:
    """Writes a byte-pair tokenizer of a tenth of the training text to a file."""
    training, _ = split_corpus(read_corpus(text), DataConfig().validation_fraction)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (x.text[: len(x.text) // 10].decode(errors="ignore") for x in training), trainer
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, tokenizer.to_str())
    return path


def measure(
    config: TrainConfig,
    folder: pathlib.Path,
    *,
    fraction: float = 0.125,
    decrement: int = 2,
    batches: int = 2,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Trains both models, prunes the selective one and measures all three.

    The search sees a few batches, and may lose on them what the selective model gains
    over the dense one on the whole held-out text: what pruning costs varies less from
    batch to batch than what the two models differ by. What is reported is measured on
    the whole text, with the smallest budgets that the search came across and that keep
    the dense model's loss there.

    Args:
      config: Of the selective run but for the folder.
      folder: Where the runs are kept.
      fraction: See `jattn.train.PruneConfig`.
      decrement: See `jattn.train.PruneConfig`.
      batches: See `jattn.train.PruneConfig`.
      deadline: When to end a search that is not over, of `time.perf_counter`.

    Returns:
      What is in the file of results about one context and seed. There, "kept" says
      whose loss was kept: that of the selective model with its whole cache if it is
      worse than the dense one; and "chosen" at which step of the search.
    """
    data = Dataset(config.data, seed=config.seed, align=config.align)
    whole_text = data.validation_batches(_ALL)
    # What only the selective model has is as it always is in the dense one's
    # configuration: all selective runs of a folder share that one.
    dense = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, scheme="dense", selective=SelectiveConfig()
        ),
        memory_loss_weight=TrainConfig.memory_loss_weight,
        memory_loss_warmup=TrainConfig.memory_loss_warmup,
    )
    memory_loss = dict(
        memory_loss_weight=config.memory_loss_weight,
        memory_loss_warmup=config.memory_loss_warmup,
        memory_tau=config.model.selective.memory_tau,
    )
    selective = "_".join(["selective", *(f"{x:g}" for x in memory_loss.values())])
    runs, measured = {}, {}
    for name, run_config in (("dense", dense), (selective, config)):
        scheme = run_config.model.scheme
        runs[scheme] = _train(run_config, folder / name)
        measured[scheme] = _measure(load_run(folder / name), whole_text)
        print(scheme, measured[scheme], flush=True)

    gain = measured["dense"]["loss"] - measured["selective"]["loss"]
    kept = "dense" if gain >= 0 else "selective"
    options = {
        "slack": max(gain, 0),
        "fraction": fraction,
        "decrement": decrement,
        "batches": batches,
    }
    steps = _search(PruneConfig(str(folder / selective), **options), deadline)

    run = load_run(folder / selective, steps[-1]["step"])
    chosen = _last_within(measured[kept]["loss"], steps, run, whole_text)
    pruned = with_budgets(run.config, steps[chosen]["budgets"])
    model = build_model(pruned, run.tokenizer.vocab_size)
    measured["pruned"] = _measure(
        dataclasses.replace(run, config=pruned, model=model), whole_text
    )
    print("pruned", measured["pruned"], flush=True)
    return {
        "context": config.data.context_length,
        "layers": config.model.num_layers,
        "heads": config.model.num_heads,
        **memory_loss,
        "seed": config.seed,
        "text": {
            "train_bytes": data.train_bytes,
            "validation_bytes": data.validation_bytes,
            "fingerprint": data.fingerprint,
            **data.entropies._asdict(),
        },
        "runs": runs,
        "search": {"kept": kept, **options, "steps": steps, "chosen": chosen},
        "measured": measured,
    }


def _train(config: TrainConfig, out: pathlib.Path) -> dict[str, Any]:
    """What is in the file of results about the training of one model."""
    # An earlier search must not change what is measured before the next one.
    budgets_path(out).unlink(missing_ok=True)
    result = train(dataclasses.replace(config, out=str(out)), callback=_show(out.name))
    return {
        "config": _without_folders(result.config).to_json(),
        "parameters": result.parameter_count,
        "tokens_per_second": result.tokens_per_second,
        "peak_bytes": result.peak_bytes,
        "skipped": result.skipped,
        "rows": result.rows,
    }


def _without_folders(config: TrainConfig) -> TrainConfig:
    """A configuration that says which files it read but not where they were."""
    paths = tuple(pathlib.Path(path).name for path in config.data.paths)
    tokenizer = config.data.tokenizer and pathlib.Path(config.data.tokenizer).name
    data = dataclasses.replace(config.data, paths=paths, tokenizer=tokenizer)
    return dataclasses.replace(config, data=data, out=None)


def _show(name: str) -> Callable[[Row], None]:
    def show(row: Row) -> None:
        if "validation_loss" in row:
            print(
                f"{name}, step {row['step']}: {row['validation_loss']:.4f}",
                flush=True,
            )

    return show


def _search(config: PruneConfig, deadline: float) -> list[dict[str, Any]]:
    """The steps of `jattn prune` until the deadline."""
    steps = []
    for state in prune(config):
        steps.append(dataclasses.asdict(state))
        print(
            f"{state.loss:.4f} of {state.limit:.4f}, {state.share:.1%} {state.budgets}",
            flush=True,
        )
        if time.perf_counter() > deadline:
            break
    return steps


def _last_within(
    limit: float, steps: list[dict[str, Any]], run: TrainedModel, batches: list[Batch]
) -> int:
    """The last step of a search with at most that loss on those batches, or the first.

    The losses are kept with the steps they were measured for.
    """
    losses = make_budget_evaluator(run.model, run.config, run.params, batches)
    whole = run.config.data.context_length
    budgets = [[whole if x is None else x for x in step["budgets"]] for step in steps]
    for end in range(len(steps), 0, -_SIDE_BY_SIDE):
        chosen = range(max(0, end - _SIDE_BY_SIDE), end)
        found = losses(np.array([budgets[i] for i in chosen], np.int32))
        for i, loss in zip(chosen, found, strict=True):
            steps[i]["whole_text_loss"] = float(loss)
        if within := [
            i for i, loss in zip(chosen, found, strict=True) if loss <= limit
        ]:
            return within[-1]
    return 0


def _measure(run: TrainedModel, batches: list[Batch]) -> dict[str, Any]:
    """A run on held-out text."""
    evaluate = make_evaluator(run.model, run.config, run.tokenizer.vocab_size)
    found = evaluate(run.params, batches)
    return {
        "step": run.step,
        "loss": found.loss,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "memory": found.auxiliary.get("selective_memory"),
        "cache_bytes": context_cache_bytes(run.model, run.config),
    }


def main(
    *,
    out: pathlib.Path,
    context: int,
    text: tuple[str, ...] = (),
    vocabulary: int | None = None,
    layers: int = 6,
    heads: int = 6,
    memory_loss_weight: float = 0.1,
    memory_loss_warmup: int = 0,
    memory_tau: float = 4.0,
    steps: int = 2000,
    seed: int = 0,
    folder: pathlib.Path = pathlib.Path("runs/selective_memory"),
    seconds: float = math.inf,
) -> int:
    """Runs the experiment and keeps what it found.

    Args:
      out: JSON file; what it says of other runs stays.
      context: Tokens of a row.
      text: Files and folders; the source of Python's standard library if there are
        none.
      vocabulary: Tokens of a byte-pair tokenizer that is trained first; bytes are the
        tokens if None.
      layers: Of each of the two models.
      heads: Likewise, of 64 each.
      memory_loss_weight: Of the memory loss in the selective model's loss.
      memory_loss_warmup: Steps over which that weight grows.
      memory_tau: Selection from which that loss counts a key as forgotten.
      steps: Of each of the two models.
      seed: Of parameters and of the order of the data.
      folder: Of the runs, which go on where they were if they were interrupted.
      seconds: A search that is not over by then ends.

    Returns:
      Exit code.
    """
    deadline = time.perf_counter() + seconds
    folder = folder / f"{context}_{layers}_{heads}_{seed}"
    tokenizer = None
    if vocabulary is not None:
        path = train_tokenizer(text, vocabulary, folder / "tokenizer.json")
        tokenizer = str(path)
    config = recipe(
        context,
        text=text,
        tokenizer=tokenizer,
        layers=layers,
        heads=heads,
        memory_loss_weight=memory_loss_weight,
        memory_loss_warmup=memory_loss_warmup,
        memory_tau=memory_tau,
        steps=steps,
        seed=seed,
    )
    found = measure(config, folder, deadline=deadline)
    results = json.loads(out.read_text()) if out.exists() else {"results": []}
    others = [x for x in results["results"] if _key(x) != _key(found)]
    everything = sorted([*others, found], key=_key)
    replace(out, json.dumps(environment() | {"results": everything}) + "\n")
    return 0


def _key(found: dict[str, Any]) -> list[float]:
    memory_loss = ("memory_loss_weight", "memory_loss_warmup", "memory_tau")
    return [
        found[name] for name in ("context", "layers", "heads", *memory_loss, "seed")
    ]


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__.splitlines()[0]))
