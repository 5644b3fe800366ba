"""2-simplicial attention in Triton, forward, and its custom derivative.

For one key of one set, 2-simplicial attention is plain attention by the query times
that key to the other set. The set with the smaller window is the one that multiplies:
its keys and a kv head's query heads make the rows of matrix tiles (see tiles), which
go through the larger window as in flash attention. A row's result counts by its
log-sum-exp, times the value of its key.

Every row keeps the running maximum, sum and output of all keys it has had; rows of one
head are brought together at the end only. Positions whose tile holds several have
windows that differ at the ends, so only there are keys masked.

Letters: B batch, T queries, F and M keys of the set with the smaller and the larger
window, N query heads, K kv heads, H key width, V value width, P programs that share a
smaller window.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import triton

from jattn.pallas import _device, _triton, tuning
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.simplicial import kernels
from jattn.pallas.simplicial.backward import backward
from jattn.pallas.simplicial.tiles import (
    constants,
    tuning_shape,
)

# Warps that keep a multiprocessor busy.
WARPS = 8


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the forward kernel is cut up: speed, never results.

    Attributes:
      rows: Rows of a tile.
      tokens: Positions of a tile of rows, at least.
      chains: Tiles of rows that meet a block together, 1 or 2.
      block: Keys of the larger window in a tile.
      warps: Warps of a program.
      stages: Tiles in flight.
    """

    rows: int
    tokens: int
    chains: int
    block: int
    warps: int
    stages: int


def attend(
    query: jax.Array,
    few_key: jax.Array,
    few_value: jax.Array,
    many_key: jax.Array,
    many_value: jax.Array,
    visible: jax.Array | None,
    *,
    few_window: int,
    many_window: int,
    scale: float,
    forward: Callable[..., tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
    """2-simplicial attention, differentiable in query, keys and values.

    Args:
      query: [B, T, N, H].
      few_key: [B, F, K, H], the keys with the smaller window, in the queries' dtype or
        in fp32; the last T of them stand at the positions of the queries.
      few_value: [B, F, K, V], as few_key.
      many_key: [B, M, K, H], as few_key.
      many_value: [B, M, K, V].
      visible: int32 [B, T], how many keys before and at its own position a query may
        see at most, or None for no such limit.
      few_window: Keys that a query sees of the one set, itself included.
      many_window: Of the other.
      scale: Factor of the logits, positive.
      forward: The kernel: this module's or another that gives what it does.

    Returns:
      Output [B, T, N, V] and log-sum-exp [B, T, N] in fp32 (natural log). A query that
      sees nothing gives 0 and -inf.
    """
    width = few_value.shape[-1]
    # Rows that begin at multiples of 16 bytes are loaded in wide pieces.
    arrays = [
        jnp.pad(x, [(0, 0)] * 3 + [(0, -x.shape[-1] % (16 // query.dtype.itemsize))])
        for x in (query, few_key, few_value, many_key, many_value)
    ]
    results: Any = _attend(*arrays, visible, few_window, many_window, scale, forward)
    out, lse = results
    return out[..., :width], lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _attend(*arguments):
    return _forward(*arguments, out_dtype=None)


def _attend_forward(*arguments):
    many_value = arguments[4]
    # Where a query sees few pairs, gradients of logits are small differences from what
    # backward computes of the output: the error of a rounded one would show in them.
    out, lse = _forward(*arguments, out_dtype=jnp.float32)
    return (out.astype(many_value.dtype), lse), (*arguments[:6], out, lse)


def _forward(*arguments, out_dtype):
    *arrays, few_window, many_window, scale, kernel = arguments
    return kernel(
        *arrays,
        few_window=few_window,
        many_window=many_window,
        scale=scale,
        out_dtype=out_dtype,
    )


def _attend_backward(few_window, many_window, scale, _, residuals, gradients):
    gradients = backward(
        *residuals,
        *gradients,
        few_window=few_window,
        many_window=many_window,
        scale=scale,
    )
    return *gradients, None


_attend.defvjp(_attend_forward, _attend_backward)


def forward(
    query: jax.Array,
    few_key: jax.Array,
    few_value: jax.Array,
    many_key: jax.Array,
    many_value: jax.Array,
    visible: jax.Array | None,
    *,
    few_window: int,
    many_window: int,
    scale: float,
    out_dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """2-simplicial attention, not differentiable.

    Args:
      query: [B, T, N, H].
      few_key: [B, F, K, H], the keys with the smaller window, in the queries' dtype or
        in fp32; the last T of them stand at the positions of the queries.
      few_value: [B, F, K, V], as few_key.
      many_key: [B, M, K, H], as few_key.
      many_value: [B, M, K, V].
      visible: int32 [B, T], how many keys before and at its own position a query may
        see at most, or None for no such limit.
      few_window: Keys that a query sees of the one set, itself included.
      many_window: Of the other.
      scale: Factor of the logits, positive.
      out_dtype: That of the output; the one of many_value if None.

    Returns:
      Output [B, T, N, V] and log-sum-exp [B, T, N] in fp32 (natural log).
    """
    batch, queries, heads, key_width = query.shape
    kv_heads, value_width = few_value.shape[2:]
    out_dtype = out_dtype or many_value.dtype
    tiling = tuning.choose(
        "simplicial_forward",
        tuning_shape(query, few_value, few_window, many_window),
        _heuristic(
            heads // kv_heads,
            few_window,
            max(key_width, value_width),
            query.dtype.itemsize,
        ),
    )
    cut = constants(query, few_value, few_window, tiling.rows, tiling.tokens)
    tiles = triton.cdiv(queries, cut["TOKENS"])
    programs = batch * kv_heads * triton.cdiv(cut["GROUP"], cut["HEADS"])
    # Where there are few tiles, several programs share the smaller window of each.
    steps = triton.cdiv(few_window, cut["ENTRIES"] * tiling.chains)
    wanted = _device.multiprocessors() * WARPS // tiling.warps
    parts = min(steps, max(1, wanted // (tiles * programs)))
    pairs = queries * few_window * many_window
    out, lse = _triton.call(
        kernels.forward_kernel,
        query,
        few_key,
        few_value,
        many_key,
        many_value,
        jnp.zeros((1, 1), jnp.int32) if visible is None else visible,
        _triton.Descriptor(many_key, (1, tiling.block, 1, cut["H_PAD"])),
        _triton.Descriptor(many_value, (1, tiling.block, 1, cut["V_PAD"])),
        float(scale) * LOG2_E,
        queries,
        few_key.shape[1],
        many_key.shape[1],
        few_window,
        many_window,
        outputs=[
            jax.ShapeDtypeStruct(
                (parts, *query.shape[:3], value_width),
                out_dtype if parts == 1 else jnp.float32,
            ),
            jax.ShapeDtypeStruct((parts, *query.shape[:3]), jnp.float32),
        ],
        grid=(tiles, programs, parts),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        flops=2 * batch * heads * pairs * (key_width + value_width),
        CHAINS=tiling.chains,
        BLOCK=tiling.block,
        TAIL=min(tiling.block, 32),
        # All keys of the smaller window at once need no running statistics.
        SINGLE=steps == 1,
        LIMITED=visible is not None,
        **cut,
    )
    if parts == 1:
        return out[0], lse[0]
    peak = jnp.max(lse, axis=0)
    peak = jnp.where(jnp.isneginf(peak), 0, peak)
    weights = jnp.exp(lse - peak)
    total = jnp.sum(weights, axis=0)
    out = jnp.sum(out * weights[..., None], axis=0)
    out /= jnp.where(total > 0, total, 1)[..., None]
    return out.astype(out_dtype), peak + jnp.log(total)


def _heuristic(group: int, few_window: int, width: int, itemsize: int) -> Tiling:
    """The tiling where none was measured, by bytes of a number."""
    if itemsize > 2:
        size = 32 if width <= 128 else 16
        return Tiling(size, tokens=1, chains=1, block=size, warps=4, stages=1)
    if width > 128:
        return Tiling(128, tokens=1, chains=1, block=32, warps=8, stages=2)
    # Two programs of 64 rows on a multiprocessor: one computes exponentials while the
    # other multiplies. They have registers for one pass through the larger window only.
    entries = max(1, 64 // triton.next_power_of_2(group))
    if few_window <= entries:
        return Tiling(64, tokens=1, chains=1, block=64, warps=4, stages=3)
    if few_window <= 2 * entries:
        return Tiling(64, tokens=1, chains=2, block=64, warps=4, stages=2)
    return Tiling(128, tokens=1, chains=1, block=64, warps=8, stages=3)
