"""jattn.train.checkpoint: what is kept, what comes back, and what goes wrong."""

import dataclasses
import os
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.train import UserError
from jattn.train.checkpoint import Checkpoints
from jattn.train.objective import Sums
from jattn.train.step import TrainState, Window
from tests.support import normal
from tests.train import runs


def make_state(seed=0, size=16):
    kernel, mean = normal(seed, (size, size), (size, size))
    zero = jnp.float32(0)
    return TrainState(
        params={"dense": {"kernel": kernel}},
        opt_state=({"mean": mean}, jnp.int32(seed)),
        step=jnp.int32(seed),
        rng=jax.random.key(seed),
        skipped=jnp.int32(1),
        skipped_in_a_row=jnp.int32(0),
        window=Window(Sums(zero + 0.1, zero, zero), {"memory": zero}, zero, zero),
    )


def save(checkpoints, step, loss=None, state=None, **fields):
    checkpoints.save(
        step,
        make_state(step) if state is None else state,
        config=runs.config("text", **fields),
        data={"iterator": {"next": step}},
        validation_loss=loss,
    )


def test_all_of_the_state_comes_back(tmp_path):
    with Checkpoints(tmp_path / "new" / "folder", keep=2) as checkpoints:
        state = make_state(3)
        save(checkpoints, 3, state=state)
        # A step may take the arrays over before they are on the disk.
        jax.tree.map(lambda x: x.delete(), state)
    with Checkpoints(tmp_path / "new" / "folder", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 3
        shapes = jax.eval_shape(lambda: make_state(3))
        restored, data = checkpoints.restore(3, shapes, runs.config("text"))
        assert checkpoints.restore_config(3) == runs.config("text")
    chex.assert_trees_all_equal(restored, make_state(3))
    chex.assert_trees_all_equal_dtypes(restored, make_state(3))
    assert data == {"iterator": {"next": 3}}


def test_the_latest_and_the_best_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: float("nan"), 6: 2.5}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step, losses[step])
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (4, 5, 6):
            save(checkpoints, step, losses[step])
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.best_step() == 2
        assert checkpoints.latest_step() == 6


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1, 3.0)
        save(checkpoints, 1, 1.0)
        assert checkpoints.steps() == [1]


def test_another_configuration_is_refused(tmp_path):
    shapes = jax.eval_shape(make_state)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1, features=16, seed=0)
        other = runs.config("text", features=32, seed=5)
        with pytest.raises(UserError) as error:
            checkpoints.restore(1, shapes, other)
        assert "model.features is 16 there and 32 here; seed is 0 there and 5" in str(
            error.value
        )
        # Where a run writes and how far it goes may change.
        longer = dataclasses.replace(runs.config("text"), steps=99, out="x")
        checkpoints.restore(1, shapes, longer)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match="takes 8 MiB and the disk has only 1 MiB"):
            save(checkpoints, 2, state=make_state(2, size=1000))
    assert os.listdir(tmp_path) == ["1"]


# Orbax gives up at the first array that cannot be written; TensorStore then reports
# the others to an event loop that is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_full_after_all_leaves_what_was_there(tmp_path, caplog):
    large = make_state(2, size=300)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        save(checkpoints, 2, state=large)
        checkpoints.wait()
        with runs.files_of_at_most(50_000):
            save(checkpoints, 3, state=large)
            with pytest.raises(UserError, match=r"cannot be written .* too large"):
                checkpoints.wait()
    assert not caplog.records
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 2
        shapes = jax.eval_shape(lambda: large)
        restored, _ = checkpoints.restore(2, shapes, runs.config("text"))
    chex.assert_trees_all_equal(restored, large)


def test_what_a_killed_run_left_is_cleaned_up(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [1]
        save(checkpoints, 2)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used for checkpoints: Not a dir"):
        Checkpoints(tmp_path / "file" / "folder", keep=2)


def test_parameters_alone(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 4)
    with Checkpoints(tmp_path) as checkpoints:
        shapes = jax.eval_shape(lambda: make_state(4).params)
        params = checkpoints.restore_params(4, shapes)
    np.testing.assert_array_equal(
        params["dense"]["kernel"], make_state(4).params["dense"]["kernel"]
    )
