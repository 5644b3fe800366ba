"""Decoding caches: arrays of static shape, written in place of their old values.

A cache is a pytree that goes into a module and comes out again, so that a jitted step
can donate it. Rows of a batch may be of different length: `length` counts the tokens
each row holds, and a call says how many of its T new tokens are real in each row.

A row must not outgrow the max_length its cache was made for. A call of more tokens than
that is refused. Whether earlier tokens leave room for new ones is known only when the
program runs: tokens past the end are not kept, and what their row gives from then on
means nothing. No other row notices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jattn.ops import _common


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


def without_padding(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Array x [B, T, ...] with zeros where the positions [B, T] are negative."""
    real = positions >= 0
    return jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0)


def place_tokens(
    mixer: Any,
    x: jax.Array,
    cache: Any,
    lengths: jax.Array | None,
    max_length: Callable[[Any], int],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the tokens are that a mixer is called with.

    Args:
      mixer: See check_cache.
      x: [B, T, features].
      cache: What came before, or None.
      lengths: int32 [B], real tokens of each row; all if None. Only with a cache.
      max_length: See check_cache.

    Returns:
      x, zero where a token is padding; positions int32 [B, T], negative there; and the
      lengths.

    Raises:
      ValueError: As check_cache and all_real.
    """
    b, t = x.shape[:2]
    lengths = all_real(lengths, b, t)
    if cache is None:
        return x, jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)), lengths
    check_cache(mixer, cache, b, t, max_length)
    positions = new_positions(cache.length, lengths, t)
    return without_padding(x, positions), positions, lengths


def attend(
    length: jax.Array,
    count: int,
    first: Callable[[], Any],
    later: Callable[[], Any],
) -> Any:
    """Attention of new tokens to each other and to what a cache holds.

    A prompt's tokens only see each other, which is faster than to read a cache as
    well. Which of the two a call is, the program finds out when it runs; under vmap it
    computes both. Where the cache has a narrower dtype than the computation, a prompt
    sees keys and values that are not rounded to it yet, as later calls do.

    Args:
      length: int32 [B], tokens the cache has seen.
      count: New tokens T, padding included.
      first: Called without arguments if no row has seen any token: attends among the
        new ones alone.
      later: Called without arguments otherwise: attends to both.

    Returns:
      What the one that is called returns. Both have to return the same structure,
      shapes and dtypes.
    """
    if count == 1:
        return later()
    return jax.lax.cond(jnp.any(length > 0), later, first)


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


def check_cache(
    mixer: Any,
    cache: Any,
    batch: int,
    count: int,
    max_length: Callable[[Any], int],
) -> None:
    """Raises ValueError unless a cache is one of a mixer, with room for new tokens.

    Args:
      mixer: A module with ``init_cache(batch_size, max_length, dtype)``.
      cache: What the mixer is called with.
      batch: Rows B of the call.
      count: New tokens T of a row, padding included.
      max_length: Tells from a cache of the mixer's class how many tokens it was made
        for; a ring as long as its window holds the last ones of any number.
    """
    kind = type(jax.eval_shape(lambda: mixer.init_cache(batch, 1)))
    maker = f"{type(mixer).__name__}.init_cache"
    if type(cache) is not kind:
        raise ValueError(
            f"cache must be a {kind.__name__}, made by {maker}; got "
            f"{type(cache).__name__}"
        )
    dtype = jax.tree.leaves(cache)[0].dtype
    capacity = max_length(cache)

    def describe(cache):
        return {
            jax.tree_util.keystr(path): f"{x.dtype} {list(x.shape)}"
            for path, x in jax.tree_util.tree_leaves_with_path(cache)
        }

    def needed(length):
        return describe(jax.eval_shape(lambda: mixer.init_cache(batch, length, dtype)))

    own, fitting = describe(cache), needed(capacity)
    for name in fitting | own:
        if own.get(name) != fitting.get(name):
            raise ValueError(
                f"cache{name} must be {fitting.get(name)}, as {maker}({batch}, "
                f"{capacity}) makes it; got {own.get(name)}"
            )
    if count > capacity and needed(count) != own:
        raise ValueError(
            f"x has T={count} tokens and the cache max_length={capacity}; T may not "
            "exceed it"
        )


def check_input(mixer: Any, x: jax.Array, segment_ids: jax.Array | None) -> int:
    """The features of what a mixer of heads is called with.

    Args:
      mixer: See check_heads.
      x: [B, T, features].
      segment_ids: int [B, T], or None.

    Raises:
      ValueError: x or segment_ids has another shape, or as check_heads.
    """
    check_heads(mixer)
    sizes = _common.bind_shapes(("x", x, "BTF"))
    _common.check_segment_ids(segment_ids, sizes["B"], sizes["T"])
    return sizes["F"]


def check_heads(mixer: Any) -> None:
    """Raises ValueError unless a mixer's heads are of positive number and width."""
    _common.positive_integers(num_heads=mixer.num_heads, head_dim=mixer.head_dim)
    for name in "num_kv_heads", "value_dim":
        # None stands for what the other fields say.
        if (size := getattr(mixer, name, None)) is not None:
            _common.positive_integers(**{name: size})


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
