"""Monarch Mixer (M2): gated long convolutions and block-diagonal feed-forwards."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.linen.dtypes import promote_dtype

from jattn.nn import cache as caches
from jattn.ops import _common
from jattn.ops.long_conv import long_conv, long_conv_step

_SHORT_TAPS = 3
_POSITION_FEATURES = 5
_SINE_FREQUENCY = 10.0


class MonarchCache(struct.PyTreeNode):
    """What a `MonarchMixer` keeps of a text to decode it.

    Attributes:
      short: [B, 2, 3 features], the last inputs of the short convolution.
      inputs: [B, S, 2 features], inputs of the gated and of the residual long
        convolution. Token p is in slot p.
      kernel: [S, 2 features], their kernels, filled in when a text begins.
      length: int32 [B], tokens seen so far.
    """

    short: jax.Array
    inputs: jax.Array
    kernel: jax.Array
    length: jax.Array


class ImplicitFilter(nn.Module):
    """Long convolution kernels computed from positions by a small network of sines.

    With n counting taps and ``t = n / (max_length - 1)``::

        e[n] = (t, cos(f_k ω n), -sin(f_k ω n)),  ω = 2π / max_length, f = (1e-4, 1)
        h[n] = W3 sin(φ (W2 sin(φ (W1 sin(φ (W0 e[n] + b0)) + b1)) + b2))
        kernel[n, d] = h[n, d] exp(-t δ_d),  δ from ln(100) / 1.5 to ln(100) / 0.3

    e and the frequencies φ are learned (in M2-BERT e at a rate of 1e-5, the rest at
    1e-3); all sines and both directions share one φ and one e.

    Attributes:
      features: Channels D.
      max_length: Taps of a kernel.
      order: Width of the network.
      bidirectional: Whether there is a second network, for the reverse kernel.
      param_dtype: Of the parameters; the kernels have the same, at least fp32.
    """

    features: int
    max_length: int
    order: int = 128
    bidirectional: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, length: int
    ) -> tuple[Callable[[], tuple[jax.Array, ...]], jax.Array]:
        """The first taps of the kernels, and the factor of lag 0 beside them.

        Args:
          length: Taps, at most max_length.

        Returns:
          A function of no arguments that computes the kernel [length, features], or
          if bidirectional the kernel and the reverse kernel, so that a decoding step
          need not; and skip [features].
        """
        positions = self.param("position_features", self._init_positions)
        frequency = self.param(
            "frequency",
            nn.initializers.constant(_SINE_FREQUENCY),
            (self.order,),
            self.param_dtype,
        )
        skip = self.param(
            "skip", nn.initializers.normal(1), (self.features,), self.param_dtype
        )
        directions = ["forward", "reverse"][: 2 if self.bidirectional else 1]
        networks = [self._network(name) for name in directions]
        time = np.linspace(0, 1, self.max_length)[:length, None]
        decay = np.exp(-time * math.log(100) / _decay_times(self.features))

        def kernels():
            dtype = jnp.promote_types(jnp.float32, self.param_dtype)
            outputs = []
            for (weight, bias), *rest in networks:
                h = positions[:length].astype(dtype) @ weight + bias
                for weight, bias in rest:
                    h = jnp.sin(frequency * h) @ weight + bias
                outputs.append(h * decay.astype(dtype))
            return tuple(outputs)

        return kernels, skip

    def _network(self, name):
        """Weights and biases of the layers, the last without bias."""
        widths = [_POSITION_FEATURES, self.order, self.order, self.order, self.features]
        # Small weights: the first kernels are smooth, and about 0.1.
        init = nn.initializers.normal(0.02)
        layers = []
        for i, shape in enumerate(itertools.pairwise(widths)):
            weight = self.param(f"{name}_kernel_{i}", init, shape, self.param_dtype)
            bias = 0
            if i < len(widths) - 2:
                zeros = nn.initializers.zeros
                bias = self.param(
                    f"{name}_bias_{i}", zeros, shape[1:], self.param_dtype
                )
            layers.append((weight, bias))
        return layers

    def _init_positions(self, key):
        del key
        steps = np.arange(self.max_length)[:, None]
        angles = 2 * np.pi * steps / self.max_length * np.array([1e-4, 1.0])
        time = np.linspace(0, 1, self.max_length)[:, None]
        return jnp.asarray(
            np.concatenate([time, np.cos(angles), -np.sin(angles)], axis=1),
            self.param_dtype,
        )


class MonarchMixer(nn.Module):
    """The sequence mixer of Monarch Mixer, wired as in the released M2-BERT.

    With a depthwise convolution of three taps, causal in both modes::

        x1, x2, v = short_conv(W_in u + b_in)
        y = x2 · long_conv(v · x1) + long_conv(u)
        out = W_out y + b_out

    Attributes:
      features: Width of the input and channels of the convolutions.
      max_length: Longest sequence; shorter ones use the first taps of the filters.
      filter_order: Width of the networks that compute the filters.
      bidirectional: Whether tokens see those after them, as in M2-BERT.
      input_norm: Whether a LayerNorm precedes the mixer, as in the 80M M2-BERT.
      dtype: Of the computation; that of the input and parameters if None.
      param_dtype: Of the parameters.
      implementation: See `jattn.long_conv`.
    """

    features: int
    max_length: int = 2048
    filter_order: int = 128
    bidirectional: bool = False
    input_norm: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: _common.Implementation | None = None

    def init_cache(
        self, batch_size: int, max_length: int, dtype: Any = jnp.float32
    ) -> MonarchCache:
        """An empty cache for up to max_length tokens a row."""
        self._check_causal()
        if max_length > self.max_length:
            raise ValueError(
                f"a cache of max_length={max_length} exceeds the mixer's "
                f"max_length={self.max_length}, the taps of its filters"
            )
        d = self.features
        return MonarchCache(
            short=jnp.zeros((batch_size, _SHORT_TAPS - 1, 3 * d), dtype),
            inputs=jnp.zeros((batch_size, max_length, 2 * d), dtype),
            kernel=jnp.zeros(
                (max_length, 2 * d), jnp.promote_types(jnp.float32, dtype)
            ),
            length=jnp.zeros(batch_size, jnp.int32),
        )

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        cache: MonarchCache | None = None,
        lengths: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> Any:
        """Mixes x along the sequence.

        Args:
          x: [B, T, features]; T may not exceed max_length, nor the cache's if there
            is one.
          segment_ids: int [B, T], the document of each token; not with a cache.
          cache: What came before, from init_cache or an earlier call; only if causal.
          lengths: int32 [B], how many of the T tokens of each row are real; the rest
            is padding on the right and leaves no trace in the cache. All if None.
            Only with a cache.
          mask: bool [B, T], False where a token is padding, which then enters no
            convolution; not with a cache.

        Returns:
          [B, T, features], and the new cache if one was given.
        """
        caches.check_call(segment_ids, cache, lengths)
        self._check_input(x, segment_ids, cache, mask)
        b, t, d = x.shape
        if self.input_norm:
            x = nn.LayerNorm(
                epsilon=1e-5,
                use_fast_variance=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="input_norm",
            )(x)

        def hide_padding(x):
            return x if mask is None else jnp.where(mask[..., None], x, 0)

        projected = hide_padding(self._dense(3 * d, "in_projection")(x))
        u = hide_padding(x.astype(projected.dtype))
        before = jnp.zeros((b, _SHORT_TAPS - 1, 3 * d), projected.dtype)
        if cache is not None:
            before = cache.short.astype(projected.dtype)
        projected = jnp.concatenate([before, projected], axis=1)  # [B, 2 + T, 3 D]
        gate_in, gate_out, value = jnp.split(
            self._short_conv(projected, segment_ids), 3, axis=-1
        )
        # Both long convolutions are one, of twice the channels.
        inputs = jnp.concatenate([hide_padding(value * gate_in), u], axis=-1)
        taps = t if cache is None else cache.inputs.shape[1]
        filters = [self._filter(n)(taps) for n in ("gated_filter", "input_filter")]
        skip = jnp.concatenate([skip for _, skip in filters])

        def kernels():
            both = zip(*(evaluate() for evaluate, _ in filters), strict=True)
            return [jnp.concatenate(pair, axis=-1) for pair in both]

        if cache is None:
            kernel, *reverse = kernels()
            y = long_conv(
                inputs,
                kernel,
                kernel_reverse=reverse[0] if reverse else None,
                skip=skip,
                segment_ids=segment_ids,
                implementation=self.implementation,
            )
        else:
            lengths = caches.all_real(lengths, b, t)
            last = lengths[:, None] + jnp.arange(_SHORT_TAPS - 1)
            short = jnp.take_along_axis(projected, last[..., None], axis=1)
            cache = cache.replace(short=short.astype(cache.short.dtype))
            y, cache = self._convolve_cached(inputs, kernels, skip, lengths, cache)
        gated, residual = jnp.split(y, 2, axis=-1)
        out = self._dense(d, "out_projection")(gate_out * gated + residual)
        return out if cache is None else (out, cache)

    def _convolve_cached(self, inputs, kernels, skip, lengths, cache):
        """The long convolution of new tokens [B, T, 2 D], and the cache with them."""
        t = inputs.shape[1]
        positions = caches.new_positions(cache.length, lengths, t)
        # The filters cost more than a step, so they are evaluated for a new text only.
        kernel = jax.lax.cond(
            jnp.all(cache.length == 0),
            lambda: kernels()[0].astype(cache.kernel.dtype),
            lambda: cache.kernel,
        )
        buffer = caches.write(cache.inputs, inputs, positions)
        history = buffer.astype(inputs.dtype)
        if t == 1:
            y = long_conv_step(history, kernel, cache.length)[:, None]
        else:
            y = long_conv(history, kernel, implementation=self.implementation)
            slots = jnp.maximum(positions, 0)
            y = jnp.take_along_axis(y, slots[..., None], axis=1)
        y = (y + skip * inputs).astype(inputs.dtype)
        length = cache.length + lengths
        return y, cache.replace(inputs=buffer, kernel=kernel, length=length)

    def _short_conv(self, x, segment_ids):
        """Depthwise causal convolution of x [B, 2 + T, 3 D] to [B, T, 3 D]."""
        t, width = x.shape[1] - _SHORT_TAPS + 1, x.shape[2]
        init = _uniform(_SHORT_TAPS)
        kernel = self.param(
            "short_kernel", init, (_SHORT_TAPS, width), self.param_dtype
        )
        bias = self.param("short_bias", init, (width,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = bias + kernel[-1] * x[:, -t:]
        for lag in range(1, _SHORT_TAPS):
            tap = x[:, _SHORT_TAPS - 1 - lag :][:, :t]
            if segment_ids is not None:
                document = jnp.pad(segment_ids, [(0, 0), (lag, 0)], mode="edge")[:, :t]
                tap = jnp.where((document == segment_ids)[..., None], tap, 0)
            y += kernel[-1 - lag] * tap
        return y

    def _dense(self, features, name):
        return nn.Dense(
            features, dtype=self.dtype, param_dtype=self.param_dtype, name=name
        )

    def _filter(self, name):
        return ImplicitFilter(
            self.features,
            self.max_length,
            self.filter_order,
            self.bidirectional,
            self.param_dtype,
            name=name,
        )

    def _check_causal(self):
        if self.bidirectional:
            raise ValueError(
                "a bidirectional MonarchMixer has no cache: every token depends on "
                "those after it; decoding needs bidirectional=False"
            )

    def _check_input(self, x, segment_ids, cache, mask):
        _common.bind_shapes(("x", x, "BTD"))
        b, t, d = x.shape
        if d != self.features:
            raise ValueError(f"x must have features={self.features} channels; got {d}")
        _common.check_segment_ids(segment_ids, b, t)
        limit, owner = self.max_length, "mixer"
        if cache is not None:
            self._check_causal()
            caches.check_cache(self, cache, b, t, lambda x: x.inputs.shape[1])
            limit, owner = cache.inputs.shape[1], "cache"
        if t > limit:
            raise ValueError(
                f"x has T={t} positions and the {owner} max_length={limit}; T may not "
                "exceed it"
            )
        if mask is not None and cache is not None:
            raise ValueError(
                "mask cannot be combined with a cache; lengths says which of the new "
                "tokens are padding"
            )
        if mask is not None and (mask.shape != (b, t) or mask.dtype != bool):
            raise ValueError(
                f"mask must be bool of shape [B={b}, T={t}]; got {mask.dtype} "
                f"{list(mask.shape)}"
            )


class BlockDiagonalLinear(nn.Module):
    """A linear map in blocks: output block k sees input block k only.

    Attributes:
      features: Width of the output, a multiple of num_blocks.
      num_blocks: Blocks.
      use_bias: Whether a bias is added.
      dtype: Of the computation; that of the input and parameters if None.
      param_dtype: Of the parameters.
    """

    features: int
    num_blocks: int = 4
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., inputs] to [..., features]; num_blocks divides both."""
        blocks, inputs = self.num_blocks, x.shape[-1]
        _common.check_positive(num_blocks=blocks)
        if inputs % blocks or self.features % blocks:
            raise ValueError(
                f"num_blocks={blocks} must divide the widths of input and output; got "
                f"{inputs} and {self.features}"
            )
        kernel = self.param(
            "kernel",
            _uniform(inputs // blocks),
            (blocks, inputs // blocks, self.features // blocks),
            self.param_dtype,
        )
        bias = None
        if self.use_bias:
            bias = self.param(
                "bias", _uniform(self.features), (self.features,), self.param_dtype
            )
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.einsum("...ki,kio->...ko", x.reshape(*x.shape[:-1], blocks, -1), kernel)
        y = y.reshape(*x.shape[:-1], self.features)
        return y if bias is None else y + bias


class BlockDiagonalMLP(nn.Module):
    """The gated feed-forward of M2-BERT, with block-diagonal maps.

    ``W_out (gelu(a) · b) + bias`` with ``(a, b) = split(W_in x)``, GELU by erf. As in
    the released model a and b are the halves of one block-diagonal output: with an
    even number of blocks, a sees only the first half of x and b only the second.

    Attributes:
      hidden: Width of a and of b.
      num_blocks: Blocks of both maps; divides the width of x, hidden and 2 hidden.
      dropout_rate: Of the hidden activations.
      dtype: Of the computation; that of the input and parameters if None.
      param_dtype: Of the parameters.
    """

    hidden: int
    num_blocks: int = 4
    dropout_rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps x [..., features] to the same shape; dropout unless deterministic."""

        def linear(features, use_bias, name):
            return BlockDiagonalLinear(
                features,
                self.num_blocks,
                use_bias,
                self.dtype,
                self.param_dtype,
                name=name,
            )

        gate, value = jnp.split(linear(2 * self.hidden, False, "in")(x), 2, axis=-1)
        h = jax.nn.gelu(gate, approximate=False) * value
        h = nn.Dropout(self.dropout_rate)(h, deterministic=deterministic)
        return linear(x.shape[-1], True, "out")(h)


def _uniform(fan_in: int) -> nn.initializers.Initializer:
    """Initial values uniform within ±fan_in**-0.5, as PyTorch's layers have them."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


def _decay_times(features: int) -> np.ndarray:
    """[features]: the fraction of max_length after which a kernel decays to 1 %."""
    return 1 / np.linspace(1 / 1.5, 1 / 0.3, features)
