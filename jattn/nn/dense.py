"""Dense causal attention as a module, the baseline."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jattn.nn import cache as caches
from jattn.nn.projection import from_heads, to_heads
from jattn.nn.rope import rope
from jattn.ops import _common
from jattn.ops.dense import attend_positions, dense_attention


class DenseAttention(nn.Module):
    """Causal multi-head attention with grouped queries and rotary positions.

    Attributes:
      num_heads: Query heads N.
      num_kv_heads: Key-value heads K, a divisor of N; N if None.
      head_dim: Width H of a head.
      window: Tokens a query sees, itself included; None for all before it. With a
        window the cache is a ring of that many tokens.
      rope_base: Base of the rotary embedding; None for no positions.
      dtype: Of the computation; that of the input and parameters if None.
      param_dtype: Of the parameters.
      implementation: See `jattn.dense_attention`.
      qk_norm: Whether queries and keys pass an RMSNorm of their own, each head by
        itself, before their positions enter.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    window: int | None = None
    rope_base: float | None = 10_000.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: _common.Implementation | None = None
    qk_norm: bool = False

    def init_cache(
        self, batch_size: int, max_length: int, dtype: Any = jnp.float32
    ) -> caches.KVCache:
        """An empty cache for up to max_length tokens a row."""
        capacity = min(max_length, self.window or max_length)
        kv_heads = self.num_kv_heads or self.num_heads
        return caches.KVCache.zeros(
            batch_size, capacity, kv_heads, self.head_dim, self.head_dim, dtype
        )

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        cache: caches.KVCache | None = None,
        lengths: jax.Array | None = None,
    ) -> Any:
        """Mixes x along the sequence.

        Args:
          x: [B, T, features].
          segment_ids: int [B, T], the document of each token; not with a cache.
          cache: What came before, from init_cache or an earlier call.
          lengths: int32 [B], how many of the T tokens of each row are real; the rest
            is padding on the right and leaves no trace in the cache. All if None.
            Only with a cache.

        Returns:
          [B, T, features], and the new cache if one was given.
        """
        caches.check_call(segment_ids, cache, lengths)
        features = caches.check_input(self, x, segment_ids)
        kv_heads = self.num_kv_heads or self.num_heads
        _common.group_size(self.num_heads, kv_heads)

        x, positions, lengths = caches.place_tokens(
            self, x, cache, lengths, lambda x: x.key.shape[1]
        )

        # query [B, T, N, H], key and value [B, T, K, H]
        query = to_heads(
            self, "query", x, self.num_heads, self.head_dim, norm=self.qk_norm
        )
        key = to_heads(self, "key", x, kv_heads, self.head_dim, norm=self.qk_norm)
        value = to_heads(self, "value", x, kv_heads, self.head_dim)
        if self.rope_base is not None:
            query = rope(query, positions, self.rope_base)
            key = rope(key, positions, self.rope_base)

        if cache is None:
            out = self._attend(query, key, value, segment_ids)
        else:
            out, cache = self._attend_cached(
                query, key, value, positions, lengths, cache
            )
        out = from_heads(self, out, features)
        return out if cache is None else (out, cache)

    def _attend(self, query, key, value, segment_ids=None):
        """Attention among the tokens of a call."""
        return dense_attention(
            query,
            key,
            value,
            window=self.window,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def _attend_cached(self, query, key, value, positions, lengths, cache):
        """Attention to the cache and the new tokens; the cache with those written."""
        b, capacity = cache.key.shape[:2]
        new = key, value
        if self.window is None:
            key = caches.write(cache.key, key, positions)
            value = caches.write(cache.value, value, positions)
            keys, values = key, value
            key_positions = jnp.broadcast_to(jnp.arange(capacity), (b, capacity))
        else:
            # New tokens may push out what the first of them still sees, so the
            # queries read the old ring and the new tokens side by side.
            held = caches.ring_positions(cache.length, capacity)
            keys = jnp.concatenate([cache.key, key.astype(cache.key.dtype)], axis=1)
            values = jnp.concatenate(
                [cache.value, value.astype(cache.value.dtype)], axis=1
            )
            key_positions = jnp.concatenate([held, positions], axis=1)
            key = caches.write_ring(cache.key, key, positions)
            value = caches.write_ring(cache.value, value, positions)

        def later():
            out, _ = attend_positions(
                query,
                keys.astype(query.dtype),
                values.astype(query.dtype),
                query_positions=positions,
                key_positions=key_positions,
                window=self.window,
                scale=_common.default_scale(None, self.head_dim),
            )
            return out

        def first():
            return caches.without_padding(self._attend(query, *new), positions)

        out = caches.attend(cache.length, query.shape[1], first, later)
        length = cache.length + lengths
        return out, cache.replace(key=key, value=value, length=length)
