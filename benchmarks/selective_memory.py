"""How small Selective Attention's cache gets at a dense model's validation loss.

python -m benchmarks.selective_memory --context 512 --out FILE --text FOLDER

trains a dense and a selective model of one size on a text, the selective one with the
memory loss, and prunes it down to the validation loss of the dense one. Everything is
what these commands do, with the options of `recipe`:

jattn train --model.scheme dense --out runs/dense
jattn train --model.scheme selective --out runs/selective
jattn prune runs/selective --baseline runs/dense --fraction 0.5 --decrement 2
jattn eval runs/selective
"""

import dataclasses
import functools
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
    UserError,
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


def recipe(
    context: int,
    *,
    text: tuple[str, ...] = (),
    tokenizer: str | None = None,
    memory_loss_weight: float = 0.1,
    memory_tau: float = 4.0,
    steps: int = 2000,
    seed: int = 0,
) -> TrainConfig:
    """The selective run's configuration but for the folder.

    Layers, heads and width are of the paper's family, in which a model of d layers has
    d heads of 64 and its queries and keys are normalised.

    Args:
      context: Tokens of a row; a batch has 65536.
      text: Files and folders; the source of Python's standard library if there are
        none.
      tokenizer: Its file; bytes are the tokens if None.
      memory_loss_weight: See `TrainConfig`.
      memory_tau: See `jattn.train.SelectiveConfig`.
      steps: Of each of the two models.
      seed: Of parameters and of the order of the data.
    """
    return TrainConfig(
        model=ModelConfig(
            scheme="selective",
            num_layers=6,
            features=384,
            num_heads=6,
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
    fraction: float = 0.5,
    decrement: int = 2,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Trains both models, prunes the selective one and measures all three.

    The search sees the batches of the evaluations during training. What is reported is
    measured on the whole held-out text, with the smallest budgets that it came across
    and that keep the loss there too.

    Args:
      config: Of the selective run but for the folder.
      folder: Where the runs are kept.
      fraction: See `jattn.train.PruneConfig`.
      decrement: See `jattn.train.PruneConfig`.
      deadline: When to end a search that is not over, of `time.perf_counter`.

    Returns:
      What is in the file of results about one context and seed. There, "kept" says
      whose loss the search kept: that of the selective model with its whole cache if
      it is worse than the dense one; and "chosen" which of its steps was.
    """
    data = Dataset(config.data, seed=config.seed, align=config.align)
    batches = data.validation_batches(_ALL)
    # What only the selective model has is as it always is in the dense one's
    # configuration: all selective runs of a folder share that one.
    dense = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, scheme="dense", selective=SelectiveConfig()
        ),
        memory_loss_weight=TrainConfig.memory_loss_weight,
    )
    weight, tau = config.memory_loss_weight, config.model.selective.memory_tau
    selective = f"selective_{weight:g}_{tau:g}"
    runs, measured = {}, {}
    for name, run_config in (("dense", dense), (selective, config)):
        scheme = run_config.model.scheme
        runs[scheme] = _train(run_config, folder / name)
        measured[scheme] = _measure(load_run(folder / name), batches)
        print(scheme, measured[scheme], flush=True)

    options = {"fraction": fraction, "decrement": decrement}
    search = functools.partial(PruneConfig, str(folder / selective), **options)
    try:
        kept = "dense"
        steps = _search(search(baseline=str(folder / "dense")), deadline)
    except UserError as error:  # the selective model is the worse one
        print(error, flush=True)
        kept = "selective"
        steps = _search(search(), deadline)

    run = load_run(folder / selective, steps[-1]["step"])
    chosen = _last_within(measured[kept]["loss"], steps, run, batches)
    pruned = with_budgets(run.config, steps[chosen]["budgets"])
    model = build_model(pruned, run.tokenizer.vocab_size)
    measured["pruned"] = _measure(
        dataclasses.replace(run, config=pruned, model=model), batches
    )
    print("pruned", measured["pruned"], flush=True)
    return {
        "context": config.data.context_length,
        "memory_loss_weight": weight,
        "memory_tau": tau,
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
    for i, step in reversed(list(enumerate(steps))):
        whole = run.config.data.context_length
        budgets = [whole if budget is None else budget for budget in step["budgets"]]
        step["whole_text_loss"] = float(losses(np.array([budgets], np.int32))[0])
        if step["whole_text_loss"] <= limit:
            return i
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
    memory_loss_weight: float = 0.1,
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
      memory_loss_weight: Of the memory loss in the selective model's loss.
      memory_tau: Selection from which that loss counts a key as forgotten.
      steps: Of each of the two models.
      seed: Of parameters and of the order of the data.
      folder: Of the runs, which go on where they were if they were interrupted.
      seconds: A search that is not over by then ends.

    Returns:
      Exit code.
    """
    deadline = time.perf_counter() + seconds
    folder = folder / f"{context}_{seed}"
    tokenizer = None
    if vocabulary is not None:
        path = train_tokenizer(text, vocabulary, folder / "tokenizer.json")
        tokenizer = str(path)
    config = recipe(
        context,
        text=text,
        tokenizer=tokenizer,
        memory_loss_weight=memory_loss_weight,
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
    names = ("context", "memory_loss_weight", "memory_tau", "seed")
    return [found[name] for name in names]


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__.splitlines()[0]))
