"""Attention to compressed tokens, each of which stands for a window of tokens.

It is the first branch of native sparse attention (arXiv 2502.11089), and what its
selection goes by.

Letters beside those of `jattn.ops._common`: M compressed tokens, l = kernel_size keys
in a compressed window, d = stride between windows.
"""

import jax
import jax.numpy as jnp

from jattn.ops import _common
from jattn.pallas import flash
from jattn.pallas._sharding import vary_alike


def nsa_windows(x: jax.Array, *, kernel_size: int = 32, stride: int = 16) -> jax.Array:
    """The windows of tokens that compression turns into one token each.

    Window i holds the tokens ``i * stride`` to ``i * stride + kernel_size - 1`` (the
    argument of φ in the paper's equation 7). Windows that would reach past the end do
    not exist: M = ⌊(S - kernel_size) / stride⌋ + 1, or 0 if S < kernel_size.
    Compression by mean pooling is `nsa_window_means`.

    Args:
      x: [B, S, K, D], keys or values of any dtype.
      kernel_size: Tokens in a window.
      stride: Tokens between the starts of windows, a divisor of kernel_size.

    Returns:
      [B, M, kernel_size, K, D] in x's dtype.

    Raises:
      ValueError: x has another rank, a size is not a positive integer, or stride does
        not divide kernel_size.
    """
    kernel_size, stride = check_windows(kernel_size, stride)
    cells, count = _cells(x, kernel_size, stride)
    shifted = [cells[:, i : i + count] for i in range(kernel_size // stride)]
    return jnp.concatenate(shifted, axis=2)


def nsa_window_means(
    x: jax.Array, *, kernel_size: int = 32, stride: int = 16
) -> jax.Array:
    """Compression by mean pooling: ``nsa_windows(x).mean(axis=2)``.

    Windows overlap; here each token is read once. Sums are in fp32 (fp64 for fp64).

    Args:
      x: [B, S, K, D], keys or values of a floating-point dtype.
      kernel_size: Tokens in a window.
      stride: Tokens between the starts of windows, a divisor of kernel_size.

    Returns:
      [B, M, K, D] in x's dtype, M as in nsa_windows.

    Raises:
      ValueError: x has another rank or dtype, a size is not a positive integer, or
        stride does not divide kernel_size.
    """
    _common.check_floating(x=x)
    kernel_size, stride = check_windows(kernel_size, stride)
    cells, count = _cells(x, kernel_size, stride)
    cells = jnp.sum(cells, axis=2, dtype=_common.statistics_dtype(x))
    total = cells[:, :count]
    for i in range(1, kernel_size // stride):
        total += cells[:, i : i + count]
    return (total / kernel_size).astype(x.dtype)


def _cells(x, kernel_size, stride):
    """Tokens [B, S, K, D] by strides, [B, S / stride, stride, K, D], and M."""
    sizes = _common.bind_shapes(("x", x, "BSKD"))
    b, s, k, d = (sizes[letter] for letter in "BSKD")
    cells = x[:, : s // stride * stride].reshape(b, s // stride, stride, k, d)
    return cells, num_windows(s, kernel_size, stride)


def compressed_attention(
    query: jax.Array,
    key_cmp: jax.Array,
    value_cmp: jax.Array,
    *,
    kernel_size: int = 32,
    stride: int = 16,
    length: int | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: _common.Implementation | None = None,
    return_lse: bool = False,
) -> _common.AttentionOutput:
    """Attention to compressed tokens: ``o_t = Σ_i softmax_i(scale q_t·k_i) v_i``.

    Compressed token i stands for the tokens ``i * stride`` to
    ``i * stride + kernel_size - 1``. Query t sees it where the last of them is at most
    t and all of them are in t's document; a window across two documents is seen by
    nobody. A query that sees nothing, as the first kernel_size - 1 do, gives 0. When
    T < S the queries are the last T positions.

    Args:
      query: [B, T, N, H]; as key_cmp and value_cmp of a floating-point dtype.
      key_cmp: [B, M, K, H], where K divides N, one for each of `nsa_windows`. M may be
        0.
      value_cmp: [B, M, K, V].
      kernel_size: Tokens in a window.
      stride: Tokens between the starts of windows, a divisor of kernel_size.
      length: Tokens S of the sequence that was compressed; if None the length of
        segment_ids, or T.
      scale: Factor of the logits, a number; H ** -0.5 if None.
      segment_ids: int [B, S], the document of each token. Documents are contiguous.
      implementation: "xla", "triton" (kernels in Triton, or in Mosaic GPU where that is
        faster), or None for the fastest that supports the call. "pallas" is no kernel
        of this operation.
      return_lse: Also return the log-sum-exp of the logits.

    Returns:
      [B, T, N, V] in value_cmp's dtype, and with return_lse also [B, T, N] in fp32
      (natural log, -inf where nothing is seen; fp64 for fp64 inputs).

    Raises:
      ValueError: Shapes or dtypes do not fit, K does not divide N, T exceeds S, M is
        not the number of windows of S tokens, a size is not a positive integer, stride
        does not divide kernel_size, scale is traced, or implementation is no such
        name.
      NotImplementedError: The requested implementation does not support the call.
    """
    sizes = _common.bind_shapes(
        ("query", query, "BTNH"),
        ("key_cmp", key_cmp, "BMKH"),
        ("value_cmp", value_cmp, "BMKV"),
    )
    _common.check_floating(query=query, key_cmp=key_cmp, value_cmp=value_cmp)
    kernel_size, stride = check_windows(kernel_size, stride)
    length = check_compressed(sizes, kernel_size, stride, length, segment_ids)
    scale = _common.default_scale(scale, sizes["H"])
    chosen = choose_compressed(
        query,
        key_cmp,
        value_cmp,
        stride=stride,
        scale=scale,
        implementation=implementation,
    )
    positions, starts = query_range(query, length, segment_ids)
    if chosen == "triton":
        # Triton is an optional dependency.
        from jattn.pallas.flash import triton as kernel

        starts = None if segment_ids is None else starts
        results: _common.AttentionOutput = kernel.attend(
            *vary_alike(query, key_cmp, value_cmp, starts),
            kernel_size=kernel_size,
            stride=stride,
            window=None,
            length=length,
            scale=scale,
        )
        return results if return_lse else results[0]
    out, lse = attend_windows(
        query,
        key_cmp,
        value_cmp,
        query_positions=positions,
        document_starts=starts,
        kernel_size=kernel_size,
        stride=stride,
        scale=scale,
    )
    return (out, lse) if return_lse else out


def choose_compressed(
    query: jax.Array,
    key_cmp: jax.Array,
    value_cmp: jax.Array,
    *,
    stride: int,
    scale: float,
    implementation: _common.Implementation | None,
) -> str:
    """The implementation of a call of `compressed_attention`: "xla" or "triton".

    Args:
      query: [B, T, N, H].
      key_cmp: [B, M, K, H].
      value_cmp: [B, M, K, V].
      stride: Tokens between the starts of windows.
      scale: Factor of the logits.
      implementation: What was asked for.

    Raises:
      ValueError: As `compressed_attention` does.
      NotImplementedError: As `compressed_attention` does.
    """
    # Without a compressed token there is nothing to compute, whatever was asked for.
    empty = key_cmp.shape[1] == 0
    reason = None
    if not empty:
        reason = flash.unsupported(
            query, key_cmp, value_cmp, stride=stride, scale=scale
        )
    chosen = _common.choose_implementation(
        "compressed_attention", implementation, [("triton", reason)]
    )
    return "xla" if empty else chosen


def num_windows(length, kernel_size: int, stride: int):
    """How many windows lie within the first `length` tokens, an int or int array."""
    return (length >= kernel_size) * ((length - kernel_size) // stride + 1)


def attend_windows(
    query: jax.Array,
    key_cmp: jax.Array,
    value_cmp: jax.Array,
    *,
    query_positions: jax.Array,
    document_starts: jax.Array,
    kernel_size: int,
    stride: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention to compressed tokens from explicit positions, as decoding needs it.

    Args:
      query: [B, T, N, H].
      key_cmp: [B, M, K, H]; what lies past the queries is not read.
      value_cmp: [B, M, K, V].
      query_positions: int [B, T]; negative for a query that sees nothing.
      document_starts: int [B, T], the first position of each query's document.
      kernel_size: Tokens in a window.
      stride: Tokens between the starts of windows.
      scale: Factor of the logits.

    Returns:
      Output [B, T, N, V] and log-sum-exp [B, T, N].
    """
    b, t, n, _ = query.shape
    m = key_cmp.shape[1]

    def attend(query, positions, starts):
        visible = visible_windows(positions, starts, m, kernel_size, stride)
        return _common.masked_attention(
            query, key_cmp, value_cmp, visible[:, None, None], scale=scale
        )

    itemsize = _common.statistics_dtype(query, key_cmp, value_cmp).itemsize
    chunk = _common.chunk_length(t, b * n * m * itemsize)
    return _common.map_query_chunks(
        attend, query, query_positions, document_starts, chunk=chunk
    )


def visible_windows(positions, starts, num_windows, kernel_size, stride):
    """True [B, T, M] where a window lies between the query's document start and it."""
    first = stride * jnp.arange(num_windows, dtype=jnp.int32)
    last = first + kernel_size - 1
    return (first >= starts[..., None]) & (last <= positions[..., None])


def query_range(query, length, segment_ids):
    """Positions and document starts int [B, T] of queries that end a sequence."""
    b, t = query.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(length - t, length), (b, t))
    if segment_ids is None:
        return positions, jnp.zeros_like(positions)
    return positions, _common.document_starts(segment_ids)[:, length - t :]


def check_compressed(
    sizes, kernel_size, stride, length, segment_ids, name="key_cmp"
) -> int:
    """The sequence's length S, once M, T and segment_ids are found to fit it.

    Args:
      sizes: Sizes of the arrays by letter: B, T, N, M, K.
      kernel_size: Tokens in a window.
      stride: Tokens between the starts of windows.
      length: S, or None for the length of segment_ids, or T.
      segment_ids: int [B, S], or None.
      name: Of the array that has M compressed tokens.

    Raises:
      ValueError: They do not fit, or K does not divide N.
    """
    b, t, m = sizes["B"], sizes["T"], sizes["M"]
    _common.group_size(sizes["N"], sizes["K"])
    hint = ""
    if length is not None:
        (length,) = _common.positive_integers(length=length)
    else:
        length = t if segment_ids is None else segment_ids.shape[-1]
        hint = " (length says how long the sequence is where there are fewer queries)"
    _common.check_segment_ids(segment_ids, b, length)
    if t > length:
        raise ValueError(
            f"query has T={t} positions and the sequence only S={length}; the queries "
            "are the last T positions of the sequence, so T may not exceed S"
        )
    needed = num_windows(length, kernel_size, stride)
    if m != needed:
        raise ValueError(
            f"{name} has M={m} compressed tokens; a sequence of length={length} has "
            f"{needed} with kernel_size={kernel_size} and stride={stride}{hint}"
        )
    return length


def check_windows(kernel_size, stride) -> tuple[int, int]:
    """Both sizes as Python integers; ValueError unless windows are whole strides."""
    kernel_size, stride = _common.positive_integers(
        kernel_size=kernel_size, stride=stride
    )
    if kernel_size % stride:
        raise ValueError(
            f"stride must divide kernel_size; got stride={stride}, "
            f"kernel_size={kernel_size}"
        )
    return kernel_size, stride
