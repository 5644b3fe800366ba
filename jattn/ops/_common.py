"""What every operation shares: argument checks, implementation choice, softmax.

Shape letters are those of ``jax.nn.dot_product_attention``: B batch, T queries,
S keys, N query heads, K key-value heads, G = N / K, H key width, V value width.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Implementation = Literal["xla", "pallas", "triton"]

# An array, or with return_lse a pair (array, log-sum-exp). A union would make every
# typed caller prove which of the two it asked for.
AttentionOutput = Any

# What one chunk of a query-chunked form may hold in temporaries. Large enough to
# keep matrix units busy, small enough that eight of them fit beside a model.
CHUNK_BYTES = 64 * 2**20


def choose_implementation(
    op: str,
    requested: str | None,
    kernels: Iterable[tuple[str, str | None]] = (),
) -> str:
    """Picks the implementation of one call.

    Args:
      op: Name of the operation, for the error message.
      requested: What the caller asked for; None for the fastest that supports it.
      kernels: (name, reason) of each kernel in order of preference, where reason
        says why the kernel does not support this call, or is None.

    Returns:
      "xla" or the name of a kernel.

    Raises:
      NotImplementedError: A kernel was requested that does not support the call.
      ValueError: The requested name is not an implementation.
    """
    reasons = dict(kernels)
    if requested is None:
        return next((n for n, reason in reasons.items() if reason is None), "xla")
    if requested == "xla":
        return "xla"
    if requested not in ("pallas", "triton"):
        raise ValueError(
            "implementation must be 'xla', 'pallas', 'triton' or None; "
            f"got {requested!r}"
        )
    reason = reasons.get(requested, "this operation has no such kernel")
    if reason is not None:
        raise NotImplementedError(
            f"{op} with implementation={requested!r}: {reason}; "
            "implementation=None picks one that supports the call"
        )
    return requested


def bind_shapes(*arguments: tuple[str, Any, str]) -> dict[str, int]:
    """Checks arrays against shape letters and returns what each letter stands for.

    Args:
      *arguments: (name, array, letters), such as ("query", query, "BTNH"). A digit
        stands for itself; a letter must mean the same size wherever it occurs.

    Raises:
      ValueError: An array has another rank, or a letter another size than before.
    """
    sizes: dict[str, int] = {}
    for name, array, letters in arguments:
        shape = tuple(jnp.shape(array))
        needed = [
            c if c.isdigit() else f"{c}={sizes[c]}" if c in sizes else c
            for c in letters
        ]
        fits = len(shape) == len(letters) and all(
            size == (int(c) if c.isdigit() else sizes.setdefault(c, size))
            for c, size in zip(letters, shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{name} must have shape [{', '.join(needed)}]; got {list(shape)}"
            )
    return sizes


def check_positive(**values: int | None) -> None:
    """Raises ValueError unless every named value is None or a positive integer."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer; got {value!r}")


def positive_integers(**values: Any) -> tuple[int, ...]:
    """The named values as Python integers, whatever kind of integer they are.

    Raises:
      ValueError: A value is None, no integer, less than 1, or traced.
    """
    return tuple(integer_from(1, name, value) for name, value in values.items())


def integer_from(least: int, name: str, value: Any) -> int:
    """A value as a Python integer; ValueError unless it is one and at least `least`."""
    integer = as_integer(value)
    if integer is None or integer < least:
        kind = "a positive integer" if least == 1 else f"an integer >= {least}"
        raise ValueError(f"{name} must be {kind}; got {value!r}")
    return integer


def as_integer(value: Any) -> int | None:
    """An integer of any type as Python's; None if the value is none, or traced."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_floating(**arrays: jax.Array) -> None:
    """Raises ValueError unless every named array has a floating-point dtype."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} must have a floating-point dtype; got {array.dtype}"
            )


def check_segment_ids(segment_ids: jax.Array | None, batch: int, length: int) -> None:
    """Raises ValueError unless segment_ids is None or an integer [batch, length]."""
    if segment_ids is None:
        return
    bad_dtype = not jnp.issubdtype(segment_ids.dtype, jnp.integer)
    if segment_ids.shape != (batch, length) or bad_dtype:
        raise ValueError(
            f"segment_ids must be integers of shape [B={batch}, S={length}], one for "
            f"each key; got {segment_ids.dtype} {list(segment_ids.shape)}"
        )


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """Position int32 [B, S] of the first token of each token's document.

    Args:
      segment_ids: int [B, S]; a document is a run of equal ids.
    """
    before = jnp.pad(segment_ids[:, :-1], [(0, 0), (1, 0)])
    positions = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    starts = jnp.where(segment_ids != before, positions, 0)
    return jax.lax.cummax(starts, axis=1)


def check_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None = None,
) -> dict[str, int]:
    """Checks the arguments of a causal attention and returns its sizes by letter.

    Raises:
      ValueError: Shapes disagree, N is no multiple of K, T exceeds S, or a dtype is
        not floating-point.
    """
    sizes = bind_shapes(
        ("query", query, "BTNH"), ("key", key, "BSKH"), ("value", value, "BSKV")
    )
    check_floating(query=query, key=key, value=value)
    group_size(sizes["N"], sizes["K"])
    if sizes["T"] > sizes["S"]:
        raise ValueError(
            f"query has T={sizes['T']} positions and key only S={sizes['S']}; the "
            "queries are the last T positions of the keys, so T may not exceed S"
        )
    check_segment_ids(segment_ids, sizes["B"], sizes["S"])
    return sizes


def group_size(num_heads: int, num_kv_heads: int) -> int:
    """Query heads that share one key-value head; ValueError if they do not divide."""
    if min(num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
        raise ValueError(
            "the number of query heads must be a multiple of the number of key-value "
            f"heads; got N={num_heads}, K={num_kv_heads}"
        )
    return num_heads // num_kv_heads


def statistics_dtype(*arrays: jax.Array) -> jnp.dtype:
    """The dtype of softmax statistics: fp32, or fp64 if an input is fp64."""
    return jnp.result_type(jnp.float32, *arrays)


def default_scale(scale: float | None, width: int) -> float:
    """The logits' factor: the one given, or width ** -0.5.

    Raises:
      ValueError: The one given is no number, or a traced one.
    """
    try:
        return float(width**-0.5 if scale is None else scale)
    except (TypeError, ValueError):  # of a tracer it is a TypeError
        raise ValueError(
            f"scale must be a number known when the function is traced; got {scale!r}"
        ) from None


def masked_softmax(
    logits: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] = -1
) -> tuple[jax.Array, jax.Array]:
    """Softmax over what mask admits, and its log-sum-exp.

    Where nothing is admitted the probabilities are exactly 0, the log-sum-exp is
    -inf, and both have zero gradients.

    Args:
      logits: Scores in the statistics dtype.
      mask: bool, broadcastable to logits; True where a key may be seen.
      axis: What to normalise over, jointly if there are several.

    Returns:
      Probabilities of logits' shape, and the natural log-sum-exp without axis.
    """
    mask = jnp.broadcast_to(mask, logits.shape)
    # The maximum only guards against overflow: its gradient cancels.
    peak = jnp.max(logits, axis=axis, keepdims=True, where=mask, initial=-jnp.inf)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isneginf(peak), 0, peak))
    # Masked scores are replaced before exp, so that no gradient meets an infinity.
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - peak, 0)), 0)
    total = jnp.sum(weights, axis=axis, keepdims=True)
    live = total > 0
    total = jnp.where(live, total, 1)
    lse = jnp.where(live, peak + jnp.log(total), -jnp.inf)
    return weights / total, jnp.squeeze(lse, axis)


def masked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over what mask admits, holding all T x S logits.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], where K divides N.
      value: [B, S, K, V].
      mask: bool, broadcastable to [B, K, G, T, S]; True where a key may be seen.
      scale: Factor of the logits.
      bias: Added to the scaled logits, broadcastable to [B, K, G, T, S].

    Returns:
      Output [B, T, N, V] in value's dtype, log-sum-exp [B, T, N] in fp32 (fp64 for
      fp64 inputs).
    """
    b, t, n, h = query.shape
    k = key.shape[2]
    dtype = statistics_dtype(query, key, value)
    grouped = query.reshape(b, t, k, n // k, h)
    logits = scale * jnp.einsum(
        "btkgh,bskh->bkgts", grouped, key, preferred_element_type=dtype
    )
    if bias is not None:
        logits = logits + bias
    probabilities, lse = masked_softmax(logits, mask)
    out = jnp.einsum(
        "bkgts,bskv->btkgv",
        probabilities.astype(value.dtype),
        value,
        preferred_element_type=dtype,
    )
    out = out.reshape(b, t, n, value.shape[-1]).astype(value.dtype)
    return out, jnp.moveaxis(lse, -1, 1).reshape(b, t, n)


def chunk_length(length: int, bytes_per_query: int) -> int:
    """How many of `length` queries one chunk takes within CHUNK_BYTES."""
    return max(1, min(length, CHUNK_BYTES // max(bytes_per_query, 1)))


def map_query_chunks(
    function: Callable[..., Any], *arrays: jax.Array, chunk: int
) -> Any:
    """Applies function to chunks of arrays along axis 1, one chunk at a time.

    Every chunk is recomputed in the backward pass, so that neither direction holds
    the temporaries of more than one. The last chunk is padded with zeros; what
    function gives there is dropped.

    Args:
      function: Takes chunks [B, chunk, ...] of arrays; returns a pytree of arrays
        [B, chunk, ...].
      *arrays: [B, T, ...].
      chunk: Length of a chunk.

    Returns:
      The pytree of function, with arrays [B, T, ...].
    """
    _, out = scan_query_chunks(
        lambda carry, *chunks: (carry, function(*chunks)), (), *arrays, chunk=chunk
    )
    return out


def scan_query_chunks(
    function: Callable[..., Any], carry: Any, *arrays: jax.Array, chunk: int
) -> tuple[Any, Any]:
    """Like map_query_chunks, with a state that goes from each chunk to the next.

    Args:
      function: Takes the carry and chunks [B, chunk, ...] of arrays; returns the next
        carry and a pytree of arrays [B, chunk, ...]. The zeros that pad the last
        chunk reach the final carry.
      carry: What the first chunk gets.
      *arrays: [B, T, ...].
      chunk: Length of a chunk.

    Returns:
      The last carry, and the pytree of function with arrays [B, T, ...].
    """
    length = arrays[0].shape[1]
    if length <= chunk:
        return function(carry, *arrays)
    count = -(-length // chunk)

    def split(x):  # [B, T, ...] -> [count, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    def join(x):  # [count, B, chunk, ...] -> [B, T, ...]
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], count * chunk, *x.shape[3:])[:, :length]

    carry, chunks = jax.lax.scan(
        jax.checkpoint(lambda carry, chunks: function(carry, *chunks)),
        carry,
        tuple(split(x) for x in arrays),
    )
    return carry, jax.tree.map(join, chunks)
