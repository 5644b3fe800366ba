"""Decoding caches: arrays of static shape, written in place of their old values.

A cache is a pytree that goes into a module and comes out again, so that a jitted step
can donate it. Rows of a batch may be of different length: `length` counts the tokens
each row holds, and a call says how many of its T new tokens are real in each row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


class KVCache(struct.PyTreeNode):
    """Keys and values of one layer.

    Attributes:
      key: [B, S, K, H]. Token p is in slot p, or p mod S if the cache is a ring.
      value: [B, S, K, V].
      length: int32 [B], tokens seen so far.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array

    @classmethod
    def zeros(
        cls,
        batch_size: int,
        capacity: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: jnp.dtype,
    ) -> "KVCache":
        """An empty cache of `capacity` slots."""
        return cls(
            key=jnp.zeros((batch_size, capacity, num_kv_heads, key_dim), dtype),
            value=jnp.zeros((batch_size, capacity, num_kv_heads, value_dim), dtype),
            length=jnp.zeros(batch_size, jnp.int32),
        )


def cache_bytes(cache) -> int:
    """Bytes of all arrays of a cache (of arrays or of their abstract shapes)."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def new_positions(start: jax.Array, lengths: jax.Array, count: int) -> jax.Array:
    """Positions int32 [B, count] of new tokens, -1 for those that are padding.

    Args:
      start: int32 [B], tokens already seen.
      lengths: int32 [B], how many of the new tokens are real.
      count: New tokens T, padding included.
    """
    offsets = jnp.arange(count, dtype=jnp.int32)
    return jnp.where(offsets < lengths[:, None], start[:, None] + offsets, -1)


def attend(
    length: jax.Array,
    count: int,
    first: Callable[..., Any],
    later: Callable[..., Any],
    *operands: Any,
) -> Any:
    """Attention of new tokens to each other and to what a cache holds.

    Args:
      length: int32 [B], tokens the cache has seen.
      count: New tokens T, padding included.
      first: Attends among new tokens alone: for prompts, which have many, there are
        faster ways than the one that also reads a cache.
      later: Attends to both.
      *operands: Of either.

    Returns:
      What the one that is needed returns; both return the like.
    """
    if count == 1:
        return later(*operands)
    return jax.lax.cond(jnp.any(length > 0), later, first, *operands)


def write(buffer: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes new [B, T, ...] into buffer [B, S, ...] at positions int [B, T].

    Negative positions and those past the end are not written.
    """
    rows = jnp.arange(buffer.shape[0])[:, None]
    slots = jnp.where(positions < 0, buffer.shape[1], positions)
    return buffer.at[rows, slots].set(new.astype(buffer.dtype), mode="drop")


def write_ring(buffer: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes new [B, T, ...] into the ring buffer [B, W, ...], position p at p mod W.

    Of the new tokens only each row's last W are written, negative positions never.
    """
    size = buffer.shape[1]
    last = jnp.max(positions, axis=1, keepdims=True)
    kept = (positions >= 0) & (positions > last - size)
    return write(buffer, new, jnp.where(kept, positions % size, -1))


def ring_positions(length: jax.Array, size: int) -> jax.Array:
    """Positions int32 [B, size] a ring of that size holds, -1 for empty slots.

    Args:
      length: int32 [B], tokens seen so far.
      size: Slots of the ring.
    """
    last = length[:, None] - 1
    held = last - (last - jnp.arange(size, dtype=jnp.int32)) % size
    return jnp.where(held >= 0, held, -1)


def after_ring(ring: jax.Array, length: jax.Array, new: jax.Array) -> jax.Array:
    """The tokens a ring holds, oldest first, and after them the new ones.

    Slot j of the result is position ``length - W + j``; it means nothing where that is
    negative.

    Args:
      ring: [B, W, ...].
      length: int32 [B], tokens seen so far.
      new: [B, T, ...].

    Returns:
      [B, W + T, ...] in new's dtype, rounded to ring's.
    """
    size = ring.shape[1]
    rows = jnp.arange(ring.shape[0])[:, None]
    held = ring[rows, (length[:, None] + jnp.arange(size)) % size]
    return jnp.concatenate([held, new.astype(ring.dtype)], axis=1).astype(new.dtype)


def all_real(lengths: jax.Array | None, batch: int, count: int) -> jax.Array:
    """Lengths as int32 [B]; every one of the count new tokens is real if None."""
    if lengths is None:
        return jnp.full(batch, count, jnp.int32)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths must be integers of shape [B={batch}]; got {lengths.dtype} "
            f"{list(lengths.shape)}"
        )
    return lengths.astype(jnp.int32)


def check_call(segment_ids, cache, lengths) -> None:
    """Raises ValueError for arguments of a mixer that exclude each other."""
    if cache is not None and segment_ids is not None:
        raise ValueError(
            "segment_ids cannot be combined with a cache: a row of a cache holds one "
            "document; decode each document in a row of its own"
        )
    if cache is None and lengths is not None:
        raise ValueError(
            "lengths says how many tokens enter the cache and needs one; without a "
            "cache use segment_ids to tell padding from text"
        )
