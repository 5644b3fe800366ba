"""Selective Attention in Triton, with F in memory for a chunk at a time.

F is the same for all heads. Column sums of what each block of queries selects, and
their running sums over the blocks (the carries, T S / BLOCK numbers), let any region of
F be computed by itself. A scan over chunks of queries writes the chunk's F and attends
with it in all heads; F and the gradients below take bounded memory.

Backward goes twice through F: by chunks of queries for the query's gradient, and by
chunks of keys for those of key and value. The gradient of F[i, j] is that of the logits
summed over heads; one of q_t·k_j of the selecting head is the sum of those over i > t.
With all queries of a chunk of keys at hand, these sums need nothing from other chunks.
The gradient of the logits is a by-product of those of key and value: it is kept where
few programs share a tile, and else computed once more, by a program that has all heads.
If its sums over queries are kept as well, one kernel goes through it once. The memory
term adds to it where F is below tau, which takes two kernels.

What attends with F, forward and backward, is Mosaic GPU's if that supports the call,
or would with somewhat wider heads.

A budget takes a pass through F first, in which every query drops a key. It computes F
once more, all of it and a chunk at a time, and one program for each row of the batch
then reads it: T S numbers, of which the T queries each take the largest, one after the
other. The longer the rows and the fewer, the more of the time of a call that is.

Nothing is added atomically: same input, same bits.

Letters: B batch, T queries, S keys, N query heads, K kv heads, H key width, V value
width; `rows` and `columns` are T and S rounded up to whole blocks, `blocks` are those
of queries.
"""

import functools

import jax
import jax.numpy as jnp

from jattn.ops._common import document_starts
from jattn.pallas import _mosaic
from jattn.pallas.selective import by_keys, by_queries, eviction
from jattn.pallas.selective.cotangents import Cotangents
from jattn.pallas.selective.work import Work


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    initial_mask: jax.Array,
    starts: jax.Array | None,
    budget: jax.Array | None,
    *,
    scale: float,
    skip_error: float = 0.0,
    memory_tau: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Selective attention, differentiable in the first four.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, V].
      initial_mask: fp32 [B, S], row F of the first query.
      starts: int32 [B, S], position of the first token of each token's document; None
        if a row is one document.
      budget: int32 [], most keys a query holds, at least 2, which needs T = S; None for
        no limit.
      scale: Factor of the logits, positive.
      skip_error: Weight of a query's softmax that may be left out.
      memory_tau: Tau of the memory term, or None to leave it out. It is exact: with
        it only keys whose F has reached tau are skipped, which count nothing.

    Returns:
      Output [B, T, N, V], log-sum-exp [B, T, N] and memory term [B, T] or None, both in
      fp32.
    """
    arrays = *_widened(query, key, value), initial_mask, starts, budget
    out, lse, memory = _attend(*arrays, scale, skip_error, memory_tau)
    return out[..., : value.shape[-1]], lse, memory


def _widened(query, key, value):
    """Query, key and value, with zeros up to a width that kernels in Mosaic have.

    Zeros change no product. The wider ones of keys and values become less than twice as
    wide: to that power of 2 to which Triton's kernels would fill up their tiles.
    """

    def widened(width):
        return [_mosaic.padded(x, 3, width) for x in (query, key, value)]

    widest = max(query.shape[-1], value.shape[-1])
    for width in _mosaic.WIDTHS:
        if width // 2 < widest <= width:
            # Nothing is filled up in vain, as fp32 would be.
            wide_query, _, wide_value = jax.eval_shape(
                functools.partial(widened, width)
            )
            if _mosaic.unsupported(wide_query, wide_value, packed=False) is None:
                return widened(width)
    return query, key, value


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attend(
    query, key, value, initial_mask, starts, budget, scale, skip_error, memory_tau
):
    arrays = query, key, value, initial_mask, starts, budget
    return _attend_forward(*arrays, scale, skip_error, memory_tau)[0]


def _attend_forward(
    query, key, value, initial_mask, starts, budget, scale, skip_error, memory_tau
):
    arguments = query, key, value, starts, scale, skip_error, memory_tau
    work = Work(*arguments)
    carries, _ = work.carries(initial_mask)
    if budget is not None:
        expiry = eviction.expiry(work, carries, budget)
        work = Work(*arguments, work.least, expiry)
    out, lse, memory = by_queries.forward(work, carries)
    of_work = query, key, value, starts, work.least, work.expiry
    return (out, lse, memory), (of_work, carries, out, lse)


def _attend_backward(scale, skip_error, memory_tau, residuals, gradients):
    (query, key, value, starts, least, expiry), carries, out, lse = residuals
    work = Work(query, key, value, starts, scale, skip_error, memory_tau, least, expiry)
    return *backward(work, carries, out, lse, *gradients), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def backward(
    work: Work,
    carries: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    out_gradient: jax.Array,
    lse_gradient: jax.Array,
    memory_gradient: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Gradients of query, key, value and initial_mask from those of what attend gives.

    Args:
      work: Of the arguments.
      carries: Those of the mask, `Work.carries`.
      out: [B, T, N, V], the output.
      lse: fp32 [B, T, N], its log-sum-exp.
      out_gradient: [B, T, N, V].
      lse_gradient: fp32 [B, T, N].
      memory_gradient: fp32 [B, T], or None without a memory term.
    """
    cotangents = Cotangents(out, lse, out_gradient, lse_gradient)
    query_gradient = by_queries.query_gradient(work, carries, cotangents)
    selecting, *others = by_keys.key_gradients(
        work, carries, cotangents, memory_gradient
    )
    selecting += query_gradient[:, :, 0].astype(jnp.float32)
    query_gradient = query_gradient.at[:, :, 0].set(
        selecting.astype(query_gradient.dtype)
    )
    return query_gradient, *others


def prefill(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    budget: jax.Array | None,
    scale: float,
    skip_error: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention among the first tokens of rows, and what decoding goes on with.

    Args:
      query: [B, T, N, H].
      key: [B, T, K, H].
      value: [B, T, K, V].
      budget: As in attend.
      scale: Factor of the logits, positive.
      skip_error: As in attend.

    Returns:
      Output [B, T, N, V]; row F of the query after the last, fp32 [B, T]; and the first
      query that no longer holds each key, int32 [B, T], T where all later ones do.
    """
    wide = _widened(query, key, value)
    arguments = *wide, None, scale, skip_error, None
    work = Work(*arguments)
    carries, following = work.carries(jnp.zeros(key.shape[:2], jnp.float32))
    expiry = jnp.full((work.batch, work.columns), work.queries, jnp.int32)
    if budget is not None:
        expiry = eviction.expiry(work, carries, budget)
        work = Work(*arguments, work.least, expiry)
    out, *_ = by_queries.forward(work, carries)
    out = out[..., : value.shape[-1]]
    return out, scale * following[:, : work.keys], expiry[:, : work.keys]


def skipped_tiles(
    query: jax.Array,
    key: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    skip_error: float,
    keys: int,
) -> tuple[jax.Array, jax.Array]:
    """How many tiles of a block and so many keys are skipped, and of how many.

    Args:
      query: [B, T, N, H], of all keys.
      key: [B, T, K, H].
      segment_ids: int [B, T] or None. Tiles of other documents do not count as skipped.
      scale: Factor of the logits.
      skip_error: As in attend.
      keys: Those of a tile.

    Returns:
      Two int32 numbers, the second of all tiles that are visible in part.
    """
    starts = None if segment_ids is None else document_starts(segment_ids)
    work = Work(query, key, key, starts, scale, skip_error, None)
    carries, _ = work.carries(jnp.zeros(key.shape[:2], jnp.float32))
    first = jnp.arange(work.blocks) * work.block
    tile = jnp.arange(0, work.columns, keys)
    visible = tile < jnp.minimum(first + work.block, work.queries)[:, None]
    if starts is not None:
        visible &= tile + keys > starts[:, first, None]
    visible = jnp.broadcast_to(visible, (work.batch, *visible.shape[-2:]))
    return jnp.sum(visible & work.dead(carries, keys)), jnp.sum(visible)
