"""Mixture of Block Attention as a module."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from jattn.nn import cache as caches
from jattn.nn.projection import from_heads, to_heads
from jattn.nn.rope import rope
from jattn.ops import _common
from jattn.ops.block_sparse import attend_block_positions
from jattn.ops.dense import attend_positions, dense_attention
from jattn.ops.moba import (
    key_convolution,
    mean_keys,
    mixture_of_block_attention,
    select_pooled,
)


class MoBACache(struct.PyTreeNode):
    """What a layer of block attention keeps of the tokens seen.

    Attributes:
      kv: Keys, as attention sees them, and values.
      block_sum: [B, ⌈max_length / block_size⌉, K, H] in fp32, the sum of each block's
        keys, so that a step routes without reading them again.
      raw_key: [B, W - 1, K, H], the last keys before their convolution, the newest
        last; None without one.
    """

    kv: caches.KVCache
    block_sum: jax.Array
    raw_key: jax.Array | None

    @property
    def length(self) -> jax.Array:
        """int32 [B], tokens seen so far."""
        return self.kv.length


class MixtureOfBlockAttention(nn.Module):
    """Causal attention of each query head to its own and the top_k - 1 best blocks.

    The parameters are those of `DenseAttention`, if there is no key convolution: a
    dense checkpoint runs sparse, and a call can be dense with `full_attention`.

    Attributes:
      num_heads: Query heads N.
      num_kv_heads: Key-value heads K, a divisor of N; N if None.
      head_dim: Width H of a head.
      block_size: Keys in a block.
      top_k: Blocks a query head sees, its own included. A sequence of fewer blocks is
        seen whole.
      key_conv_width: Taps W of FlashMoBA's key convolution (3 or 5 there); none if
        None. It starts as the identity.
      rope_base: Base of the rotary embedding, applied after the convolution; None for
        no positions, as FlashMoBA trains it between sliding-window layers.
      dtype: Of the computation; that of the input and parameters if None.
      param_dtype: Of the parameters.
      implementation: See `jattn.mixture_of_block_attention`.
      qk_norm: Whether queries and keys pass an RMSNorm of their own, each head by
        itself, before their positions enter.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    block_size: int = 512
    top_k: int = 3
    key_conv_width: int | None = None
    rope_base: float | None = 10_000.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: _common.Implementation | None = None
    qk_norm: bool = False

    def init_cache(
        self, batch_size: int, max_length: int, dtype: Any = jnp.float32
    ) -> MoBACache:
        """An empty cache for up to max_length tokens a row."""
        kv_heads = self.num_kv_heads or self.num_heads
        # Whole blocks, so that no step has to pad the keys.
        count = -(-max_length // self.block_size)
        width, held = self.head_dim, (self.key_conv_width or 1) - 1
        return MoBACache(
            kv=caches.KVCache.zeros(
                batch_size, count * self.block_size, kv_heads, width, width, dtype
            ),
            block_sum=jnp.zeros(
                (batch_size, count, kv_heads, width),
                jnp.result_type(jnp.float32, dtype),
            ),
            raw_key=jnp.zeros((batch_size, held, kv_heads, width), dtype)
            if held
            else None,
        )

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        cache: MoBACache | None = None,
        lengths: jax.Array | None = None,
        full_attention: bool = False,
    ) -> Any:
        """Mixes x along the sequence.

        Args:
          x: [B, T, features].
          segment_ids: int [B, T], the document of each token; not with a cache.
          cache: What came before, from init_cache or an earlier call.
          lengths: int32 [B], how many of the T tokens of each row are real; the rest
            is padding on the right and leaves no trace in the cache. All if None.
            Only with a cache.
          full_attention: Let this call's tokens see everything before them. The cache
            is the same either way, so calls may alternate.

        Returns:
          [B, T, features], and the new cache if one was given.
        """
        caches.check_call(segment_ids, cache, lengths)
        _common.check_positive(
            block_size=self.block_size,
            top_k=self.top_k,
            key_conv_width=self.key_conv_width,
        )
        features = caches.check_input(self, x, segment_ids)
        kv_heads = self.num_kv_heads or self.num_heads
        _common.group_size(self.num_heads, kv_heads)

        x, positions, lengths = caches.place_tokens(
            self, x, cache, lengths, lambda x: x.kv.key.shape[1]
        )

        # query [B, T, N, H], key and value [B, T, K, H]
        query = to_heads(
            self, "query", x, self.num_heads, self.head_dim, norm=self.qk_norm
        )
        key = to_heads(self, "key", x, kv_heads, self.head_dim, norm=self.qk_norm)
        value = to_heads(self, "value", x, kv_heads, self.head_dim)
        if self.key_conv_width is not None:
            weight = self.param(
                "key_conv",
                nn.initializers.zeros_init(),
                (self.key_conv_width, kv_heads, self.head_dim),
                self.param_dtype,
            )
            if cache is None or cache.raw_key is None:
                key = key_convolution(key, weight, segment_ids=segment_ids)
            else:
                key, cache = self._convolve_cached(key, weight, lengths, cache)
        if self.rope_base is not None:
            query = rope(query, positions, self.rope_base)
            key = rope(key, positions, self.rope_base)

        def attend(query, key, value):
            """Attention among the tokens of this call."""
            if full_attention:
                return dense_attention(
                    query,
                    key,
                    value,
                    segment_ids=segment_ids,
                    implementation=self.implementation,
                )
            return mixture_of_block_attention(
                query,
                key,
                value,
                block_size=self.block_size,
                top_k=min(self.top_k, -(-x.shape[1] // self.block_size)),
                segment_ids=segment_ids,
                implementation=self.implementation,
            )

        if cache is None:
            out = attend(query, key, value)
        else:
            held = cache.length
            cache = self._write(key, value, positions, lengths, cache)
            attend_cached = (
                self._attend_cached_fully if full_attention else self._attend_cached
            )

            out = caches.attend(
                held,
                x.shape[1],
                lambda: caches.without_padding(attend(query, key, value), positions),
                lambda: attend_cached(query, positions, cache),
            )
        out = from_heads(self, out, features)
        return out if cache is None else (out, cache)

    def _convolve_cached(self, key, weight, lengths, cache):
        """The convolution of new keys that follow the cache's; the cache with them."""
        held = cache.raw_key.shape[1]
        keys = jnp.concatenate([cache.raw_key.astype(key.dtype), key], axis=1)
        last = lengths[:, None] + jnp.arange(held)  # up to each row's last real key
        raw_key = jnp.take_along_axis(keys, last[..., None, None], axis=1)
        cache = cache.replace(raw_key=raw_key.astype(cache.raw_key.dtype))
        return key_convolution(keys, weight)[:, held:], cache

    def _write(self, key, value, positions, lengths, cache):
        """The cache with the new tokens, whose key is the one attention sees."""
        b, t = positions.shape
        # The new keys are laid out from the start of the first block they touch, and
        # each block is summed whole: no sum depends on the order of a scatter.
        touched = -(-(t - 1) // self.block_size) + 1
        start = cache.length // self.block_size
        places = jnp.where(
            positions < 0, -1, positions - start[:, None] * self.block_size
        )
        layout = jnp.zeros(
            (b, touched * self.block_size, *key.shape[2:]), cache.block_sum.dtype
        )
        added = caches.write(layout, key, places)
        added = added.reshape(b, touched, self.block_size, *key.shape[2:]).sum(axis=2)
        rows = jnp.arange(b)[:, None]
        blocks = start[:, None] + jnp.arange(touched)
        return cache.replace(
            kv=caches.KVCache(
                key=caches.write(cache.kv.key, key, positions),
                value=caches.write(cache.kv.value, value, positions),
                length=cache.length + lengths,
            ),
            block_sum=cache.block_sum.at[rows, blocks].add(added, mode="drop"),
        )

    def _attend_cached(self, query, positions, cache):
        """Attention of new tokens to the blocks they pick in a cache they are in."""
        # In a block that is not full yet this is no mean, but nobody looks at it.
        pooled_keys = mean_keys(cache.block_sum, self.block_size, query.dtype)
        block_indices = select_pooled(
            query,
            pooled_keys,
            block_size=self.block_size,
            top_k=min(self.top_k, cache.block_sum.shape[1]),
            query_positions=positions,
        )
        out, _ = attend_block_positions(
            query,
            cache.kv.key.astype(query.dtype),
            cache.kv.value.astype(query.dtype),
            block_indices,
            block_size=self.block_size,
            scale=_common.default_scale(None, self.head_dim),
            query_positions=positions,
        )
        return out

    def _attend_cached_fully(self, query, positions, cache):
        """Dense attention of new tokens to a cache they are in."""
        b, capacity = cache.kv.key.shape[:2]
        out, _ = attend_positions(
            query,
            cache.kv.key.astype(query.dtype),
            cache.kv.value.astype(query.dtype),
            query_positions=positions,
            key_positions=jnp.broadcast_to(jnp.arange(capacity), (b, capacity)),
            scale=_common.default_scale(None, self.head_dim),
        )
        return out
