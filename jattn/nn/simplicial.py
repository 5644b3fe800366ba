"""2-simplicial attention as a module (arXiv 2507.02754)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from jattn.nn import cache as caches
from jattn.nn.projection import from_heads, to_heads
from jattn.nn.rope import rope
from jattn.ops import _common, simplicial


class SimplicialCache(struct.PyTreeNode):
    """Two ring buffers, each as long as the window of its set of keys.

    They fill from the end: the slots in use are the last ones, as if the tokens in them
    came last. A query sees all of them, whatever their order, so that decoding a token
    reads the rings as they are.

    Attributes:
      key: [B, W1, K, H]. Token p is in slot -1 - p mod W1.
      value: [B, W1, K, H].
      key2: [B, W2, K, H]. Token p is in slot -1 - p mod W2.
      value2: [B, W2, K, H].
      length: int32 [B], tokens seen so far.
    """

    key: jax.Array
    value: jax.Array
    key2: jax.Array
    value2: jax.Array
    length: jax.Array


class TwoSimplicialAttention(nn.Module):
    """Causal attention to pairs of keys, one from each of two sets.

    The paper places it in every fourth layer, with 64 query heads to one kv head,
    without positions.

    Attributes:
      num_heads: Query heads N.
      head_dim: Width H of a head.
      num_kv_heads: Key-value heads K of both sets, a divisor of N; N if None.
      windows: Tokens a query sees of the first and of the second set, itself
        included; None for all before it. The cache holds two rings of that many.
      form: "trilinear" or "determinant", see `jattn.two_simplicial_attention`.
      key2_bias: Constant added to the keys of the second set.
      value2_bias: Constant added to the values of the second set.
      rope_base: Base of the rotary embedding, which turns the first two entries of
        each triple of queries and keys, so that determinants depend on relative
        positions only; features after the last triple are not turned. None for no
        positions. The trilinear form admits none: no rotation leaves it as it is.
      dtype: Of the computation; that of the input and parameters if None.
      param_dtype: Of the parameters.
      implementation: See `jattn.two_simplicial_attention`.
      qk_norm: Whether queries and keys pass an RMSNorm of their own, each head by
        itself, before their positions enter.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    windows: simplicial.Windows = (512, 32)
    form: simplicial.Form = "trilinear"
    key2_bias: float = 0.0
    value2_bias: float = 0.0
    rope_base: float | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: _common.Implementation | None = None
    qk_norm: bool = False

    def init_cache(
        self, batch_size: int, max_length: int, dtype: Any = jnp.float32
    ) -> SimplicialCache:
        """An empty cache for up to max_length tokens a row."""
        kv_heads = self.num_kv_heads or self.num_heads

        def ring(window):
            capacity = min(max_length, window or max_length)
            return jnp.zeros((batch_size, capacity, kv_heads, self.head_dim), dtype)

        window, window2 = self.windows
        return SimplicialCache(
            key=ring(window),
            value=ring(window),
            key2=ring(window2),
            value2=ring(window2),
            length=jnp.zeros(batch_size, jnp.int32),
        )

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        cache: SimplicialCache | None = None,
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

        Raises:
          ValueError: rope_base is given for the trilinear form or for heads narrower
            than a triple, num_kv_heads does not divide num_heads, arguments exclude
            each other or have another shape or dtype, or the cache is not one that
            init_cache of this module makes for B rows.
        """
        caches.check_call(segment_ids, cache, lengths)
        self._check_fields()
        features = caches.check_input(self, x, segment_ids)
        kv_heads = self.num_kv_heads or self.num_heads

        x, positions, lengths = caches.place_tokens(
            self, x, cache, lengths, lambda x: max(x.key.shape[1], x.key2.shape[1])
        )

        # [B, T, N, H]
        query = to_heads(
            self, "query", x, self.num_heads, self.head_dim, norm=self.qk_norm
        )
        new = {
            # [B, T, K, H]
            name: to_heads(self, name, x, kv_heads, self.head_dim, norm=norm)
            for name, norm in {
                "key": self.qk_norm,
                "value": False,
                "key2": self.qk_norm,
                "value2": False,
            }.items()
        }
        if self.rope_base is not None:
            query = _turn_triples(query, positions, self.rope_base)
            for name in ("key", "key2"):
                new[name] = _turn_triples(new[name], positions, self.rope_base)

        options = {
            "windows": self.windows,
            "form": self.form,
            "key2_bias": self.key2_bias,
            "value2_bias": self.value2_bias,
        }
        if cache is None:
            out = simplicial.two_simplicial_attention(
                query,
                **new,
                segment_ids=segment_ids,
                implementation=self.implementation,
                **options,
            )
        else:
            out, cache = attend_cached(
                query,
                new,
                cache,
                lengths,
                implementation=self.implementation,
                **options,
            )
            out = caches.without_padding(out, positions)
        out = from_heads(self, out, features)
        return out if cache is None else (out, cache)

    def _check_fields(self):
        simplicial.check_options(self.windows, self.form)
        _common.group_size(self.num_heads, self.num_kv_heads or self.num_heads)
        if self.rope_base is None:
            return
        if self.form == "trilinear":
            raise ValueError(
                "rope_base must be None for form='trilinear', whose product of three "
                f"no rotation leaves as it is; got {self.rope_base}; form="
                "'determinant' admits rotary positions"
            )
        if self.head_dim < 3:
            raise ValueError(
                "rotary positions turn triples of features and need a head_dim of at "
                f"least 3; got {self.head_dim}"
            )


def attend_cached(
    query: jax.Array,
    new: dict[str, jax.Array],
    cache: SimplicialCache,
    lengths: jax.Array,
    *,
    windows: simplicial.Windows,
    form: simplicial.Form,
    key2_bias: float,
    value2_bias: float,
    implementation: _common.Implementation | None,
) -> tuple[jax.Array, SimplicialCache]:
    """Attention to what a cache holds and to new tokens, which are then written.

    Args:
      query: [B, T, N, H].
      new: The new tokens' "key", "value", "key2" and "value2", [B, T, K, H].
      cache: What came before.
      lengths: int32 [B], how many of the T tokens are real.
      windows: See `jattn.two_simplicial_attention`, as for the others.
      form: "trilinear" or "determinant".
      key2_bias: Constant added to the keys of the second set.
      value2_bias: Constant added to the values of the second set.
      implementation: Of the attention.

    Returns:
      [B, T, N, H], and the new cache.
    """
    positions = caches.new_positions(cache.length, lengths, query.shape[1])
    written = {
        name: _write(getattr(cache, name), part, positions)
        for name, part in new.items()
    }
    if query.shape[1] == 1:
        sets = {name: x.astype(new[name].dtype) for name, x in written.items()}
    else:
        sets = {
            name: _in_order(getattr(cache, name), cache.length, part)
            for name, part in new.items()
        }
    out, _ = simplicial.attend_pairs(
        query,
        **sets,
        visible=positions + 1,
        windows=windows,
        form=form,
        key2_bias=key2_bias,
        value2_bias=value2_bias,
        scale=_common.default_scale(None, query.shape[-1]),
        implementation=implementation,
    )
    return out, cache.replace(length=cache.length + lengths, **written)


def _in_order(ring, length, new):
    """The tokens [B, W + T, ...] a ring holds, oldest first, and then the new ones."""
    size = ring.shape[1]
    slots = (-1 - length[:, None] - jnp.arange(size)) % size
    held = ring[jnp.arange(ring.shape[0])[:, None], slots]
    return jnp.concatenate([held, new.astype(ring.dtype)], axis=1).astype(new.dtype)


def _write(ring, new, positions):
    """The ring, with the last W of new tokens [B, T, ...] at positions int [B, T]."""
    size = ring.shape[1]
    last = jnp.max(positions, axis=1, keepdims=True)
    kept = (positions >= 0) & (positions > last - size)
    return caches.write(ring, new, jnp.where(kept, (-1 - positions) % size, -1))


def _turn_triples(x, positions, base):
    """Turns each triple about its third axis by position * base ** (-l / triples).

    All turns share their axis, so they commute, and a determinant of three vectors
    depends on the differences of their positions only.

    Args:
      x: [B, T, N, H].
      positions: int [B, T].
      base: Longest wavelength over 2π.
    """
    last = x.shape[-1] // 3 * 3
    triples = x[..., :last].reshape(*x.shape[:-1], -1, 3)
    planar = jnp.concatenate([triples[..., 0], triples[..., 1]], axis=-1)
    first, second = jnp.split(rope(planar, positions, base), 2, axis=-1)
    turned = jnp.stack([first, second, triples[..., 2]], axis=-1)
    return jnp.concatenate(
        [turned.reshape(*x.shape[:-1], last), x[..., last:]], axis=-1
    )
