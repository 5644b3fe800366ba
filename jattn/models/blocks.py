"""The stack of residual blocks every network is made of, with any mixer by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jattn.models.feed_forward import MixtureOfExperts, SwiGLU
from jattn.nn import MIXERS, BlockDiagonalMLP
from jattn.ops import _common

# A name of `jattn.nn.MIXERS`, or a module class that keeps the same protocol.
Mixer = str | type[nn.Module]

FeedForward = Literal["swiglu", "block_diagonal"]


class Block(nn.Module):
    """``x += mixer(norm(x))``, then ``x += feed_forward(norm(x))``.

    Attributes:
      mixer: Module with the protocol of `jattn.nn`.
      feed_forward: Module that maps each token by itself.
      dtype: Of the norms; that of the input and parameters if None.
      param_dtype: Of the norms' parameters.
    """

    mixer: nn.Module
    feed_forward: nn.Module
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        cache: Any = None,
        lengths: jax.Array | None = None,
    ) -> Any:
        """Maps x [B, T, features] to the same shape; arguments as of a mixer."""

        def norm(name):
            return nn.RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        mixed: Any = self.mixer(
            norm("mixer_norm")(x), segment_ids=segment_ids, cache=cache, lengths=lengths
        )
        if cache is not None:
            mixed, cache = mixed
        x = x + mixed
        x = x + self.feed_forward(norm("feed_forward_norm")(x))
        return x if cache is None else (x, cache)


class BlockStack(nn.Module):
    """Pre-norm residual blocks and a final RMSNorm.

    Layers are named by their place and not by their mixer, so that mixers with the same
    parameters can be exchanged: a stack trained as "moba" also runs as "dense".

    Attributes:
      features: Width of the residual stream.
      num_layers: Blocks.
      num_heads: Query heads of each mixer that has heads.
      head_dim: Width of a head.
      hidden: Width of a feed-forward layer, or of one expert.
      num_kv_heads: Key-value heads; num_heads if None.
      mixers: Mixer of each layer: names of `jattn.nn.MIXERS` separated by blanks, or a
        sequence of names or module classes of the same protocol. A pattern shorter
        than the stack repeats.
      mixer_options: Further fields of the mixers by name, such as
        ``{"moba": {"block_size": 64}}``. A "budget" may be a sequence, one number (or
        None) for each layer of that mixer in turn.
      feed_forward: "swiglu", or "block_diagonal" for that of Monarch Mixer models.
      num_experts: Routed experts of each feed-forward layer, which are SwiGLUs; 0 for
        a dense one.
      experts_per_token: How many of them a token goes to.
      num_shared_experts: Experts that see every token.
      remat: Recompute each layer in the backward pass instead of keeping it.
      dtype: Of the computation; that of the input and parameters if None.
      param_dtype: Of the parameters.
      qk_norm: Of the mixers that have it.

    Raises:
      ValueError: On construction, if a mixer or an option is unknown or the pattern
        does not fit the number of layers.
    """

    features: int
    num_layers: int
    num_heads: int
    head_dim: int
    hidden: int
    num_kv_heads: int | None = None
    mixers: str | tuple[Mixer, ...] = "dense"
    mixer_options: Mapping[Mixer, Mapping[str, Any]] = FrozenDict()
    feed_forward: FeedForward = "swiglu"
    num_experts: int = 0
    experts_per_token: int = 2
    num_shared_experts: int = 0
    remat: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    qk_norm: bool = False

    def __post_init__(self):
        freeze_fields(self)
        _common.check_positive(
            features=self.features,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            hidden=self.hidden,
        )
        if len(self.pattern()) > self.num_layers:
            raise ValueError(
                f"mixers names {len(self.pattern())} layers and the stack has only "
                f"num_layers={self.num_layers}; a shorter pattern repeats"
            )
        if self.feed_forward not in get_args(FeedForward):
            raise ValueError(
                f"feed_forward must be one of {', '.join(get_args(FeedForward))}; got "
                f"{self.feed_forward!r}"
            )
        if self.num_experts and self.feed_forward != "swiglu":
            raise ValueError(
                "experts are SwiGLUs: num_experts needs feed_forward='swiglu'; got "
                f"num_experts={self.num_experts} and {self.feed_forward!r}"
            )
        for mixer in {*self.pattern(), *self.mixer_options}:
            options = self.mixer_options.get(mixer, {})
            unknown = set(options) - set(field_names(mixer_class(mixer)))
            if unknown:
                raise ValueError(
                    f"mixer_options of {mixer!r} has unknown {sorted(unknown)}; known "
                    f"are {sorted(field_names(mixer_class(mixer)))}"
                )
            budget, layers = options.get("budget"), len(self._layers_of(mixer))
            if isinstance(budget, tuple) and len(budget) != layers:
                raise ValueError(
                    f"mixer_options of {mixer!r} has {len(budget)} budgets for "
                    f"{layers} layers; give one number, or one for each layer"
                )
        super().__post_init__()

    def pattern(self) -> tuple[Mixer, ...]:
        """The mixers as given, before they repeat over the layers."""
        mixers = self.mixers
        pattern = tuple(mixers.split()) if isinstance(mixers, str) else mixers
        if not pattern:
            raise ValueError("mixers is empty; name at least one mixer")
        return pattern

    def options_without_rope(self) -> dict[Mixer, Any]:
        """mixer_options with the rotary embedding off in each mixer that has one."""
        options: dict[Mixer, Any] = dict(self.mixer_options)
        for mixer in set(self.pattern()):
            if "rope_base" in field_names(mixer_class(mixer)):
                options[mixer] = {**options.get(mixer, {}), "rope_base": None}
        return options

    def budget_layers(self) -> tuple[int, ...]:
        """The layers whose mixer has a budget, in order."""
        return tuple(
            layer
            for layer in range(self.num_layers)
            if "budget" in field_names(mixer_class(self._name(layer)))
        )

    def budget_variables(self, budgets: jax.Array) -> dict[str, Any]:
        """The collection "budgets" that overrides the budgets of a call.

        Args:
          budgets: int32 [L], one for each of `budget_layers`.
        """
        return {
            f"layer_{layer}": {"mixer": {"budget": budget}}
            for layer, budget in zip(self.budget_layers(), budgets, strict=True)
        }

    def init_cache(
        self, batch_size: int, max_length: int, dtype: Any = jnp.float32
    ) -> tuple[Any, ...]:
        """The empty caches of all layers, for up to max_length tokens a row."""
        return tuple(
            self._mixer(layer).init_cache(batch_size, max_length, dtype)
            for layer in range(self.num_layers)
        )

    def _mixer(self, layer: int) -> Any:
        """The mixer of a layer, bound to no parent."""
        name = self._name(layer)
        cls = mixer_class(name)
        options = dict(self.mixer_options.get(name, {}))
        if isinstance(options.get("budget"), tuple):
            options["budget"] = options["budget"][self._layers_of(name).index(layer)]
        shared = {
            field: getattr(self, field)
            for field in (
                *("features", "num_heads", "num_kv_heads", "head_dim"),
                *("dtype", "param_dtype", "qk_norm"),
            )
            if field in field_names(cls)
        }
        return cls(**shared | options, parent=None)

    def _name(self, layer: int) -> Mixer:
        """The mixer of a layer as the pattern has it."""
        return self.pattern()[layer % len(self.pattern())]

    def _layers_of(self, mixer: Mixer) -> list[int]:
        """The layers of a mixer, in order."""
        return [layer for layer in range(self.num_layers) if self._name(layer) == mixer]

    def _feed_forward(self) -> nn.Module:
        """A feed-forward layer, bound to no parent."""
        if not self.num_experts:
            dense = {"swiglu": SwiGLU, "block_diagonal": BlockDiagonalMLP}
            return dense[self.feed_forward](
                self.hidden,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                parent=None,
            )
        return MixtureOfExperts(
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            hidden=self.hidden,
            num_shared_experts=self.num_shared_experts,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            parent=None,
        )

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        cache: tuple[Any, ...] | None = None,
        lengths: jax.Array | None = None,
    ) -> Any:
        """Runs every block and the final norm.

        Args:
          x: [B, T, features].
          segment_ids: int [B, T], the document of each token; not with a cache.
          cache: What came before, from init_cache or an earlier call.
          lengths: int32 [B], how many of the T tokens of each row are real; only with
            a cache.

        Returns:
          [B, T, features], and the new cache if one was given.
        """
        # Without a backward pass there is nothing to recompute.
        remat = self.remat and cache is None and not self.is_initializing()
        block_class = nn.remat(Block) if remat else Block
        new_cache = []
        for layer in range(self.num_layers):
            block = block_class(
                mixer=self._mixer(layer),
                feed_forward=self._feed_forward(),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"layer_{layer}",
            )
            if cache is None:
                x = block(x, segment_ids=segment_ids)
            else:
                x, layer_cache = block(x, cache=cache[layer], lengths=lengths)
                new_cache.append(layer_cache)
        x = nn.RMSNorm(
            dtype=self.dtype, param_dtype=self.param_dtype, name="final_norm"
        )(x)
        return x if cache is None else (x, tuple(new_cache))


def copy_stack(stage: BlockStack, **changes) -> BlockStack:
    """A new stack with other fields, bound to where this is called."""
    fields = {name: getattr(stage, name) for name in field_names(type(stage))}
    return type(stage)(**fields | changes)


def field_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Fields a user may set on a module class."""
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    return tuple(name for name in names if name not in ("parent", "name"))


def mixer_class(mixer: Mixer) -> type[nn.Module]:
    """The class a mixer's name stands for; ValueError if there is none."""
    if not isinstance(mixer, str):
        return mixer
    if mixer not in MIXERS:
        raise ValueError(f"unknown mixer {mixer!r}; known are {', '.join(MIXERS)}")
    return MIXERS[mixer]


def freeze_fields(module: nn.Module) -> None:
    """Makes mixers and mixer_options of a module hashable.

    A model is a static argument of jit, so its fields have to be hashable; users
    write dictionaries and lists.
    """

    def freeze(value):
        if isinstance(value, Mapping):
            return FrozenDict({k: freeze(v) for k, v in value.items()})
        if isinstance(value, list | tuple):
            return tuple(freeze(v) for v in value)
        return value

    for name in ("mixers", "mixer_options"):
        object.__setattr__(module, name, freeze(getattr(module, name)))


def shift_right(
    tokens: jax.Array, bos_id: int, segment_ids: jax.Array | None
) -> jax.Array:
    """What is fed to predict tokens: each token's predecessor in its document.

    Args:
      tokens: int [B, T].
      bos_id: Predecessor of the first token of a document.
      segment_ids: int [B, T], or None if each row is one document.

    Returns:
      int [B, T].
    """
    previous = jnp.pad(tokens[:, :-1], [(0, 0), (1, 0)], constant_values=bos_id)
    if segment_ids is None:
        return previous
    first = _common.document_starts(segment_ids) == jnp.arange(tokens.shape[1])
    return jnp.where(first, bos_id, previous)


def project_logits(x: jax.Array, head: jax.Array) -> jax.Array:
    """``x @ head`` of x [..., features] and head [features, V], in fp32 at least."""
    return jnp.matmul(
        x,
        head.astype(x.dtype),
        preferred_element_type=_common.statistics_dtype(x),
    )


def check_bos_id(bos_id: int) -> None:
    """Raises ValueError if bos_id cannot be fed."""
    if bos_id < 0:
        raise ValueError(f"bos_id must be a token id, 0 or more; got {bos_id}")


def check_tokens(tokens: jax.Array, segment_ids: jax.Array | None) -> None:
    """Raises ValueError unless tokens is int [B, T] and segment_ids fits it."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            "tokens must be integers of shape [B, T]; got "
            f"{tokens.dtype} {list(tokens.shape)}"
        )
    _common.check_segment_ids(segment_ids, *tokens.shape)
