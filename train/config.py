"""What a run is: frozen dataclasses, read from the command line or from JSON."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

import jattn

SCHEMES = (*jattn.nn.MIXERS, "megabyte", "m2bert")


class UserError(Exception):
    """Something only the user can put right, said in one sentence.

    The command line prints it without a traceback and exits with code 2.
    """


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _positive(config: Any, prefix: str, names: str) -> None:
    for name, value in _named(config, prefix, names):
        if value is not None and not value > 0:
            raise UserError(f"{name} must be greater than 0; got {value}")


def _not_negative(config: Any, prefix: str, names: str) -> None:
    for name, value in _named(config, prefix, names):
        if not value >= 0:
            raise UserError(f"{name} must be 0 or greater; got {value}")


def _fraction(config: Any, prefix: str, names: str, *, ends: bool) -> None:
    for name, value in _named(config, prefix, names):
        if not (0 <= value <= 1 if ends else 0 < value < 1):
            where = "from 0 to 1" if ends else "between 0 and 1"
            raise UserError(f"{name} must be {where}; got {value}")


def _named(config: Any, prefix: str, names: str) -> list[tuple[str, Any]]:
    return [(prefix + name, getattr(config, name)) for name in names.split()]


@dataclasses.dataclass(frozen=True)
class NSAConfig:
    """Sizes of native sparse attention, in tokens.

    Attributes:
      kernel_size: Tokens a compressed token is made of.
      stride: Tokens from one compressed token to the next.
      block_size: Tokens of a block that is selected as a whole.
      num_blocks: Blocks a query selects, forced ones included.
      window_size: Last tokens every query sees.
    """

    kernel_size: int = 16
    stride: int = 8
    block_size: int = 16
    num_blocks: int = 6
    window_size: int = 64

    def __post_init__(self):
        """Checks the values; see `UserError`."""
        names = "kernel_size stride block_size num_blocks window_size"
        _positive(self, "model.nsa.", names)


@dataclasses.dataclass(frozen=True)
class MoBAConfig:
    """Sizes of mixture of block attention.

    Attributes:
      block_size: Tokens of a block.
      top_k: Blocks a query attends to, its own included.
    """

    block_size: int = 32
    top_k: int = 3

    def __post_init__(self):
        """Checks the values; see `UserError`."""
        _positive(self, "model.moba.", "block_size top_k")


@dataclasses.dataclass(frozen=True)
class SimplicialConfig:
    """Sizes of 2-simplicial attention.

    Attributes:
      windows: Tokens seen through the first keys and through the second keys.
      form: The logits' trilinear or determinant form.
    """

    windows: tuple[int, int] = (64, 16)
    form: Literal["trilinear", "determinant"] = "trilinear"

    def __post_init__(self):
        """Checks the values; see `UserError`."""
        if min(self.windows) < 1:
            raise UserError(
                "model.simplicial.windows must both be greater than 0; got "
                f"{self.windows[0]} and {self.windows[1]}"
            )


@dataclasses.dataclass(frozen=True)
class SelectiveConfig:
    """Sizes of Selective Attention.

    Attributes:
      budgets: Tokens a layer holds, one number for all selective layers or one for
        each; whole contexts if there are none. The paper trains without, and `jattn
        prune` finds them afterwards; some steps with them (see
        `TrainConfig.resume_from`) win back part of what they cost.
      memory_tau: Selection from which a key counts as forgotten in the memory loss.
      skip_error: Part of a query's softmax weight that kernels may leave out to skip
        what is forgotten.
    """

    budgets: tuple[int | None, ...] = ()
    memory_tau: float = 1.0
    skip_error: float = 0.0

    def __post_init__(self):
        """Checks the values; see `UserError`."""
        _positive(self, "model.selective.", "memory_tau")
        if not 0 <= self.skip_error < 1:
            raise UserError(
                "model.selective.skip_error must be at least 0 and less than 1; got "
                f"{self.skip_error}"
            )
        for budget in self.budgets:
            if budget is not None and budget < 2:
                raise UserError(
                    "model.selective.budgets must be at least 2, for the first token "
                    f"and the current one; got {budget}"
                )


@dataclasses.dataclass(frozen=True)
class MonarchConfig:
    """Sizes of Monarch Mixer layers; their filters are as long as the context.

    Attributes:
      filter_order: Width of the networks that compute the filters.
      num_blocks: Blocks of M2-BERT's block-diagonal feed-forward.
    """

    filter_order: int = 64
    num_blocks: int = 4

    def __post_init__(self):
        """Checks the values; see `UserError`."""
        _positive(self, "model.monarch.", "filter_order num_blocks")


@dataclasses.dataclass(frozen=True)
class MegabyteConfig:
    """Sizes of MEGABYTE's stages.

    Attributes:
      patch_size: Bytes of a patch.
      global_layers: Layers over patches.
      local_layers: Layers inside a patch.
      local_features: Width of the local model, a multiple of the width of a head.
        The global model is as wide as `ModelConfig.features`, over all bytes of a
        patch together.
      global_mixers: Pattern of mixers of the global layers.
      local_mixers: Pattern of mixers of the local layers.
    """

    patch_size: int = 8
    global_layers: int = 3
    local_layers: int = 2
    local_features: int = 96
    global_mixers: str = "dense"
    local_mixers: str = "dense"

    def __post_init__(self):
        """Checks the values; see `UserError`."""
        names = "patch_size global_layers local_layers local_features"
        _positive(self, "model.megabyte.", names)


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of every feed-forward.

    Attributes:
      num_experts: Experts a router chooses from; 0 for a dense feed-forward.
      top_k: Experts a token goes to.
      num_shared: Experts every token goes to besides.
    """

    num_experts: int = 0
    top_k: int = 2
    num_shared: int = 0

    def __post_init__(self):
        """Checks the values; see `UserError`."""
        _positive(self, "model.experts.", "top_k")
        _not_negative(self, "model.experts.", "num_experts num_shared")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    Attributes:
      scheme: What mixes the sequence: dense, nsa, moba, simplicial, selective,
        monarch, or one of the whole models megabyte and m2bert.
      layers: A pattern of mixers that repeats over the layers, such as
        "dense dense dense simplicial"; every layer is of the scheme if None.
      num_layers: Layers.
      features: Width of the residual stream.
      num_heads: Query heads.
      num_kv_heads: Key-value heads; as many as query heads if None.
      head_dim: Width of a head; features / num_heads if None.
      hidden: Width of a feed-forward layer, or of one expert; 8/3 of features, in
        multiples of 8, if None.
      feed_forward: swiglu or block_diagonal; the latter for monarch if None, as Monarch
        Mixer models have it.
      qk_norm: Whether queries and keys pass an RMSNorm, in the mixers that have any.
      tie_embeddings: Whether the output layer is the embedding.
      remat: Recompute each layer in the backward pass instead of keeping it.
      implementation: Of the sequence mixers; the fastest one there is if None.
      experts: Mixture-of-experts feed-forward.
      nsa: Sizes of native sparse attention.
      moba: Sizes of mixture of block attention.
      simplicial: Sizes of 2-simplicial attention.
      selective: Sizes of Selective Attention.
      monarch: Sizes of Monarch Mixer layers.
      megabyte: Sizes of MEGABYTE.
    """

    scheme: str = "dense"
    layers: str | None = None
    num_layers: int = 4
    features: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    feed_forward: Literal["swiglu", "block_diagonal"] | None = None
    qk_norm: bool = False
    tie_embeddings: bool = True
    remat: bool = False
    implementation: Literal["xla", "pallas", "triton"] | None = None
    experts: ExpertsConfig = ExpertsConfig()
    nsa: NSAConfig = NSAConfig()
    moba: MoBAConfig = MoBAConfig()
    simplicial: SimplicialConfig = SimplicialConfig()
    selective: SelectiveConfig = SelectiveConfig()
    monarch: MonarchConfig = MonarchConfig()
    megabyte: MegabyteConfig = MegabyteConfig()

    def __post_init__(self):
        """Checks the values; see `UserError`."""
        _choice("model.scheme", self.scheme, SCHEMES)
        for name, mixers in (
            ("model.layers", self.layers or ""),
            ("model.megabyte.global_mixers", self.megabyte.global_mixers),
            ("model.megabyte.local_mixers", self.megabyte.local_mixers),
        ):
            for mixer in mixers.split():
                _choice(name, mixer, tuple(jattn.nn.MIXERS))
        _positive(
            self,
            "model.",
            "num_layers features num_heads num_kv_heads head_dim hidden",
        )
        if self.head_dim is None and self.features % self.num_heads:
            raise UserError(
                "model.features must be a multiple of model.num_heads unless "
                f"model.head_dim is given; got {self.features} and {self.num_heads}"
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise UserError(
                "model.num_heads must be a multiple of model.num_kv_heads; got "
                f"{self.num_heads} and {self.num_kv_heads}"
            )

    @property
    def is_masked(self) -> bool:
        """Whether the model fills in masked tokens instead of continuing text."""
        return self.scheme == "m2bert"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text and how it is batched.

    Attributes:
      paths: Files (.gz, .xz and .zst are unpacked) and folders; the source of
        Python's standard library if there are none.
      tokenizer: A file of the tokenizers library; bytes are the tokens if None.
      context_length: Tokens of a row.
      batch_size: Rows of a step.
      validation_fraction: Part of the text that is held out, in whole documents.
      max_bytes: Reads no more than this much text; None for all of it.
      align: Documents start at multiples of this; None for what the model needs.
    """

    paths: tuple[str, ...] = ()
    tokenizer: str | None = None
    context_length: int = 256
    batch_size: int = 8
    validation_fraction: float = 0.05
    max_bytes: int | None = None
    align: int | None = None

    def __post_init__(self):
        """Checks the values; see `UserError`."""
        _positive(self, "data.", "context_length batch_size max_bytes align")
        _fraction(self, "data.", "validation_fraction", ends=False)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow gradients.

    Attributes:
      name: adamw, or muon for matrices with AdamW for everything else.
      learning_rate: Its peak.
      schedule: cosine, or wsd: warm-up, constant, linear decay.
      warmup_steps: Steps from 0 to the peak.
      decay_fraction: Part of all steps that wsd decays in.
      end_factor: Last learning rate over the peak.
      weight_decay: Of matrices; norms, biases and embeddings do not decay.
      beta1: AdamW's decay of the mean gradient.
      beta2: AdamW's decay of the mean squared gradient.
      muon_beta: Muon's momentum.
      clip_norm: Largest norm of the gradient.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-3
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 50
    decay_fraction: float = 0.2
    end_factor: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    muon_beta: float = 0.95
    clip_norm: float = 1.0

    def __post_init__(self):
        """Checks the values; see `UserError`."""
        _choice("optimizer.name", self.name, ("adamw", "muon"))
        _choice("optimizer.schedule", self.schedule, ("cosine", "wsd"))
        _positive(self, "optimizer.", "learning_rate clip_norm")
        _not_negative(self, "optimizer.", "warmup_steps weight_decay")
        _fraction(self, "optimizer.", "decay_fraction end_factor", ends=True)
        _fraction(self, "optimizer.", "beta1 beta2 muon_beta", ends=False)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
      model: What is trained.
      data: On what text.
      optimizer: How.
      out: Folder of the run: configuration, metrics and checkpoints. A run that is
        there already is continued. None to keep nothing.
      resume_from: Folder of another run that this one goes on from, under other
        options: its latest checkpoint's parameters, optimizer state and step, and its
        place in the text if that is read in the same way. It may have another mixer
        with the same parameters, other budgets or another schedule. None to begin with
        random parameters.
      steps: Optimizer steps, with those of resume_from included.
      accumulation: Parts a batch is computed in, one after the other.
      seed: Of parameters, order of the data and masking.
      dtype: Of the computation; parameters are always float32.
      memory_loss_weight: Weight of Selective Attention's memory loss.
      memory_loss_warmup: Steps over which that weight grows in proportion, so that a
        model learns what to attend to before it learns to forget.
      load_balance_weight: Weight of the experts' load-balance loss.
      log_every: Steps between two lines of metrics.
      eval_every: Steps between two evaluations; one takes place at the end anyway.
      eval_batches: Batches of an evaluation, always the same ones.
      checkpoint_every: Steps between two checkpoints; one is written at the end
        anyway.
      keep_checkpoints: Latest checkpoints to keep, besides the one with the least
        validation loss.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    out: str | None = None
    resume_from: str | None = None
    steps: int = 500
    accumulation: int = 1
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    memory_loss_weight: float = 0.1
    memory_loss_warmup: int = 0
    load_balance_weight: float = 0.01
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 8
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self):
        """Checks the values against each other; see `UserError`."""
        _positive(
            self,
            "",
            "steps accumulation log_every eval_every eval_batches checkpoint_every "
            "keep_checkpoints",
        )
        _choice("dtype", self.dtype, ("float32", "bfloat16"))
        weights = "memory_loss_weight memory_loss_warmup load_balance_weight"
        _not_negative(self, "", f"seed {weights}")
        if self.seed >= 2**63:
            raise UserError(f"seed must be less than 2**63; got {self.seed}")
        if self.data.batch_size % self.accumulation:
            raise UserError(
                "data.batch_size must be a multiple of accumulation; got "
                f"{self.data.batch_size} and {self.accumulation}"
            )
        if self.data.context_length % self.align:
            raise UserError(
                "data.context_length must be a multiple of what documents are aligned "
                f"to; got {self.data.context_length} and {self.align}"
            )
        if self.model.scheme == "megabyte" and self.align % self.patch_size:
            raise UserError(
                "data.align must be a multiple of model.megabyte.patch_size, so that "
                f"documents start with a patch; got {self.align} and {self.patch_size}"
            )

    @property
    def patch_size(self) -> int:
        """Bytes of a patch; 1 for models without patches."""
        return self.model.megabyte.patch_size if self.model.scheme == "megabyte" else 1

    @property
    def align(self) -> int:
        """Documents start at multiples of this."""
        return self.patch_size if self.data.align is None else self.data.align

    def to_json(self) -> dict[str, Any]:
        """The configuration as nested dictionaries of plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The configuration of nested dictionaries; missing fields keep defaults.

        Raises:
          UserError: A field is unknown or its value is not allowed.
        """
        return _from_json(cls, values, "")


# Fields in which a continued run may differ from the one it continues: where it
# writes, how often it reports, how far it goes.
_CHANGEABLE = {
    "out",
    "steps",
    "log_every",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
    "keep_checkpoints",
    "model.implementation",
}


def differences(saved: TrainConfig, current: TrainConfig) -> list[str]:
    """Fields that make two runs different ones, as "name is A there and B here"."""
    there, here = (
        {k: v for k, v in _flatten(x.to_json()).items() if k not in _CHANGEABLE}
        for x in (saved, current)
    )
    return differing(there, here)


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs of values by the same names, as "name is A there and B here"."""
    return [
        f"{name} is {there[name]!r} there and {here[name]!r} here"
        for name in here
        if there[name] != here[name]
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _from_json(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise UserError(f"{prefix}{name} is not a field of the configuration")
    arguments = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(fields[name]):
            value = _from_json(
                typing.cast(type, fields[name]), value, f"{prefix}{name}."
            )
        elif isinstance(value, list):  # JSON knows no tuples
            value = tuple(value)
        arguments[name] = value
    return cls(**arguments)
