"""How tokens fall into patches, and attention that reaches into the previous one."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from jattn.nn import cache as caches
from jattn.nn.projection import from_heads, to_heads
from jattn.nn.rope import rope
from jattn.ops import _common
from jattn.ops.dense import attend_positions


@dataclasses.dataclass(frozen=True)
class PatchGrid:
    """The patches that the next T tokens of each row fall into.

    Rows may stand anywhere in a patch, so the tokens touch up to M patches, of which
    the first may have begun in an earlier call. In the patched form [B, M, Q] the new
    tokens of each patch are moved to the left, and Q is the most that one can have.

    Attributes:
      start: int32 [B], tokens already seen.
      lengths: int32 [B], how many of the new tokens are real.
      count: New tokens T, padding included.
      patch_size: Tokens of a patch, P.
    """

    start: jax.Array
    lengths: jax.Array
    count: int
    patch_size: int

    @property
    def num_patches(self) -> int:
        """M, the most patches T tokens can touch."""
        return (self.count + self.patch_size - 2) // self.patch_size + 1

    @property
    def width(self) -> int:
        """Q, the most new tokens one patch can have."""
        return min(self.count, self.patch_size)

    @property
    def phase(self) -> jax.Array:
        """int32 [B], tokens the first patch had before."""
        return self.start % self.patch_size

    @property
    def slots(self) -> jax.Array:
        """int32 [B, T], where in its patch each new token is."""
        return (self.phase[:, None] + jnp.arange(self.count)) % self.patch_size

    @property
    def patches(self) -> jax.Array:
        """int32 [B, T], which of the M patches each new token is in."""
        return (self.phase[:, None] + jnp.arange(self.count)) // self.patch_size

    @property
    def last_patch(self) -> jax.Array:
        """int32 [B], which of the M patches the row's last real token is in.

        Without a new token it is the patch of the last token seen, -1 if that is
        complete.
        """
        return (self.phase + self.lengths - 1) // self.patch_size

    @property
    def first_tokens(self) -> jax.Array:
        """int32 [B, M], the first new token of each patch."""
        begins = jnp.arange(self.num_patches) * self.patch_size
        return jnp.maximum(begins - self.phase[:, None], 0)

    @property
    def first_slots(self) -> jax.Array:
        """int32 [B, M], where in its patch that token is."""
        later = jnp.arange(self.num_patches) > 0
        return jnp.where(later, 0, self.phase[:, None])

    @property
    def counts(self) -> jax.Array:
        """int32 [B, M], real new tokens of each patch."""
        room = self.patch_size - self.first_slots
        left = self.lengths[:, None] - self.first_tokens
        return jnp.clip(left, 0, room)

    def split(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] to [B, M, Q, ...]; slots without a token hold any other."""
        index = self.first_tokens[..., None] + jnp.arange(self.width)
        index = jnp.minimum(index, self.count - 1)
        rows = take(x, index.reshape(x.shape[0], -1))
        return rows.reshape(x.shape[0], self.num_patches, self.width, *x.shape[2:])

    def join(self, x: jax.Array) -> jax.Array:
        """[B, M, Q, ...] back to [B, T, ...]."""
        column = self.slots - jnp.where(self.patches > 0, 0, self.phase[:, None])
        flat = x.reshape(x.shape[0], -1, *x.shape[3:])
        return take(flat, self.patches * self.width + column)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Reads x [B, S, ...] at index [B, I] of each row, to [B, I, ...]."""
    return x[jnp.arange(x.shape[0])[:, None], index]


def slide(
    recent: jax.Array, new: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Puts the last R tokens before new ones, and finds the last R after them.

    Args:
      recent: [B, R, ...].
      new: [B, T, ...].
      lengths: int32 [B], how many of the T are real.

    Returns:
      Both side by side, [B, R + T, ...], and the next recent, [B, R, ...].
    """
    window = jnp.concatenate([recent, new.astype(recent.dtype)], axis=1)
    return window, take(window, lengths[:, None] + jnp.arange(recent.shape[1]))


class CrossPatchCache(struct.PyTreeNode):
    """Keys and values that later tokens of CrossPatchAttention may see.

    Attributes:
      key: [B, overlap + P - 1, K, H] of the last tokens, without rotary embedding.
      value: [B, overlap + P - 1, K, H].
      length: int32 [B], tokens seen so far.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array


class CrossPatchAttention(nn.Module):
    """Causal attention inside patches that also sees the end of the previous one.

    Query t of patch k sees the keys s <= t of its patch and the last `overlap` keys of
    patch k - 1, the cross-patch attention of MEGABYTE. Parameters are those of
    `jattn.nn.DenseAttention`, and so is the call.

    Attributes:
      num_heads: Query heads N.
      head_dim: Width H of a head.
      patch_size: Tokens of a patch, P.
      overlap: Keys of the previous patch, 1 to P.
      num_kv_heads: Key-value heads K, a divisor of N; N if None.
      rope_base: Base of the rotary embedding; None for no positions.
      dtype: Of the computation; that of the input and parameters if None.
      param_dtype: Of the parameters.
      implementation: "xla" or None; there is no kernel.
    """

    num_heads: int
    head_dim: int
    patch_size: int
    overlap: int
    num_kv_heads: int | None = None
    rope_base: float | None = 10_000.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: _common.Implementation | None = None

    def init_cache(
        self, batch_size: int, max_length: int, dtype: Any = jnp.float32
    ) -> CrossPatchCache:
        """An empty cache; its size does not depend on max_length."""
        del max_length
        held = self.overlap + self.patch_size - 1
        kv_heads = self.num_kv_heads or self.num_heads
        shape = (batch_size, held, kv_heads, self.head_dim)
        return CrossPatchCache(
            key=jnp.zeros(shape, dtype),
            value=jnp.zeros(shape, dtype),
            length=jnp.zeros(batch_size, jnp.int32),
        )

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        cache: CrossPatchCache | None = None,
        lengths: jax.Array | None = None,
    ) -> Any:
        """Mixes x [B, T, features]; arguments and result as of `DenseAttention`.

        Raises:
          ValueError: As there, or overlap is not 1 to patch_size.
        """
        caches.check_call(segment_ids, cache, lengths)
        features = caches.check_input(self, x, segment_ids)
        _common.positive_integers(patch_size=self.patch_size, overlap=self.overlap)
        if self.overlap > self.patch_size:
            raise ValueError(
                f"overlap may be at most patch_size={self.patch_size}; got "
                f"{self.overlap}"
            )
        kv_heads = self.num_kv_heads or self.num_heads
        _common.group_size(self.num_heads, kv_heads)
        _common.choose_implementation("CrossPatchAttention", self.implementation)
        # Any number of tokens fits into a cache that holds the last ones.
        x, _, lengths = caches.place_tokens(
            self, x, cache, lengths, lambda _: x.shape[1]
        )

        # query [B, T, N, H], key and value [B, T, K, H]
        query = to_heads(self, "query", x, self.num_heads, self.head_dim)
        key = to_heads(self, "key", x, kv_heads, self.head_dim)
        value = to_heads(self, "value", x, kv_heads, self.head_dim)
        if cache is None:
            out = self._parallel(query, key, value, segment_ids)
        else:
            out, cache = self._cached(query, key, value, cache, lengths)
        out = from_heads(self, out, features)
        return out if cache is None else (out, cache)

    def _parallel(self, query, key, value, segment_ids):
        b, t = query.shape[:2]
        size, overlap = self.patch_size, self.overlap
        if segment_ids is None:
            segment_ids = jnp.zeros((b, t), jnp.int32)

        def patch(x):  # [B, T, ...] -> [B, K, P, ...]
            x = jnp.pad(x, [(0, 0), (0, -t % size)] + [(0, 0)] * (x.ndim - 2))
            return x.reshape(b, -1, size, *x.shape[2:])

        def with_previous(x):  # [B, T, ...] -> [B, K, overlap + P, ...]
            x = patch(x)
            ends = x[:, :-1, size - overlap :]
            ends = jnp.pad(ends, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))
            return jnp.concatenate([ends, x], axis=2)

        held = jnp.ones((b, t), bool)
        out = self._attend(
            patch(query),
            with_previous(key),
            with_previous(value),
            slots=jnp.broadcast_to(jnp.arange(size), (b, -(-t // size), size)),
            held=with_previous(held),
            segment_ids=(patch(segment_ids), with_previous(segment_ids)),
        )
        return out.reshape(b, -1, *out.shape[3:])[:, :t]

    def _cached(self, query, key, value, cache, lengths):
        size, overlap = self.patch_size, self.overlap
        grid = PatchGrid(cache.length, lengths, query.shape[1], size)
        keys, new_key = slide(cache.key, key, lengths)
        values, new_value = slide(cache.value, value, lengths)
        # The key before slot 0 of patch m by `overlap` is in keys and values at
        # m P - phase + P - 1, since they begin overlap + P - 1 before the first token.
        first = (jnp.arange(grid.num_patches) + 1) * size - 1 - grid.phase[:, None]
        index = first[..., None] + jnp.arange(overlap + size)  # [B, M, overlap + P]
        positions = index + (grid.start - overlap - size + 1)[:, None, None]
        # Past the end there are only tokens of the future.
        index = jnp.minimum(index, keys.shape[1] - 1)

        def gather(x):  # [B, S, ...] -> [B, M, overlap + P, ...]
            rows = take(x, index.reshape(x.shape[0], -1))
            return rows.reshape(*index.shape, *x.shape[2:]).astype(query.dtype)

        out = self._attend(
            grid.split(query),
            gather(keys),
            gather(values),
            slots=grid.first_slots[..., None] + jnp.arange(grid.width),
            held=positions >= 0,
        )
        cache = CrossPatchCache(new_key, new_value, cache.length + lengths)
        return grid.join(out), cache

    def _attend(self, query, key, value, *, slots, held, segment_ids=(None, None)):
        """Attention of queries [B, M, Q] to keys [B, M, overlap + P] of each patch.

        Positions count from the first key, so that they are small and relative ones
        are exact however long the row is.
        """
        b, patches, width = slots.shape

        def fold(x):  # [B, M, ...] -> [B M, ...]
            return x.reshape(b * patches, *x.shape[2:])

        query, key, value = fold(query), fold(key), fold(value)
        query_positions = fold(slots) + self.overlap
        key_positions = jnp.arange(key.shape[1])
        if self.rope_base is not None:
            query = rope(query, query_positions, self.rope_base)
            key = rope(
                key, jnp.broadcast_to(key_positions, key.shape[:2]), self.rope_base
            )
        query_segment_ids, key_segment_ids = (
            None if ids is None else fold(ids) for ids in segment_ids
        )
        out, _ = attend_positions(
            query,
            key,
            value,
            query_positions=query_positions,
            key_positions=jnp.where(fold(held), key_positions, -1),
            scale=_common.default_scale(None, self.head_dim),
            query_segment_ids=query_segment_ids,
            key_segment_ids=key_segment_ids,
        )
        return out.reshape(b, patches, width, *out.shape[2:])
