"""Every scheme on the same data, with the same steps and as many parameters."""

import dataclasses
import gc
import json
import platform
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import jattn
from jattn.models import Sampling
from jattn.train.build import (
    build_model,
    context_cache_bytes,
    model_errors,
    parameter_count,
)
from jattn.train.config import (
    DataConfig,
    MegabyteConfig,
    ModelConfig,
    OptimizerConfig,
    SimplicialConfig,
    TrainConfig,
    UserError,
)
from jattn.train.data import Tokenizer, load_tokenizer
from jattn.train.files import write_atomically
from jattn.train.generate import PIECE, encode_prompt, stream_text
from jattn.train.loop import StopSignal, TrainResult, train
from jattn.train.report import SchemeResult, write_report
from jattn.train.step import init_params

# Numbers of parameters may differ by this part of the first scheme's.
PARAMETER_TOLERANCE = 0.05

# How samples are drawn: unlikely bytes are left out, so that one can read them.
SAMPLING = Sampling(temperature=0.7, top_p=0.95)

# Pieces at the end of a sample whose median is the speed of decoding.
LAST_PIECES = 4

# Pieces of the shortest sample: the first one compiles, the others are timed.
MIN_PIECES = 2


def _small_run() -> TrainConfig:
    """A run of half a minute on two CPU cores."""
    return TrainConfig(
        model=ModelConfig(
            num_layers=3,
            features=96,
            num_heads=4,
            num_kv_heads=2,
            simplicial=SimplicialConfig(windows=(32, 4)),
            megabyte=MegabyteConfig(patch_size=4, global_layers=2),
        ),
        data=DataConfig(max_bytes=8_000_000),
        optimizer=OptimizerConfig(name="muon", learning_rate=0.006, warmup_steps=10),
        steps=100,
        eval_every=25,
        eval_batches=8,
        checkpoint_every=50,
    )


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """A comparison.

    Attributes:
      out: Folder of the report and of one run for each scheme. Runs that are there
        already are kept or continued.
      schemes: What to compare. The first one sets the number of parameters; the
        others get a feed-forward as wide as it takes to come close to it.
      run: What all of them have in common; its scheme and out are replaced.
      prompt: What the samples continue.
    """

    out: str = "runs/compare"
    schemes: tuple[str, ...] = (
        "dense",
        "nsa",
        "moba",
        "simplicial",
        "selective",
        "megabyte",
        "monarch",
    )
    run: TrainConfig = dataclasses.field(default_factory=_small_run)
    prompt: str = "def "

    def __post_init__(self):
        """Checks the values; see `UserError`."""
        if not self.schemes:
            raise UserError("schemes is empty; name at least one")
        if len(set(self.schemes)) < len(self.schemes):
            raise UserError(f"schemes names one twice: {' '.join(self.schemes)}")
        if "m2bert" in self.schemes:
            raise UserError(
                "m2bert fills in masked text, which cannot be compared in bits per "
                "byte with models that continue it; train it by itself, or compare "
                "monarch, its causal form"
            )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a comparison came to.

    Attributes:
      results: One for each scheme that was finished, in the order of the schemes.
      references: Unigram and bigram entropy of the validation text in bits per byte.
      report: Path of the report; None if the comparison was interrupted.
    """

    results: list[SchemeResult]
    references: dict[str, float]
    report: Path | None


def compare(config: CompareConfig, *, progress: bool = False) -> Comparison:
    """Trains every scheme and writes report.html.

    Killed and started again with the same configuration, it goes on where it was.

    Args:
      config: What to compare.
      progress: Whether to show what goes on on the terminal.

    Raises:
      UserError: As `train`; or a scheme cannot be given as many parameters.
    """
    tokenizer = load_tokenizer(config.run.data.tokenizer)
    _check_prompt(config, tokenizer)
    runs = scheme_runs(config)
    results, references, data = [], {}, None
    for scheme, run in runs.items():
        path = Path(config.out, scheme, "result.json")
        finished, interrupted = _read_result(path, run, config.prompt), False
        if finished is None:
            trained = train(run, data=data, progress=progress)
            data = trained.data
            if trained.interrupted:
                return Comparison(results, references, None)
            with StopSignal() as stop:
                finished = _measure(scheme, trained, tokenizer, config)
                _write_result(path, run, config.prompt, finished)
            interrupted = stop.requested
            # Nothing compiled for one scheme serves the next.
            del trained
            jax.clear_caches()
            gc.collect()
        results.append(finished.result)
        references = finished.references
        if interrupted:
            return Comparison(results, references, None)
    report = write_report(Path(config.out), results, references, _setup(config))
    return Comparison(results, references, report)


def scheme_runs(config: CompareConfig) -> dict[str, TrainConfig]:
    """The run of each scheme, with a feed-forward that evens out the parameters."""
    vocab_size = load_tokenizer(config.run.data.tokenizer).vocab_size
    data = config.run.data
    if data.align is None and "megabyte" in config.schemes:
        # MEGABYTE's documents start with a patch; so do all, to see the same rows.
        patch_size = config.run.model.megabyte.patch_size
        data = dataclasses.replace(data, align=patch_size)
    runs, target = {}, None
    for scheme in config.schemes:
        run = dataclasses.replace(
            config.run,
            out=str(Path(config.out, scheme)),
            data=data,
            model=dataclasses.replace(config.run.model, scheme=scheme, layers=None),
        )
        if target is None:
            target = _parameters(run, vocab_size)
        else:
            run = _match_parameters(run, vocab_size, target)
        runs[scheme] = run
    return runs


def _parameters(run: TrainConfig, vocab_size: int) -> int:
    model = build_model(run, vocab_size)
    with model_errors():
        return parameter_count(jax.eval_shape(lambda: init_params(model, run)))


def _match_parameters(run: TrainConfig, vocab_size: int, target: int) -> TrainConfig:
    """The run with the width of feed-forward that comes closest to target."""

    def with_hidden(hidden: int) -> TrainConfig:
        return dataclasses.replace(
            run, model=dataclasses.replace(run.model, hidden=hidden)
        )

    # The number of parameters is a linear function of the width.
    step = 8
    least = _parameters(with_hidden(step), vocab_size)
    slope = _parameters(with_hidden(2 * step), vocab_size) - least
    more = max(0, round((target - least) / slope))
    found = least + more * slope
    if abs(found - target) > PARAMETER_TOLERANCE * target:
        raise UserError(
            f"{run.model.scheme} has {found:,} parameters at the closest, more than "
            f"{PARAMETER_TOLERANCE:.0%} off the {target:,} of the first scheme; choose "
            "other sizes"
        )
    return with_hidden(step + more * step)


def _check_prompt(config: CompareConfig, tokenizer: Tokenizer) -> None:
    """Before anything is trained, that samples will have room."""
    length = len(encode_prompt(tokenizer, config.prompt))
    context = config.run.data.context_length
    if length + MIN_PIECES * PIECE > context:
        raise UserError(
            f"a context of {context} tokens must hold the prompt and "
            f"{MIN_PIECES * PIECE} tokens more; the prompt has {length}"
        )


@dataclasses.dataclass(frozen=True)
class _Finished:
    """What is kept of a scheme: its result, and the entropies of its text."""

    result: SchemeResult
    references: dict[str, float]


def _write_result(path: Path, run: TrainConfig, prompt: str, found: _Finished) -> None:
    saved = {"config": run.to_json(), "prompt": prompt, **dataclasses.asdict(found)}
    write_atomically(path, json.dumps(saved, indent=1).encode())


def _read_result(path: Path, run: TrainConfig, prompt: str) -> _Finished | None:
    """What was written for the very same run and prompt, if anything was.

    A file that is damaged or of another version is as good as none: the checkpoints
    beside it still save the training.
    """
    try:
        saved = json.loads(path.read_bytes())
        same = saved["config"] == _as_read(run.to_json()) and saved["prompt"] == prompt
        if not same:
            return None
        result = SchemeResult(**saved["result"])
        curve = tuple((step, value) for step, value in result.curve)
        return _Finished(dataclasses.replace(result, curve=curve), saved["references"])
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _as_read(values: Any) -> Any:
    """Values as they come back from JSON, which has no tuples."""
    return json.loads(json.dumps(values))


def _measure(
    scheme: str, trained: TrainResult, tokenizer: Tokenizer, config: CompareConfig
) -> _Finished:
    assert trained.validation is not None
    context = trained.config.data.context_length
    sample, decode_speed = continue_prompt(
        trained.model, trained.params, tokenizer, config.prompt, context
    )
    curve = [
        (row["step"], row["validation_bits_per_byte"])
        for row in trained.rows
        if "validation_bits_per_byte" in row
    ]
    result = SchemeResult(
        scheme=scheme,
        parameters=trained.parameter_count,
        validation_bits_per_byte=trained.validation.bits_per_byte,
        training_tokens_per_second=trained.tokens_per_second,
        decode_tokens_per_second=decode_speed,
        cache_bytes=context_cache_bytes(trained.model, trained.config),
        peak_bytes=trained.peak_bytes,
        skipped_steps=trained.skipped,
        curve=tuple((int(step), value) for step, value in curve),
        sample=sample,
    )
    references = {
        f"{name} entropy": value for name, value in trained.entropies._asdict().items()
    }
    return _Finished(result, references)


def continue_prompt(
    model: nn.Module,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str,
    context: int,
) -> tuple[str, float]:
    """Fills a context from a prompt.

    Args:
      model: A language model.
      params: Its parameters.
      tokenizer: What its tokens mean.
      prompt: Text to continue.
      context: Tokens of prompt and continuation together, at most.

    Returns:
      The prompt with its continuation, and the tokens a second of one sequence at the
      end of the context.
    """
    room = context - len(encode_prompt(tokenizer, prompt))
    count = max(MIN_PIECES, room // PIECE)
    stream = stream_text(
        *(model, params, tokenizer, prompt),
        max_new_tokens=count * PIECE,
        sampling=SAMPLING,
    )
    pieces, times = [], [time.perf_counter()]
    for piece in stream:
        pieces.append(piece)
        times.append(time.perf_counter())
    # The first piece compiles, and after the last one only leftovers of text come.
    seconds = np.diff(times[1 : count + 1])[-LAST_PIECES:]
    return prompt + "".join(pieces), PIECE / float(np.median(seconds))


def _setup(config: CompareConfig) -> dict[str, str]:
    run = config.run
    device = jax.devices()[0]
    return {
        "text": ", ".join(run.data.paths) or "source of Python's standard library",
        "tokens": run.data.tokenizer or "bytes",
        "context": f"{run.data.context_length} tokens",
        "batch": f"{run.data.batch_size} rows",
        "steps": f"{run.steps:,}",
        "optimizer": f"{run.optimizer.name}, peak {run.optimizer.learning_rate:g}",
        "model": f"{run.model.num_layers} layers of width {run.model.features}",
        "dtype": run.dtype,
        "seed": str(run.seed),
        "device": f"{device.device_kind} ({device.platform}), {platform.machine()}",
        "versions": f"jattn {jattn.__version__}, jax {jax.__version__}",
    }
