"""Native sparse attention of new tokens to a decoding cache that holds them already.

Internal: `jattn.nn.NativeSparseAttention` decodes by it. The letters are those of
`jattn.ops.nsa`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jattn.ops import _common, nsa, nsa_selection
from jattn.ops.block_sparse import (
    attend_block_positions,
    block_sparse_attention,
    choose_block_sparse,
)
from jattn.ops.compressed import (
    attend_windows,
    choose_compressed,
    compressed_attention,
    num_windows,
)
from jattn.ops.dense import attend_positions, dense_attention
from jattn.pallas import nsa_decode

Pair = tuple[jax.Array, jax.Array]


def cached_attention(
    query: jax.Array,
    compressed: Pair,
    selected: Pair,
    window: Pair,
    gates: jax.Array,
    *,
    positions: jax.Array,
    window_end: jax.Array,
    ring: bool,
    kernel_size: int,
    stride: int,
    block_size: int,
    num_blocks: int,
    num_initial: int,
    num_local: int,
    window_size: int,
    scale: float,
    implementation: _common.Implementation | None,
) -> tuple[jax.Array, jax.Array]:
    """`jattn.native_sparse_attention` of new tokens at the end of rows of any length.

    Args:
      query: [B, T, N, H].
      compressed: Keys [B, M, K, H] and values [B, M, K, V], of any floating-point
        dtype; what lies past the queries is not read.
      selected: Keys [B, S, K, H] and values [B, S, K, V], token p in slot p.
      window: Keys [B, W, K, H] and values [B, W, K, V], the tokens before window_end.
      gates: [B, T, N, 3].
      positions: int32 [B, T], those of a row following each other; negative for
        padding, whose output means nothing, as it does past the last slot of selected.
      window_end: int32 [B], the position after the last one of window.
      ring: Whether window is a ring buffer of at most window_size slots, with token p
        in slot p mod W. Then T is 1. If not, window is in order and its last T slots
        are the queries' own.
      kernel_size: Tokens in a compressed window.
      stride: Tokens between the starts of compressed windows.
      block_size: Tokens in a selected block.
      num_blocks: Blocks a query reads.
      num_initial: Blocks always read at the start.
      num_local: Blocks always read at the query.
      window_size: Tokens the window branch sees.
      scale: Factor of the logits.
      implementation: "xla"; "triton", for up to `nsa_decode.MAX_QUERIES` queries the
        decoding kernels and for more the kernels of each branch; or None for the
        fastest that supports the call. "pallas" is no kernel of this operation.

    Returns:
      [B, T, N, V] in query's dtype, and the selected blocks int32
      [B, T, K, num_blocks].

    Raises:
      ValueError: Sizes contradict each other, M is not the number of windows of S
        tokens, there are more queries than slots, or implementation is no such name.
      NotImplementedError: The requested implementation does not support the call.
    """
    sizes = nsa_selection.check_sizes(
        kernel_size=kernel_size,
        stride=stride,
        block_size=block_size,
        num_blocks=num_blocks,
        num_initial=num_initial,
        num_local=num_local,
    )
    (window_size,) = _common.positive_integers(window_size=window_size)
    t, slots = query.shape[1], selected[0].shape[1]
    if t > slots:
        raise ValueError(f"T={t} queries cannot be in a cache of S={slots} slots")
    needed = num_windows(slots, sizes["kernel_size"], sizes["stride"])
    if (windows := compressed[0].shape[1]) != needed:
        raise ValueError(
            f"compressed must have the M={needed} windows of S={slots} slots; got "
            f"{windows}"
        )
    if t > nsa_decode.MAX_QUERIES:
        # A longer prompt goes through the kernels of the branches.
        chosen = "xla"
    else:
        reason = nsa_decode.unsupported(
            query,
            compressed,
            selected,
            window,
            **{x: sizes[x] for x in ("block_size", "stride", "num_blocks")},
        )
        chosen = _common.choose_implementation(
            "decoding of native sparse attention", implementation, [("triton", reason)]
        )
    sizes |= {"ring": ring, "window_size": window_size, "scale": scale}
    arrays = (query, compressed, selected, window, gates, positions, window_end)
    if chosen == "xla":
        return _attend_branches(*arrays, implementation=implementation, **sizes)
    # Triton is an optional dependency.
    from jattn.pallas.nsa_decode import triton as kernel

    @jax.custom_vjp
    def attend(*arrays):
        return kernel.attend(*arrays, **sizes)

    def attend_forward(*arrays):
        return attend(*arrays), arrays

    def attend_backward(arrays, cotangents):
        # It has no kernel of its own, and those of the branches may not support it.
        in_branches = functools.partial(_attend_branches, implementation=None, **sizes)
        _, pullback = jax.vjp(in_branches, *arrays)
        return pullback(cotangents)

    attend.defvjp(attend_forward, attend_backward)
    return attend(*arrays)


def _attend_branches(
    query,
    compressed,
    selected,
    window,
    gates,
    positions,
    window_end,
    *,
    ring,
    kernel_size,
    stride,
    block_size,
    num_blocks,
    num_initial,
    num_local,
    window_size,
    scale,
    implementation,
):
    """The same, one branch after the other."""
    compressed, selected, window = jax.tree.map(
        lambda x: x.astype(query.dtype), (compressed, selected, window)
    )
    sizes: dict[str, Any] = {
        "kernel_size": kernel_size,
        "stride": stride,
        "scale": scale,
    }
    selection: dict[str, Any] = {
        "block_size": block_size,
        "num_blocks": num_blocks,
        "num_initial": num_initial,
        "num_local": num_local,
    }
    capacity = selected[0].shape[1]
    chosen = choose_compressed(
        query, *compressed, stride=stride, scale=scale, implementation=implementation
    )
    # A query past the last slot sees what one there does.
    held = jnp.minimum(positions, capacity - 1)
    if ring or chosen == "xla":
        sight = {
            "query_positions": held,
            "document_starts": jnp.zeros_like(positions),
        }
        from_compressed, _ = attend_windows(query, *compressed, **sight, **sizes)
        blocks = nsa_selection.select_blocks(
            query, compressed[0], length=capacity, **sight, **sizes, **selection
        )
    else:
        from_compressed, blocks = _attend_moved(
            query,
            compressed,
            window_end - query.shape[1],
            capacity=capacity,
            implementation=implementation,
            **sizes,
            **selection,
        )
    slots = jnp.arange(window[0].shape[1], dtype=jnp.int32)
    if ring:
        # Whatever the ring holds is in the window of the newest token.
        in_window, _ = attend_positions(
            query,
            *window,
            query_positions=positions,
            key_positions=jnp.where(slots < window_end[:, None], 0, -1),
            scale=scale,
        )
    else:
        # Slots before the first token are a document that no query belongs to.
        filled = slots >= slots.size - window_end[:, None]
        in_window = dense_attention(
            query,
            *window,
            window=window_size,
            scale=scale,
            segment_ids=filled.astype(jnp.int32),
            implementation=implementation,
        )
    from_selected = _attend_blocks(
        query, selected, blocks, held, block_size, scale, implementation
    )
    return nsa.gated_sum((from_compressed, from_selected, in_window), gates), blocks


def _attend_moved(
    query,
    compressed,
    start,
    *,
    capacity,
    kernel_size,
    stride,
    block_size,
    num_blocks,
    num_initial,
    num_local,
    scale,
    implementation,
):
    """Attention to compressed tokens, and selection, by kernels for a sequence's end.

    They take queries for the last of all positions. So each row is moved to the end, by
    a multiple of block_size, for blocks to stay what they are: the queries, and a copy
    of the compressed tokens, which are few. What was before the row's start is a
    document that no query belongs to.

    Args:
      query: [B, T, N, H].
      compressed: Keys [B, M, K, H] and values [B, M, K, V].
      start: int32 [B], the position of each row's first query.
      capacity: Slots for tokens in the cache.
      kernel_size: See cached_attention, as for all that follow.
      stride: Its argument.
      block_size: Its argument.
      num_blocks: Its argument.
      num_initial: Its argument.
      num_local: Its argument.
      scale: Its argument.
      implementation: Its argument.

    Returns:
      [B, T, N, V], and the blocks int32 [B, T, K, num_blocks].
    """
    b, t = query.shape[:2]
    rows = jnp.arange(b)[:, None]
    queries = t + block_size - 1
    length = capacity + queries
    # A row goes as far towards the end as a whole number of blocks takes it.
    move = (length - t - start) // block_size * block_size  # [B], at least 0
    first = queries - length + start + move  # of its queries' places, [B]

    def take(x, index):
        return x.at[rows, index].get(mode="clip")

    windows = jnp.arange(num_windows(length, kernel_size, stride), dtype=jnp.int32)
    windows = windows - (move // stride)[:, None]
    key, value = (take(x, windows) for x in compressed)
    moved_query = take(query, jnp.arange(queries, dtype=jnp.int32) - first[:, None])
    shared: dict[str, Any] = {
        "kernel_size": kernel_size,
        "stride": stride,
        "length": length,
        "scale": scale,
        "segment_ids": (jnp.arange(length) >= move[:, None]).astype(jnp.int32),
        "implementation": implementation,
    }
    out, lse = compressed_attention(moved_query, key, value, return_lse=True, **shared)
    blocks = nsa_selection.select_blocks_by_lse(
        moved_query,
        key,
        lse,
        block_size=block_size,
        num_blocks=num_blocks,
        num_initial=num_initial,
        num_local=num_local,
        **shared,
    )
    places = first[:, None] + jnp.arange(t, dtype=jnp.int32)
    out, blocks = take(out, places), take(blocks, places)
    moved_blocks = (move // block_size)[:, None, None, None]
    return out, jnp.where(blocks < 0, -1, blocks - moved_blocks)


def _attend_blocks(
    query, selected, blocks, positions, block_size, scale, implementation
):
    """Attention to selected blocks of the cache, by the kernel where one supports it.

    The kernel takes queries for the last of all slots, past where they are. It gets the
    blocks before a query's own, of which the query sees everything anyway. Its own
    block is a window with the edges of blocks, over a copy of the new tokens and the
    few before them that share a block with them.
    """
    b, t = positions.shape
    key, value = selected
    chosen = choose_block_sparse(
        query,
        key,
        value,
        blocks,
        None,
        block_size=block_size,
        scale=scale,
        implementation=implementation,
    )
    if chosen == "xla":
        out, _ = attend_block_positions(
            query,
            key,
            value,
            blocks,
            query_positions=positions,
            block_size=block_size,
            scale=scale,
        )
        return out
    own = (positions // block_size)[..., None, None]
    before, lse_before = block_sparse_attention(
        query,
        key,
        value,
        jnp.where(blocks < own, blocks, -1),
        block_size=block_size,
        scale=scale,
        implementation="triton",
        return_lse=True,
    )
    # The first of a row's new tokens is at the same place for real rows and padding.
    slots = positions[:, :1] + jnp.arange(1 - block_size, t, dtype=jnp.int32)
    near_key, near_value = (
        x.at[jnp.arange(b)[:, None], slots].get(mode="clip") for x in (key, value)
    )
    within, lse_within = dense_attention(
        query,
        near_key,
        near_value,
        window=block_size,
        scale=scale,
        segment_ids=jnp.where(slots < 0, -1, slots // block_size),
        implementation=implementation,
        return_lse=True,
    )
    lse = jnp.logaddexp(lse_before, lse_within)
    weights = jnp.stack([jnp.exp(x - lse) for x in (lse_before, lse_within)], axis=-1)
    return nsa.gated_sum((before, within), weights)
