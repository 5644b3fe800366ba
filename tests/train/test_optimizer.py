"""jattn.train.optimizer: schedules, what decays, and what Muon orthogonalises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import jattn.models
from jattn.nn.monarch import BlockDiagonalMLP
from jattn.train import OptimizerConfig
from jattn.train.optimizer import (
    decayed,
    make_optimizer,
    make_schedule,
    muon_dimension_numbers,
)
from tests.support import normal

CONFIG = OptimizerConfig(learning_rate=0.5, warmup_steps=10, end_factor=0.1)


def rates(steps=100, **fields):
    schedule = make_schedule(dataclasses.replace(CONFIG, **fields), steps)
    return np.array([schedule(step) for step in range(steps + 1)])


def test_cosine_rises_and_falls():
    rate = rates()
    step = np.arange(101)
    expected = np.where(
        step < 10,
        0.5 * step / 10,
        0.05 + 0.45 * (1 + np.cos(np.pi * (step - 10) / 90)) / 2,
    )
    np.testing.assert_allclose(rate, expected, rtol=1e-5)


def test_wsd_rises_stays_and_falls():
    rate = rates(schedule="wsd", decay_fraction=0.25)
    step = np.arange(101)
    expected = np.interp(step, [0, 10, 75, 100], [0, 0.5, 0.5, 0.05])
    np.testing.assert_allclose(rate, expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_short_runs_have_a_short_warm_up(schedule):
    rate = rates(steps=6, warmup_steps=1000, schedule=schedule)
    assert rate[0] == 0
    assert rate.max() == pytest.approx(0.5)
    assert rate[6] == pytest.approx(0.05)


@pytest.fixture(scope="module")
def shapes():
    """Shapes of the parameters of a model that has everything."""
    model = jattn.models.DecoderLM(
        vocab_size=256,
        bos_id=256,
        features=16,
        num_layers=1,
        num_heads=2,
        head_dim=8,
        hidden=24,
        num_experts=4,
        num_shared_experts=1,
        tie_embeddings=False,
    )
    tokens = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])


def by_path(tree, **options):
    leaves = jax.tree_util.tree_leaves_with_path(tree, **options)
    return {"/".join(key.key for key in path): value for path, value in leaves}


def test_matrices_decay_and_nothing_else(shapes):
    decays = by_path(decayed(shapes))
    assert {name for name, value in decays.items() if not value} == {
        "embedding/embedding",
        "blocks/final_norm/scale",
        "blocks/layer_0/mixer_norm/scale",
        "blocks/layer_0/feed_forward_norm/scale",
    }


def test_muon_knows_every_linear_map(shapes):
    numbers = by_path(
        muon_dimension_numbers(shapes),
        is_leaf=lambda x: isinstance(x, MuonDimensionNumbers),
    )
    layer = "blocks/layer_0/"
    expected = {
        **{f"{layer}mixer/{x}/kernel": (0, (1, 2)) for x in ("query", "key", "value")},
        f"{layer}mixer/out/kernel": ((0, 1), 2),
        **{f"{layer}feed_forward/{x}": (1, 2) for x in ("gate", "up", "down")},
        **{
            f"{layer}feed_forward/shared/{x}/kernel": (0, 1)
            for x in ("gate", "up", "down")
        },
    }
    assert {k: tuple(v) for k, v in numbers.items()} == expected


def test_muon_knows_branches_and_diagonal_blocks():
    x = jnp.zeros((1, 4, 16))
    mixer = jattn.nn.NativeSparseAttention(num_heads=2, head_dim=8)
    params = jax.eval_shape(mixer.init, jax.random.key(0), x)["params"]
    numbers = muon_dimension_numbers({"mixer": params})["mixer"]
    assert params["key"]["kernel"].shape == (16, 3, 2, 8)
    assert tuple(numbers["key"]["kernel"]) == (0, (2, 3))
    assert tuple(numbers["value"]["kernel"]) == (0, (2, 3))
    mlp = BlockDiagonalMLP(hidden=24)
    params = jax.eval_shape(mlp.init, jax.random.key(0), x)["params"]
    numbers = muon_dimension_numbers({"mlp_0": params})["mlp_0"]
    assert params["out"]["kernel"].shape == (4, 6, 4)
    assert tuple(numbers["in"]["kernel"]) == tuple(numbers["out"]["kernel"]) == (1, 2)


def test_muon_orthogonalises_heads_together_and_the_rest_apart():
    params = {
        "query": {"kernel": jnp.zeros((16, 2, 8))},
        "key": {"kernel": jnp.zeros((16, 3, 2, 8))},
        "out": {"kernel": jnp.zeros((2, 8, 16))},
        "gate": jnp.zeros((3, 16, 16)),
        "mlp_0": {"out": {"kernel": jnp.zeros((3, 16, 16))}},
        "embedding": jnp.zeros((32, 16)),
    }
    leaves, treedef = jax.tree.flatten(params)
    grads = treedef.unflatten(normal(0, *(leaf.shape for leaf in leaves)))
    config = dataclasses.replace(
        CONFIG, name="muon", weight_decay=0.0, warmup_steps=0, clip_norm=1e9
    )
    optimizer = make_optimizer(config, 10)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)

    def singular_values(matrix):
        # Updates are scaled to AdamW's size: 0.2 sqrt(16) times an orthogonal map.
        return np.linalg.svd(matrix, compute_uv=False) / (0.5 * 0.2 * 4)

    maps = [
        updates["query"]["kernel"].reshape(16, 16),
        updates["out"]["kernel"].reshape(16, 16),
        *jnp.moveaxis(updates["key"]["kernel"].reshape(16, 3, 16), 1, 0),
        *updates["gate"],
        *updates["mlp_0"]["out"]["kernel"],
    ]
    for matrix in maps:
        values = singular_values(matrix)
        # Newton-Schulz brings all but the smallest near 1.
        assert np.all(values < 1.3)
        assert np.sum(values > 0.6) >= 14
    # The first step of AdamW with Nesterov momentum follows the gradient's sign.
    size = 0.5 * (0.9 * 0.1 / (1 - 0.9**2) + 0.1 / (1 - 0.9))
    np.testing.assert_allclose(
        updates["embedding"], -size * np.sign(grads["embedding"]), rtol=1e-4
    )


def test_adamw_against_its_equations():
    config = dataclasses.replace(
        CONFIG, warmup_steps=0, clip_norm=1.0, beta1=0.9, beta2=0.95, weight_decay=0.1
    )
    optimizer = make_optimizer(config, 10)
    rates_ = rates(steps=10, warmup_steps=0)
    params = {"kernel": normal(0, (3, 4))[0], "scale": jnp.ones(4)}
    state = optimizer.init(params)
    expected = {k: np.asarray(v, np.float64) for k, v in params.items()}
    means = {k: (np.zeros(v.shape), np.zeros(v.shape)) for k, v in params.items()}
    for step in range(3):
        kernel, scale = normal(step + 1, (3, 4), (4,))
        grads = {"kernel": kernel, "scale": scale}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)

        norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
        for name, grad in grads.items():
            grad = np.asarray(grad, np.float64) / max(norm, 1.0)
            first, second = means[name]
            first = 0.9 * first + 0.1 * grad
            second = 0.95 * second + 0.05 * grad**2
            means[name] = first, second
            update = (first / (1 - 0.9 ** (step + 1))) / (
                np.sqrt(second / (1 - 0.95 ** (step + 1))) + 1e-8
            )
            decay = 0.1 if name == "kernel" else 0.0
            expected[name] -= rates_[step] * (update + decay * expected[name])
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-4, atol=1e-6)


def test_position_features_learn_at_an_eightieth_of_the_rate():
    params = {"position_features": jnp.zeros((3, 5)), "kernel": jnp.zeros((3, 5))}
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), 10)
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(
        updates["position_features"], updates["kernel"] / 80, rtol=1e-6
    )


def test_muon_takes_the_diagonal_blocks_of_a_decoder_apart():
    model = jattn.models.DecoderLM(
        vocab_size=5,
        bos_id=5,
        features=8,
        num_layers=1,
        num_heads=2,
        head_dim=4,
        hidden=8,
        feed_forward="block_diagonal",
    )
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3), int))
    block = muon_dimension_numbers(params["params"])["blocks"]["layer_0"]
    for name in ("in", "out"):
        assert block["feed_forward"][name]["kernel"] == MuonDimensionNumbers(1, 2)
    assert block["mixer"]["out"]["kernel"] == MuonDimensionNumbers((0, 1), 2)
