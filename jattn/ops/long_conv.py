"""Convolution along the sequence with a kernel as long as the sequence.

The sequence is halved again and again: what a left half contributes to the right half
beside it is one product, a Toeplitz matrix for short halves and a Fourier transform
for long ones, and what is left over are blocks of a few tokens. A right half never
enters the sum of a left one, so that causality holds bit for bit, which one transform
over the whole sequence cannot give: its rounding mixes the future into the past.

The transforms are order-2 Monarch products with the entries of the DFT matrix, that
is matrix products. `jnp.fft` is not used: on CPU, with jaxlib 0.11, a program with
several of them can hang, as they take turns waiting for the same threads.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jattn.ops import _common

# Measured on CPU. Blocks of at most so many tokens are summed directly; between halves
# of at most so many tokens a Toeplitz matrix is cheaper than a Fourier transform.
_DIRECT_LENGTH = 8
_TOEPLITZ_LENGTH = 64

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def long_conv(
    u: jax.Array,
    kernel: jax.Array,
    *,
    kernel_reverse: jax.Array | None = None,
    skip: jax.Array | None = None,
    gate_in: jax.Array | None = None,
    gate_out: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: _common.Implementation | None = None,
) -> jax.Array:
    """Gated convolution of every channel with a kernel of its own.

    With ``z = gate_in * u``::

        y[t] = gate_out[t] * (Σ_{j<=t} kernel[t-j] z[j]
                              + Σ_{j>t} kernel_reverse[j-t-1] z[j] + skip z[t])

    Lag 0 is only in kernel; the first tap of kernel_reverse meets the next token.
    Without kernel_reverse the result is causal, bit for bit. Computed in fp32 (fp64 if
    an input is fp64), in O(L^1.5) products and O(L log L) memory per channel.

    Args:
      u: [B, L, D].
      kernel: [K, D] with K >= 1; taps past the last one are 0, taps from L on unused.
      kernel_reverse: [R, D] likewise, or None for a causal convolution.
      skip: [D], or None for 0.
      gate_in: [B, L, D], or None for 1.
      gate_out: [B, L, D], or None for 1.
      segment_ids: int [B, L], the document of each token. Documents are contiguous
        and never see each other.
      implementation: "xla", "pallas", "triton", or None for the fastest that
        supports the call.

    Returns:
      [B, L, D] in u's dtype.

    Raises:
      ValueError: Shapes or dtypes do not fit, or a kernel or u is empty.
      NotImplementedError: The requested implementation does not support the call.
    """
    arrays = {"u": u, "kernel": kernel, "kernel_reverse": kernel_reverse}
    arrays |= {"skip": skip, "gate_in": gate_in, "gate_out": gate_out}
    letters = {"kernel": "KD", "kernel_reverse": "RD", "skip": "D"}
    arrays = {name: x for name, x in arrays.items() if x is not None}
    sizes = _common.bind_shapes(
        *((name, x, letters.get(name, "BLD")) for name, x in arrays.items())
    )
    _common.check_floating(**arrays)
    _common.check_positive(L=sizes["L"], K=sizes["K"], R=sizes.get("R"))
    _common.check_segment_ids(segment_ids, sizes["B"], sizes["L"])
    _common.choose_implementation("long_conv", implementation)

    dtype = _common.statistics_dtype(*arrays.values())
    z = u.astype(dtype)
    if gate_in is not None:
        z = z * gate_in
    y = _causal_conv(z, kernel.astype(dtype), segment_ids)
    if kernel_reverse is not None:
        # The future is the past of the reversed sequence, from the next token on.
        taps = jnp.pad(kernel_reverse.astype(dtype), [(1, 0), (0, 0)])
        reversed_ids = None if segment_ids is None else segment_ids[:, ::-1]
        y = y + _causal_conv(z[:, ::-1], taps, reversed_ids)[:, ::-1]
    if skip is not None:
        y = y + skip * z
    if gate_out is not None:
        y = y * gate_out
    return y.astype(u.dtype)


def long_conv_step(
    history: jax.Array, kernel: jax.Array, positions: jax.Array
) -> jax.Array:
    """One output of a causal convolution a row, as decoding needs it: O(S D).

    Args:
      history: [B, S, D]; the token at position p is in slot p, slots after a row's
        position are not read.
      kernel: [K, D]; taps past the last one are 0.
      positions: int [B], the position of the output.

    Returns:
      ``y[b] = Σ_{s<=p} kernel[p-s] history[b, s]`` with ``p = positions[b]``,
      [B, D] in history's dtype.
    """
    dtype = _common.statistics_dtype(history, kernel)
    lags = positions[:, None] - jnp.arange(history.shape[1])  # [B, S]
    lags = jnp.where(lags < 0, kernel.shape[0], lags)
    taps = kernel.astype(dtype).at[lags].get(mode="fill", fill_value=0)  # [B, S, D]
    y = _einsum("bsd,bsd->bd", taps, history.astype(dtype))
    return y.astype(history.dtype)


def _causal_conv(
    u: jax.Array, kernel: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """Causal convolution of u [B, L, D] with kernel [K, D] within documents."""
    b, length, d = u.shape
    doublings = ((length - 1) // _DIRECT_LENGTH).bit_length()
    block = -(-length >> doublings)
    padded = block << doublings
    kernel = kernel[:padded]
    u = jnp.pad(jnp.transpose(u, (2, 0, 1)), [(0, 0), (0, 0), (0, padded - length)])
    kernel = jnp.pad(kernel.T, [(0, 0), (0, padded - len(kernel))])
    if segment_ids is not None:
        pad = [(0, 0), (0, padded - length)]
        segment_ids = jnp.pad(segment_ids, pad, mode="edge")
    # Fusing the sums over the halvings into what surrounds them takes XLA minutes.
    u, kernel = jax.lax.optimization_barrier((u, kernel))

    y = _within_blocks(u, kernel[:, :block], segment_ids)
    half = block
    while half < padded:
        pairs = u.reshape(d, b, -1, 2, half)
        left = pairs[..., 0, :]  # [D, B, n, half]
        taps = kernel[:, : 2 * half]
        if segment_ids is not None:
            # Documents are contiguous: only the one that ends the left half can go on
            # in the right half.
            ids = segment_ids.reshape(b, -1, 2, half)
            document = ids[:, :, 0, -1:]
            left = jnp.where(ids[:, :, 0] == document, left, 0)
        if half <= _TOEPLITZ_LENGTH:
            right = _einsum("dbns,dst->dbnt", left, _toeplitz(taps)[:, :, half:])
        else:
            right = _next_half_by_fourier(left, taps)
        if segment_ids is not None:
            right = jnp.where(ids[:, :, 1] == document, right, 0)
        right = jnp.pad(right[..., None, :], [(0, 0)] * 3 + [(1, 0), (0, 0)])
        y = (y.reshape(pairs.shape) + right).reshape(u.shape)
        half *= 2
    y = jax.lax.optimization_barrier(y)
    return jnp.transpose(y[..., :length], (1, 2, 0))


def _within_blocks(u, kernel, segment_ids):
    """Convolves blocks of u [D, B, n block] with kernel [D, block], each by itself."""
    d, b, _ = u.shape
    block = kernel.shape[1]
    blocks = u.reshape(d, b, -1, block)
    toeplitz = _toeplitz(jnp.pad(kernel, [(0, 0), (0, block)]))[:, :, :block]
    if segment_ids is None:
        y = _einsum("dbns,dst->dbnt", blocks, toeplitz)
    else:
        ids = segment_ids.reshape(b, -1, block)
        same = ids[..., :, None] == ids[..., None, :]  # [B, n, s, t]
        products = blocks[..., :, None] * toeplitz[:, None, None]
        y = jnp.sum(jnp.where(same, products, 0), axis=-2)
    return y.reshape(u.shape)


def _toeplitz(taps):
    """[D, m, 2m] with ``[d, s, t] = taps[d, t-s]`` for t >= s, of taps [D, 2m].

    Entries with t < s hold one of taps[m+1:] or 0.
    """
    d, width = taps.shape
    rows = width // 2
    # Rows of width + 1 numbers read as rows of width numbers move on by one each.
    # A gather would do the same, and its gradient would be a slow scatter.
    repeated = jnp.tile(jnp.pad(taps, [(0, 0), (0, 1)]), (1, rows))
    return repeated[:, : rows * width].reshape(d, rows, width)


def _next_half_by_fourier(left, taps):
    """What left [D, B, n, m] contributes to the m tokens after it, of taps [D, 2m].

    The DFT of N = 2m numbers, split as ``j = j1 N0 + j0`` and ``i = i1 N1 + i0``, is
    ``w_N0^(i1 j0) · w_N^(i0 j0) · w_N1^(i0 j1)``: products with two small matrices and
    factors between them. Left fills the lower half of j1, the result is the upper
    half, and as everything is real, i0 up to N1/2 is enough. Real and imaginary parts
    are stacked, so that all products are real.
    """
    size = taps.shape[-1]
    # About sqrt(2 N), a power of two: the products cost 2 N1 + 4 N0 for each number.
    n1 = min(2 ** math.ceil(math.log2(size) / 2), size & -size)
    n0 = size // n1
    i0 = np.arange(n1 // 2 + 1)

    def roots(rows, columns, order):
        angles = -2 * np.pi * (np.outer(rows, columns) % order) / order
        return np.cos(angles).astype(left.dtype), np.sin(angles).astype(left.dtype)

    inner = np.concatenate(roots(i0, np.arange(n1), n1))  # [2 i0, j1]
    twiddle_re, twiddle_im = roots(i0, np.arange(n0), size)  # [i0, j0]
    re, im = roots(np.arange(n0), np.arange(n0), n0)
    outer = np.block([[re, im], [-im, re]])  # [2 j0, 2 i1]

    def multiply(a, b_re, b_im):
        a_re, a_im = a
        return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re

    def transform(x):  # [..., size or size/2] -> 2 x [..., i0, i1]
        grid = x.reshape(*x.shape[:-1], -1, n0)  # [..., j1, j0]
        x = _einsum("...jk,ij->...ik", grid, inner[:, : grid.shape[-2]])
        x = multiply(jnp.split(x, 2, axis=-2), twiddle_re, twiddle_im)
        x = _einsum("...k,kl->...l", jnp.concatenate(x, axis=-1), outer)
        return jnp.split(x, 2, axis=-1)

    # Every i0 stands for its conjugate N1 - i0 too, but for 0 and N1/2.
    weights = np.where(i0 % (n1 // 2) == 0, 1, 2)[:, None] / size
    kernel_re, kernel_im = (
        (x * weights.astype(left.dtype))[:, None, None] for x in transform(taps)
    )
    x = multiply(transform(left), kernel_re, kernel_im)
    x = _einsum("...l,kl->...k", jnp.concatenate(x, axis=-1), outer)
    x = multiply(jnp.split(x, 2, axis=-1), twiddle_re, -twiddle_im)
    x = jnp.concatenate(x, axis=-2)
    return _einsum("...ik,ij->...jk", x, inner[:, n1 // 2 :]).reshape(left.shape)
