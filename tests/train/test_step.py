"""jattn.train.step and objective: what one step does, and what it must not do."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jattn.train import ExpertsConfig, SelectiveConfig, UserError, build_model
from jattn.train.config import SCHEMES
from jattn.train.data import Batch
from jattn.train.objective import causal_examples, masked_examples, measure
from jattn.train.optimizer import make_optimizer
from jattn.train.step import init_state, make_train_step
from tests.train import runs


def random_batch(seed, rows=4, length=32, vocab_size=256):
    """Rows of two documents and some padding."""
    rng = np.random.default_rng(seed)
    segments = np.repeat([1, 2, 0], [length // 2, length // 4, length // 4])
    segments = np.tile(segments, (rows, 1)).astype(np.int32)
    tokens = rng.integers(0, vocab_size, (rows, length), dtype=np.int32)
    return Batch(tokens, segments, (segments > 0).astype(np.int32))


class Setup:
    def __init__(self, **fields):
        self.config = runs.config("", **fields)
        self.model = build_model(self.config, 256)
        self.optimizer = make_optimizer(self.config.optimizer, self.config.steps)
        self.state = jax.jit(
            lambda: init_state(self.model, self.optimizer, self.config)
        )()
        self.function = make_train_step(self.model, self.optimizer, self.config, 256)
        self.step = jax.jit(self.function)


@pytest.fixture(scope="module")
def dense():
    setup = Setup()
    # The tests that share it may trace the step once between them.
    setup.step = jax.jit(chex.assert_max_traces(setup.function, n=1))
    return setup


@pytest.fixture(scope="module")
def dense_in_parts():
    return Setup(accumulation=4)


def mean_loss(setup, params, batch):
    """Cross-entropy by hand, in float64."""
    logits = setup.model.apply(
        {"params": params},
        batch.tokens,
        segment_ids=batch.segment_ids,
        method="score",
    )
    logits = np.asarray(logits, np.float64)
    peak = logits.max(-1)
    lse = peak + np.log(np.sum(np.exp(logits - peak[..., None]), -1))
    chosen = np.take_along_axis(logits, batch.tokens[..., None], -1)[..., 0]
    real = batch.segment_ids > 0
    return np.sum((lse - chosen)[real]) / np.sum(real)


def test_a_step_measures_what_it_minimises(dense):
    batch = random_batch(0)
    state = dense.step(dense.state, batch)
    sums = state.window.sums
    assert sums.tokens == sums.num_bytes == 4 * 24
    loss = mean_loss(dense, dense.state.params, batch)
    np.testing.assert_allclose(sums.nats / sums.tokens, loss, rtol=1e-5)
    for _ in range(4):
        state = dense.step(state, batch)
    assert mean_loss(dense, state.params, batch) < loss - 0.1


def test_padding_has_no_influence(dense):
    batch = random_batch(0)
    other = batch._replace(tokens=np.where(batch.segment_ids > 0, batch.tokens, 7))
    assert np.any(other.tokens != batch.tokens)
    one, two = dense.step(dense.state, batch), dense.step(dense.state, other)
    chex.assert_trees_all_equal(one.params, two.params)


def test_accumulation_changes_nothing(dense, dense_in_parts):
    batch = random_batch(0)
    # Parts with different numbers of real tokens still count every token once.
    segments = batch.segment_ids.copy()
    segments[0] = 0
    batch = Batch(batch.tokens, segments, (segments > 0).astype(np.int32))
    whole = dense.step(dense.state, batch)
    parts = dense_in_parts.step(dense_in_parts.state, batch)
    chex.assert_trees_all_close(parts.params, whole.params, atol=2e-5)
    chex.assert_trees_all_close(parts.window, whole.window, rtol=1e-4)


def test_the_step_is_traced_once(dense):
    state = dense.state
    for seed in range(3):
        state = dense.step(state, random_batch(seed))
    assert state.step == 3


def test_the_whole_state_can_be_donated(dense):
    step = jax.jit(dense.function, donate_argnums=0)
    text = step.lower(dense.state, random_batch(0)).as_text()
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(dense.state))


def test_a_window_ends_with_its_line_of_metrics(dense):
    # log_every is 2.
    tokens, state = [], dense.state
    for seed in range(4):
        state = dense.step(state, random_batch(seed))
        tokens.append((float(state.window.steps), float(state.window.sums.tokens)))
    assert tokens == [(1, 96), (2, 192), (1, 96), (2, 192)]


@pytest.mark.parametrize("name", ["dense", "dense_in_parts"])
def test_a_step_that_is_not_finite_is_skipped(request, name):
    setup = request.getfixturevalue(name)
    good = setup.step(setup.state, random_batch(0))
    poisoned = jax.tree.map(jnp.copy, good.params)
    poisoned["embedding"]["embedding"] = (
        poisoned["embedding"]["embedding"].at[3].set(jnp.nan)
    )
    harmless = random_batch(1)._replace(tokens=np.full((4, 32), 5, np.int32))
    state = good.replace(params=poisoned)
    for skipped in (1, 2):
        before, state = state, setup.step(state, random_batch(skipped))
        chex.assert_trees_all_equal(state.params, before.params)
        chex.assert_trees_all_equal(state.opt_state, before.opt_state)
        assert state.step == skipped + 1
        assert state.skipped == state.skipped_in_a_row == skipped
        assert np.isfinite(state.window.sums.nats)
    # Steps 2 and 3 share no window with step 1; nothing was counted in either.
    assert state.window.steps == 0
    state = setup.step(state.replace(params=good.params), harmless)
    assert state.skipped == 2
    assert state.skipped_in_a_row == 0
    assert np.any(
        state.params["embedding"]["embedding"] != good.params["embedding"]["embedding"]
    )


def test_after_ten_in_a_row_no_step_is_taken(dense):
    failed = dense.state.replace(skipped_in_a_row=jnp.int32(10))
    state = dense.step(jax.tree.map(jnp.copy, failed), random_batch(0))
    chex.assert_trees_all_equal(state.params, failed.params)
    assert state.skipped_in_a_row == 11
    nine = failed.replace(skipped_in_a_row=jnp.int32(9))
    assert dense.step(nine, random_batch(0)).skipped_in_a_row == 0


def test_gradients_are_clipped():
    batch = random_batch(0)
    setup = Setup(clip_norm=1e-3, learning_rate=1.0, warmup_steps=0)
    sgd = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    step = make_train_step(setup.model, sgd, setup.config, 256)
    state = setup.state.replace(opt_state=sgd.init(setup.state.params))
    new = jax.jit(step)(state, batch)
    change = jax.tree.map(jnp.subtract, new.params, state.params)
    assert optax.tree.norm(change) == pytest.approx(1e-3, rel=1e-3)
    assert new.window.grad_norm > 0.01


def test_computation_in_bfloat16_keeps_parameters_in_float32(dense):
    setup = Setup(dtype="bfloat16")
    state = setup.step(setup.state, random_batch(0))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    low = float(state.window.sums.nats)
    high = float(dense.step(dense.state, random_batch(0)).window.sums.nats)
    assert low != high
    assert low == pytest.approx(high, rel=1e-2)


def test_the_memory_loss_has_its_weight():
    def step(weight, accumulation):
        setup = Setup(
            scheme="selective", memory_loss_weight=weight, accumulation=accumulation
        )
        return setup.step(setup.state, random_batch(0))

    none, some, parts = step(0.0, 1), step(0.1, 1), step(0.1, 2)
    assert set(some.window.auxiliary) == {"selective_memory"}
    assert 0 < some.window.auxiliary["selective_memory"] <= 1
    chex.assert_trees_all_close(none.window.auxiliary, some.window.auxiliary)
    chex.assert_trees_all_close(none.window.sums, some.window.sums)
    assert abs(none.window.grad_norm - some.window.grad_norm) > 1e-5
    # The memory of a part is the mean over its rows, so parts of equal size add up.
    chex.assert_trees_all_close(parts.window, some.window, rtol=1e-4)
    chex.assert_trees_all_close(parts.params, some.params, atol=2e-5)


def test_the_memory_loss_grows_to_its_weight():
    def grad_norms(steps, **options):
        setup = Setup(scheme="selective", **options)
        states = [setup.state.replace(step=jnp.int32(step)) for step in steps]
        new = [setup.step(state, random_batch(0)) for state in states]
        return [float(state.window.grad_norm) for state in new]

    first, half, whole, after = grad_norms(
        (0, 1, 3, 9), memory_loss_weight=0.4, memory_loss_warmup=4
    )
    assert first != half != whole == after
    assert [first] == pytest.approx(grad_norms([0], memory_loss_weight=0.1), rel=1e-6)
    assert [whole] == pytest.approx(grad_norms([0], memory_loss_weight=0.4), rel=1e-6)


def test_the_memory_loss_is_minimised_with_its_weight_and_tau():
    """What it adds to a step of plain gradient descent is its gradient, times 0.3."""

    def change(weight, tau):
        setup = Setup(
            scheme="selective",
            memory_loss_weight=weight,
            selective=SelectiveConfig(memory_tau=tau, skip_error=1e-3),
        )
        sgd = optax.sgd(1.0)
        step = make_train_step(setup.model, sgd, setup.config, 256)
        state = setup.state.replace(opt_state=sgd.init(setup.state.params))
        new = jax.jit(step)(state, random_batch(0))
        return setup, jax.tree.map(jnp.subtract, state.params, new.params)

    _, without = change(0.0, 0.2)
    setup, with_loss = change(0.3, 0.2)
    examples = causal_examples(random_batch(0))

    @jax.jit
    @jax.grad
    def gradient(params):
        return measure(setup.model, params, examples)[1]["selective_memory"]

    expected = gradient(setup.state.params)
    found = jax.tree.map(lambda a, b: (a - b) / 0.3, with_loss, without)
    chex.assert_trees_all_close(found, expected, atol=1e-6)
    assert optax.tree.norm(expected) > 1e-3
    (layer,) = setup.model.budget_layers()
    mixer = setup.model.bind({})._blocks(parent=None)._mixer(layer)
    assert (mixer.memory_tau, mixer.padding_segment) == (0.2, 0)
    assert mixer.skip_error == 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_has_a_step(scheme):
    # Traced, not compiled: that they learn is for the comparison to show.
    config = runs.config("", scheme=scheme, features=32, hidden=32)
    sizes = dataclasses.replace(config.model.megabyte, local_features=16)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, megabyte=sizes)
    )
    model = build_model(config, 256)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = jax.eval_shape(lambda: init_state(model, optimizer, config))
    step = make_train_step(model, optimizer, config, 256)
    assert jax.eval_shape(step, state, random_batch(0)) == state
    auxiliary = {"selective_memory"} if scheme == "selective" else set()
    assert set(state.window.auxiliary) == auxiliary


def test_a_pattern_of_mixers_and_experts():
    config = runs.config(
        "",
        layers="dense moba",
        num_layers=4,
        experts=ExpertsConfig(num_experts=4, top_k=2, num_shared=1),
    )
    model = build_model(config, 256)
    assert model.mixers == "dense moba"
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = jax.eval_shape(lambda: init_state(model, optimizer, config))
    assert set(state.window.auxiliary) == {"load_balance"}
    assert set(state.params["blocks"]) == {"final_norm"} | {
        f"layer_{i}" for i in range(4)
    }


def test_sizes_that_do_not_fit_are_refused():
    config = runs.config("", layers="dense moba", num_layers=1)
    with pytest.raises(UserError, match=r"cannot be built: .* num_layers=1"):
        build_model(config, 256)


def test_masking_follows_bert():
    batch = random_batch(0, rows=200, length=128)
    mask = jax.jit(
        lambda rng: masked_examples(batch, rng, fraction=0.3, vocab_size=256)
    )
    examples = mask(jax.random.key(0))
    real, chosen = batch.segment_ids > 0, np.asarray(examples.weights) > 0
    assert not np.any(chosen & ~real)
    assert np.mean(chosen[real]) == pytest.approx(0.3, abs=0.01)
    np.testing.assert_array_equal(examples.targets, batch.tokens)
    inputs = np.asarray(examples.inputs)
    np.testing.assert_array_equal(inputs[~chosen], batch.tokens[~chosen])
    assert np.mean(inputs[chosen] == 257) == pytest.approx(0.8, abs=0.02)
    replaced = inputs[chosen & (inputs != 257)]
    original = batch.tokens[chosen & (inputs != 257)]
    assert np.mean(replaced == original) == pytest.approx(0.5, abs=0.03)
    assert replaced.max() < 256
    again, other = mask(jax.random.key(0)), mask(jax.random.key(1))
    chex.assert_trees_all_equal(examples, again)
    assert np.any(other.inputs != examples.inputs)


def test_the_seed_gives_the_parameters(dense):
    again, other = Setup(), Setup(seed=1)
    chex.assert_trees_all_equal(again.state, dense.state)
    one, two = (x.state.params["embedding"]["embedding"] for x in (dense, other))
    assert np.any(one != two)
