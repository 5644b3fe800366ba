"""Selective Attention of one new token to a cache, in Triton.

What counts is that the cache is read once, by all multiprocessors however small the
batch is. The query heads of a kv head are the rows of a matrix tile; the slots of a row
are divided into parts, which are added up in a fixed order. The programs of the first
kv head have the logits that select at hand and write F for the next token.

Letters: B batch, S slots, N query heads, K kv heads, H key width, V value width, P
parts.
"""

# A type checker does not see what a constexpr stands for.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jattn.pallas import _triton, tuning
from jattn.pallas._softmax import LOG2_E
from jattn.pallas._tiles import _load_rows, _store_rows

LN_2 = tl.constexpr(0.6931471805599453)

# A row's parts are few, so that adding them up costs little.
MAX_PARTS = 32


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      keys: Keys of a matrix tile, a power of two, at least 16.
      programs: How many programs are enough; fewer if there are not so many tiles.
      warps: Warps of a program.
      stages: Tiles in flight.
    """

    keys: int
    programs: int
    warps: int
    stages: int


def heuristic(query: jax.Array, value: jax.Array) -> Tiling:
    """The tiling where none was measured."""
    narrow = query.dtype.itemsize * max(query.shape[-1], value.shape[-1]) <= 256
    return Tiling(keys=64 if narrow else 32, programs=1024, warps=4, stages=3)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    query_position: jax.Array,
    key_positions: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention to the slots of a cache, not differentiable.

    Args:
      query: [B, 1, N, H].
      key: [B, S, K, H].
      value: [B, S, K, V].
      mask: fp32 [B, S], F of the slots.
      query_position: int32 [B], negative for padding, which sees nothing.
      key_positions: int32 [B, S] of the tokens in the slots, negative where there is
        none.
      scale: Factor of the logits, positive.

    Returns:
      Output [B, 1, N, V] in value's dtype and F after the query, fp32 [B, S].
    """
    batch, _, heads, key_width = query.shape
    slots, kv_heads, value_width = value.shape[1:]
    group = heads // kv_heads
    shape = {
        "group": group,
        "key_width": key_width,
        "value_width": value_width,
        "dtype": str(query.dtype),
    }
    tiling = tuning.choose("selective_decode", shape, heuristic(query, value))
    parts = min(
        MAX_PARTS,
        max(1, tiling.programs // (batch * kv_heads)),
        triton.cdiv(slots, tiling.keys),
    )
    out, lse, next_mask = _triton.call(
        decode_kernel,
        query,
        key,
        value,
        mask,
        query_position,
        key_positions,
        float(scale) * LOG2_E,
        slots,
        outputs=[
            jax.ShapeDtypeStruct((batch, parts, heads, value_width), jnp.float32),
            jax.ShapeDtypeStruct((batch, parts, heads), jnp.float32),
            jax.ShapeDtypeStruct(mask.shape, jnp.float32),
        ],
        grid=(kv_heads * parts, batch),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        flops=2 * batch * heads * slots * (key_width + value_width),
        KV_HEADS=kv_heads,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        H=key_width,
        V=value_width,
        H_PAD=max(16, triton.next_power_of_2(key_width)),
        V_PAD=max(16, triton.next_power_of_2(value_width)),
        KEYS=tiling.keys,
        PARTS=parts,
    )
    peak = jnp.max(lse, axis=1, keepdims=True)
    weights = jnp.exp2(lse - jnp.where(peak == -jnp.inf, 0, peak))  # [B, P, N]
    total = jnp.sum(weights, axis=1)
    out = jnp.sum(out * weights[..., None], axis=1)
    out = out / jnp.where(total == 0, 1, total)[..., None]
    return out[:, None].astype(value.dtype), next_mask


@triton.jit
def decode_kernel(
    query_ptr,  # [B, 1, N, H]
    key_ptr,  # [B, S, K, H]
    value_ptr,  # [B, S, K, V]
    mask_ptr,  # [B, S]
    query_position_ptr,  # [B]
    key_position_ptr,  # [B, S]
    scale_log2,
    slots,
    out_ptr,  # [B, PARTS, N, V]
    lse_ptr,  # [B, PARTS, N], in base 2
    next_mask_ptr,  # [B, S]
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    H_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Attention of the heads of one kv head to one part of a row's slots."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    batch = tl.program_id(1).to(tl.int64)
    kv_head = tl.program_id(0) % KV_HEADS
    part = tl.program_id(0) // KV_HEADS
    size = tl.cdiv(tl.cdiv(slots, KEYS), PARTS) * KEYS
    begin = part * size
    row, column = tl.arange(0, ROWS), tl.arange(0, KEYS)
    live = row < GROUP
    head = kv_head * GROUP + row
    query = _load_rows(query_ptr, batch * HEADS + head, live, H, H_PAD)
    now = tl.load(query_position_ptr + batch)
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, V_PAD], tl.float32)
    for start in range(begin, tl.minimum(begin + size, slots), KEYS):
        slot = start + column
        exists = slot < slots
        place = batch * slots + slot
        position = tl.load(key_position_ptr + place, mask=exists, other=-1)
        forgotten = tl.load(mask_ptr + place, mask=exists, other=0.0)
        seen = (position >= 0) & (position <= now)
        key_row = place * KV_HEADS + kv_head
        key = _load_rows(key_ptr, key_row, exists, H, H_PAD)
        value = _load_rows(value_ptr, key_row, seen, V, V_PAD)
        products = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        logits = products * scale_log2 - (forgotten / LN_2)[None, :]
        logits = tl.where(seen[None, :], logits, -float("inf"))
        highest = tl.maximum(peak, tl.max(logits, axis=1))
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        weights = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(peak - shift)
        peak = highest
        total = total * decay + tl.sum(weights, axis=1)
        out = tl.dot(
            weights.to(value.dtype),
            value,
            out * decay[:, None],
            input_precision="tf32x3",
        )
        if kv_head == 0:
            selected = tl.where((row == 0)[:, None], products, 0.0)
            selected = tl.sum(selected, axis=0)
            selected = tl.maximum(selected, 0.0) * (scale_log2 * LN_2)
            # Neither itself nor the first token.
            selects = (position > 0) & (position < now)
            forgotten += tl.where(selects, selected, 0.0)
            tl.store(next_mask_ptr + place, forgotten, mask=exists)
    target = (batch * PARTS + part) * HEADS + head
    divisor = tl.where(total == 0.0, 1.0, total)
    _store_rows(out_ptr, target, live, out / tl.expand_dims(divisor, 1), V, V_PAD)
    lse = tl.where(total == 0.0, -float("inf"), peak + tl.log2(divisor))
    tl.store(lse_ptr + target, lse, mask=live)
