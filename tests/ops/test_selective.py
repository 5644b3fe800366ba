"""Selective Attention against loops in float64, and its contract."""

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
from tests.support import (
    assert_equal_up_to_rounding,
    documents,
    normal,
    shard_over_batch,
    temporary_bytes,
)


def qkv(seed=0, b=2, t=9, s=None, n=4, k=2, h=8, v=6, dtype=jnp.float32):
    s = s or t
    return normal(seed, (b, t, n, h), (b, s, k, h), (b, s, k, v), dtype=dtype)


def document_start(segments, row, i):
    """Position of the first token of the document of token i."""
    if segments is None:
        return 0
    return next(
        j
        for j in range(i, -1, -1)
        if j == 0 or segments[row, j - 1] != segments[row, i]
    )


def slow_mask(query, key, segments=None, scale=None):
    """F[i, j]: the sum over queries t with j < t < i, one number at a time."""
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    b, t, _, h = query.shape
    scale = h**-0.5 if scale is None else scale
    mask = np.zeros((b, t, t))
    for row, i, j in np.ndindex(b, t, t):
        for between in range(j + 1, i):
            start = document_start(segments, row, between)
            if start < j:
                logit = scale * query[row, between, 0] @ key[row, j, 0]
                mask[row, i, j] += max(logit, 0)
    return mask


def slow_stream(mask, budget=None, segments=None):
    """The keys each query of each row holds, one query after the other."""
    mask = np.asarray(mask)
    rows = []
    for row in range(len(mask)):
        held, history = [], []
        for i in range(mask.shape[1]):
            start = document_start(segments, row, i)
            if start == i:
                held = []
            if budget is not None and len(held) == budget:
                forgotten = max(mask[row, i, j] for j in held if j != start)
                # Held keys are in order of age.
                held.remove(
                    next(j for j in held if j != start and mask[row, i, j] == forgotten)
                )
            held.append(i)
            history.append(list(held))
        rows.append(history)
    return rows


def slow_attention(query, key, value, budget=None, segments=None, scale=None):
    """Softmax(L - F) V over what a query holds, all queries and keys given."""
    mask = slow_mask(query, key, segments, scale)
    held = slow_stream(mask, budget, segments)
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    b, t, n, h = query.shape
    scale = h**-0.5 if scale is None else scale
    group = n // key.shape[2]
    out, lse = np.zeros((b, t, n, value.shape[3])), np.zeros((b, t, n))
    for row, i, head in np.ndindex(b, t, n):
        seen = held[row][i]
        logits = scale * key[row, seen, head // group] @ query[row, i, head]
        weights = np.exp(logits - mask[row, i, seen])
        lse[row, i, head] = np.log(weights.sum())
        out[row, i, head] = weights / weights.sum() @ value[row, seen, head // group]
    return out, lse


def slow_memory(mask, tau, segments=None, budget=None):
    """M of every query."""
    mask = np.asarray(mask)
    held = slow_stream(mask, budget, segments)
    b, t, _ = mask.shape
    memory = np.zeros((b, t))
    for row, i in np.ndindex(b, t):
        seen = held[row][i]
        memory[row, i] = sum(1 - min(mask[row, i, j], tau) / tau for j in seen)
    return memory


def slow_eviction(mask, budget, segments=None):
    held = slow_stream(mask, budget, segments)
    b, t, _ = np.shape(mask)
    eviction = np.full((b, t), t)
    for row, j in np.ndindex(b, t):
        for i in range(j, t):
            if j not in held[row][i]:
                eviction[row, j] = i
                break
    return eviction


@given(
    b=st.integers(1, 2),
    t=st.integers(1, 13),
    extra=st.integers(0, 4),
    k=st.integers(1, 3),
    g=st.integers(1, 3),
    packed=st.booleans(),
    scale=st.sampled_from([None, 0.7]),
)
def test_equals_the_loop_for_any_shape(b, t, extra, k, g, packed, scale):
    s = t + extra
    query, key, value = qkv(b=b, t=s, n=k * g, k=k)
    segments = documents(s // 2, s - s // 2, batch=b) if packed else None
    slow = slow_mask(query, key, segments, scale)
    options = {"scale": scale, "segment_ids": segments}
    if extra:
        options["initial_mask"] = jnp.asarray(slow[:, extra], jnp.float32)

    @jax.jit
    def compute(query, key, value):
        mask = jattn.selection_mask(query, key, **options)
        most = jattn.selective_memory(mask, tau=0.8, segment_ids=segments)
        return (
            mask,
            most,
            *jattn.selective_attention(
                query, key, value, return_lse=True, memory_tau=0.8, **options
            ),
        )

    mask, most, out, lse, memory = compute(query[:, extra:], key, value)
    assert mask.dtype == lse.dtype == memory.dtype == jnp.float32
    slow_out, slow_lse = slow_attention(query, key, value, None, segments, scale)
    assert_equal_up_to_rounding(mask, slow[:, extra:])
    assert_equal_up_to_rounding(out, slow_out[:, extra:])
    assert_equal_up_to_rounding(lse, slow_lse[:, extra:])
    assert_equal_up_to_rounding(memory, slow_memory(slow, 0.8, segments)[:, extra:])
    assert_equal_up_to_rounding(most, np.max(memory, axis=1))


@given(
    t=st.sampled_from([2, 14]),
    budget=st.integers(2, 8),
    packed=st.booleans(),
)
def test_a_budget_equals_streaming_token_by_token(t, budget, packed):
    query, key, value = qkv(seed=budget, t=t)
    segments = documents(t // 3, t - t // 3, batch=2) if packed else None
    mask = slow_mask(query, key, segments)

    @jax.jit
    def compute(query, key, value, mask):
        options = {"budget": budget, "segment_ids": segments}
        return jattn.selective_eviction(mask, **options), *jattn.selective_attention(
            query, key, value, return_lse=True, memory_tau=0.8, **options
        )

    eviction, out, lse, memory = compute(
        query, key, value, jnp.asarray(mask, jnp.float32)
    )
    assert eviction.dtype == jnp.int32
    np.testing.assert_array_equal(eviction, slow_eviction(mask, budget, segments))
    slow_out, slow_lse = slow_attention(query, key, value, budget, segments)
    assert_equal_up_to_rounding(out, slow_out)
    assert_equal_up_to_rounding(lse, slow_lse)
    assert_equal_up_to_rounding(memory, slow_memory(mask, 0.8, segments, budget))


def test_fp64_stays_fp64(x64):
    query, key, value = qkv(dtype=jnp.float64)
    mask = jattn.selection_mask(query, key)
    out, lse, memory = jattn.selective_attention(
        query, key, value, return_lse=True, memory_tau=1.0
    )
    assert mask.dtype == out.dtype == lse.dtype == memory.dtype == jnp.float64
    slow_out, slow_lse = slow_attention(query, key, value)
    assert_equal_up_to_rounding(mask, slow_mask(query, key), 1e-14)
    assert_equal_up_to_rounding(out, slow_out, 1e-14)
    assert_equal_up_to_rounding(lse, slow_lse, 1e-14)
    assert_equal_up_to_rounding(memory, slow_memory(mask, 1.0), 1e-14)


def test_bf16_keeps_sums_and_statistics_in_fp32():
    query, key, value = qkv(dtype=jnp.bfloat16, t=40)
    mask = jattn.selection_mask(query, key)
    out, lse = jattn.selective_attention(query, key, value, return_lse=True)
    assert out.dtype == jnp.bfloat16
    assert mask.dtype == lse.dtype == jnp.float32
    slow_out, slow_lse = slow_attention(query, key, value)
    assert_equal_up_to_rounding(mask, slow_mask(query, key), 1e-6)
    assert_equal_up_to_rounding(lse, slow_lse, 1e-6)
    assert_equal_up_to_rounding(out, slow_out, 5e-3)


@pytest.mark.parametrize("budget", [None, 4])
def test_gradients_equal_finite_differences(x64, budget):
    arguments = qkv(b=1, t=7, n=2, k=1, h=4, v=3, dtype=jnp.float64)

    def loss(*arguments):
        out, lse, memory = jattn.selective_attention(
            *arguments, budget=budget, memory_tau=1.0, return_lse=True
        )
        return sum(jnp.sum(jnp.sin(x)) for x in (out, lse, memory))

    check_grads(jax.jit(loss), arguments, order=1, modes=["rev"])


def test_gradients_of_the_mask_and_its_first_row(x64):
    query, key, _ = qkv(b=1, t=4, s=7, h=4, dtype=jnp.float64)
    (first,) = normal(1, (1, 7), dtype=jnp.float64)

    def loss(query, key, first):
        mask = jattn.selection_mask(query, key, initial_mask=jnp.abs(first))
        return jnp.sum(jnp.sin(mask)) + jnp.sum(jattn.selective_memory(mask, tau=2.0))

    check_grads(jax.jit(loss), (query, key, first), order=1, modes=["rev"])


def test_values_of_later_heads_train_the_selecting_head():
    query, key, value = qkv(k=4)

    def loss(query, key):
        return jnp.sum(jnp.sin(jattn.selective_attention(query, key, value))[:, :, 1])

    d_query, d_key = jax.jit(jax.grad(loss, argnums=(0, 1)))(query, key)
    for gradient in d_query, d_key:
        assert np.any(gradient[:, :, 0] != 0)
        np.testing.assert_array_equal(gradient[:, :, 2:], 0)


@pytest.mark.parametrize("budget", [None, 7])
def test_chunks_change_nothing(monkeypatch, budget):
    arguments = qkv(t=61, b=1)
    segments = documents(20, 41)

    def value_and_grads():
        def loss(*arguments):
            results = jattn.selective_attention(
                *arguments,
                budget=budget,
                memory_tau=1.0,
                segment_ids=segments,
                return_lse=True,
            )
            return sum(jnp.sum(jnp.sin(x)) for x in results), results

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)

    whole = value_and_grads()
    monkeypatch.setattr("jattn.ops._common.CHUNK_BYTES", 2**13)
    chunked = value_and_grads()
    jax.tree.map(assert_equal_up_to_rounding, chunked, whole)


@pytest.mark.parametrize("budget", [None, 5])
def test_the_future_changes_nothing_bit_for_bit(budget):
    arguments, other = qkv(t=40), qkv(seed=1, t=40)
    cut = 23
    changed = [
        jnp.concatenate([x[:, :cut], y[:, cut:]], axis=1)
        for x, y in zip(arguments, other, strict=True)
    ]
    attend = jax.jit(
        functools.partial(
            jattn.selective_attention, budget=budget, memory_tau=1.0, return_lse=True
        )
    )
    for before, after in zip(attend(*arguments), attend(*changed), strict=True):
        np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
        assert np.any(before[:, cut:] != after[:, cut:])


@pytest.mark.parametrize("budget", [None, 4])
def test_packed_documents_never_meet(budget):
    arguments, other = qkv(b=1, t=20), qkv(seed=1, b=1, t=20)

    @jax.jit
    def attend(query, key, value, segments):
        return jattn.selective_attention(
            query,
            key,
            value,
            budget=budget,
            memory_tau=1.0,
            segment_ids=segments,
            return_lse=True,
        )

    packed = attend(*arguments, documents(8, 12))
    alone = [
        attend(*(x[:, a:b] for x in arguments), documents(b - a))
        for a, b in [(0, 8), (8, 20)]
    ]
    for whole, *parts in zip(packed, *alone, strict=True):
        assert_equal_up_to_rounding(whole, jnp.concatenate(parts, axis=1))
    changed = [
        jnp.concatenate([y[:, :8], x[:, 8:]], axis=1)
        for x, y in zip(arguments, other, strict=True)
    ]
    for before, after in zip(packed, attend(*changed, documents(8, 12)), strict=True):
        np.testing.assert_array_equal(before[:, 8:], after[:, 8:])


def test_what_is_never_masked_and_that_nothing_is_remembered_again():
    query, key, _ = qkv(t=30)
    segments = documents(11, 19, batch=2)
    mask = np.asarray(jattn.selection_mask(query, key, segment_ids=segments))
    i = np.arange(30)
    np.testing.assert_array_equal(mask[:, :, [0, 11]], 0)
    np.testing.assert_array_equal(mask[:, i, i], 0)
    np.testing.assert_array_equal(mask[:, i[1:], i[:-1]], 0)
    np.testing.assert_array_equal(np.triu(mask), 0)
    assert np.all(np.diff(mask, axis=1) >= -1e-6 * mask[:, 1:])
    assert np.all(mask[:, -1, 12:20] > 0)


def test_selections_add_up_over_queries_not_over_keys():
    # Query 2 selects key 1 by 3, query 3 selects it by 5 and key 2 by 7.
    logits = np.zeros((5, 5))
    logits[2, 1], logits[3, 1], logits[3, 2] = 3, 5, 7
    query = jnp.asarray(logits)[None, :, None]  # keys are unit vectors
    key = jnp.eye(5)[None, :, None]
    mask = jattn.selection_mask(query, key, scale=1.0)
    expected = np.zeros((5, 5))
    expected[3, 1], expected[4, 1], expected[4, 2] = 3, 8, 7
    np.testing.assert_array_equal(mask[0], expected)


def test_without_selection_it_is_dense_attention():
    query, key, value = qkv(t=12)
    query = query.at[:, :, 0].set(-jnp.abs(query[:, :, 0]))
    key = key.at[:, :, 0].set(jnp.abs(key[:, :, 0]))
    np.testing.assert_array_equal(jattn.selection_mask(query, key), 0)
    selective = jattn.selective_attention(query, key, value, return_lse=True)
    dense = jattn.dense_attention(query, key, value, return_lse=True)
    chex.assert_trees_all_equal(selective, dense)


def test_without_selection_the_oldest_goes_but_never_the_first():
    eviction = jattn.selective_eviction(jnp.zeros((1, 8, 8)), budget=3)
    np.testing.assert_array_equal(eviction[0], [8, 3, 4, 5, 6, 7, 8, 8])


def test_equal_selections_evict_the_oldest():
    mask = np.zeros((1, 6, 6))
    mask[0, 4:, 1:4] = [1, 2, 2]
    eviction = jattn.selective_eviction(jnp.asarray(mask), budget=4)
    np.testing.assert_array_equal(eviction[0], [6, 6, 4, 5, 6, 6])


def test_an_evicted_key_does_not_return():
    # At query 3 key 1 is the most forgotten. At query 4 keys 2 and 3 are far more so,
    # and the budget's best keys of that query alone would be 0, 1 and 4.
    mask = np.zeros((1, 5, 5))
    mask[0, 3, 1:3] = [2, 1]
    mask[0, 4, 1:4] = [2, 9, 8]
    eviction = jattn.selective_eviction(jnp.asarray(mask), budget=3)
    np.testing.assert_array_equal(eviction[0], [5, 3, 4, 5, 5])


def test_duplicated_keys_are_selected_alike():
    query, key, value = qkv(t=12)
    key = key.at[:, 3].set(key[:, 2])
    value = value.at[:, 3].set(value[:, 2])
    mask = jattn.selection_mask(query, key)
    by_query_3 = jnp.maximum(
        jnp.einsum("bh,bh->b", query[:, 3, 0], key[:, 2, 0]) / jnp.sqrt(8.0), 0
    )
    assert_equal_up_to_rounding(
        mask[:, 4:, 2], mask[:, 4:, 3] + by_query_3[:, None], 1e-6
    )
    assert_equal_up_to_rounding(
        jattn.selective_attention(query, key, value),
        slow_attention(query, key, value)[0],
    )


def test_long_sequences_do_not_build_a_square():
    shapes = [jax.ShapeDtypeStruct((1, 8192, 8, 64), jnp.float32)] * 3
    megabyte = 2**20  # one T x T array of fp32 takes 256 of them

    def loss(*arguments):
        out, memory = jattn.selective_attention(*arguments, memory_tau=1.0)
        return jnp.sum(out) + jnp.max(memory)

    pruned = functools.partial(jattn.selective_attention, budget=512)
    assert temporary_bytes(jattn.selective_attention, *shapes) < 200 * megabyte
    assert temporary_bytes(pruned, *shapes) < 200 * megabyte
    assert temporary_bytes(jax.grad(loss, argnums=(0, 1, 2)), *shapes) < 450 * megabyte


@pytest.mark.parametrize("budget", [None, 4])
def test_transformations_agree(budget):
    arguments = qkv(b=2)
    attend = functools.partial(jattn.selective_attention, budget=budget, memory_tau=1.0)
    plain = attend(*arguments)
    jitted = jax.jit(attend)(*arguments)
    mapped = jax.vmap(
        lambda *a: jax.tree.map(lambda x: x[0], attend(*(x[None] for x in a)))
    )(*arguments)
    sharded = shard_over_batch(attend)(*arguments)
    chex.assert_trees_all_close(plain, jitted, mapped, sharded, rtol=1e-5, atol=1e-6)


def test_chunked_scan_shards_over_the_batch(monkeypatch):
    query, key, value = qkv(b=2, t=33)
    segments = documents(12, 21, batch=2)

    def loss(query, key, value, segments):
        out = jattn.selective_attention(
            query, key, value, budget=5, segment_ids=segments
        )
        return jnp.sum(jnp.sin(out), axis=(1, 2, 3))

    def grads(*arguments):
        return jax.grad(lambda *a: jnp.sum(loss(*a)), argnums=(0, 1, 2))(*arguments)

    monkeypatch.setattr("jattn.ops._common.CHUNK_BYTES", 2**12)
    arguments = query, key, value, segments
    chex.assert_trees_all_close(
        jax.jit(grads)(*arguments),
        shard_over_batch(grads)(*arguments),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": (2, 9, 3, 8), "value": (2, 9, 3, 6)}, "N=4, K=3"),
        ({"key": (2, 9, 2, 9)}, r"key must have shape \[B=2, S, K, H=8\]"),
        ({"value": (2, 6, 2, 6)}, r"value must have shape \[B=2, S=9, K=2, V\]"),
        ({"query": (2, 11, 4, 8)}, "T may not exceed S"),
        ({"query": (2, 7, 4, 8)}, r"initial_mask of shape \[B=2, S=9\] is needed"),
    ],
)
def test_wrong_shapes_are_named(changes, message):
    arguments = dict(zip(("query", "key", "value"), qkv(), strict=True))
    for name, shape in changes.items():
        arguments[name] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(jattn.selective_attention, **arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 1}, ValueError, "budget must be an integer of at least 2.*got 1"),
        ({"budget": 2.5}, ValueError, "budget must be an integer.*got 2.5"),
        ({"budget": True}, ValueError, "budget must be an integer.*got True"),
        ({"budget": "4"}, ValueError, "budget must be an integer.*got '4'"),
        ({"budget": np.array([4])}, ValueError, "budget must be an integer.*got array"),
        ({"memory_tau": 0.0}, ValueError, "must be positive; got 0.0"),
        (
            {"initial_mask": jnp.zeros((2, 8))},
            ValueError,
            r"initial_mask must have shape \[B=2, S=9\]; got \[2, 8\]",
        ),
        ({"implementation": "cuda"}, ValueError, "implementation must be"),
        ({"implementation": "triton"}, NotImplementedError, "it needs a GPU"),
        ({"skip_error": 1.0}, ValueError, "skip_error must be at least 0 and below 1"),
        ({"segment_ids": jnp.zeros((2, 3), jnp.int32)}, ValueError, "segment_ids"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        jattn.selective_attention(*qkv(), **options)


def test_a_budget_may_be_an_array():
    query, key, value = qkv(seed=1, t=14)

    @jax.jit
    def attend(budget):
        return jattn.selective_attention(query, key, value, budget=budget)

    for budget in (3, 8):
        expected = jattn.selective_attention(query, key, value, budget=budget)
        assert_equal_up_to_rounding(attend(jnp.int32(budget)), expected)
    assert attend._cache_size() == 1
    for budget in (jnp.zeros(2, jnp.int32), jnp.float32(3)):
        with pytest.raises(ValueError, match="budget must be an integer"):
            attend(budget)


def test_array_budgets_below_2_count_as_2():
    query, key, value = qkv(seed=1, t=14)
    mask = jattn.selection_mask(query, key)

    @jax.jit
    def compute(budget):
        attend = functools.partial(jattn.selective_attention, budget=budget)
        return jattn.selective_eviction(mask, budget=budget), attend(query, key, value)

    eviction = jattn.selective_eviction(mask, budget=2)
    attended = jattn.selective_attention(query, key, value, budget=2)
    for budget in (1, 0, -1):
        actual = compute(jnp.int32(budget))
        np.testing.assert_array_equal(actual[0], eviction)
        assert_equal_up_to_rounding(actual[1], attended)


@pytest.mark.parametrize("budget", [np.int32(4), np.int64(4), np.array(4)])
def test_a_budget_may_be_any_integer(budget):
    mask = jattn.selection_mask(*qkv()[:2])
    np.testing.assert_array_equal(
        jattn.selective_eviction(mask, budget=budget),
        jattn.selective_eviction(mask, budget=4),
    )


def test_there_may_be_no_queries():
    query, key, value = qkv(t=0)
    mask = jattn.selection_mask(query, key)
    assert mask.shape == (2, 0, 0)
    assert jattn.selective_eviction(mask, budget=3).shape == (2, 0)
    np.testing.assert_array_equal(jattn.selective_memory(mask), 0)
    for budget in (None, 3):
        out, lse, memory = jattn.selective_attention(
            query, key, value, budget=budget, memory_tau=1.0, return_lse=True
        )
        assert out.shape == (2, 0, 4, 6)
        assert lse.shape == (2, 0, 4)
        assert memory.shape == (2, 0)
    _, key, _ = qkv(s=5)
    (first_row,) = normal(1, (2, 5))
    mask = jattn.selection_mask(query, key, initial_mask=first_row)
    assert mask.shape == (2, 0, 5)


def test_a_budget_needs_all_queries():
    query, key, value = qkv(t=5, s=9)
    with pytest.raises(ValueError, match="got T=5, S=9"):
        jattn.selective_attention(
            query, key, value, budget=3, initial_mask=jnp.zeros((2, 9))
        )


def test_wrong_arguments_of_the_functions_of_the_mask_are_named():
    query, key, _ = qkv(t=5, s=9)
    mask = jnp.zeros((2, 5, 9))
    with pytest.raises(ValueError, match=r"S - T = 4 earlier queries"):
        jattn.selection_mask(query, key)
    with pytest.raises(NotImplementedError, match="selection_mask"):
        jattn.selection_mask(key, key, implementation="pallas")
    with pytest.raises(ValueError, match=r"mask must have shape \[B, T, T\]"):
        jattn.selective_eviction(mask, budget=3)
    with pytest.raises(ValueError, match="at least 2"):
        jattn.selective_eviction(mask[:, :, :5], budget=0)
    with pytest.raises(ValueError, match="T=9 queries and only S=5 keys"):
        jattn.selective_memory(jnp.zeros((2, 9, 5)))
    with pytest.raises(ValueError, match="must be positive; got -1"):
        jattn.selective_memory(mask, tau=-1)
    with pytest.raises(ValueError, match="segment_ids must be integers"):
        jattn.selective_memory(mask, segment_ids=documents(5, batch=2))
