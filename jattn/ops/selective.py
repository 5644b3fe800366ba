"""Selective Attention: head 0 decides what every later query may forget.

F[i, j] sums how strongly the queries between key j and query i selected the key, and
is subtracted from the logits of all heads. It never decreases in i, so a key with a
large F may also be dropped for good: `selective_eviction`.
"""

import math

import jax
import jax.numpy as jnp

from jattn.ops import _common
from jattn.pallas import selective as kernels
from jattn.pallas._sharding import vary_alike

# Keys of a tile whose skipping `selective_skipped` counts.
SKIPPED_KEYS = 64


def selection_mask(
    query: jax.Array,
    key: jax.Array,
    *,
    initial_mask: jax.Array | None = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: _common.Implementation | None = None,
) -> jax.Array:
    """What head 0 lets each query forget: ``F[i,j] = Σ_{j<t<i} relu(scale q_t·k_j)``.

    The first token of a document is never forgotten, and a query neither forgets its
    own key nor selects in another document. F[i, j] is 0 up to i = j + 1 and never
    decreases in i. Gradients flow through it.

    Args:
      query: [B, T, N, H]; head 0 selects.
      key: [B, S, K, H], where K divides N; kv head 0 is selected.
      initial_mask: [B, S], row F of the first query: what the queries before it
        selected. Needed if T < S, where those queries are not given.
      scale: Factor of the logits; H ** -0.5 if None.
      segment_ids: int [B, S], the document each key belongs to. Documents are
        contiguous and never see each other.
      implementation: "xla", "pallas", "triton", or None for the fastest that
        supports the call.

    Returns:
      F [B, T, S] in fp32 (fp64 for fp64 inputs).

    Raises:
      ValueError: Shapes or dtypes do not fit, or T < S without an initial_mask.
      NotImplementedError: The requested implementation does not support the call.
    """
    sizes = _common.check_attention(query, key, key, segment_ids)
    _common.choose_implementation("selection_mask", implementation)
    mask, _ = _select(
        query,
        key,
        _first_row(initial_mask, query, key),
        scale=_common.default_scale(scale, sizes["H"]),
        **_token_positions(sizes["B"], sizes["T"], sizes["S"], segment_ids),
    )
    return mask


def selective_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    budget: int | jax.Array | None = None,
    memory_tau: float | None = None,
    initial_mask: jax.Array | None = None,
    skip_error: float = 0.0,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: _common.Implementation | None = None,
    return_lse: bool = False,
) -> _common.AttentionOutput:
    """Attention that subtracts the selection mask: ``o_i = Σ_j softmax(L - F)_ij v_j``.

    L are the causal logits ``scale q_i·k_j`` of each head, F is `selection_mask`, the
    same for all heads. F is computed for a chunk of queries at a time.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], where K divides N; G = N / K query heads share a kv head.
      value: [B, S, K, V].
      budget: Most keys a query holds, itself included, at least 2; the others are
        dropped for good, see `selective_eviction`. None to drop none. Needs T = S. An
        int32 scalar array may differ from call to call of a compiled function; one
        that is less than 2 counts as 2.
      memory_tau: If given, also return the memory term of every query,
        ``M_i = Σ_{j<=i} (1 - min(F[i,j], tau) / tau)``, see `selective_memory`. Keys
        that were dropped count nothing.
      initial_mask: [B, S], row F of the first query; needed if T < S. The first token
        of a document and keys of the queries given are taken to have 0.
      skip_error: Part of a query's softmax weight that may be left out, less than 1.
        A kernel then skips blocks of keys whose F is so large that what they add up
        to, in any head and for any later query, is less than this part, by the norms
        of queries and keys. The memory term stays exact: with it they skip no key
        whose F is less than tau. 0 to leave out nothing.
      scale: Factor of the logits; H ** -0.5 if None.
      segment_ids: int [B, S], the document each key belongs to. Documents are
        contiguous and never see each other.
      implementation: "xla", "pallas", "triton", or None for the fastest that
        supports the call.
      return_lse: Also return the log-sum-exp of L - F.

    Returns:
      [B, T, N, V] in value's dtype; with return_lse also [B, T, N] (natural log) and
      with memory_tau also [B, T], in this order and in fp32 (fp64 for fp64 inputs).

    Raises:
      ValueError: Shapes or dtypes do not fit, T < S without an initial_mask or with a
        budget, or budget, memory_tau or skip_error is out of range.
      NotImplementedError: The requested implementation does not support the call.
    """
    sizes = _common.check_attention(query, key, value, segment_ids)
    if budget is not None:
        budget = _usable_budget(budget)
        if sizes["T"] < sizes["S"]:
            raise ValueError(
                "budget needs the queries of all keys, since each may have evicted "
                f"one; got T={sizes['T']}, S={sizes['S']}"
            )
    if memory_tau is not None:
        _check_tau(memory_tau)
    check_skip_error(skip_error)
    scale = _common.default_scale(scale, sizes["H"])
    unsupported = kernels.unsupported(query, key, value, scale=scale, budget=budget)
    chosen = _common.choose_implementation(
        "selective_attention", implementation, [("triton", unsupported)]
    )
    first_row = _first_row(initial_mask, query, key)
    if chosen == "triton":
        # Triton is an optional dependency.
        from jattn.pallas.selective import triton as kernel

        starts = None if segment_ids is None else _common.document_starts(segment_ids)
        held = None if budget is None else jnp.asarray(budget, jnp.int32)
        tau = None if memory_tau is None else float(memory_tau)
        arrays = vary_alike(query, key, value, first_row, starts, held)
        out, lse, memory = kernel.attend(
            *arrays, scale=scale, skip_error=float(skip_error), memory_tau=tau
        )
    else:
        out, lse, memory, *_ = attend_positions(
            query,
            key,
            value,
            first_row,
            scale=scale,
            budget=budget,
            memory_tau=memory_tau,
            **_token_positions(sizes["B"], sizes["T"], sizes["S"], segment_ids),
        )
    results = (
        out,
        *([lse] if return_lse else []),
        *([] if memory is None else [memory]),
    )
    return results if len(results) > 1 else out


def selective_memory(
    mask: jax.Array,
    *,
    tau: float = 1.0,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Keys the most demanding query still needs: ``max_i M_i``, the memory loss.

    ``M_i = Σ_{j<=i} (1 - min(F[i,j], tau) / tau)``: each key query i may see counts
    1 while nothing selected it and 0 once F reaches tau.

    Args:
      mask: F [B, T, S] of `selection_mask`.
      tau: F from which a key counts as forgotten.
      segment_ids: int [B, S], the document each key belongs to; a query counts the
        keys of its own.

    Returns:
      [B] in mask's dtype, 0 if there are no queries.

    Raises:
      ValueError: Shapes do not fit, or tau is not positive.
    """
    b, t, s = _check_mask(mask, "BTS", segment_ids)
    _check_tau(tau)
    visible = _visible(**_token_positions(b, t, s, segment_ids))
    return jnp.max(_memory(mask, tau, visible), axis=-1, initial=0)


def selective_eviction(
    mask: jax.Array,
    *,
    budget: int | jax.Array,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """When each key is dropped if at most `budget` of them are held.

    Queries come one after the other. One that would hold more than budget keys,
    itself included, first drops the held key with the largest F (the oldest if
    several have it), never the first token of its document nor itself. A dropped key
    does not return. The keys of a document are dropped when the next one begins.

    Args:
      mask: F [B, T, T] of `selection_mask`.
      budget: Most keys a query holds, at least 2. An int32 scalar array that is less
        counts as 2.
      segment_ids: int [B, T], the document each token belongs to.

    Returns:
      int32 [B, T], the first query that no longer holds the key; T if none.

    Raises:
      ValueError: Shapes do not fit, or budget is less than 2.
    """
    b, t, _ = _check_mask(mask, "BTT", segment_ids)
    budget = _usable_budget(budget)
    positions = _token_positions(b, t, t, segment_ids)
    return _evict(_never(mask), mask, budget, **positions)


def selective_skipped(
    query: jax.Array,
    key: jax.Array,
    *,
    skip_error: float,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: _common.Implementation | None = None,
) -> jax.Array:
    """What part of its tiles `selective_attention` skips for a skip_error.

    A tile is 128 queries times 64 keys. Those that are visible at least in part count.

    Args:
      query: [B, T, N, H].
      key: [B, T, K, H].
      skip_error: See `selective_attention`.
      scale: Factor of the logits; H ** -0.5 if None.
      segment_ids: int [B, T], the document each token belongs to.
      implementation: See `selective_attention`; only kernels skip.

    Returns:
      fp32 scalar from 0 to 1.

    Raises:
      ValueError: Shapes or dtypes do not fit, T < S, or skip_error is out of range.
      NotImplementedError: The requested implementation does not support the call.
    """
    sizes = _common.check_attention(query, key, key, segment_ids)
    if sizes["T"] < sizes["S"]:
        raise ValueError(
            "the queries of all keys are needed, since each may have selected; got "
            f"T={sizes['T']}, S={sizes['S']}"
        )
    check_skip_error(skip_error)
    scale = _common.default_scale(scale, sizes["H"])
    unsupported = kernels.unsupported(query, key, key, scale=scale, budget=None)
    chosen = _common.choose_implementation(
        "selective_skipped", implementation, [("triton", unsupported)]
    )
    if chosen != "triton" or not skip_error:
        return jnp.zeros((), jnp.float32)
    # Triton is an optional dependency.
    from jattn.pallas.selective import triton as kernel

    skipped, visible = kernel.skipped_tiles(
        query, key, segment_ids, scale, float(skip_error), SKIPPED_KEYS
    )
    return skipped / visible


def attend_positions(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    initial_mask: jax.Array,
    *,
    query_positions: jax.Array,
    query_starts: jax.Array,
    key_positions: jax.Array,
    scale: float,
    budget: int | jax.Array | None = None,
    memory_tau: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array | None]:
    """Selective attention between tokens at explicit positions, as decoding needs it.

    Args:
      query: [B, T, N, H], in order of position.
      key: [B, S, K, H] in any order; with a budget in order of position.
      value: [B, S, K, V].
      initial_mask: [B, S], row F of the first query.
      query_positions: int [B, T]; negative for padding, which selects nothing.
      query_starts: int [B, T], position of the first token of the query's document.
      key_positions: int [B, S]; negative where a slot holds nothing.
      scale: Factor of the logits.
      budget: Most keys a query holds; None for no limit.
      memory_tau: Tau of the memory term; None to leave it out.

    Returns:
      Output [B, T, N, V], log-sum-exp [B, T, N], memory term [B, T] or None, row F
      [B, S] of the query after the last, and with a budget the position of the first
      query that no longer holds each key, int32 [B, S], S if none, else None.
    """
    b, t, n, _ = query.shape
    s = key.shape[1]
    dtype = _common.statistics_dtype(query, key, value)

    def attend(state, query, query_positions, query_starts):
        mask, expiry = state
        positions = dict(
            query_positions=query_positions,
            query_starts=query_starts,
            key_positions=key_positions,
        )
        mask, next_mask = _select(query, key, mask, scale=scale, **positions)
        visible = _visible(**positions)
        if budget is not None:
            expiry = _evict(expiry, jax.lax.stop_gradient(mask), budget, **positions)
            visible &= query_positions[:, :, None] < expiry[:, None, :]
        memory = None if memory_tau is None else _memory(mask, memory_tau, visible)
        out, lse = _common.masked_attention(
            query,
            key,
            value,
            visible[:, None, None],
            scale=scale,
            bias=-mask[:, None, None],
        )
        return (next_mask, expiry), (out, lse, memory)

    # What pads the last chunk is at position 0, where nothing is selected or evicted.
    # The backward pass keeps one [B, S] of sums per chunk: chunks much shorter than
    # sqrt(T / N) would cost it more than their logits.
    chunk = _common.chunk_length(t, b * n * s * dtype.itemsize)
    chunk = max(chunk, math.isqrt(t // n))
    initial_mask = initial_mask.astype(dtype)
    expiry = None if budget is None else _never(initial_mask)
    (next_mask, expiry), (out, lse, memory) = _common.scan_query_chunks(
        attend,
        (initial_mask, expiry),
        query,
        query_positions,
        query_starts,
        chunk=chunk,
    )
    return out, lse, memory, next_mask, expiry


def _select(query, key, mask, *, query_positions, query_starts, key_positions, scale):
    """F [B, T, S] from its first row, and the row of the query after the last."""
    dtype = _common.statistics_dtype(query, key)
    logits = scale * jnp.einsum(
        "bth,bsh->bts",
        query[:, :, 0],
        key[:, :, 0],
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    keys = key_positions[:, None, :]
    selects = (query_starts[:, :, None] < keys) & (keys < query_positions[:, :, None])
    selected = jnp.where(selects, jax.nn.relu(logits), 0)
    # A selection holds for strictly later queries.
    rows = jnp.concatenate([mask[:, None], selected[:, :-1]], axis=1)
    # A tree of sums, where cumsum is a scan from row to row.
    mask = jax.lax.associative_scan(jnp.add, rows, axis=1)
    # Of no queries, the last row is the first one, and none has selected anything.
    last = jnp.sum(selected[:, -1:], axis=1)
    return mask[:, : query.shape[1]], mask[:, -1] + last


def _visible(*, query_positions, query_starts, key_positions):
    """Whether a query may see a key, bool [B, T, S]."""
    keys = key_positions[:, None, :]
    return (query_starts[:, :, None] <= keys) & (keys <= query_positions[:, :, None])


def _memory(mask, tau, visible):
    """The memory term M [B, T] of F and what may be seen, both [B, T, S]."""
    kept = 1 - jnp.minimum(mask, tau) / tau
    return jnp.sum(kept, axis=-1, where=visible)


def _evict(expiry, mask, budget, *, query_positions, query_starts, key_positions):
    """Expiry int32 [B, S] after the queries of F [B, T, S]; keys are in order."""
    if not expiry.shape[1]:
        return expiry  # argmax needs something to choose from

    def step(expiry, query):
        mask, position, start = query  # [B, S], [B, 1], [B, 1]
        live = expiry > position
        held = live & (start <= key_positions) & (key_positions <= position)
        excess = jnp.sum(held, axis=-1, keepdims=True) > budget
        candidates = held & (start < key_positions) & (key_positions < position)
        # argmax takes the first of several, which is the oldest.
        victim = jnp.argmax(
            jnp.where(candidates, mask, -jnp.inf), axis=-1, keepdims=True
        )
        dropped = excess & (jnp.arange(expiry.shape[1]) == victim)
        dropped |= live & (key_positions < start)
        return jnp.where(dropped, position, expiry), None

    queries = mask, query_positions[..., None], query_starts[..., None]
    expiry, _ = jax.lax.scan(
        step, expiry, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), queries)
    )
    return expiry


def _never(mask):
    """The expiry int32 [B, S] of keys [B, ..., S] that are all still held."""
    b, *_, s = mask.shape
    return jnp.full_like(mask, s, jnp.int32, shape=(b, s))


def _token_positions(b, t, s, segment_ids):
    """Positions and document starts of S keys and of the last T of them as queries."""
    positions = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s))
    starts = jnp.zeros_like(positions)
    if segment_ids is not None:
        starts = _common.document_starts(segment_ids)
    return {
        "query_positions": positions[:, s - t :],
        "query_starts": starts[:, s - t :],
        "key_positions": positions,
    }


def _first_row(initial_mask, query, key):
    """Row F [B, S] of the first query; zeros if no query precedes the given ones."""
    b, s = key.shape[:2]
    earlier = s - query.shape[1]
    if initial_mask is None:
        if earlier:
            raise ValueError(
                f"initial_mask of shape [B={b}, S={s}] is needed: it sums what the "
                f"S - T = {earlier} earlier queries selected, which are not given"
            )
        initial_mask = jnp.zeros_like(key, shape=(b, s))
    _common.bind_shapes(("key", key, "BSKH"), ("initial_mask", initial_mask, "BS"))
    return initial_mask.astype(_common.statistics_dtype(query, key))


def _check_mask(mask, letters, segment_ids):
    """Checks F and returns B, T and S."""
    _common.bind_shapes(("mask", mask, letters))
    b, t, s = mask.shape
    if t > s:
        raise ValueError(
            f"mask has T={t} queries and only S={s} keys; T may not exceed S"
        )
    _common.check_segment_ids(segment_ids, b, s)
    return b, t, s


def check_budget(budget: int) -> int:
    """The budget, an integer of any type; ValueError unless it is at least 2."""
    number = _common.as_integer(budget)
    if number is None or number < 2:
        raise ValueError(
            "budget must be an integer of at least 2, for the first token and the "
            f"current one; got {budget!r}"
        )
    return number


def check_skip_error(skip_error: float) -> None:
    """Raises ValueError unless 0 <= skip_error < 1."""
    if not 0 <= skip_error < 1:
        raise ValueError(f"skip_error must be at least 0 and below 1; got {skip_error}")


def _usable_budget(budget):
    """The budget if it is an array or an integer that can be one, at least 2."""
    if not isinstance(budget, jax.Array):
        return check_budget(budget)
    if budget.shape or not jnp.issubdtype(budget.dtype, jnp.integer):
        raise ValueError(
            "budget must be an integer or a scalar array of one; got shape "
            f"{budget.shape} and {budget.dtype}"
        )
    # No query can drop the first token of its document, nor its own.
    return jnp.maximum(budget, 2)


def _check_tau(tau):
    if not tau > 0:
        raise ValueError(f"tau of the memory term must be positive; got {tau!r}")
