"""jattn.nn.SelectiveAttention: its decoding, its cache, its loss and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests.nn import mixers
from tests.support import assert_equal_up_to_rounding, documents, normal

BUDGETS = [None, 4]


def make(**options):
    return jattn.nn.SelectiveAttention(**{"num_heads": 4, "head_dim": 8} | options)


def initialised(mixer, *, batch=2, length=13, features=16):
    (x,) = normal(5, (batch, length, features))
    return x, jax.jit(mixer.init)(jax.random.key(0), x)


@pytest.mark.parametrize("budget", BUDGETS)
def test_decode_equals_parallel(budget):
    mixers.check_decode_equals_parallel(make(num_kv_heads=2, budget=budget))


@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_of_different_length(budget):
    mixers.check_ragged_decode(make(budget=budget))


@pytest.mark.parametrize("budget", BUDGETS)
def test_padding_may_hold_anything(budget):
    mixers.check_padding_may_hold_anything(make(budget=budget))


@pytest.mark.parametrize("budget", BUDGETS)
def test_cached_calls_map_and_shard(budget):
    mixers.check_cached_calls_map_and_shard(make(budget=budget))


@pytest.mark.parametrize("budget", BUDGETS)
def test_prompts_in_chunks_map_and_shard(monkeypatch, budget):
    monkeypatch.setattr("jattn.ops._common.CHUNK_BYTES", 1)
    # With a width of its own, so that nothing was compiled before.
    mixers.check_cached_calls_map_and_shard(make(budget=budget, head_dim=12))


def test_causality():
    mixers.check_causality(make(budget=4))


def test_gradients_reach_every_parameter():
    mixers.check_gradients_reach_every_parameter(make())


def test_a_budget_is_all_the_cache_holds():
    grown = make(num_kv_heads=2).init_cache(3, 100, jnp.bfloat16)
    pruned = make(num_kv_heads=2, budget=10).init_cache(3, 100, jnp.bfloat16)
    short = make(num_kv_heads=2, budget=10).init_cache(3, 7, jnp.bfloat16)
    slot = 2 * (8 + 8) * 2 + 4 + 4  # keys and values, mask, position
    for cache, slots in (grown, 100), (pruned, 10), (short, 7):
        assert jattn.nn.cache_bytes(cache) == 3 * (slots * slot + 4)


def test_a_budget_that_is_never_reached_changes_nothing():
    x, params = initialised(make())
    # With 13 slots, a budget of 13 is one that prunes, and drops nothing.
    for mixer in (make(), make(budget=14), make(budget=13)):
        apply = jax.jit(
            lambda x, cache, mixer=mixer: mixer.apply(params, x, cache=cache)
        )
        out, cache = apply(x, mixer.init_cache(2, 13))
        if mixer.budget is None:
            expected = out, cache
        jax.tree.map(np.testing.assert_array_equal, (out, cache), expected)


@pytest.mark.parametrize("split", [(13,), (6, 1, 6)])
def test_the_cache_holds_what_the_budget_left(split):
    mixer = make(num_heads=2, budget=5, rope_base=None)
    x, params = initialised(mixer)
    cache = mixer.init_cache(2, 13)
    step = jax.jit(lambda x, cache: mixer.apply(params, x, cache=cache))
    for part in jnp.split(x, np.cumsum(split)[:-1], axis=1):
        _, cache = step(part, cache)
    kernel = jax.tree.map(np.asarray, params["params"])
    query, key, value = (
        jnp.einsum("btf,fnh->btnh", x, kernel[name]["kernel"])
        for name in ("query", "key", "value")
    )
    mask = jattn.selection_mask(query, key)
    eviction = np.asarray(jattn.selective_eviction(mask, budget=5))
    selected = np.maximum(np.einsum("bh,bsh->bs", query[:, -1, 0], key[:, :, 0]), 0)
    following = np.array(mask[:, -1] + selected / np.sqrt(8))
    following[:, [0, 12]] = 0  # neither the first token nor the last query's own
    for row in range(2):
        held = np.flatnonzero(eviction[row] == 13)
        slots = np.argsort(cache.position[row])
        np.testing.assert_array_equal(cache.position[row, slots], held)
        assert_equal_up_to_rounding(cache.key[row, slots], key[row, held])
        assert_equal_up_to_rounding(cache.value[row, slots], value[row, held])
        assert_equal_up_to_rounding(cache.mask[row, slots], following[row, held])


def test_without_selection_the_oldest_token_goes():
    mixer = make(budget=4)
    x, params = initialised(mixer)
    query = params["params"]["query"]["kernel"]
    params["params"]["query"]["kernel"] = query.at[:, 0].set(0)
    _, cache = jax.jit(lambda x, cache: mixer.apply(params, x, cache=cache))(
        x, mixer.init_cache(2, 13)
    )
    np.testing.assert_array_equal(cache.mask, 0)
    np.testing.assert_array_equal(
        np.sort(cache.position), [[0, 10, 11, 12], [0, 10, 11, 12]]
    )


@pytest.mark.parametrize("budget", BUDGETS)
def test_padding_leaves_no_trace(budget):
    mixer = make(budget=budget)
    x, params = initialised(mixer)
    extend = jax.jit(
        lambda x, cache, lengths: mixer.apply(params, x, cache=cache, lengths=lengths)
    )
    _, cache = extend(x[:, :9], mixer.init_cache(2, 13), jnp.array([9, 9]))
    lengths = jnp.array([4, 0])
    _, padded = extend(x[:, 9:], cache, lengths)
    noise = x[:, 9:] * jnp.array([1, 9])[:, None, None]
    _, other = extend(noise, cache, lengths)
    jax.tree.map(np.testing.assert_array_equal, padded, other)
    for before, after in zip(
        jax.tree.leaves(cache), jax.tree.leaves(padded), strict=True
    ):
        np.testing.assert_array_equal(before[1], after[1])
        assert np.any(before[0] != after[0])


def test_a_step_compiles_once():
    mixer = make(budget=4)
    x, params = initialised(mixer)
    traces = []

    @jax.jit
    def step(x, cache):
        traces.append(None)
        return mixer.apply(params, x, cache=cache)

    cache = mixer.init_cache(2, 13, jnp.bfloat16)
    for t in range(13):
        _, cache = step(x[:, t : t + 1], cache)
    assert len(traces) == 1


@pytest.mark.parametrize("budget", BUDGETS)
def test_packed_documents_equal_documents_alone(budget):
    # Without positions, a document does not know where in the row it begins.
    mixer = make(budget=budget, rope_base=None)
    x, params = initialised(mixer, batch=1)
    apply = jax.jit(mixer.apply)
    packed = apply(params, x, segment_ids=documents(6, 7))
    alone = [apply(params, x[:, a:b]) for a, b in [(0, 6), (6, 13)]]
    assert_equal_up_to_rounding(packed, jnp.concatenate(alone, axis=1))


def test_the_memory_loss_is_sown_for_whom_it_trains():
    mixer = make(num_heads=2, rope_base=None, memory_tau=0.3)
    x, params = initialised(mixer)
    segments = documents(4, 9, batch=2)
    assert set(params) == {"params"}

    @jax.jit
    def loss(params):
        _, state = mixer.apply(params, x, segment_ids=segments, mutable=["losses"])
        (value,) = state["losses"]["selective_memory"]
        return value

    kernel = params["params"]
    query, key = (
        jnp.einsum("btf,fnh->btnh", x, kernel[name]["kernel"])
        for name in ("query", "key")
    )
    mask = jattn.selection_mask(query, key, segment_ids=segments)
    worst = jattn.selective_memory(mask, tau=0.3, segment_ids=segments)
    assert_equal_up_to_rounding(loss(params), jnp.mean(worst) / 13)
    gradient = jax.grad(loss)(params)["params"]
    assert np.any(gradient["query"]["kernel"][:, 0] != 0)
    assert np.any(gradient["key"]["kernel"][:, 0] != 0)
    for kernel in (
        gradient["query"]["kernel"][:, 1],
        gradient["key"]["kernel"][:, 1],
        gradient["value"]["kernel"],
    ):
        np.testing.assert_array_equal(kernel, 0)


def test_what_is_skipped_is_sown_for_whom_it_asks(monkeypatch):
    seen = []

    def skipped(query, key, **arguments):
        seen.append((query.shape, key.shape, arguments))
        return 0.25

    monkeypatch.setattr("jattn.nn.selective.selective_skipped", skipped)
    mixer = make(num_heads=4, num_kv_heads=2, skip_error=0.1)
    x, params = initialised(mixer)
    segments = documents(4, 9, batch=2)
    assert not seen
    options = dict(segment_ids=segments, mutable=["metrics"])
    _, state = mixer.apply(params, x, **options)
    assert state["metrics"] == {"selective_skipped": (0.25,)}
    [(query_shape, key_shape, arguments)] = seen
    assert (query_shape[:3], key_shape[:3]) == ((2, 13, 4), (2, 13, 2))
    assert arguments == dict(
        skip_error=0.1, segment_ids=segments, implementation=mixer.implementation
    )
    _, state = make(num_heads=4, num_kv_heads=2).apply(params, x, **options)
    assert not state
    assert len(seen) == 1


def slow_memory_loss(query, key, segments, tau):
    """``max_i M_i / n`` of each row with its n tokens that are not in segment 0.

    ``M_i = i - sum_k min(F_ik, tau) / tau``, i counting a document's tokens from 1.
    """
    query, key = (np.asarray(x, np.float64)[:, :, 0] for x in (query, key))
    losses = []
    for q, k, row in zip(query, key, segments, strict=True):
        memory = [0.0]
        for document in sorted(set(row.tolist()) - {0}):
            (places,) = np.nonzero(row == document)
            first = places[0]
            for i in places:
                most = i - first + 1
                for j in places[places <= i]:
                    forgotten = sum(
                        max(q[t] @ k[j] / np.sqrt(q.shape[-1]), 0)
                        for t in range(j + 1, i)
                        if j != first
                    )
                    most -= min(forgotten, tau) / tau
                memory.append(most)
        if np.any(row != 0):
            losses.append(max(memory) / np.sum(row != 0))
    return np.mean(losses)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_memory_loss_leaves_padding_out(tau):
    mixer = make(num_heads=2, rope_base=None, memory_tau=tau, padding_segment=0)
    x, params = initialised(mixer, batch=3)
    segments = np.array(
        [[1] * 5 + [2] * 3 + [0] * 5, [1] * 13, [0] * 13], dtype=np.int32
    )

    @jax.jit
    def loss(x):
        _, state = mixer.apply(params, x, segment_ids=segments, mutable=["losses"])
        return state["losses"]["selective_memory"][0]

    query, key = (
        np.einsum("btf,fnh->btnh", x, params["params"][name]["kernel"])
        for name in ("query", "key")
    )
    expected = slow_memory_loss(query, key, segments, tau)
    assert float(loss(x)) == pytest.approx(expected, rel=1e-5)
    gradient = jax.grad(loss)(x)
    np.testing.assert_array_equal(gradient[segments == 0], 0)
    assert np.any(gradient[0, :8] != 0)


def test_training_on_the_memory_loss_lowers_it():
    mixer = make()
    x, params = initialised(mixer, length=32)

    @jax.jit
    def loss(params):
        _, state = mixer.apply(params, x, mutable=["losses"])
        return state["losses"]["selective_memory"][0]

    first = loss(params)
    step = jax.jit(
        lambda params: jax.tree.map(
            lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params)
        )
    )
    for _ in range(10):
        params = step(params)
    assert loss(params) < 0.9 * first


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"num_kv_heads": 3}, {}, "N=4, K=3"),
        ({"head_dim": 7}, {}, "even head width; got 7"),
        ({"budget": 1}, {}, "budget must be an integer of at least 2"),
        ({}, {"lengths": jnp.ones(2, jnp.int32)}, "needs one"),
    ],
)
def test_errors_say_what_is_wrong(fields, arguments, message):
    (x,) = normal(0, (2, 5, 16))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda x: make(**fields).init(jax.random.key(0), x, **arguments), x
        )


def test_a_cache_excludes_segments():
    mixer = make()
    x, params = initialised(mixer, batch=1, length=5)
    with pytest.raises(ValueError, match="cannot be combined"):
        mixer.apply(params, x, segment_ids=documents(5), cache=mixer.init_cache(1, 5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 1}, "budget must be an integer of at least 2.*got 1"),
        ({"budget": 0}, "budget must be an integer of at least 2.*got 0"),
        ({"budget": -3}, "budget must be an integer of at least 2.*got -3"),
        ({"budget": 2.5}, "budget must be an integer of at least 2.*got 2.5"),
        ({"budget": "a"}, "budget must be an integer of at least 2.*got 'a'"),
        ({"skip_error": 2.0}, "skip_error must be at least 0 and below 1; got 2.0"),
        ({"budget": 4}, r"cache.key must be float32 \[2, 4, .* got float32 \[2, 13,"),
    ],
)
def test_unusable_fields_are_named_with_a_cache(fields, message):
    x, params = initialised(make())
    mixer, cache = make(**fields), make().init_cache(2, 13)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda cache: mixer.apply(params, x, cache=cache), cache)
    if fields != {"budget": 4}:
        with pytest.raises(ValueError, match=message):
            mixer.init_cache(2, 13)


def test_an_unusable_tau_is_named_where_the_loss_is_collected():
    mixer = make(memory_tau=0.0)
    x, params = initialised(mixer)
    with pytest.raises(ValueError, match="tau of the memory term must be positive"):
        mixer.apply(params, x, mutable=["losses"])
