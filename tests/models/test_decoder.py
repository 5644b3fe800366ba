"""jattn.models.DecoderLM: its logits, its documents, its decoding and its errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.models import DecoderLM
from tests.models import slow
from tests.support import assert_equal_up_to_rounding, documents, shard_over_batch

VOCAB = 11

# Sizes at which every part of each scheme has something to do in a few tokens.
SMALL = {
    "moba": {"block_size": 4, "top_k": 2},
    "nsa": {
        "kernel_size": 4,
        "stride": 2,
        "block_size": 4,
        "num_blocks": 3,
        "window_size": 4,
    },
    "simplicial": {"windows": (6, 3)},
}


def make(**options):
    sizes = {"features": 16, "num_layers": 2, "num_heads": 4, "head_dim": 4}
    return DecoderLM(
        **{"vocab_size": VOCAB, "bos_id": VOCAB, "hidden": 24} | sizes | options
    )


def small(mixers, **options):
    chosen = {name: SMALL[name] for name in mixers.split() if name in SMALL}
    return make(mixers=mixers, mixer_options=chosen, **options)


def tokens(batch=2, length=13, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCAB, (batch, length), np.int32)


@functools.cache
def init(model):
    return slow.random_params(model, tokens())


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens, **options):
    return model.apply(params, tokens, **options)


@functools.partial(jax.jit, static_argnums=0)
def score(model, params, tokens, segment_ids=None):
    return model.apply(params, tokens, segment_ids, method="score")


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_equals_the_loop(x64, tie_embeddings):
    model = make(num_kv_heads=2, tie_embeddings=tie_embeddings, param_dtype=jnp.float64)
    params = init(model)
    weights = slow.float64(params["params"])
    table = weights["embedding"]["embedding"]
    head = table[:VOCAB].T if tie_embeddings else weights["head"]
    fed = tokens(batch=1)
    x = slow.block_stack(weights["blocks"], table[np.asarray(fed[0])])
    assert_equal_up_to_rounding(apply(model, params, fed)[0], x @ head, 1e-12)


def test_score_feeds_each_predecessor_and_bos_at_the_start_of_documents():
    model = make()
    params = init(model)
    row = tokens(length=6)
    segments = documents(2, 4, batch=2)
    bos = np.full((2, 1), VOCAB)
    fed = np.concatenate([bos, row[:, :1], bos, row[:, 2:5]], axis=1)
    np.testing.assert_array_equal(
        score(model, params, row, segments),
        apply(model, params, fed, segment_ids=segments),
    )
    whole = np.concatenate([bos, row[:, :-1]], axis=1)
    np.testing.assert_array_equal(
        score(model, params, row), apply(model, params, whole)
    )


def test_packed_documents_equal_documents_alone():
    model = small("dense simplicial")
    params = init(model)
    row = tokens(batch=1)
    packed = score(model, params, row, documents(5, 8))
    alone = [score(model, params, part) for part in (row[:, :5], row[:, 5:])]
    assert_equal_up_to_rounding(packed, np.concatenate(alone, axis=1))


@pytest.mark.parametrize("mixer", jattn.nn.MIXERS)
def test_decode_equals_parallel_with_every_mixer(mixer):
    model = small(mixer, num_kv_heads=2, num_layers=1)
    params = init(model)
    fed, cache, outputs = tokens(length=12), model.init_cache(2, 12), []
    for part in np.split(fed, 3, axis=1):
        logits, cache = apply(model, params, part, cache=cache)
        outputs.append(logits)
    whole = apply(model, params, fed)
    assert_equal_up_to_rounding(np.concatenate(outputs, axis=1), whole)


def with_budgets(budget, **options):
    return make(
        mixers="selective dense",
        num_layers=3,
        mixer_options={"selective": {"budget": budget}},
        **options,
    )


def test_each_layer_has_a_budget_of_its_own():
    model = with_budgets([3, 7])
    params = init(model)
    fed = tokens(length=12)
    whole = apply(model, params, fed)
    for split in ([12], [1] * 12):
        cache, outputs = model.init_cache(2, 12), []
        assert [layer.key.shape[1] for layer in cache] == [3, 12, 7]
        for part in np.split(fed, np.cumsum(split)[:-1], axis=1):
            logits, cache = apply(model, params, part, cache=cache)
            outputs.append(logits)
        assert_equal_up_to_rounding(np.concatenate(outputs, axis=1), whole)
    unlike = apply(with_budgets([7, 3]), params, fed)
    assert np.max(np.abs(whole - unlike)) > 1e-3


def test_budgets_may_be_given_with_the_parameters():
    model = with_budgets([2, None], remat=True)
    params = init(model)
    row, segments = tokens(length=12), documents(4, 8, batch=2)
    assert model.budget_layers() == (0, 2)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def found(budgets):
        variables = model.budget_variables(budgets)
        return score(model, {**params, **variables}, row, segments)

    for budgets in ([3, 12], [12, 5]):
        expected = score(with_budgets(budgets), params, row, segments)
        assert_equal_up_to_rounding(found(np.array(budgets)), expected)


def test_rows_of_different_length_decode_as_each_alone():
    model = small("dense simplicial", num_experts=3)
    params = init(model)
    fed = tokens()
    expected = apply(model, params, fed)
    held = np.array([7, 2])
    cache = model.init_cache(2, 13)
    _, cache = apply(model, params, fed[:, :7], cache=cache, lengths=held)
    for _ in range(4):
        token = fed[np.arange(2), held][:, None]
        logits, cache = apply(model, params, token, cache=cache)
        assert_equal_up_to_rounding(logits[:, 0], expected[np.arange(2), held])
        held = held + 1


@pytest.mark.parametrize("mixer", jattn.nn.MIXERS)
def test_a_token_changes_later_logits_only(mixer):
    model = small(mixer, num_kv_heads=2, num_layers=1)
    params = init(model)
    fed, changed = tokens(length=12), tokens(length=12)
    changed[:, 6] = (fed[:, 6] + 1) % VOCAB
    before = np.asarray(apply(model, params, fed))
    after = np.asarray(apply(model, params, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.all(np.any(before[:, 6:8] != after[:, 6:8], axis=-1))


def test_rematerialisation_changes_nothing():
    options = {"num_experts": 3, "num_shared_experts": 1}
    segments = documents(5, 8, batch=2)

    def value_and_grads(remat):
        model = make(remat=remat, **options)

        def loss(params):
            logits, sown = model.apply(
                params, tokens(), segments, method="score", mutable=["losses"]
            )
            return jnp.sum(jnp.sin(logits)) + sum(jax.tree.leaves(sown))

        return jax.jit(jax.value_and_grad(loss))(init(make(**options)))

    jax.tree.map(assert_equal_up_to_rounding, *map(value_and_grads, (True, False)))


def test_rematerialisation_wraps_each_layer():
    model = make(remat=True)
    apply_wrapped = functools.partial(score.__wrapped__, model)
    jaxpr = jax.make_jaxpr(apply_wrapped)(init(make()), tokens())
    names = [equation.primitive.name for equation in jaxpr.eqns]
    assert names.count("remat2") == model.num_layers


def test_gradients_reach_every_parameter():
    model = make(num_experts=2, num_shared_experts=1, tie_embeddings=False)
    segments = documents(6, 7, batch=2)
    loss = lambda p: jnp.sum(jnp.sin(score(model, p, tokens(), segments)))  # noqa: E731
    for path, grad in jax.tree_util.tree_leaves_with_path(
        jax.jit(jax.grad(loss))(init(model))
    ):
        assert np.all(np.isfinite(grad)), path
        assert np.any(grad != 0), path


def test_every_layer_of_experts_sows_its_loss():
    model = make(num_experts=4)
    losses_of = jax.jit(lambda p: model.apply(p, tokens(), mutable=["losses"])[1])
    sown = losses_of(init(model))
    layers = sown["losses"]["blocks"]
    assert set(layers) == {"layer_0", "layer_1"}
    losses = [layer["feed_forward"]["load_balance"][0] for layer in layers.values()]
    assert all(loss.shape == () and loss > 0 for loss in losses)


def test_logits_are_fp32_under_bf16():
    model = make(dtype=jnp.bfloat16)
    params = init(model)
    logits = score(model, params, tokens())
    assert logits.dtype == jnp.float32
    assert_equal_up_to_rounding(logits, score(make(), params, tokens()), 3e-2)


def test_patterns_repeat_over_the_layers():
    model = make(mixers="dense dense simplicial", num_layers=5)
    layers = init(model)["params"]["blocks"]
    second = ["key2" in layers[f"layer_{i}"]["mixer"] for i in range(5)]
    assert second == [False, False, True, False, False]


def test_options_reach_their_mixer():
    narrow = make(mixer_options={"dense": {"window": 2}})
    params = init(narrow)
    wide, narrow = score(make(), params, tokens()), score(narrow, params, tokens())
    assert_equal_up_to_rounding(wide[:, :2], narrow[:, :2])
    assert np.max(np.abs(wide[:, 4:] - narrow[:, 4:])) > 1e-2


def test_moba_runs_as_dense_with_the_same_parameters():
    """And equals it where every block is selected."""
    sparse = make(mixers="moba", mixer_options={"moba": {"block_size": 4, "top_k": 4}})
    params = init(sparse)
    assert_equal_up_to_rounding(
        score(make(), params, tokens()), score(sparse, params, tokens())
    )


def test_equal_models_compile_once():
    """Dictionaries and lists in fields do not keep a model from being static."""

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def run(model, params, row):
        return score(model, params, row)

    def again():
        return make(
            mixers=["dense", "simplicial"],
            mixer_options={"simplicial": {"windows": [4, 2]}},
        )

    params = init(again())
    run(again(), params, tokens())
    run(again(), params, tokens(seed=1))


def test_shards_over_the_batch():
    model = small("dense simplicial", num_experts=3)
    params = init(model)
    plain = score(model, params, tokens())
    sharded = shard_over_batch(lambda row: score(model, params, row))(tokens())
    assert_equal_up_to_rounding(sharded, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixers": "dense sparse"}, "unknown mixer 'sparse'; known are dense, "),
        ({"mixers": ""}, "mixers is empty"),
        ({"mixers": "dense dense dense"}, "names 3 layers .* num_layers=2"),
        ({"mixer_options": {"sparse": {}}}, "unknown mixer 'sparse'"),
        ({"mixer_options": {"dense": {"size": 1}}}, "'dense' has unknown .*'size'"),
        (
            {
                "mixers": "dense selective",
                "mixer_options": {"selective": {"budget": [3, 4]}},
            },
            "'selective' has 2 budgets for 1 layers; give one number",
        ),
        ({"hidden": 0}, "hidden must be a positive integer; got 0"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer; got -1"),
        ({"bos_id": -1}, "bos_id must be a token id, 0 or more; got -1"),
    ],
)
def test_wrong_fields_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (jnp.zeros((2, 3)), {}, "tokens must be integers of shape .* float32"),
        (jnp.zeros(3, jnp.int32), {}, "tokens must be integers of shape"),
        (
            jnp.zeros((2, 4), jnp.int32),
            {"segment_ids": jnp.zeros((2, 3), jnp.int32)},
            "segment_ids must",
        ),
        (
            jnp.zeros((2, 4), jnp.int32),
            {"lengths": jnp.ones(2, jnp.int32)},
            "needs one",
        ),
    ],
)
def test_wrong_arguments_are_named(row, options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: make().init(jax.random.key(0), row, **options))


def test_the_block_diagonal_feed_forward_is_that_of_monarch_mixer():
    model = make(mixers="dense", feed_forward="block_diagonal")
    layer = init(model)["params"]["blocks"]["layer_0"]
    assert layer["feed_forward"]["in"]["kernel"].shape == (4, 16 // 4, 2 * 24 // 4)
    logits = apply(model, init(model), tokens())
    assert logits.shape == (2, 13, VOCAB)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feed_forward": "relu"}, "feed_forward must be one of swiglu, block_diag"),
        ({"feed_forward": "block_diagonal", "num_experts": 4}, "experts are SwiGLUs"),
    ],
)
def test_feed_forwards_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
