"""jattn.train.start: a run that goes on from another one."""

import shutil

import chex
import jax
import jax.numpy as jnp
import pytest

from jattn.train import Dataset, UserError, build_model, load_run, start, train
from jattn.train.optimizer import make_optimizer
from tests.train import runs

pytestmark = pytest.mark.usefixtures("compiled_programs")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def other(path, tmp_path_factory):
    """A run of six steps to resume from."""
    return train(runs.config(path, out=str(tmp_path_factory.mktemp("other") / "run")))


def start_of(config):
    data = Dataset.of(config)
    model = build_model(config, data.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.steps)
    return start.find_start(config, model, optimizer, data)


def test_a_run_in_two_parts_is_the_run_in_one_go(path, tmp_path):
    def config(name, **fields):
        # The learning rate is constant until its last third.
        fields = dict(steps=9, schedule="wsd", decay_fraction=1 / 3) | fields
        return runs.config(path, out=str(tmp_path / name), **fields)

    whole = train(config("whole"))
    first = train(config("first", steps=6, decay_fraction=0.0)).config.out
    last = config("last", resume_from=first)
    result = train(last)
    chex.assert_trees_all_equal(result.params, whole.params)
    assert result.step == 9
    assert [row["step"] for row in result.rows] == [8, 9, 9]
    assert runs.without_speed(result.rows) == runs.without_speed(
        row for row in whole.rows if row["step"] > 6
    )

    # The first part is as it was, and not needed to continue the last one.
    assert load_run(first).step == 6
    shutil.rmtree(first)
    assert train(last).step == 9
    shutil.rmtree(tmp_path / "last" / "checkpoints")
    with pytest.raises(UserError, match=f"{first} holds no run"):
        train(last)


@pytest.mark.parametrize("scheme", ["dense", "moba", "selective"])
def test_a_run_may_resume_with_another_scheme(other, path, scheme):
    # With so small a learning rate, no parameter changes.
    fields = dict(scheme=scheme, steps=7, learning_rate=1e-30)
    result = train(runs.config(path, resume_from=other.config.out, **fields))
    assert result.step == 7
    chex.assert_trees_all_equal(result.params, other.params)


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({}, True),
        ({"accumulation": 2}, True),
        ({"validation_fraction": 0.4}, False),
        ({"context_length": 16}, False),
        ({"batch_size": 2}, False),
        ({"seed": 1}, False),
        ({"align": 2}, False),
    ],
)
def test_a_run_goes_on_in_its_text_if_that_is_read_likewise(other, path, fields, same):
    found = start_of(runs.config(path, resume_from=other.config.out, steps=7, **fields))
    position = start_of(other.config).position
    assert position is not None
    assert found.position == (position if same else None)
    assert found.step == found.state.step == 6
    seed = fields.get("seed", 0)
    assert found.state.rng == start_of(runs.config(path, seed=seed)).state.rng


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"features": 32}, r"blocks/\S+ is \(16,.*\) there and \(32,.*\) here"),
        ({"num_layers": 2}, r"blocks/layer_1/\S+ is absent there and \(.*\) here"),
        ({"scheme": "monarch"}, r"\S+ is .*absent"),
        ({"name": "muon"}, r"optimizer.name is 'adamw' there and 'muon' here"),
    ],
)
def test_what_does_not_fit_is_named(other, path, tmp_path, fields, reason):
    out = tmp_path / "run"
    fields = dict(resume_from=other.config.out, out=str(out), steps=7) | fields
    with pytest.raises(UserError, match=f"cannot resume from .*: {reason}"):
        train(runs.config(path, **fields))
    assert not out.exists()


def test_steps_made_before_count(other, path):
    config = runs.config(path, resume_from=other.config.out, steps=6)
    with pytest.raises(UserError, match=r"has made 6 steps.* must be more, got 6"):
        train(config)


def test_there_is_no_checkpoint_to_resume_from(path, tmp_path):
    for message in ("holds no run", "does not hold a checkpoint"):
        with pytest.raises(UserError, match=f"{tmp_path} {message}"):
            train(runs.config(path, resume_from=str(tmp_path)))
        (tmp_path / "checkpoints").mkdir(exist_ok=True)


def test_arrays_computed_one_by_one_leave_out_what_is_not_returned():
    def fail():
        raise AssertionError("nobody needs this")

    def program():
        keys = jax.random.split(jax.random.key(0))
        jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32))
        return jax.random.normal(keys[0], (5, 3)), jax.random.uniform(keys[1], (7,))

    found = start._compute_in_parts(jax.make_jaxpr(program)())
    chex.assert_trees_all_close(tuple(found), jax.jit(program)(), rtol=1e-6)
