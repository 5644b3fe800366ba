"""Selective Attention inside `jax.shard_map`, over heads or over the sequence.

Both functions are called by every device of a mesh axis with its own part of the
arrays, and together give what `selective_attention` gives on one device. Where P is
`jax.sharding.PartitionSpec` and a mesh has an axis "x", heads are sharded by

    jax.shard_map(
        functools.partial(selective_attention_over_heads, axis_name="x"),
        mesh=mesh,
        in_specs=P(None, None, "x"),
        out_specs=P(None, None, "x"),
    )(query, key, value)

and the sequence by

    jax.shard_map(
        functools.partial(selective_attention_over_sequence, axis_name="x"),
        mesh=mesh,
        in_specs=P(None, "x"),
        out_specs=P(None, "x"),
    )(query, key, value)

What else is sharded, such as the batch over another axis, makes no difference.
"""

import jax
import jax.numpy as jnp

from jattn.ops import _common
from jattn.ops.selective import selective_attention


def selective_attention_over_heads(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    axis_name: str,
    budget: int | jax.Array | None = None,
    memory_tau: float | None = None,
    skip_error: float = 0.0,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: _common.Implementation | None = None,
    return_lse: bool = False,
) -> _common.AttentionOutput:
    """Selective attention of one device's heads; head 0 of the first device selects.

    One query head and one kv head go from the first device to all others. They take
    part in the attention of every device as one kv head more, which is left out of the
    output: of K kv heads on a device, that is 1 / K more work.

    Args:
      query: [B, T, N, H], the heads of this device, in order of devices.
      key: [B, T, K, H], the kv heads of this device's query heads, where K divides N.
      value: [B, T, K, V].
      axis_name: Mesh axis over which heads are sharded.
      budget: As of `jattn.selective_attention`, as is all that follows.
      memory_tau: Tau of the memory term.
      skip_error: Part of the softmax weight that may be left out.
      scale: Factor of the logits.
      segment_ids: int [B, T], the same on all devices.
      implementation: "xla", "pallas", "triton", or None.
      return_lse: Also return the log-sum-exp.

    Returns:
      [B, T, N, V], the output of this device's heads; with return_lse also [B, T, N]
      of this device's heads and with memory_tau also [B, T], the same on all devices.

    Raises:
      ValueError: As `jattn.selective_attention`.
      NotImplementedError: The requested implementation does not support the call.
    """
    sizes = _common.check_attention(query, key, value, segment_ids)
    group = sizes["N"] // sizes["K"]
    selecting = _from_first(query[:, :, :1], axis_name)
    selected = _from_first(key[:, :, :1], axis_name)
    # One kv head more in front, whose group holds the selecting head and zeros.
    front = jnp.pad(selecting, [(0, 0), (0, 0), (0, group - 1), (0, 0)])
    out, lse, *memory = selective_attention(
        jnp.concatenate([front, query], axis=2),
        jnp.concatenate([selected, key], axis=2),
        jnp.pad(value, [(0, 0), (0, 0), (1, 0), (0, 0)]),
        budget=budget,
        memory_tau=memory_tau,
        skip_error=skip_error,
        scale=scale,
        segment_ids=segment_ids,
        implementation=implementation,
        return_lse=True,
    )
    # All devices have the same M; taking that of one says so to shard_map.
    memory = [_from_first(m, axis_name) for m in memory]
    lse = [lse[:, :, group:]] if return_lse else []
    results = (out[:, :, group:], *lse, *memory)
    return results if len(results) > 1 else results[0]


def selective_attention_over_sequence(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    axis_name: str,
    memory_tau: float | None = None,
    skip_error: float = 0.0,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: _common.Implementation | None = None,
    return_lse: bool = False,
) -> _common.AttentionOutput:
    """Selective attention of one device's queries to the keys of all devices.

    Devices hold equal parts of the sequence, in order. Each gathers the keys and values
    of all, and sums what its queries select of each key; an exclusive scan of these
    sums over the devices is the row of F from which a device goes on. A device so
    holds the keys and values of the whole sequence, and for each key one fp32 number
    of each device. The last device, whose queries see the most, takes longest.

    There is no budget: what a query drops depends on all that the queries before it
    dropped, so that the devices would work one after the other.

    Args:
      query: [B, T, N, H], the part of this device.
      key: [B, T, K, H], where K divides N.
      value: [B, T, K, V].
      axis_name: Mesh axis over which the sequence is sharded.
      memory_tau: As of `jattn.selective_attention`, as is all that follows.
      skip_error: Part of the softmax weight that may be left out.
      scale: Factor of the logits.
      segment_ids: int [B, T], the part of this device; documents may go on from one
        device to the next.
      implementation: "xla", "pallas", "triton", or None.
      return_lse: Also return the log-sum-exp.

    Returns:
      [B, T, N, V], the part of this device; with return_lse also [B, T, N] and with
      memory_tau also [B, T].

    Raises:
      ValueError: As `jattn.selective_attention`, or T differs between query and key.
      NotImplementedError: The requested implementation does not support the call.
    """
    sizes = _common.check_attention(query, key, value, segment_ids)
    b, t = sizes["B"], sizes["T"]
    if t != sizes["S"]:
        raise ValueError(
            "each device needs the queries of its keys and no others; got "
            f"T={t}, S={sizes['S']}"
        )
    scale = _common.default_scale(scale, sizes["H"])
    index, devices = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)

    def gather(x):  # [B, T, ...] -> [B, S, ...]
        return jax.lax.all_gather(x, axis_name, axis=1, tiled=True)

    # The queries of an operation are those of its last keys. So the parts rotate until
    # this device's is the last, and those after it, which are then in front, become a
    # document of their own, which ends before that of the first token begins.
    def rotate(x):  # [B, S, ...]
        return jnp.roll(x, -(index + 1) * t, axis=1)

    if segment_ids is None:
        segment_ids = jnp.zeros((b, t), jnp.int32)
    segments = gather(segment_ids)
    in_front = jnp.arange(devices * t) < (devices - 1 - index) * t
    segments = jnp.where(in_front, segments[:, :1] + 1, rotate(segments))
    keys = rotate(gather(key))
    sums = _selected(
        query,
        keys,
        _common.document_starts(segments),
        scale=scale,
        dtype=_common.statistics_dtype(query, key, value),
    )
    # What the queries of each earlier device selected, by position in the sequence.
    sums = jax.lax.all_gather(
        jnp.roll(sums, (index + 1) * t, axis=1), axis_name
    )  # [devices, B, S]
    earlier = jnp.arange(devices) < index
    first_row = jnp.sum(sums, axis=0, where=earlier[:, None, None])
    return selective_attention(
        query,
        keys,
        rotate(gather(value)),
        initial_mask=rotate(first_row),
        memory_tau=memory_tau,
        skip_error=skip_error,
        scale=scale,
        segment_ids=segments,
        implementation=implementation,
        return_lse=return_lse,
    )


def _from_first(x, axis_name):
    """The first device's x, on every device."""
    is_first = jax.lax.axis_index(axis_name) == 0
    return jax.lax.psum(jnp.where(is_first, x, 0), axis_name)


def _selected(query, key, starts, *, scale, dtype):
    """How strongly all queries, those of the last T keys, select each: [B, S]."""
    b, t = query.shape[:2]
    s = key.shape[1]
    keys = jnp.arange(s)

    def add(sums, query, positions, starts):
        logits = scale * jnp.einsum(
            "bth,bsh->bts",
            query,
            key[:, :, 0],
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )
        # A padded query is at position 0 and selects nothing.
        selects = (starts[..., None] < keys) & (keys < positions[..., None])
        selected = jnp.where(selects, jax.nn.relu(logits), 0)
        return sums + jnp.sum(selected, axis=1), ()

    # A sum that differs between devices, as one that is carried along has to.
    zero = jnp.zeros_like(key[:, :, 0, 0], dtype)
    positions = jnp.broadcast_to(keys[s - t :], (b, t))
    sums, _ = _common.scan_query_chunks(
        add,
        zero,
        query[:, :, 0],
        positions,
        starts[:, s - t :],
        chunk=_common.chunk_length(t, b * s * jnp.dtype(dtype).itemsize),
    )
    return sums
