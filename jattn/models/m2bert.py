"""M2-BERT: a masked language model of long convolutions and block-diagonal maps."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jattn.models import blocks
from jattn.models.embedding import Embed
from jattn.nn.monarch import BlockDiagonalMLP, MonarchMixer
from jattn.ops import _common


class M2Bert(nn.Module):
    """The masked language model of Monarch Mixer, as released.

    Embeddings of token, token type and absolute position; layers
    ``h = MonarchMixer(h)``, ``h = LayerNorm(h + MLP(h))``, the mixer without a residual
    of its own; a head whose matrix is the token embedding. The defaults are the model
    of 80M parameters; its siblings have features and hidden of 960 and 3840 (116M),
    1536 and 6144 (259M), 1792 and 7168 (341M), and max_length up to 32768.

    Attributes:
      vocab_size: Tokens V.
      max_length: Positions there are embeddings and filter taps for.
      num_layers: Layers.
      features: Width of the layers.
      hidden: Width of the gated feed-forward.
      num_blocks: Blocks of the feed-forward's maps.
      filter_order: Width of the networks that compute the filters.
      num_token_types: Token types.
      input_norm: Whether a LayerNorm precedes every mixer, as in the published
        weights of the 80M model.
      mask_padding: Whether tokens that attention_mask hides enter no convolution.
        The released model ignores the mask, so that padding changes the logits of
        real tokens; False gives its numbers.
      dropout_rate: Of embeddings and hidden activations.
      dtype: Of the computation; that of the parameters if None.
      param_dtype: Of the parameters.
      implementation: See `jattn.long_conv`.
    """

    vocab_size: int = 30528
    max_length: int = 128
    num_layers: int = 12
    features: int = 768
    hidden: int = 3072
    num_blocks: int = 4
    filter_order: int = 128
    num_token_types: int = 2
    input_norm: bool = False
    mask_padding: bool = True
    dropout_rate: float = 0.1
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: _common.Implementation | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Scores what every token could be, given those on both sides.

        Args:
          tokens: int [B, L], L at most max_length.
          attention_mask: bool or int [B, L], 0 for padding; see mask_padding.
          token_type_ids: int [B, L]; all 0 if None.
          segment_ids: int [B, L], the document of each token. Documents never see
            each other and count their positions from 0.
          deterministic: Whether dropout is off; on, it needs an rng named "dropout".

        Returns:
          Logits [B, L, V] in fp32 (fp64 for fp64 parameters).

        Raises:
          ValueError: Shapes do not fit, or L exceeds max_length.
        """
        self._check(tokens, attention_mask, token_type_ids, segment_ids)
        b, length = tokens.shape
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(tokens)
        positions = jnp.broadcast_to(jnp.arange(length), (b, length))
        if segment_ids is not None:
            positions -= _common.document_starts(segment_ids)
        words = self._embed(self.vocab_size, "token_embedding")
        types = self._embed(self.num_token_types, "token_type_embedding")
        places = self._embed(self.max_length, "position_embedding")
        h = words(tokens) + types(token_type_ids) + places(positions)
        h = self._norm("embedding_norm")(h)
        h = nn.Dropout(self.dropout_rate)(h, deterministic=deterministic)

        mask = None
        if attention_mask is not None and self.mask_padding:
            mask = attention_mask != 0
        for i in range(self.num_layers):
            h = MonarchMixer(
                features=self.features,
                max_length=self.max_length,
                filter_order=self.filter_order,
                bidirectional=True,
                input_norm=self.input_norm,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                implementation=self.implementation,
                name=f"mixer_{i}",
            )(h, segment_ids=segment_ids, mask=mask)
            mlp = BlockDiagonalMLP(
                hidden=self.hidden,
                num_blocks=self.num_blocks,
                dropout_rate=self.dropout_rate,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"mlp_{i}",
            )
            h = self._norm(f"norm_{i}")(h + mlp(h, deterministic=deterministic))

        h = nn.Dense(
            self.features,
            kernel_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="head",
        )(h)
        h = self._norm("head_norm")(jax.nn.gelu(h, approximate=False))
        bias = self.param(
            "head_bias", nn.initializers.zeros, (self.vocab_size,), self.param_dtype
        )
        return blocks.project_logits(h, words.embedding.T) + bias

    def _embed(self, count, name):
        return Embed(
            count,
            self.features,
            embedding_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def _norm(self, name):
        # With this epsilon E[x²] - E[x]² is too inexact a variance.
        return nn.LayerNorm(
            epsilon=1e-12,
            use_fast_variance=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def _check(self, tokens, attention_mask, token_type_ids, segment_ids):
        blocks.check_tokens(tokens, segment_ids)
        optional = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        given = {name: x for name, x in optional.items() if x is not None}
        _common.bind_shapes(
            ("tokens", tokens, "BL"), *((name, x, "BL") for name, x in given.items())
        )
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"tokens has L={length} positions and the model "
                f"max_length={self.max_length}; L may not exceed it"
            )
