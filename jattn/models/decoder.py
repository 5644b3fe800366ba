"""A decoder language model over any pattern of mixers."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jattn.models import blocks
from jattn.models.embedding import Embed
from jattn.nn import cache as caches
from jattn.ops import _common


class DecoderLM(nn.Module):
    """Token embedding, a stack of blocks, and logits over the vocabulary.

    `score` and `__call__` are two views of one computation: ``score(tokens)[:, t]`` are
    the logits of ``tokens[:, t]`` given what precedes it, ``model(tokens)[:, t]`` those
    of the token after ``tokens[:, t]``. Every document begins with bos_id, which score
    inserts itself.

    Attributes:
      vocab_size: Tokens the model predicts, V.
      bos_id: Fed before the first token of a document. It may lie outside of the
        vocabulary; then it is never predicted.
      tie_embeddings: Whether the logits' matrix is the embedding's.
      features: Width of the residual stream.
      num_layers: See `BlockStack`, as for all fields that follow.
      num_heads: Query heads of each mixer that has heads.
      head_dim: Width of a head.
      hidden: Width of a feed-forward layer, or of one expert.
      num_kv_heads: Key-value heads; num_heads if None.
      mixers: Mixer of each layer, such as "dense dense dense simplicial"; the pattern
        repeats.
      mixer_options: Further fields of the mixers by name, such as
        ``{"selective": {"budget": (256, 64, 64, None)}}``, a budget for each layer.
      feed_forward: "swiglu", or "block_diagonal" for that of Monarch Mixer models.
      num_experts: Routed experts of each feed-forward layer; 0 for a dense one.
      experts_per_token: How many of them a token goes to.
      num_shared_experts: Experts that see every token.
      remat: Recompute each layer in the backward pass instead of keeping it.
      dtype: Of the computation; that of the parameters if None. Logits are fp32 (fp64
        if the computation is).
      param_dtype: Of the parameters.
      qk_norm: Of the mixers that have it.

    Raises:
      ValueError: On construction, as for `BlockStack`.
    """

    vocab_size: int
    bos_id: int
    features: int
    num_layers: int
    num_heads: int
    head_dim: int
    hidden: int
    num_kv_heads: int | None = None
    mixers: str | tuple[blocks.Mixer, ...] = "dense"
    mixer_options: Mapping[blocks.Mixer, Mapping[str, Any]] = FrozenDict()
    feed_forward: blocks.FeedForward = "swiglu"
    num_experts: int = 0
    experts_per_token: int = 2
    num_shared_experts: int = 0
    tie_embeddings: bool = True
    remat: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    qk_norm: bool = False

    def __post_init__(self):
        blocks.freeze_fields(self)
        _common.check_positive(vocab_size=self.vocab_size)
        blocks.check_bos_id(self.bos_id)
        self._blocks(parent=None)  # what is wrong is said here, not at the first call
        super().__post_init__()

    def _blocks(self, **options) -> blocks.BlockStack:
        """The stack, whose fields are fields of this module."""
        names = blocks.field_names(blocks.BlockStack)
        return blocks.BlockStack(**{n: getattr(self, n) for n in names}, **options)

    def init_cache(
        self, batch_size: int, max_length: int, dtype: Any = jnp.float32
    ) -> tuple[Any, ...]:
        """An empty cache for up to max_length tokens a row, bos_id included."""
        return self._blocks(parent=None).init_cache(batch_size, max_length, dtype)

    def budget_layers(self) -> tuple[int, ...]:
        """The layers whose mixer has a budget, in order."""
        return self._blocks(parent=None).budget_layers()

    def budget_variables(self, budgets: jax.Array) -> dict[str, Any]:
        """Variables that override the budgets of a call without a cache.

        They go beside the parameters, as in
        ``model.apply({"params": params, **model.budget_variables(budgets)}, tokens)``,
        and being arrays need no compilation of their own.

        Args:
          budgets: int32 [L], one for each of `budget_layers`; one that is as long as
            the context keeps all of it.
        """
        layers = self._blocks(parent=None).budget_variables(budgets)
        return {"budgets": {"blocks": layers}}

    def score(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Logits of each token given what precedes it in its document.

        Args:
          tokens: int [B, T].
          segment_ids: int [B, T], the document of each token; documents are contiguous
            and never see each other. One document a row if None.

        Returns:
          [B, T, V] in fp32.
        """
        blocks.check_tokens(tokens, segment_ids)
        previous = blocks.shift_right(tokens, self.bos_id, segment_ids)
        return self(previous, segment_ids=segment_ids)

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        cache: tuple[Any, ...] | None = None,
        lengths: jax.Array | None = None,
    ) -> Any:
        """Logits of the token after each token.

        Args:
          tokens: int [B, T]; each document begins with bos_id.
          segment_ids: int [B, T], the document of each token; not with a cache.
          cache: What came before, from init_cache or an earlier call.
          lengths: int32 [B], how many of the T tokens of each row are real; the rest
            is padding on the right and leaves no trace in the cache. All if None.
            Only with a cache.

        Returns:
          [B, T, V] in fp32, and the new cache if one was given.
        """
        blocks.check_tokens(tokens, segment_ids)
        caches.check_call(segment_ids, cache, lengths)
        embed = Embed(
            # bos_id has a row even where it cannot be predicted.
            max(self.vocab_size, self.bos_id + 1),
            self.features,
            embedding_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="embedding",
        )
        x: Any = self._blocks(name="blocks")(
            embed(tokens), segment_ids=segment_ids, cache=cache, lengths=lengths
        )
        if cache is not None:
            x, cache = x
        if self.tie_embeddings:
            head = embed.embedding[: self.vocab_size].T
        else:
            head = self.param(
                "head",
                nn.initializers.lecun_normal(),
                (self.features, self.vocab_size),
                self.param_dtype,
            )
        logits = blocks.project_logits(x, head)
        return logits if cache is None else (logits, cache)
