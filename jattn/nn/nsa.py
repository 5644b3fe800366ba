"""Native sparse attention as a module (arXiv 2502.11089)."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.linen.dtypes import promote_dtype

from jattn.nn import cache as caches
from jattn.nn.projection import from_heads, to_heads
from jattn.nn.rope import rope
from jattn.ops import _common, nsa, nsa_selection
from jattn.ops.compressed import nsa_window_means, nsa_windows, num_windows
from jattn.ops.nsa_decode import cached_attention

Pair = tuple[jax.Array, jax.Array]


class NSACache(struct.PyTreeNode):
    """Keys [B, ..., K, H] and values [B, ..., K, V] that the three branches keep.

    Attributes:
      compressed: M compressed tokens, one for each complete window.
      tail: A ring of the last kernel_size tokens that enter the compression.
      selected: All tokens.
      window: A ring of the last window_size tokens.
      length: int32 [B], tokens seen so far.
    """

    compressed: Pair
    tail: Pair
    selected: Pair
    window: Pair
    length: jax.Array


class WindowMLP(nn.Module):
    """The learned compression φ: from a window's tokens to one token.

    To each token the encoding of its place in the window is added; all tokens of the
    window go through one hidden layer, as wide as a token, with SiLU. Each kv head has
    weights of its own.

    Attributes:
      dtype: Of the computation; that of the input and parameters if None.
      param_dtype: Of the parameters.
    """

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, windows: jax.Array) -> jax.Array:
        """Compresses windows [B, M, kernel_size, K, D] to tokens [B, M, K, D]."""
        size, heads, width = windows.shape[2:]

        def parameter(name, init, *shape):
            return self.param(name, init, shape, self.param_dtype)

        windows, position, hidden, out = promote_dtype(
            windows,
            parameter("position", nn.initializers.normal(0.02), size, heads, width),
            parameter(
                "hidden",
                nn.initializers.lecun_normal((1, 2), 3, batch_axis=(0,)),
                *(heads, size, width, width),
            ),
            parameter(
                "out",
                nn.initializers.lecun_normal(1, 2, batch_axis=(0,)),
                *(heads, width, width),
            ),
            dtype=self.dtype,
        )
        inner = jnp.einsum("bmlkd,kldf->bmkf", windows + position, hidden)
        return jnp.einsum("bmkf,kfd->bmkd", nn.silu(inner), out)


class NativeSparseAttention(nn.Module):
    """Compressed, selected and window attention, summed with gates.

    Each branch projects keys and values of its own. The gates are the sigmoid of a
    linear map of x, one for each head and branch; they need not sum to 1.

    Attributes:
      num_heads: Query heads N.
      head_dim: Width H of queries and keys.
      num_kv_heads: Key-value heads K, a divisor of N; N if None. The query heads of a
        kv head share their selected blocks.
      value_dim: Width V of values; head_dim if None.
      kernel_size: Tokens in a compressed window, at most block_size.
      stride: Tokens between the starts of compressed windows, a divisor of
        kernel_size and of block_size.
      block_size: Tokens in a selected block.
      num_blocks: Blocks a query reads, the forced ones counted.
      num_initial: Blocks always read at the document's start.
      num_local: Blocks always read at the query, its own counted; at least 1.
      window_size: Tokens the window branch sees, the query's own counted.
      compression: "mlp" for a learned map with intra-window positions, one for keys
        and one for values, or "mean".
      rope_base: Base of the rotary embedding; None for no positions.
      rope_compressed: Where the compressed branch's keys are rotated: "after"
        compression, at the position of the window's first token, or "before" it, each
        token at its own position. Where φ is learned only "after" lets it see the
        same window at every position.
      dtype: Of the computation; that of the input and parameters if None.
      param_dtype: Of the parameters.
      implementation: See `jattn.native_sparse_attention`.
      qk_norm: Whether queries and keys pass an RMSNorm of their own, each head by
        itself, before their positions enter.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    value_dim: int | None = None
    kernel_size: int = 32
    stride: int = 16
    block_size: int = 64
    num_blocks: int = 16
    num_initial: int = 1
    num_local: int = 2
    window_size: int = 512
    compression: Literal["mlp", "mean"] = "mlp"
    rope_base: float | None = 10_000.0
    rope_compressed: Literal["after", "before"] = "after"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: _common.Implementation | None = None
    qk_norm: bool = False

    def init_cache(
        self, batch_size: int, max_length: int, dtype: Any = jnp.float32
    ) -> NSACache:
        """An empty cache for up to max_length tokens a row.

        A row must not outgrow it: a token past max_length is not kept, and from there
        on what its row gives means nothing. Other rows do not notice.

        Args:
          batch_size: Rows B.
          max_length: Tokens S a row can take, padding not counted.
          dtype: Of the keys and values.

        Returns:
          Keys [B, slots, K, H] and values [B, slots, K, V] in dtype for each branch
          and for the compression, and lengths int32 [B], all zero.

        Raises:
          ValueError: As a call does, for the module's fields.
        """
        self._check_fields()
        kv_heads = self.num_kv_heads or self.num_heads

        def empty(capacity) -> Pair:
            slots = (batch_size, capacity, kv_heads)
            return (
                jnp.zeros((*slots, self.head_dim), dtype),
                jnp.zeros((*slots, self.value_dim or self.head_dim), dtype),
            )

        return NSACache(
            compressed=empty(num_windows(max_length, **self._windows())),
            tail=empty(self.kernel_size),
            selected=empty(max_length),
            window=empty(min(max_length, self.window_size)),
            length=jnp.zeros(batch_size, jnp.int32),
        )

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        cache: NSACache | None = None,
        lengths: jax.Array | None = None,
    ) -> Any:
        """Mixes x along the sequence.

        The selected blocks, int32 [B, T, K, num_blocks], are sown as "block_indices"
        into the collection "intermediates".

        Args:
          x: [B, T, features].
          segment_ids: int [B, T], the document of each token; not with a cache.
            Documents are contiguous and never see each other.
          cache: What came before, from init_cache or an earlier call.
          lengths: int32 [B], how many of the T tokens of each row are real; the rest
            is padding on the right and leaves no trace in the cache. All if None.
            Only with a cache.

        Returns:
          [B, T, features] in the dtype of the computation, and the new cache if one
          was given.

        Raises:
          ValueError: The module's sizes are not positive integers or contradict each
            other; compression, rope_compressed or implementation is none of its
            choices; head_dim is odd and there are rotary positions; x, segment_ids or
            lengths has another shape or dtype; segment_ids is given with a cache, or
            lengths without one; the cache is not one that init_cache of this module
            makes for B rows, or T exceeds its max_length.
          NotImplementedError: The module's implementation does not support the call.
        """
        caches.check_call(segment_ids, cache, lengths)
        self._check_fields()
        features = caches.check_input(self, x, segment_ids)
        kv_heads = self.num_kv_heads or self.num_heads

        x, positions, lengths = caches.place_tokens(
            self, x, cache, lengths, lambda x: x.selected[0].shape[1]
        )
        if segment_ids is not None:
            # Within the document: a φ of rotated keys sees absolute positions.
            positions -= _common.document_starts(segment_ids)

        # [B, T, N, H]
        query = to_heads(
            self, "query", x, self.num_heads, self.head_dim, norm=self.qk_norm
        )
        # Keys and values of the three branches: [B, T, 3, K, H] and [B, T, 3, K, V].
        key = to_heads(self, "key", x, 3, kv_heads, self.head_dim, norm=self.qk_norm)
        value = to_heads(self, "value", x, 3, kv_heads, self.value_dim or self.head_dim)
        gates = nn.sigmoid(to_heads(self, "gate", x, self.num_heads, 3))
        compress = self._compression()

        query = self._rope(query, positions)
        keys = [key[:, :, branch] for branch in range(3)]
        for branch in range(0 if self.rope_compressed == "before" else 1, 3):
            keys[branch] = self._rope(keys[branch], positions)
        pairs = [(keys[branch], value[:, :, branch]) for branch in range(3)]

        if cache is None:
            out = self._attend(query, pairs, gates, compress, positions, segment_ids)
        else:
            out, cache = self._attend_cached(
                query, pairs, gates, compress, positions, lengths, cache
            )
            out = caches.without_padding(out, positions)
        out = from_heads(self, out, features)
        return out if cache is None else (out, cache)

    def _attend(self, query, pairs, gates, compress, positions, segment_ids):
        """Attention among the tokens of one call."""
        raw, selected, window = pairs
        count = num_windows(query.shape[1], **self._windows())
        starts = positions[:, :: self.stride][:, :count]
        if self.compression == "mean":
            # As `compress` does it, but each token is read once.
            key, value = (nsa_window_means(x, **self._windows()) for x in raw)
            compressed = self._placed(key, starts), value
        else:
            windows = tuple(nsa_windows(x, **self._windows()) for x in raw)
            compressed = compress(windows, starts)
        out, blocks = nsa.native_sparse_attention(
            query,
            compressed,
            selected,
            window,
            gates,
            window_size=self.window_size,
            segment_ids=segment_ids,
            implementation=self.implementation,
            return_block_indices=True,
            **self._windows(),
            **self._selection(),
        )
        self.sow("intermediates", "block_indices", blocks)
        return out

    def _attend_cached(self, query, pairs, gates, compress, positions, lengths, cache):
        """Attention to the cache and the new tokens; the cache with those written."""
        raw, selected, window = pairs
        one = query.shape[1] == 1
        length = cache.length + lengths

        def append(ring, new):
            """The ring with the new tokens, and what a query may see, in order.

            With one new token that is what the ring then holds, in the ring's order.
            """
            if one:
                ring = caches.write_ring(ring, new, positions)
                return ring, ring.astype(new.dtype)
            tokens = caches.after_ring(ring, cache.length, new)
            # Read first and written afterwards, the ring need not be copied.
            tokens, new = jax.lax.optimization_barrier((tokens, new))
            return caches.write_ring(ring, new, positions), tokens

        (tail_key, raw_key), (tail_value, raw_value) = map(append, cache.tail, raw)
        (ring_key, window_key), (ring_value, window_value) = map(
            append, cache.window, window
        )
        written = cache.replace(
            compressed=self._compress_cached(
                (raw_key, raw_value), compress, length, cache
            ),
            tail=(tail_key, tail_value),
            selected=jax.tree.map(
                lambda buffer, new: caches.write(buffer, new, positions),
                cache.selected,
                selected,
            ),
            window=(ring_key, ring_value),
            length=length,
        )
        out, blocks = cached_attention(
            query,
            written.compressed,
            written.selected,
            (window_key, window_value),
            gates,
            positions=positions,
            window_end=length if one else cache.length + query.shape[1],
            ring=one,
            window_size=self.window_size,
            scale=_common.default_scale(None, self.head_dim),
            implementation=self.implementation,
            **self._windows(),
            **self._selection(),
        )
        self.sow("intermediates", "block_indices", blocks)
        return out, written

    def _compress_cached(self, tokens, compress, length, cache):
        """The compressed tokens, with those whose last token is among the new ones.

        Args:
          tokens: Keys and values [B, kernel_size + T, K, H or V] in order, the new ones
            last; or a ring [B, kernel_size, K, H or V] with the one new token.
          compress: See _compression.
          length: int32 [B], tokens seen, the new ones counted.
          cache: Of the tokens before.
        """
        b, slots = tokens[0].shape[:2]
        before, after = (
            num_windows(x, **self._windows()) for x in (cache.length, length)
        )
        # T new tokens complete at most this many windows in any row.
        count = -(-max(1, slots - self.kernel_size) // self.stride)
        windows = before[:, None] + jnp.arange(count, dtype=jnp.int32)  # [B, count]
        starts = windows * self.stride
        places = starts[..., None] + jnp.arange(self.kernel_size)
        if slots == self.kernel_size:
            places %= slots
        else:
            places += self.kernel_size - cache.length[:, None, None]
        rows = jnp.arange(b)[:, None, None]
        read = jax.tree.map(lambda x: x.at[rows, places].get(mode="clip"), tokens)
        complete = jnp.where(windows < after[:, None], windows, -1)
        return jax.tree.map(
            lambda buffer, new: caches.write(buffer, new, complete),
            cache.compressed,
            compress(read, starts),
        )

    def _compression(self):
        """A function from windows of keys and values to compressed tokens.

        It takes a pair [B, M, kernel_size, K, H or V] and the position int [B, M] of
        each window's first token, and returns a pair [B, M, K, H or V].
        """
        if self.compression == "mean":
            maps = [lambda windows: jnp.mean(windows, axis=2)] * 2
        else:
            maps = [
                WindowMLP(dtype=self.dtype, param_dtype=self.param_dtype, name=name)
                for name in ("key_compression", "value_compression")
            ]

        def compress(windows, starts):
            key, value = (f(x) for f, x in zip(maps, windows, strict=True))
            return self._placed(key, starts), value

        return compress

    def _placed(self, key, starts):
        """Compressed keys, rotated by their windows' starts unless they were before."""
        return self._rope(key, starts) if self.rope_compressed == "after" else key

    def _rope(self, x, positions):
        return x if self.rope_base is None else rope(x, positions, self.rope_base)

    def _windows(self) -> dict[str, Any]:
        return {"kernel_size": self.kernel_size, "stride": self.stride}

    def _selection(self) -> dict[str, Any]:
        return {
            "block_size": self.block_size,
            "num_blocks": self.num_blocks,
            "num_initial": self.num_initial,
            "num_local": self.num_local,
        }

    def _check_fields(self):
        choices = {
            "compression": ("mlp", "mean"),
            "rope_compressed": ("after", "before"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {allowed}; got {getattr(self, name)!r}"
                )
        caches.check_heads(self)
        _common.group_size(self.num_heads, self.num_kv_heads or self.num_heads)
        _common.positive_integers(window_size=self.window_size)
        nsa_selection.check_sizes(**self._windows(), **self._selection())
