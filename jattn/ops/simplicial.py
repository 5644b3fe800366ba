"""2-simplicial attention: softmax over pairs of keys (arXiv 2507.02754)."""

from typing import Literal

import jax
import jax.numpy as jnp

from jattn.ops import _common
from jattn.pallas._sharding import vary_alike
from jattn.pallas.simplicial import unsupported, unsupported_mosaic

Form = Literal["trilinear", "determinant"]
Windows = tuple[int | None, int | None]

# Queries that read one stretch of the larger window together. A stretch is one key
# less than this longer than the window, so few queries waste little; but their pairs
# with the smaller window are the rows of a matrix product, which should be many.
TILE = 32


def two_simplicial_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key2: jax.Array,
    value2: jax.Array,
    *,
    windows: Windows = (512, 32),
    form: Form = "trilinear",
    key2_bias: float = 0.0,
    value2_bias: float = 0.0,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: _common.Implementation | None = None,
    return_lse: bool = False,
) -> _common.AttentionOutput:
    """Causal attention of each query to pairs of keys, one key from each of two sets.

    ``o_i = Σ_jk softmax_jk(scale A_ijk) (v_j ∘ v'_k)`` with jointly normalised pairs.
    The trilinear form is ``A_ijk = Σ_d q_id k_jd k'_kd``. The determinant form cuts
    the H features into triples l and is ``A_ijk = Σ_l det[q_i^l, k_j^l, k'_k^l]``,
    which a common rotation of all triples leaves as it is; what H mod 3 leaves over
    enters as in the trilinear form.

    Query i sees the pair (j, k) where ``0 <= i - j < windows[0]``,
    ``0 <= i - k < windows[1]``, and all three belong to the same document. When T < S
    the queries are the last T positions. The cost is T * windows[0] * windows[1].

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], where K divides N; G = N / K query heads share a kv head.
      value: [B, S, K, V].
      key2: [B, S, K, H], the keys k' of the second set.
      value2: [B, S, K, V], the values v' of the second set.
      windows: Keys a query sees of the first and of the second set, itself included;
        None for all before it.
      form: "trilinear" or "determinant".
      key2_bias: Constant added to key2. With 1 / H, and value2_bias 1, small key2 and
        value2 give nearly ordinary attention to the first set. Sums are rounded to the
        dtype of key2, unless a kernel computes the result and windows[1] is at most
        windows[0]: then they multiply the queries unrounded.
      value2_bias: Constant added to value2.
      scale: Factor of the logits; H ** -0.5 if None.
      segment_ids: int [B, S], the document each key belongs to. Documents are
        contiguous and never see each other.
      implementation: "xla", "pallas", "triton", or None for the fastest that
        supports the call.
      return_lse: Also return the log-sum-exp of the logits over the pairs.

    Returns:
      [B, T, N, V] in value's dtype, and with return_lse also [B, T, N] in fp32
      (natural log; fp64 for fp64 inputs).

    Raises:
      ValueError: Shapes or dtypes do not fit, windows are not two positive integers
        or None, or form is unknown.
      NotImplementedError: The requested implementation does not support the call.
    """
    sizes = _common.check_attention(query, key, value, segment_ids)
    _common.bind_shapes(
        ("key", key, "BSKH"),
        ("value", value, "BSKV"),
        ("key2", key2, "BSKH"),
        ("value2", value2, "BSKV"),
    )
    _common.check_floating(key2=key2, value2=value2)
    check_options(windows, form)
    visible = None
    if segment_ids is not None:
        visible = jnp.arange(1, sizes["S"] + 1) - _common.document_starts(segment_ids)
        visible = visible[:, sizes["S"] - sizes["T"] :]
    out, lse = attend_pairs(
        query,
        key,
        value,
        key2,
        value2,
        visible=visible,
        windows=windows,
        form=form,
        key2_bias=key2_bias,
        value2_bias=value2_bias,
        scale=_common.default_scale(scale, sizes["H"]),
        implementation=implementation,
    )
    return (out, lse) if return_lse else out


def check_options(windows: Windows, form: str) -> None:
    """Raises ValueError unless windows are two positive ones and form is known."""
    if not isinstance(windows, tuple | list) or len(windows) != 2:
        raise ValueError(
            "windows must be a pair, of the first and of the second set of keys; got "
            f"{windows!r}"
        )
    _common.check_positive(**{f"windows[{i}]": w for i, w in enumerate(windows)})
    if form not in ("trilinear", "determinant"):
        raise ValueError(f"form must be 'trilinear' or 'determinant'; got {form!r}")


def attend_pairs(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key2: jax.Array,
    value2: jax.Array,
    *,
    visible: jax.Array | None,
    windows: Windows,
    form: Form,
    key2_bias: float,
    value2_bias: float,
    scale: float,
    implementation: _common.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """2-simplicial attention whose two sets may be of different length.

    The last T keys of either set stand at the positions of the queries. Decoding
    calls this with the end of each window and the new tokens.

    Args:
      query: [B, T, N, H].
      key: [B, S1, K, H], S1 >= T.
      value: [B, S1, K, V].
      key2: [B, S2, K, H], S2 >= T.
      value2: [B, S2, K, V].
      visible: int [B, T], how many keys before and at its own position a query may
        see at most, whatever the windows; 0 for none. None for all there are, of
        sets of the same length.
      windows: As in two_simplicial_attention, and so are the others.
      form: "trilinear" or "determinant".
      key2_bias: Constant added to key2.
      value2_bias: Constant added to value2.
      scale: Factor of the logits.
      implementation: As in two_simplicial_attention.

    Returns:
      Output [B, T, N, V] and log-sum-exp [B, T, N].
    """
    dtype = _common.statistics_dtype(query, key, value, key2, value2)
    # For each key of one set this is plain attention, by the query times that key, to
    # the other set. The set with the smaller window is the one that multiplies.
    window, window2 = (
        min(limit or x.shape[1], x.shape[1])
        for limit, x in zip(windows, (key, key2), strict=True)
    )
    multiplies = window2 <= window
    dtypes = (key2.dtype, value2.dtype) if multiplies else (key.dtype, value.dtype)
    if key2_bias:
        key2 = key2.astype(dtype if multiplies else key2.dtype) + key2_bias
    if value2_bias:
        value2 = value2.astype(dtype if multiplies else value2.dtype) + value2_bias
    if form == "determinant":
        query, key, key2 = _determinant_factors(query, key, key2)
    if multiplies:
        few, few_keys, few_values = window2, key2, value2
        many, many_keys, many_values = window, key, value
    else:
        few, few_keys, few_values = window, key, value
        many, many_keys, many_values = window2, key2, value2
    arrays = (query, few_keys, few_values, many_keys, many_values)
    limits = {"few_window": few, "many_window": many}
    chosen = _common.choose_implementation(
        "two_simplicial_attention",
        implementation,
        [
            (
                "pallas",
                unsupported_mosaic(
                    *arrays, **limits, scale=scale, limited=visible is not None
                ),
            ),
            ("triton", unsupported(*arrays, **limits, scale=scale)),
        ],
    )
    if chosen != "xla":
        # Triton, which gradients need in any case, is an optional dependency.
        from jattn.pallas.simplicial import mosaic, triton

        return triton.attend(
            *vary_alike(*arrays, visible),
            **limits,
            scale=scale,
            forward=(mosaic if chosen == "pallas" else triton).forward,
        )

    b, t, n, _ = query.shape
    kv_heads, width = value.shape[2:]
    few_keys, few_values = few_keys.astype(dtypes[0]), few_values.astype(dtypes[1])
    if visible is None:
        visible = jnp.broadcast_to(jnp.arange(1, t + 1) + key.shape[1] - t, (b, t))

    # Three arrays like the logits, two like the expanded queries and their outputs.
    per_pair = 3 * (many + TILE) + 2 * query.shape[-1] + 2 * width
    chunk = _common.chunk_length(t, b * n * few * per_pair * dtype.itemsize)
    tile = min(TILE, chunk)
    count = -(-t // tile)
    tail = count * tile - t

    def in_tiles(x):  # [B, T, ...] -> [B, count, tile, ...]
        x = jnp.pad(x, [(0, 0), (0, tail)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(b, count, tile, *x.shape[2:])

    def aligned(x, window):  # -> [B, window - 1 + count * tile, ...]
        # The window of query i then starts at i.
        x = x[:, max(0, x.shape[1] - t - window + 1) :]
        head = t + window - 1 - x.shape[1]
        return jnp.pad(x, [(0, 0), (head, tail), (0, 0), (0, 0)])

    few_keys, few_values = aligned(few_keys, few), aligned(few_values, few)
    many_keys, many_values = aligned(many_keys, many), aligned(many_values, many)
    span = tile + many - 1
    in_tile, in_span = jnp.arange(tile), jnp.arange(span)
    # Steps back from each query of a tile to each key of its stretch, [tile, span].
    many_distance = in_tile[:, None] + many - 1 - in_span
    few_distance = few - 1 - jnp.arange(few)

    def attend(query, visible, starts):  # i of tiles, c of a tile, w of few, s of span
        starts = starts[0]
        grouped = query.reshape(*query.shape[:3], kv_heads, n // kv_heads, -1)

        def few_of(x):  # -> [B, tiles, tile, few, K, *]
            stretch = _stretches(x, starts, tile + few - 1, axis=1)
            return jnp.moveaxis(
                _stretches(stretch, jnp.arange(few), tile, axis=2), 2, 3
            )

        expanded = grouped[:, :, :, None] * few_of(few_keys)[..., None, :]
        logits = scale * jnp.einsum(
            "bicwkgh,biskh->bikgcws",
            expanded,
            _stretches(many_keys, starts, span, axis=1),
            preferred_element_type=dtype,
        )
        reach = visible[:, :, None, None, :, None]  # [B, tiles, 1, 1, tile, 1]
        mask = (many_distance >= 0) & (many_distance < jnp.minimum(many, reach))
        probabilities, lse = _common.masked_softmax(logits, mask[..., None, :])
        attended = jnp.einsum(
            "bikgcws,biskv->bikgcwv",
            probabilities.astype(value.dtype),
            _stretches(many_values, starts, span, axis=1),
            preferred_element_type=dtype,
        )
        weights, lse = _common.masked_softmax(lse, few_distance < reach)
        factors = jnp.moveaxis(few_of(few_values), 4, 2)[:, :, :, None]
        out = jnp.sum(weights[..., None] * attended * factors, axis=-2)
        return [
            jnp.moveaxis(x, 4, 2).reshape(*query.shape[:3], n, *x.shape[5:])
            for x in (out.astype(value.dtype), lse)
        ]

    out, lse = _common.map_query_chunks(
        attend,
        in_tiles(query),
        in_tiles(visible),
        jnp.arange(0, count * tile, tile)[None],
        chunk=chunk // tile,
    )
    return (
        out.reshape(b, count * tile, n, width)[:, :t],
        lse.reshape(b, count * tile, n)[:, :t],
    )


def _stretches(x, starts, length, axis):
    """Stretches of x of that length from each start, stacked in front of axis."""
    return jax.vmap(
        lambda start: jax.lax.dynamic_slice_in_dim(x, start, length, axis),
        out_axes=axis,
    )(starts)


def _determinant_factors(query, key, key2):
    """Vectors whose trilinear product is the sum of the triples' determinants.

    ``det[a, b, c] = Σ a ∘ (b2, b3, b1) ∘ (c3, c1, c2) - a ∘ (b3, b1, b2) ∘ (c2, c3,
    c1)``: two trilinear terms, laid side by side. Features after the last triple are
    appended as they are.
    """
    last = query.shape[-1] // 3 * 3

    def turned(x, steps):  # each triple's entries, moved to the left
        triples = x[..., :last].reshape(*x.shape[:-1], -1, 3)
        return jnp.roll(triples, -steps, axis=-1).reshape(*x.shape[:-1], last)

    def side_by_side(*parts, rest):
        return jnp.concatenate([*parts, rest[..., last:]], axis=-1)

    return (
        side_by_side(query[..., :last], -query[..., :last], rest=query),
        side_by_side(turned(key, 1), turned(key, 2), rest=key),
        side_by_side(turned(key2, 2), turned(key2, 1), rest=key2),
    )
