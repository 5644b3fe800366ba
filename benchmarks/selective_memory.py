r"""Selective Attention with a small cache against a dense model of the same size.

python -m benchmarks.selective_memory --context 512 --share 0.12 --out F --text FOLDER

trains a dense and a selective model on a text, for as many steps. The selective one has
the memory loss until the learning rate begins to fall. Then it is pruned, and makes its
last steps with the budgets that were found. Everything is what these commands do, with
the options of `recipe`:

jattn train --model.scheme dense --out runs/dense
jattn train --model.scheme selective --out runs/selective --steps 1125 \
    --optimizer.decay-fraction 0
jattn prune runs/selective --step 1125 --share 0.12 --slack 100 --fraction 0.125 \
    --decrement 2 --batches 2
jattn train --model.scheme selective --out runs/tuned --resume-from runs/selective \
    --model.selective.budgets 9 17 11 301 30 11 255 13 11 21 49 30 \
    --memory-loss-weight 0
jattn eval runs/tuned
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

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
    load_run,
    make_evaluator,
    train,
)
from jattn.train.budgets import budgets_path, with_budgets
from jattn.train.build import context_cache_bytes
from jattn.train.corpus import read_corpus, split_corpus
from jattn.train.data import Batch, Dataset
from jattn.train.metrics import Row
from jattn.train.prune import PruneConfig, prune

# More batches than the held-out text has.
_ALL = 10**6

# Nats that no budgets cost.
_ANY = 100.0


def recipe(
    context: int,
    *,
    text: tuple[str, ...] = (),
    tokenizer: str | None = None,
    layers: int = 12,
    heads: int = 6,
    memory_loss_weight: float = 0.12,
    memory_loss_warmup: int = 400,
    memory_tau: float = 4.0,
    steps: int = 1500,
    seed: int = 0,
) -> TrainConfig:
    """The configuration of a selective model that is trained in one go.

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
      steps: Of each of the two models; the learning rate falls in the last quarter.
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
        optimizer=OptimizerConfig(
            learning_rate=3e-3, schedule="wsd", warmup_steps=100, decay_fraction=0.25
        ),
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
    share: float,
    fraction: float = 0.125,
    decrement: int = 2,
    batches: int = 2,
) -> dict[str, Any]:
    """Trains both models, the selective one in two parts, and measures them.

    Args:
      config: Of a selective run in one go; its learning rate's schedule is wsd.
      folder: Where the runs are kept.
      share: See `jattn.train.PruneConfig`.
      fraction: See `jattn.train.PruneConfig`.
      decrement: See `jattn.train.PruneConfig`.
      batches: See `jattn.train.PruneConfig`.

    Returns:
      What is in the file of results about one context, share and seed. There,
      "selective" is the model before the learning rate falls, with its whole cache,
      "pruned" the same with the budgets that were found, and "tuned" what it becomes
      with them.
    """
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
    folders = {
        "dense": folder / "dense",
        "selective": folder / selective,
        "pruned": folder / selective,
        "tuned": folder / f"{selective}_{share:g}",
    }
    first, last = _parts(config)
    # Before the training, because this finds numbers that are out of range.
    search = PruneConfig(
        str(folders["selective"]),
        step=first.steps,
        slack=_ANY,  # what counts is the loss after the last steps
        share=share,
        fraction=fraction,
        decrement=decrement,
        batches=batches,
    )
    data = Dataset.of(config)
    whole_text = data.validation_batches(_ALL)
    runs, measured = {}, {}

    def measure_run(name, step):
        measured[name] = _measure(load_run(folders[name], step), whole_text)
        print(name, measured[name], flush=True)

    def train_run(name, config):
        runs[name] = _train(config, folders[name], data)
        measure_run(name, config.steps)

    train_run("dense", dense)
    train_run("selective", first)
    steps = _search(search, data)
    measure_run("pruned", first.steps)
    last = dataclasses.replace(last, resume_from=str(folders["selective"]))
    train_run("tuned", with_budgets(last, steps[-1]["budgets"]))
    return {
        "context": config.data.context_length,
        "layers": config.model.num_layers,
        "heads": config.model.num_heads,
        **memory_loss,
        "share": share,
        "seed": config.seed,
        "text": {
            "train_bytes": data.train_bytes,
            "validation_bytes": data.validation_bytes,
            "fingerprint": data.fingerprint,
            **data.entropies._asdict(),
        },
        "runs": runs,
        "search": {
            "fraction": fraction,
            "decrement": decrement,
            "batches": batches,
            "steps": steps,
        },
        "measured": measured,
    }


def _parts(config: TrainConfig) -> tuple[TrainConfig, TrainConfig]:
    """A run until the learning rate falls, and the rest of it without memory loss."""
    decay_steps = round(config.optimizer.decay_fraction * config.steps)
    first = dataclasses.replace(
        config,
        steps=config.steps - decay_steps,
        optimizer=dataclasses.replace(config.optimizer, decay_fraction=0.0),
    )
    return first, dataclasses.replace(config, memory_loss_weight=0.0)


def _train(config: TrainConfig, out: pathlib.Path, data: Dataset) -> dict[str, Any]:
    """What is in the file of results about the training of one model."""
    # An earlier search must not change what is measured before the next one.
    budgets_path(out).unlink(missing_ok=True)
    config = dataclasses.replace(config, out=str(out))
    result = train(config, data=data, callback=_show(out.name))
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
    resume_from = config.resume_from and pathlib.Path(config.resume_from).name
    return dataclasses.replace(config, data=data, out=None, resume_from=resume_from)


def _show(name: str) -> Callable[[Row], None]:
    def show(row: Row) -> None:
        if "validation_loss" in row:
            print(
                f"{name}, step {row['step']}: {row['validation_loss']:.4f}",
                flush=True,
            )

    return show


def _search(config: PruneConfig, data: Dataset) -> list[dict[str, Any]]:
    """The steps of `jattn prune`."""
    steps = []
    for state in prune(config, data):
        steps.append(dataclasses.asdict(state))
        print(f"{state.loss:.4f}, {state.share:.1%} {state.budgets}", flush=True)
    return steps


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
    share: float,
    text: tuple[str, ...] = (),
    vocabulary: int | None = None,
    layers: int = 12,
    heads: int = 6,
    memory_loss_weight: float = 0.12,
    memory_loss_warmup: int = 400,
    memory_tau: float = 4.0,
    steps: int = 1500,
    seed: int = 0,
    folder: pathlib.Path = pathlib.Path("runs/selective_memory"),
) -> int:
    """Runs the experiment and keeps what it found.

    Args:
      out: JSON file; what it says of other runs stays.
      context: Tokens of a row.
      share: Part of whole contexts at which the search for budgets ends.
      text: Files and folders; the source of Python's standard library if there are
        none.
      vocabulary: Tokens of a byte-pair tokenizer that is trained first; bytes are the
        tokens if None.
      layers: Of each of the two models.
      heads: Likewise, of 64 each.
      memory_loss_weight: Of the memory loss in the selective model's loss.
      memory_loss_warmup: Steps over which that weight grows.
      memory_tau: Selection from which that loss counts a key as forgotten.
      steps: Of each of the two models; the learning rate falls in the last quarter.
      seed: Of parameters and of the order of the data.
      folder: Of the runs, which go on where they were if they were interrupted.

    Returns:
      Exit code.
    """
    # The learning rate falls with the end in view: more steps are another experiment.
    folder = folder / f"{context}_{layers}_{heads}_{steps}_{seed}"
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
    found = measure(config, folder, share=share)
    results = json.loads(out.read_text()) if out.exists() else {"results": []}
    others = [x for x in results["results"] if _key(x) != _key(found)]
    everything = sorted([*others, found], key=_key)
    replace(out, json.dumps(environment() | {"results": everything}) + "\n")
    return 0


def _key(found: dict[str, Any]) -> list[float]:
    memory_loss = ("memory_loss_weight", "memory_loss_warmup", "memory_tau")
    return [
        found[name]
        for name in ("context", "layers", "heads", *memory_loss, "share", "seed")
    ]


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__.splitlines()[0]))
