"""Selective Attention as a module, with a cache that shrinks to a budget."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from jattn.nn import cache as caches
from jattn.nn.projection import from_heads, to_heads
from jattn.nn.rope import rope
from jattn.ops import _common
from jattn.ops.selective import (
    check_budget,
    check_skip_error,
    selective_attention,
    selective_skipped,
)
from jattn.ops.selective_decode import (
    cached_selective_attention,
    prefill_selective_attention,
)


class SelectiveCache(struct.PyTreeNode):
    """Keys, values and selection sums of one layer.

    Attributes:
      key: [B, S, K, H], after the rotary embedding.
      value: [B, S, K, H].
      mask: fp32 [B, S] (fp64 for an fp64 cache), row F of the next query: how
        strongly the queries so far selected each key.
      position: int32 [B, S] of the token in each slot, -1 if there is none.
      length: int32 [B], tokens seen so far.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array
    position: jax.Array
    length: jax.Array


class SelectiveAttention(nn.Module):
    """Multi-head attention in which head 0 decides what later queries forget.

    Selection has no parameters of its own. Where the collection "losses" is mutable,
    the module sows "selective_memory" into it: the mean over rows of
    ``max_i M_i / n`` (see `jattn.selective_memory`) with n tokens in a row, to be
    averaged over layers and added to the loss with a small weight (0.1 in the paper)
    so that the model learns to need few keys.

    A variable "budget" in the collection "budgets", an int32 scalar, takes the place
    of the field in calls without a cache: one compiled function tries any budget.

    Attributes:
      num_heads: Query heads N.
      num_kv_heads: Key-value heads K, a divisor of N; N if None.
      head_dim: Width H of a head.
      budget: Tokens a query holds, itself included, and slots of the cache; the
        most forgotten are dropped for good. None to keep all. The paper trains
        without one and then searches for the smallest budget of each layer.
      memory_tau: F from which a key counts as forgotten in the memory loss.
      skip_error: Part of a query's softmax weight that may be left out in calls
        without a cache and in the first one with it, see `jattn.selective_attention`.
      padding_segment: Id in segment_ids of what is padding and not a document, which
        the memory loss leaves out; None if every token is of a document.
      rope_base: Base of the rotary embedding; None for no positions.
      dtype: Of the computation; that of the input and parameters if None.
      param_dtype: Of the parameters.
      implementation: See `jattn.selective_attention`.
      qk_norm: Whether queries and keys pass an RMSNorm of their own, each head by
        itself, before their positions enter.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    budget: int | None = None
    memory_tau: float = 1.0
    skip_error: float = 0.0
    padding_segment: int | None = None
    rope_base: float | None = 10_000.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: _common.Implementation | None = None
    qk_norm: bool = False

    def init_cache(
        self, batch_size: int, max_length: int, dtype: Any = jnp.float32
    ) -> SelectiveCache:
        """An empty cache for up to max_length tokens a row, of at most `budget` slots.

        Args:
          batch_size: Rows B.
          max_length: Most tokens of a row, those of the prompt included.
          dtype: Of keys and values.

        Returns:
          See `SelectiveCache`; no slot holds a token.

        Raises:
          ValueError: budget or skip_error is out of range.
        """
        budget = self._checked_budget()
        slots = (batch_size, max_length if budget is None else min(max_length, budget))
        shape = (*slots, self.num_kv_heads or self.num_heads, self.head_dim)
        return SelectiveCache(
            key=jnp.zeros(shape, dtype),
            value=jnp.zeros(shape, dtype),
            mask=jnp.zeros(slots, jnp.promote_types(jnp.float32, dtype)),
            position=jnp.full(slots, -1, jnp.int32),
            length=jnp.zeros(batch_size, jnp.int32),
        )

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        cache: SelectiveCache | None = None,
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
          [B, T, features] in the dtype of the computation, and the new cache if one
          was given, in its own dtypes.

        Raises:
          ValueError: budget, skip_error or (where the loss is collected) memory_tau is
            out of range; the head sizes are not positive, num_kv_heads does not divide
            num_heads, or head_dim is odd and there are rotary positions; x, segment_ids
            or lengths has another shape or dtype; segment_ids is given with a cache, or
            lengths without one; the cache is not one that init_cache of this module
            makes for B rows, or T exceeds its max_length.
          NotImplementedError: The requested implementation does not support the call.
        """
        caches.check_call(segment_ids, cache, lengths)
        budget = self._checked_budget()
        features = caches.check_input(self, x, segment_ids)
        kv_heads = self.num_kv_heads or self.num_heads
        _common.group_size(self.num_heads, kv_heads)

        x, positions, lengths = caches.place_tokens(
            self, x, cache, lengths, lambda x: x.position.shape[1]
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
            out = self._attend(query, key, value, budget, segment_ids)
        else:
            # A cache of fewer slots than the budget has one for each of its tokens.
            pruned = cache.position.shape[1] == budget
            arrays = query, key, value, positions, cache
            first = functools.partial(
                _prefill,
                *arrays,
                budget=budget if pruned else None,
                skip_error=self.skip_error,
                implementation=self.implementation,
            )
            later = functools.partial(
                attend_pruned if pruned else _attend_cached,
                *arrays,
                implementation=self.implementation,
            )
            out, cache = caches.attend(cache.length, x.shape[1], first, later)
        out = from_heads(self, out, features)
        return out if cache is None else (out, cache)

    def _checked_budget(self) -> int | None:
        """The budget as an int or None; ValueError if a field is out of range."""
        check_skip_error(self.skip_error)
        return None if self.budget is None else check_budget(self.budget)

    def _attend(self, query, key, value, budget, segment_ids):
        """Attention within the call; sows what is collected of it."""
        collect = self._collects("losses")
        memory_tau = self.memory_tau if collect else None
        if self.has_variable("budgets", "budget"):
            budget = self.get_variable("budgets", "budget")
        out = selective_attention(
            query,
            key,
            value,
            budget=budget,
            memory_tau=memory_tau,
            skip_error=self.skip_error,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        if self.skip_error and self._collects("metrics"):
            skipped = selective_skipped(
                query,
                key,
                skip_error=self.skip_error,
                segment_ids=segment_ids,
                implementation=self.implementation,
            )
            self.sow("metrics", "selective_skipped", skipped)
        out, memory = out if collect else (out, None)
        if memory is not None:
            self.sow("losses", "selective_memory", self._loss(memory, segment_ids))
        return out

    def _collects(self, collection):
        return self.is_mutable_collection(collection) and not self.is_initializing()

    def _loss(self, memory, segment_ids):
        """The memory loss of M [B, T]: ``max_i M_i / n``, mean over rows with text."""
        if segment_ids is None or self.padding_segment is None:
            return jnp.mean(jnp.max(memory, axis=1)) / memory.shape[1]
        real = segment_ids != self.padding_segment
        count = jnp.sum(real, axis=1)  # [B]
        most = jnp.max(jnp.where(real, memory, 0), axis=1)
        return jnp.sum(most / jnp.maximum(count, 1)) / jnp.maximum(
            jnp.sum(count > 0), 1
        )


def _prefill(
    query, key, value, positions, cache, *, budget, skip_error, implementation
):
    """Attention among the first tokens, of which the cache takes what is held."""
    lengths = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    out, mask, held = prefill_selective_attention(
        query,
        key,
        value,
        lengths,
        budget=budget,
        skip_error=skip_error,
        scale=_common.default_scale(None, query.shape[-1]),
        implementation=implementation,
    )
    if budget is not None:
        # Those that are held, in order.
        taken = jnp.argsort(~held, axis=1, stable=True)[:, :budget]
        rows = jnp.arange(len(taken))[:, None]
        key, value, mask, positions, held = (
            x[rows, taken] for x in (key, value, mask, positions, held)
        )
    slot = jnp.arange(held.shape[1], dtype=jnp.int32)
    slot = jnp.where(held, slot, -1)
    return out, SelectiveCache(
        key=caches.write(cache.key, key, slot),
        value=caches.write(cache.value, value, slot),
        mask=caches.write(cache.mask, mask, slot),
        position=caches.write(cache.position, positions, slot),
        length=cache.length + lengths,
    )


def _attend_cached(query, key, value, positions, cache, implementation):
    """Attention to the cache with the new tokens written at their positions."""
    cache = cache.replace(
        key=caches.write(cache.key, key, positions),
        value=caches.write(cache.value, value, positions),
        position=caches.write(cache.position, positions, positions),
        length=cache.length + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32),
    )
    return _attend_slots(query, positions, cache, implementation)


def attend_pruned(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    cache: SelectiveCache,
    implementation: _common.Implementation | None = None,
) -> tuple[jax.Array, SelectiveCache]:
    """Attention token by token, each in the slot of what is forgotten for it.

    Args:
      query: [B, T, N, H].
      key: [B, T, K, H].
      value: [B, T, K, H].
      positions: int32 [B, T] of the tokens in their rows, -1 for padding.
      cache: Of as many slots as the budget, which tokens fill first.
      implementation: "xla", "triton", or None for the fastest.

    Returns:
      Output [B, T, N, H] and the new cache.
    """

    def step(cache, token):
        query, key, value, position = token  # [B, 1, N, H], ..., [B, 1]
        capacity = cache.position.shape[1]
        # The slots fill up in order. Then a token takes the one with the largest F,
        # the oldest if there are several, but never that of the first token.
        forgotten = jnp.where(cache.position > 0, cache.mask, -jnp.inf)
        most = forgotten == jnp.max(forgotten, axis=1, keepdims=True)
        victim = jnp.argmin(jnp.where(most, cache.position, cache.length[:, None]), 1)
        slot = jnp.where(cache.length < capacity, cache.length, victim)[:, None]
        slot = jnp.where(position < 0, -1, slot)  # [B, 1]
        cache = cache.replace(
            key=caches.write(cache.key, key, slot),
            value=caches.write(cache.value, value, slot),
            mask=caches.write(cache.mask, jnp.zeros(slot.shape), slot),
            position=caches.write(cache.position, position, slot),
            length=cache.length + (position[:, 0] >= 0),
        )
        out, cache = _attend_slots(query, position, cache, implementation)
        return cache, out

    tokens = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], (query, key, value, positions)
    )
    cache, out = jax.lax.scan(step, cache, tokens)
    return jnp.moveaxis(out[:, :, 0], 0, 1), cache


def _attend_slots(query, positions, cache, implementation):
    """Attention of queries to the slots of the cache; the cache with F after them."""
    out, mask = cached_selective_attention(
        query,
        cache.key.astype(query.dtype),
        cache.value.astype(query.dtype),
        cache.mask,
        query_positions=positions,
        key_positions=cache.position,
        scale=_common.default_scale(None, query.shape[-1]),
        implementation=implementation,
    )
    return out, cache.replace(mask=mask.astype(cache.mask.dtype))
