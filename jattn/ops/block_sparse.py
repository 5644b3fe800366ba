"""Attention of each query to the blocks of keys it is given.

It is computed block by block: the queries that see a block are brought together, up to
M at a time, and meet its keys in one matrix product. The cost is that of the pairs of a
query and a block, no key is copied, and nothing of size T x S exists.
"""

import functools

import jax
import jax.numpy as jnp

from jattn.ops import _common
from jattn.pallas._sharding import vary_alike
from jattn.pallas.block_sparse import unsupported

# Rows of a unit at most: enough for a matrix unit, few enough that the last unit of a
# block, which is half empty on average, wastes little.
MAX_UNIT_ROWS = 128


def block_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_indices: jax.Array,
    *,
    block_size: int,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: _common.Implementation | None = None,
    return_lse: bool = False,
) -> _common.AttentionOutput:
    """Causal softmax attention to chosen blocks of keys.

    Block j holds the keys ``j * block_size`` to ``(j + 1) * block_size - 1``; the last
    one may be shorter. Query t sees key s where s is in one of t's blocks, ``s <= t``,
    and both belong to the same document:
    ``o_t = Σ_s softmax_s(scale q_t·k_s) v_s`` over those s. The order of the indices
    does not matter, an index given twice counts once, and a block that is past the
    query or past the last key adds nothing. When T < S the queries are the last T
    positions.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], where K divides N; G = N / K query heads share a kv head.
      value: [B, S, K, V].
      block_indices: int [B, T, K, n], shared by the query heads of a kv head, or
        [B, T, N, n], one list for each query head. Negative for no block.
      block_size: Keys in a block.
      scale: Factor of the logits; H ** -0.5 if None.
      segment_ids: int [B, S], the document each key belongs to. Documents are
        contiguous and never see each other; blocks count from the row's start.
      implementation: "xla", "pallas", "triton", or None for the fastest that
        supports the call.
      return_lse: Also return the log-sum-exp of the logits.

    Returns:
      [B, T, N, V] in value's dtype, and with return_lse also [B, T, N] in fp32
      (natural log; fp64 for fp64 inputs). A query that sees nothing gives 0 and -inf.

    Raises:
      ValueError: Shapes or dtypes do not fit, or block_size is not positive.
      NotImplementedError: The requested implementation does not support the call.
    """
    scale = _common.default_scale(scale, query.shape[-1])
    chosen = choose_block_sparse(
        query,
        key,
        value,
        block_indices,
        segment_ids,
        block_size=block_size,
        scale=scale,
        implementation=implementation,
    )
    if chosen == "triton":
        # Triton is an optional dependency.
        from jattn.pallas.block_sparse import triton as kernel

        arrays = vary_alike(query, key, value, block_indices, segment_ids)
        results: _common.AttentionOutput = kernel.attend(*arrays, block_size, scale)
        return results if return_lse else results[0]
    b, t, s = *query.shape[:2], key.shape[1]
    out, lse = attend_block_positions(
        query,
        key,
        value,
        block_indices,
        block_size=block_size,
        scale=scale,
        query_positions=jnp.broadcast_to(jnp.arange(s - t, s), (b, t)),
        query_segment_ids=None if segment_ids is None else segment_ids[:, s - t :],
        key_segment_ids=segment_ids,
    )
    return (out, lse) if return_lse else out


def choose_block_sparse(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_indices: jax.Array,
    segment_ids: jax.Array | None,
    *,
    block_size: int,
    scale: float,
    implementation: _common.Implementation | None,
) -> str:
    """The implementation of a call of `block_sparse_attention`: "xla" or "triton".

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, V].
      block_indices: int [B, T, K, n] or [B, T, N, n].
      segment_ids: int [B, S], or None.
      block_size: Keys in a block.
      scale: Factor of the logits.
      implementation: What was asked for.

    Raises:
      ValueError: As `block_sparse_attention` does.
      NotImplementedError: As `block_sparse_attention` does.
    """
    sizes = _common.check_attention(query, key, value, segment_ids)
    _common.check_positive(block_size=block_size)
    _check_block_indices(block_indices, sizes)
    reason = unsupported(query, key, value, block_indices, block_size, scale)
    return _common.choose_implementation(
        "block_sparse_attention", implementation, [("triton", reason)]
    )


def attend_block_positions(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_indices: jax.Array,
    *,
    block_size: int,
    scale: float,
    query_positions: jax.Array,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Block-sparse attention of queries at explicit positions, as decoding needs it.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], key s at position s; those past a query are not seen by it.
      value: [B, S, K, V].
      block_indices: int [B, T, K, n] or [B, T, N, n]; negative for no block.
      block_size: Keys in a block.
      scale: Factor of the logits.
      query_positions: int [B, T]; a query at a negative position sees nothing.
      query_segment_ids: int [B, T], or None.
      key_segment_ids: int [B, S], or None.

    Returns:
      Output [B, T, N, V] and log-sum-exp [B, T, N].
    """
    b, t, n, _ = query.shape
    s, k = key.shape[1:3]
    if query_segment_ids is None or key_segment_ids is None:
        query_segment_ids = jnp.zeros((b, t), jnp.int32)
        key_segment_ids = jnp.zeros((b, s), jnp.int32)
    # A kv head's query heads come in R = 1 or R = G parts with a list each. A row is
    # one query of one part; a kv head has L = T R of them.
    r = block_indices.shape[2] // k
    count = -(-s // block_size)

    def rows(x):  # [B, T, K R, ...] -> [B, K, L, ...]
        x = x.reshape(b, t, k, r, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(b, k, t * r, *x.shape[4:])

    def blocks(x):  # [B, S, ...] -> [B, count, block_size, ...]
        padding = [(0, 0), (0, count * block_size - s)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(b, count, block_size, *x.shape[2:])

    def heads(x):  # [B, K, L, N / (K R), ...] -> [B, T, N, ...]
        x = jnp.moveaxis(x.reshape(b, k, t, r, *x.shape[3:]), 1, 2)
        return x.reshape(b, t, n, *x.shape[5:])

    # The logits of one step of the loop are those of a unit for each kv head.
    unit_rows = _common.chunk_length(
        min(MAX_UNIT_ROWS, -(-t * r * block_indices.shape[3] // count)),
        b * n // r * block_size * _common.statistics_dtype(query, key, value).itemsize,
    )
    positions = jnp.repeat(query_positions, r, axis=1)  # [B, L]
    plan = functools.partial(
        _plan_units, count=count, block_size=block_size, unit_rows=unit_rows
    )
    plan = jax.vmap(plan, in_axes=(0, None), out_axes=1)  # over K: [U, K, ...]
    plan = jax.vmap(plan)(rows(block_indices), positions)
    arguments = vary_alike(
        rows(query.reshape(b, t, k * r, n // (k * r), -1)),
        blocks(key),
        blocks(value),
        plan,
        (positions, jnp.repeat(query_segment_ids, r, axis=1)),
        blocks(key_segment_ids),
    )
    out, lse = jax.vmap(lambda *x: _attend_units(*x, scale))(*arguments)
    return heads(out).astype(value.dtype), heads(lse)


def _check_block_indices(block_indices, sizes):
    """Raises ValueError unless they are integers [B, T, K or N, n]."""
    b, t, k, n = (sizes[letter] for letter in "BTKN")
    shape = block_indices.shape
    fits = len(shape) == 4 and shape[:2] == (b, t) and shape[2] in (k, n)
    if not fits or not jnp.issubdtype(block_indices.dtype, jnp.integer):
        raise ValueError(
            f"block_indices must be integers of shape [B={b}, T={t}, K={k} or N={n}, "
            f"n]; got {block_indices.dtype} {list(shape)}"
        )


def _plan_units(lists, positions, *, count, block_size, unit_rows):
    """Groups the pairs (row, block) into units: up to M rows that see one block.

    A block seen by many rows (the first one, often) becomes many units, so that all
    units are of one size. The rows of a unit are distinct.

    Args:
      lists: int [L, n], blocks of each row.
      positions: int [L].
      count: Blocks there are.
      block_size: Keys in a block.
      unit_rows: M.

    Returns:
      The block of each unit int32 [U], and its rows int32 [U, M], which are L where
      there is none.
    """
    length, n = lists.shape
    pairs = length * n
    # Clipped before the cast, so that no index of a wider dtype wraps around.
    last = min(count, jnp.iinfo(lists.dtype).max)
    lists = jnp.minimum(lists, last).astype(jnp.int32)
    hidden = (lists < 0) | (lists > positions[:, None] // block_size)
    blocks = jnp.where(hidden, count, lists).reshape(-1)
    order = jnp.argsort(blocks, stable=True)
    blocks, rows = blocks[order], order // n
    # The sort brought together what a row names twice.
    again = (blocks[1:] == blocks[:-1]) & (rows[1:] == rows[:-1])
    rows = rows.at[1:].set(jnp.where(again, length, rows[1:]))

    sizes = jnp.zeros(count, jnp.int32).at[blocks].add(1, mode="drop")  # in pairs
    first = jnp.cumsum(sizes) - sizes
    units_of_block = -(-sizes // unit_rows)
    end = jnp.cumsum(units_of_block)
    # Every block that occurs may have one unit that is not full.
    units = jnp.arange(min(pairs, pairs // unit_rows + min(count, pairs)))
    # Units past the end get the last block, and a place past its pairs.
    block = jnp.sum(units[:, None] >= end[:-1], axis=1)
    place = (units - end[block] + units_of_block[block])[:, None] * unit_rows
    place = place + jnp.arange(unit_rows)  # [U, M], among the pairs of the block
    row = rows.at[first[block][:, None] + place].get(mode="clip")
    row = jnp.where(place < sizes[block][:, None], row, length)
    return block.astype(jnp.int32), row.astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend_units(query, key, value, plan, rows, key_segments, scale):
    """Attention of rows to the blocks of their units, unit after unit in each kv head.

    Differentiated by hand, because the transpose of a loop over units would add an
    array as long as the sequence at each of them. Every sum is taken in the order of
    the units, so that the same input gives the same bits.

    Args:
      query: [K, L, G, H].
      key: [count, block_size, K, H].
      value: [count, block_size, K, V].
      plan: Block int32 [U, K] and rows int32 [U, K, M] of each unit.
      rows: Position and segment of each row, int [L] both.
      key_segments: int [count, block_size].
      scale: Factor of the logits.

    Returns:
      [K, L, G, V] and its log-sum-exp [K, L, G], in the statistics dtype.
    """
    dtype = _common.statistics_dtype(query, key, value)
    like = query[..., 0].astype(dtype)
    heads = jnp.arange(query.shape[0])

    def step(carry, unit):
        block, members = unit
        _, logits, mask = _unit_logits(query, key, unit, rows, key_segments, scale)
        acc, total, peak = (_take(x, members) for x in carry)
        new_peak = jnp.max(logits, axis=-1, where=mask, initial=-jnp.inf)
        new_peak = jnp.maximum(peak, new_peak)
        finite_peak = jnp.where(jnp.isneginf(new_peak), 0, new_peak)
        weights = jnp.where(mask, jnp.exp(logits - finite_peak[..., None]), 0)
        decay = jnp.exp(peak - finite_peak)
        update = jnp.einsum(
            "kmgs,ksv->kmgv",
            weights.astype(value.dtype),
            value[block, :, heads],
            preferred_element_type=dtype,
        )
        acc = decay[..., None] * acc + update
        total = decay * total + jnp.sum(weights, axis=-1)
        return tuple(
            x.at[heads[:, None], members].set(y, mode="drop")
            for x, y in zip(carry, (acc, total, new_peak), strict=True)
        ), None

    start = (
        jnp.zeros_like(like, shape=(*like.shape, value.shape[-1])),
        jnp.zeros_like(like),
        jnp.full_like(like, -jnp.inf),
    )
    (acc, total, peak), _ = jax.lax.scan(step, start, plan)
    live = total > 0
    total = jnp.where(live, total, 1)
    lse = jnp.where(live, peak + jnp.log(total), -jnp.inf)
    return acc / total[..., None], lse


def _attend_units_forward(query, key, value, plan, rows, key_segments, scale):
    arguments = (query, key, value, plan, rows, key_segments)
    results = _attend_units(*arguments, scale)
    return results, (*arguments, results)


def _attend_units_backward(scale, residuals, cotangents):
    query, key, value, plan, rows, key_segments, (out, lse) = residuals
    out_bar, lse_bar = cotangents
    dtype = out.dtype
    heads = jnp.arange(query.shape[0])
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)
    live = jnp.isfinite(lse)
    finite_lse = jnp.where(live, lse, 0)
    # The gradient of the logits is P * (out_bar·v - correction).
    correction = jnp.sum(out_bar * out, axis=-1) - jnp.where(live, lse_bar, 0)

    def step(carry, unit):
        block, members = unit
        query_bar, key_bar, value_bar = carry
        q, logits, mask = _unit_logits(query, key, unit, rows, key_segments, scale)
        weights = jnp.exp(logits - _take(finite_lse, members)[..., None])
        weights = jnp.where(mask, weights, 0)  # [K, M, G, block_size]
        o_bar = _take(out_bar, members).astype(value.dtype)
        v_bar = product("kmgs,kmgv->ksv", weights.astype(value.dtype), o_bar)
        weights_bar = product("kmgv,ksv->kmgs", o_bar, value[block, :, heads])
        logits_bar = weights_bar - _take(correction, members)[..., None]
        logits_bar = (scale * weights * logits_bar).astype(key.dtype)
        q_bar = product("kmgs,ksh->kmgh", logits_bar, key[block, :, heads])
        k_bar = product("kmgs,kmgh->ksh", logits_bar, q)
        return (
            query_bar.at[heads[:, None], members].add(q_bar, mode="drop"),
            key_bar.at[block, :, heads].add(k_bar),
            value_bar.at[block, :, heads].add(v_bar),
        ), None

    start = tuple(jnp.zeros_like(x, dtype) for x in (query, key, value))
    (query_bar, key_bar, value_bar), _ = jax.lax.scan(step, start, plan)
    return (
        query_bar.astype(query.dtype),
        key_bar.astype(key.dtype),
        value_bar.astype(value.dtype),
        None,
        None,
        None,
    )


_attend_units.defvjp(_attend_units_forward, _attend_units_backward)


def _take(x, members):
    """Rows members [K, M] of x [K, L, ...], zeros where there is no such row."""
    heads = jnp.arange(x.shape[0])[:, None]
    return x.at[heads, members].get(mode="fill", fill_value=0)


def _unit_logits(query, key, unit, rows, key_segments, scale):
    """Of one unit in each kv head, queries [K, M, G, H], logits and their mask."""
    block, members = unit
    q = _take(query, members)
    logits = scale * jnp.einsum(
        "kmgh,ksh->kmgs",
        q,
        key[block, :, jnp.arange(query.shape[0])],
        preferred_element_type=_common.statistics_dtype(query, key),
    )
    positions, segments = (x.at[members].get(mode="clip")[..., None] for x in rows)
    block_size = key.shape[1]
    key_positions = block[:, None] * block_size + jnp.arange(block_size)
    mask = key_positions[:, None] <= positions  # [K, M, block_size]
    mask &= key_segments[block][:, None] == segments
    mask &= (members < query.shape[1])[..., None]
    return q, logits, mask[:, :, None]
