"""The command line: jattn train, compare, prune, generate, eval."""

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import rich.console
import rich.table
import tyro

from jattn.models import Sampling
from jattn.train.budgets import (
    Budgets,
    budgets_path,
    read_budgets,
    with_budgets,
)
from jattn.train.build import build_model, context_cache_bytes
from jattn.train.compare import CompareConfig, Comparison, compare
from jattn.train.config import TrainConfig, UserError
from jattn.train.data import Dataset
from jattn.train.evaluate import Evaluation, make_evaluator
from jattn.train.generate import encode_prompt, stream_text
from jattn.train.load import TrainedModel, load_run
from jattn.train.loop import train
from jattn.train.presets import PRESETS
from jattn.train.prune import PruneConfig, PruneStep, prune
from jattn.train.report import COLUMNS, table_rows

_Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How to continue a prompt.

    Attributes:
      run: Folder of a run that `jattn train` or `jattn compare` wrote.
      prompt: Text to continue.
      max_new_tokens: Tokens to generate; what is left of the context the model was
        trained on if None.
      temperature: Divides the logits; 0 takes the most likely token.
      top_k: Draw from the k most likely tokens only.
      top_p: Draw from the fewest most likely tokens that sum to this probability.
      seed: Of the random draws.
      step: Which checkpoint; the one with the least validation loss if None.
    """

    run: _Run
    prompt: str = ""
    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What to measure a run on.

    Attributes:
      run: Folder of a run that `jattn train` or `jattn compare` wrote.
      paths: Files and folders to measure on; the run's own text if there are none.
        The held-out part is used, chosen as in training.
      batches: Batches to measure; those of the run's evaluations if None.
      step: Which checkpoint; the one with the least validation loss if None.
    """

    run: _Run
    paths: tuple[str, ...] = ()
    batches: int | None = None
    step: int | None = None

    def __post_init__(self):
        """Checks the values; see `UserError`."""
        if self.batches is not None and self.batches < 1:
            raise UserError(f"batches must be greater than 0; got {self.batches}")


def _command(preset: TrainConfig) -> Any:
    """What the arguments are read as, with training's defaults from a preset."""
    return Annotated[
        Annotated[
            TrainConfig,
            tyro.conf.subcommand(
                "train",
                default=preset,
                description="Train a model, or go on with a run.\n\nDefaults are those "
                f"below, or of --preset {{{','.join(PRESETS)}}}.",
            ),
        ]
        | Annotated[
            CompareConfig,
            tyro.conf.subcommand(
                "compare",
                description="Train every scheme on the same text and write a report.",
            ),
        ]
        | Annotated[
            PruneConfig,
            tyro.conf.subcommand(
                "prune",
                description="Find the smallest caches with which a run keeps a "
                "validation loss.",
            ),
        ]
        | Annotated[
            GenerateConfig,
            tyro.conf.subcommand(
                "generate", description="Continue a prompt with a trained model."
            ),
        ]
        | Annotated[
            EvalConfig,
            tyro.conf.subcommand(
                "eval", description="Measure a trained model on held-out text."
            ),
        ],
        tyro.conf.OmitSubcommandPrefixes,
    ]


def _take_preset(arguments: Sequence[str]) -> tuple[TrainConfig, Sequence[str]]:
    """The configuration that ``train --preset`` names, and the other arguments.

    It has to be known before all others are read, because it has their defaults.
    """
    if not arguments or arguments[0] != "train":
        return TrainConfig(), arguments
    parser = argparse.ArgumentParser(
        prog="jattn train", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--preset", choices=list(PRESETS))
    known, rest = parser.parse_known_args(arguments[1:])
    preset = PRESETS[known.preset] if known.preset else TrainConfig()
    return preset, ["train", *rest]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 2 for what a user can mend."""
    try:
        preset, arguments = _take_preset(
            sys.argv[1:] if arguments is None else arguments
        )
        config = tyro.cli(
            _command(preset),
            prog="jattn",
            description="Train, compare and sample from models of sequence mixers.",
            args=arguments,
        )
        match config:
            case TrainConfig():
                _train(config)
            case CompareConfig():
                _compare(config)
            case PruneConfig():
                _prune(config)
            case GenerateConfig():
                _generate(config)
            case EvalConfig():
                _evaluate(config)
        sys.stdout.flush()
    except UserError as error:
        # Libraries that were asked may have broken what they said into lines.
        print(f"jattn: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader has gone, as `head` does. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _train(config: TrainConfig) -> None:
    console = rich.console.Console()
    result = train(config, progress=True)
    console.print(f"{result.parameter_count:,} parameters", highlight=False)
    if result.interrupted:
        again = "run the same command again to go on" if config.out else "nothing kept"
        console.print(f"stopped after step {result.step:,}; {again}", highlight=False)
        return
    assert result.validation is not None
    console.print(
        f"validation {result.validation.bits_per_byte:.3f} bits per byte "
        f"(unigram entropy {result.entropies.unigram:.3f}, bigram entropy "
        f"{result.entropies.bigram:.3f}), {result.tokens_per_second:,.0f} tokens/s",
        highlight=False,
    )
    if config.out:
        console.print(f"kept in {config.out}", highlight=False)


def _compare(config: CompareConfig) -> None:
    console = rich.console.Console()
    comparison = compare(config, progress=True)
    if comparison.results:
        console.print(_table(comparison))
    if comparison.report is None:
        console.print("stopped; run the same command again to go on", highlight=False)
    else:
        console.print(f"report: {comparison.report}", highlight=False)


def _table(comparison: Comparison) -> rich.table.Table:
    """The results in 80 columns."""
    table = rich.table.Table(
        box=None, padding=(0, 2), collapse_padding=True, pad_edge=False
    )
    for index, (name, _, _) in enumerate(COLUMNS):
        table.add_column(
            name.replace(" ", "\n"),
            justify="right" if index else "left",
            vertical="bottom",
        )
    for row in table_rows(comparison.results):
        table.add_row(*row)
    for name, value in comparison.references.items():
        table.add_row(name, "", f"{value:.3f}", style="dim")
    return table


def _prune(config: PruneConfig) -> None:
    state = None
    for state in prune(config):
        if state.lowered is None:
            print(
                f"step {state.step}: validation loss {state.loss:.4f} nats per token, "
                f"limit {state.limit:.4f}"
            )
            print(
                f"{'lowered':>8} {'loss':>8} {'cache':>7} {'saved bytes':>13}  budgets"
            )
        print(_prune_row(state), flush=True)
    assert state is not None
    print(
        f"kept in {budgets_path(config.run)}: {state.share:.1%} of the tokens, "
        f"{state.cache_bytes:,} bytes instead of {state.unpruned_bytes:,}"
    )


def _prune_row(state: PruneStep) -> str:
    lowered = "" if state.lowered is None else f"layer {state.lowered}"
    return (
        f"{lowered:>8} {state.loss:8.4f} {state.share:7.1%} "
        f"{state.unpruned_bytes - state.cache_bytes:13,}  {_shown(state.budgets)}"
    )


def _shown(budgets: Budgets) -> str:
    return " ".join("all" if budget is None else str(budget) for budget in budgets)


def _generate(config: GenerateConfig) -> None:
    try:
        sampling = Sampling(config.temperature, config.top_k, config.top_p)
    except ValueError as error:
        raise UserError(str(error)) from error
    run = load_run(config.run, config.step)
    max_new_tokens = config.max_new_tokens
    if max_new_tokens is None:
        length = len(encode_prompt(run.tokenizer, config.prompt))
        max_new_tokens = max(1, run.config.data.context_length - length)
    text = stream_text(
        run.model,
        run.params,
        run.tokenizer,
        config.prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=config.seed,
    )
    # The prompt comes with the first piece, when nothing can be refused any more.
    print(config.prompt, next(text), sep="", end="", flush=True)
    for piece in text:
        print(piece, end="", flush=True)
    print()


def _evaluate(config: EvalConfig) -> None:
    run = load_run(config.run, config.step)
    data_config = run.config.data
    if config.paths:
        data_config = dataclasses.replace(data_config, paths=config.paths)
    data = Dataset.of(dataclasses.replace(run.config, data=data_config))
    batches = config.batches or run.config.eval_batches
    evaluate = make_evaluator(run.model, run.config, data.vocab_size)
    found = evaluate(run.params, data.validation_batches(batches))
    print(
        f"step {run.step}: {found.bits_per_byte:.4f} bits per byte, loss "
        f"{found.loss:.4f} nats per token over {found.tokens:,} tokens "
        f"(unigram entropy {data.entropies.unigram:.3f}, bigram entropy "
        f"{data.entropies.bigram:.3f} bits per byte)"
    )
    if "selective_memory" in found.auxiliary:
        print(_memory(run, found))
    if "selective_skipped" in found.auxiliary:
        skipped = found.auxiliary["selective_skipped"]
        print(
            f"selective layers: {skipped:.1%} of the tiles of queries and keys "
            f"skipped, with a skip_error of {run.config.model.selective.skip_error:g}"
        )
    kept = read_budgets(config.run, run.step)
    if kept is not None:
        print(
            f"budgets found at a validation loss of {kept.loss:.4f}, of at most "
            f"{kept.limit:.4f}"
        )


def _memory(run: TrainedModel, found: Evaluation) -> str:
    """What the selective layers of a run need to remember."""
    needed = (
        f"selective layers: memory term {found.auxiliary['selective_memory']:.4f} of "
        "the tokens"
    )
    if not hasattr(run.model, "budget_layers"):
        return needed
    context = run.config.data.context_length
    layers = len(run.model.budget_layers())
    budgets = run.config.model.selective.budgets or (None,)
    budgets = budgets * layers if len(budgets) == 1 else budgets
    share = sum(min(budget or context, context) for budget in budgets) / layers
    unpruned = build_model(with_budgets(run.config, ()), run.tokenizer.vocab_size)
    return (
        f"{needed}; budgets {_shown(budgets)}, {share / context:.1%} of the context; "
        f"cache of {context_cache_bytes(run.model, run.config):,} bytes, "
        f"{context_cache_bytes(unpruned, run.config):,} without budgets"
    )


if __name__ == "__main__":
    sys.exit(main())
