"""Native sparse attention against loops over the paper's equations in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

import jattn
from jattn.pallas import _triton
from tests.support import (
    assert_equal_up_to_rounding,
    documents,
    normal,
    shard_over_batch,
    temporary_bytes,
)

SIZES = {"kernel_size": 4, "stride": 2, "block_size": 4, "num_blocks": 4}
WINDOWS = {"kernel_size": 4, "stride": 2}


def slow_windows(x, kernel_size, stride):
    """Equation 7 with mean pooling as φ."""
    x = np.asarray(x, np.float64)
    firsts = range(0, x.shape[1] - kernel_size + 1, stride)
    pooled = [x[:, i : i + kernel_size].mean(axis=1) for i in firsts]
    return np.stack(pooled, axis=1) if pooled else x[:, :0]


def slow_softmax(query, keys):
    """Probabilities and log-sum-exp of one query and a list of keys."""
    if not len(keys):
        return np.zeros(0), -np.inf
    logits = keys @ query / np.sqrt(len(query))
    peak = logits.max()
    weights = np.exp(logits - peak)
    return weights / weights.sum(), peak + np.log(weights.sum())


def slow_visible_windows(t, segments, count, kernel_size, stride):
    """Windows whose every token is in t's document and none is after t."""
    covered = [range(i * stride, i * stride + kernel_size) for i in range(count)]
    return [
        i
        for i, window in enumerate(covered)
        if all(s <= t and segments[s] == segments[t] for s in window)
    ]


def slow_selection(
    query,
    key_cmp,
    segments,
    *,
    kernel_size,
    stride,
    block_size,
    num_blocks,
    num_initial=1,
    num_local=2,
):
    """Equations 8 to 11, the indices of equation 9 counted from 1 as in the paper."""
    query, key_cmp = np.asarray(query, np.float64), np.asarray(key_cmp, np.float64)
    b, queries, n, _ = query.shape
    m, k = key_cmp.shape[1:3]
    length = segments.shape[1]
    ratio, overlap = block_size // stride, kernel_size // stride
    blocks = np.full((b, queries, k, num_blocks), -1)
    for row, i, kv_head in np.ndindex(b, queries, k):
        t = length - queries + i
        seen = slow_visible_windows(t, segments[row], m, kernel_size, stride)
        scores = dict.fromkeys(range(1, -(-length // block_size) + 1), 0.0)
        for head in range(kv_head * n // k, (kv_head + 1) * n // k):
            p = np.zeros(m + 1)  # p[1] to p[M]
            p[[w + 1 for w in seen]] = slow_softmax(
                query[row, i, head], key_cmp[row, seen, kv_head]
            )[0]
            for j in scores:
                for a in range(ratio):
                    for c in range(overlap):
                        if 1 <= ratio * j - a - c <= m:
                            scores[j] += p[ratio * j - a - c]
        mine = [s for s in range(t + 1) if segments[row, s] == segments[row, t]]
        allowed = sorted({s // block_size for s in mine})
        forced = {*allowed[:num_initial], *allowed[-num_local:]}
        ranked = sorted(allowed, key=lambda j: (j not in forced, -scores[j + 1], j))
        chosen = sorted(ranked[:num_blocks])
        blocks[row, i, kv_head, : len(chosen)] = chosen
    return blocks


def slow_native(
    query,
    compressed,
    selected,
    window,
    gates,
    *,
    window_size=512,
    segments=None,
    block_indices=None,
    **sizes,
):
    """Equation 5 over the three branches, one query and one head at a time."""
    if segments is None:
        segments = np.zeros(selected[0].shape[:2], int)
    if block_indices is None:
        block_indices = slow_selection(query, compressed[0], segments, **sizes)
    pairs = [
        tuple(np.asarray(x, np.float64) for x in pair)
        for pair in (compressed, selected, window)
    ]
    query, gates = np.asarray(query, np.float64), np.asarray(gates, np.float64)
    b, queries, n, _ = query.shape
    k, v = pairs[1][1].shape[2:]
    length = segments.shape[1]
    out, lse = np.zeros((b, queries, n, v)), np.zeros((b, queries, n, 3))
    for row, i, head in np.ndindex(b, queries, n):
        t, kv_head = length - queries + i, head // (n // k)
        mine = [s for s in range(t + 1) if segments[row, s] == segments[row, t]]
        blocks = block_indices[row, i, head * block_indices.shape[2] // n]
        seen = (
            slow_visible_windows(
                t,
                segments[row],
                pairs[0][0].shape[1],
                sizes["kernel_size"],
                sizes["stride"],
            ),
            [s for s in mine if s // sizes["block_size"] in blocks],
            [s for s in mine if t - s < window_size],
        )
        for branch, (key, value) in enumerate(pairs):
            p, lse[row, i, head, branch] = slow_softmax(
                query[row, i, head], key[row, seen[branch], kv_head]
            )
            gate = gates[row, i, head, branch]
            out[row, i, head] += gate * (p @ value[row, seen[branch], kv_head])
    return out, lse, block_indices


def raw_inputs(seed=0, b=2, t=21, s=None, n=4, k=2, h=8, v=6, dtype=jnp.float32):
    """Query, three pairs of keys and values before compression, and gates."""
    s = s or t
    key, value = (b, s, k, h), (b, s, k, v)
    query, *pairs, gates = normal(
        seed, (b, t, n, h), *[key, value] * 3, (b, t, n, 3), dtype=dtype
    )
    return query, *pairs, jax.nn.sigmoid(gates)


def attend(query, k1, v1, k2, v2, k3, v3, gates, **options):
    """Native sparse attention over mean-pooled windows."""
    sizes = SIZES | options
    pool = functools.partial(
        jattn.nsa_windows, kernel_size=sizes["kernel_size"], stride=sizes["stride"]
    )
    compressed = pool(k1).mean(axis=2), pool(v1).mean(axis=2)
    return jattn.native_sparse_attention(
        query, compressed, (k2, v2), (k3, v3), gates, **sizes
    )


def slow_attend(query, k1, v1, k2, v2, k3, v3, gates, **options):
    sizes = SIZES | options
    windows = sizes["kernel_size"], sizes["stride"]
    compressed = slow_windows(k1, *windows), slow_windows(v1, *windows)
    return slow_native(query, compressed, (k2, v2), (k3, v3), gates, **sizes)


def full(**options):
    """The compiled function, with everything it can return."""
    return jax.jit(
        functools.partial(attend, return_lse=True, return_block_indices=True, **options)
    )


@given(
    b=st.integers(1, 2),
    t=st.integers(1, 26),
    extra=st.integers(0, 20),
    k=st.integers(1, 3),
    g=st.integers(1, 3),
    sizes=st.sampled_from([(4, 2, 8), (8, 2, 8), (3, 3, 3), (2, 1, 4), (4, 4, 8)]),
    forced=st.sampled_from([(1, 2), (0, 1), (2, 1), (1, 3)]),
    free=st.integers(0, 2),
    window_size=st.integers(1, 12),
    packed=st.booleans(),
)
def test_equals_the_equations_for_any_shape(
    b, t, extra, k, g, sizes, forced, free, window_size, packed
):
    s = t + extra
    arguments = raw_inputs(b=b, t=t, s=s, n=k * g, k=k)
    options = dict(zip(("kernel_size", "stride", "block_size"), sizes, strict=True))
    options |= {"num_initial": forced[0], "num_local": forced[1]}
    options |= {"num_blocks": sum(forced) + free, "window_size": window_size}
    segments = documents(s // 3, s - s // 3, batch=b) if packed else None
    out, lse, blocks = full(segment_ids=segments, **options)(*arguments)
    slow_out, slow_lse, slow_blocks = slow_attend(
        *arguments,
        segments=None if segments is None else np.asarray(segments),
        **options,
    )
    np.testing.assert_array_equal(blocks, slow_blocks)
    assert_equal_up_to_rounding(out, slow_out)
    assert_equal_up_to_rounding(lse, slow_lse)


def test_fp64_stays_fp64(x64):
    arguments = raw_inputs(t=40, dtype=jnp.float64)
    out, lse, blocks = full(window_size=7)(*arguments)
    assert out.dtype == lse.dtype == jnp.float64
    slow_out, slow_lse, slow_blocks = slow_attend(*arguments, window_size=7)
    assert_equal_up_to_rounding(out, slow_out, 1e-14)
    assert_equal_up_to_rounding(lse, slow_lse, 1e-14)
    np.testing.assert_array_equal(blocks, slow_blocks)


def test_bf16_keeps_statistics_and_scores_in_fp32():
    query, k1, v1, *rest = raw_inputs(t=40, dtype=jnp.bfloat16)
    pooled = [jattn.nsa_windows(x, **WINDOWS).mean(axis=2) for x in (k1, v1)]
    arguments = query, pooled, rest[0:2], rest[2:4], rest[4]
    function = functools.partial(
        jattn.native_sparse_attention, return_lse=True, return_block_indices=True
    )
    out, lse, blocks = jax.jit(functools.partial(function, **SIZES))(*arguments)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    slow_out, slow_lse, slow_blocks = slow_native(*arguments, **SIZES)
    np.testing.assert_array_equal(blocks, slow_blocks)
    assert_equal_up_to_rounding(out, slow_out, 5e-3)
    assert_equal_up_to_rounding(lse, slow_lse, 1e-6)


def test_a_sequence_shorter_than_a_window_has_no_compressed_tokens():
    (x,) = normal(0, (2, 5, 3, 5))
    assert jattn.nsa_windows(x, kernel_size=6, stride=2).shape == (2, 0, 6, 3, 5)
    out, lse, _ = full()(*raw_inputs(t=3))
    assert np.all(np.isneginf(lse[..., 0]))
    assert np.all(np.isfinite(lse[..., 1:]))
    assert np.all(np.isfinite(out))


def test_no_compressed_tokens_need_no_kernel(monkeypatch):
    """A kernel that was asked for is not needed where there is nothing to read."""
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    query, empty = normal(0, (2, 3, 4, 8), (2, 0, 2, 8))
    out, lse = jattn.compressed_attention(
        query, empty, empty, **WINDOWS, implementation="triton", return_lse=True
    )
    np.testing.assert_array_equal(out, jnp.zeros((2, 3, 4, 8)))
    np.testing.assert_array_equal(lse, jnp.full((2, 3, 4), -jnp.inf))
    blocks = jattn.nsa_select_blocks(query, empty, **SIZES, implementation="triton")
    np.testing.assert_array_equal(blocks[..., 0], 0)
    np.testing.assert_array_equal(blocks[..., 1:], -1)
    with pytest.raises(NotImplementedError, match="no such kernel"):
        jattn.compressed_attention(query, empty, empty, implementation="pallas")


def test_fewer_queries_than_tokens_are_the_last_ones():
    query, key, value = normal(0, (2, 20, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))

    @jax.jit
    def function(query):
        return (
            jattn.compressed_attention(query, key, value, length=20, **WINDOWS),
            jattn.nsa_select_blocks(query, key, length=20, **SIZES),
        )

    whole, last = function(query), function(query[:, 15:])
    assert_equal_up_to_rounding(last[0], whole[0][:, 15:])
    np.testing.assert_array_equal(last[1], whole[1][:, 15:])


@pytest.mark.parametrize("heads", [2, 4])
def test_blocks_can_be_passed_in(heads):
    arguments = raw_inputs(t=30)
    blocks = np.random.default_rng(0).integers(-1, 5, (2, 30, heads, 3))
    out, lse, returned = full(block_indices=jnp.asarray(blocks))(*arguments)
    slow_out, slow_lse, _ = slow_attend(*arguments, block_indices=blocks)
    np.testing.assert_array_equal(returned, blocks)
    assert_equal_up_to_rounding(out, slow_out)
    assert_equal_up_to_rounding(lse, slow_lse)


def test_gradients_equal_finite_differences(x64):
    arguments = raw_inputs(b=1, t=14, n=2, k=1, h=3, v=2, dtype=jnp.float64)
    options = {"kernel_size": 4, "stride": 2, "block_size": 4, "num_blocks": 2}
    options |= {"num_local": 1, "window_size": 3}

    @jax.jit
    def loss(*arguments):
        out, lse = attend(*arguments, return_lse=True, **options)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(finite))

    check_grads(loss, arguments, order=1, modes=["rev"])


def test_selection_passes_no_gradient():
    query, k1, v1, *rest, gates = raw_inputs()
    gates = gates.at[..., 0].set(0)

    @jax.jit
    def loss(k1, v1):
        return jnp.sum(jnp.sin(attend(query, k1, v1, *rest, gates)))

    grads = jax.grad(loss, argnums=(0, 1))(k1, v1)
    jax.tree.map(lambda grad: np.testing.assert_array_equal(grad, 0), grads)


def test_chunks_change_nothing(monkeypatch):
    arguments = raw_inputs(b=1, t=61)

    def value_and_grads():
        @jax.jit
        def loss(*arguments):
            result = attend(
                *arguments,
                window_size=5,
                return_lse=True,
                return_block_indices=True,
            )
            return jnp.sum(jnp.sin(result[0])), result

        argnums = tuple(range(len(arguments)))
        return jax.grad(loss, argnums=argnums, has_aux=True)(*arguments)

    whole = value_and_grads()
    monkeypatch.setattr("jattn.ops._common.CHUNK_BYTES", 2**10)
    chunked = value_and_grads()
    jax.tree.map(assert_equal_up_to_rounding, chunked, whole)


def test_the_future_changes_nothing_bit_for_bit():
    first, second = raw_inputs(t=40), raw_inputs(seed=1, t=40)
    cut = 23
    changed = [
        jnp.concatenate([x[:, :cut], y[:, cut:]], axis=1)
        for x, y in zip(first, second, strict=True)
    ]
    function = full(window_size=6)
    before, after = function(*first), function(*changed)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, :cut], y[:, :cut])
        assert np.any(x[:, cut:] != y[:, cut:])


def test_documents_never_see_each_other_bit_for_bit():
    """Starts and ends of documents off the grid of windows and blocks."""
    first, second = raw_inputs(t=43), raw_inputs(seed=1, t=43)
    function = full(segment_ids=documents(13, 17, 13, batch=2))
    changed = [
        jnp.concatenate([y[:, :13], x[:, 13:30], y[:, 30:]], axis=1)
        for x, y in zip(first, second, strict=True)
    ]
    before, after = function(*first), function(*changed)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, 13:30], y[:, 13:30])
    assert np.any(before[0][:, 30:] != after[0][:, 30:])


def test_packed_documents_equal_documents_alone():
    """A document that starts on a block boundary is as it would be in a row alone."""
    arguments = raw_inputs(t=48)
    out, lse, blocks = full(segment_ids=documents(16, 32, batch=2))(*arguments)
    function = full()
    for start, stop in [(0, 16), (16, 48)]:
        alone = function(*(x[:, start:stop] for x in arguments))
        assert_equal_up_to_rounding(out[:, start:stop], alone[0])
        assert_equal_up_to_rounding(lse[:, start:stop], alone[1])
        moved = jnp.where(alone[2] < 0, -1, alone[2] + start // SIZES["block_size"])
        np.testing.assert_array_equal(blocks[:, start:stop], moved)


def test_same_input_same_bits():
    arguments = raw_inputs(t=33)
    gradient = jax.jit(
        jax.grad(lambda *a: jnp.sum(jnp.sin(attend(*a))), tuple(range(8)))
    )
    chex.assert_trees_all_equal(gradient(*arguments), gradient(*arguments))


def test_long_sequences_do_not_build_a_square():
    heads, length = 16, 8192
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    pair = [shape((1, length, 4, 64))] * 2
    arguments = [
        shape((1, length, heads, 64)),
        *pair * 3,
        shape((1, length, heads, 3)),
    ]
    function = functools.partial(
        attend, kernel_size=32, stride=16, block_size=64, num_blocks=16
    )
    needed = temporary_bytes(function, *arguments)
    assert needed < 400 * 2**20
    assert needed < heads * length**2 * 4 / 10


@pytest.mark.parametrize("packed", [False, True])
def test_reading_every_block_is_dense_attention(packed):
    arguments = raw_inputs(t=21)
    options = {"num_blocks": 6}  # as many as 21 tokens have
    if packed:
        options["segment_ids"] = documents(8, 13, batch=2)
    out, lse, blocks = full(**options)(*arguments)
    key_cmp = jattn.nsa_windows(arguments[1], **WINDOWS).mean(axis=2)
    chosen = jattn.nsa_select_blocks(arguments[0], key_cmp, **SIZES | options)
    np.testing.assert_array_equal(blocks, chosen)
    expected = full(**options, block_indices=chosen)(*arguments)
    chex.assert_trees_all_close((out, lse), expected[:2], rtol=1e-5, atol=1e-6)


def test_transformations_agree():
    arguments = raw_inputs(t=17)
    jitted = jax.jit(attend)(*arguments)
    mapped = jax.jit(jax.vmap(lambda *a: attend(*(x[None] for x in a))[0]))(*arguments)
    sharded = shard_over_batch(attend)(*arguments)
    chex.assert_trees_all_close(jitted, mapped, sharded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stride": 3}, ValueError, "stride must divide kernel_size; got stride=3"),
        ({"stride": 0}, ValueError, "stride must be a positive integer; got 0"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be a positive integer"),
        ({"block_size": 2}, ValueError, "at least kernel_size; got block_size=2"),
        ({"block_size": 9}, ValueError, "multiple of stride .* got block_size=9"),
        ({"num_blocks": 2}, ValueError, r"num_local; got 2 < 1 \+ 2"),
        ({"num_local": 0}, ValueError, "num_local must be a positive integer; got 0"),
        ({"num_initial": -1}, ValueError, "num_initial must be an integer >= 0"),
        ({"window_size": 0}, ValueError, "window_size must be a positive integer"),
        ({"kernel_size": None}, ValueError, "kernel_size must be .*; got None"),
        ({"stride": None}, ValueError, "stride must be a positive integer; got None"),
        ({"block_size": None}, ValueError, "block_size must be .*; got None"),
        ({"num_blocks": None}, ValueError, "num_blocks must be .*; got None"),
        ({"num_local": None}, ValueError, "num_local must be .*; got None"),
        ({"num_initial": 0.5}, ValueError, "num_initial must be an integer >= 0"),
        ({"window_size": None}, ValueError, "window_size must be .*; got None"),
        ({"scale": "0.1 or so"}, ValueError, "scale must be a number"),
        ({"implementation": "cuda"}, ValueError, "implementation must be"),
        ({"implementation": "pallas"}, NotImplementedError, "compressed_attention"),
        ({"segment_ids": jnp.zeros((2, 3), jnp.int32)}, ValueError, "segment_ids"),
        ({"block_indices": jnp.zeros((2, 21, 3, 1), int)}, ValueError, "block_indices"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(functools.partial(attend, **options), *raw_inputs())


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (2, 21, 3, 8), "N=3, K=2"),
        (0, (2, 22, 4, 8), "T=22 positions and the sequence only S=21"),
        (1, (2, 19, 2, 8), r"compressed value must have shape \[B=2, M=8, K=2, V=6\]"),
        (3, (2, 21, 2, 7), r"selected key must have shape \[B=2, S, K, H=8\]"),
        (5, (2, 20, 2, 8), r"window key must have shape \[B=2, S=21, K=2, H=8\]"),
        (6, (2, 21, 2, 5), r"window value must have shape \[B=2, S=21, K=2, V=6\]"),
        (7, (2, 21, 4, 2), r"gates must have shape \[B=2, T=21, N=4, 3\]"),
    ],
)
def test_wrong_shapes_are_named(position, shape, message):
    arguments = list(raw_inputs())
    arguments[position] = jnp.zeros(shape)
    if position == 0:
        arguments[7] = jnp.zeros((*shape[:3], 3))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(attend, *arguments)


def test_compressed_tokens_must_fit_the_length():
    query, key = normal(0, (1, 5, 2, 8), (1, 9, 1, 8))
    with pytest.raises(ValueError, match=r"M=9 compressed tokens; .*length=5 has 1"):
        jattn.compressed_attention(query, key, key, **WINDOWS)
    with pytest.raises(ValueError, match="length=30 has 14"):
        jattn.nsa_select_blocks(query, key, length=30, **SIZES)
    with pytest.raises(ValueError, match="floating-point dtype; got int32"):
        jattn.compressed_attention(
            query, key.astype(jnp.int32), key, length=20, **WINDOWS
        )


def separate():
    """Arguments of native_sparse_attention by name, of S = 21 tokens and M = 9."""
    query, k1, v1, k2, v2, k3, v3, gates = raw_inputs()
    return {
        "query": query,
        "compressed": (k1[:, :9], v1[:, :9]),
        "selected": (k2, v2),
        "window": (k3, v3),
        "gates": gates,
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda x: {"selected": x["selected"][0]}, "selected must be a pair of arrays"),
        (lambda x: {"selected": (*x["selected"], 0)}, "selected must be a pair"),
        (lambda x: {"window": (x["query"], None)}, r"window must be .* None"),
        (
            lambda x: {"compressed": None},
            "compressed must be a pair .* got shapes None",
        ),
        (
            lambda x: {"compressed": [y[:, 1:] for y in x["compressed"]]},
            "^compressed key has M=8 compressed tokens; a sequence of length=21 has 9 "
            "with kernel_size=4 and stride=2$",
        ),
        (
            lambda x: {"compressed": [y.astype(jnp.bfloat16) for y in x["compressed"]]},
            "one dtype, the output's; got selected value float32, .*ed value bfloat16",
        ),
        (
            lambda x: {"window": (x["window"][0].astype(int), x["window"][1])},
            "window key must have a floating-point dtype; got int32",
        ),
    ],
)
def test_wrong_branches_are_named(changed, message):
    arguments = separate()
    with pytest.raises(ValueError, match=message):
        jattn.native_sparse_attention(**arguments | changed(arguments), **SIZES)


def test_any_integer_is_a_size(x64):
    """Also one of numpy's, which would make int64 of int32 if it were left as it is."""
    sizes = {"kernel_size": 4, "stride": 2, "block_size": 4, "num_blocks": 2}
    sizes |= {"num_initial": 0, "num_local": 1, "window_size": 5}
    function = functools.partial(
        jattn.native_sparse_attention, **separate(), return_block_indices=True
    )
    expected = function(**sizes)
    actual = function(**{name: np.int64(size) for name, size in sizes.items()})
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(actual, expected)
    query, (key, value) = separate()["query"], separate()["compressed"]
    windows = {"kernel_size": np.int64(4), "stride": np.int64(2)}
    jattn.compressed_attention(query, key, value, **windows, length=np.int64(21))
    assert jattn.nsa_windows(query, **windows).shape == (2, 9, 4, 4, 8)
    assert jattn.nsa_window_means(query, **windows).shape == (2, 9, 4, 8)


def test_a_traced_scale_is_refused():
    arguments = separate()

    @jax.jit
    def attend(scale):
        return jattn.native_sparse_attention(**arguments, **SIZES, scale=scale)

    message = "scale must be a number known when the function is traced; got .*float32"
    with pytest.raises(ValueError, match=message):
        attend(0.5)
