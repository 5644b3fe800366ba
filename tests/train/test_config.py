"""jattn.train.config: reading, writing, comparing and refusing configurations."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import pytest
import tyro

from jattn.train import (
    ModelConfig,
    OptimizerConfig,
    SelectiveConfig,
    TrainConfig,
    UserError,
)
from jattn.train.config import SCHEMES, differences


@hypothesis.given(
    scheme=st.sampled_from(SCHEMES),
    windows=st.tuples(st.integers(1, 99), st.integers(1, 99)),
    learning_rate=st.floats(1e-6, 1.0),
    paths=st.lists(st.text("aé/", max_size=5), max_size=2),
)
def test_json_round_trip(scheme, windows, learning_rate, paths):
    config = TrainConfig()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            scheme=scheme,
            simplicial=dataclasses.replace(config.model.simplicial, windows=windows),
        ),
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        data=dataclasses.replace(config.data, paths=tuple(paths)),
    )
    written = json.loads(json.dumps(config.to_json()))
    assert TrainConfig.from_json(written) == config


def test_the_command_line_reaches_every_level():
    arguments = "--steps 7 --model.scheme dense --model.nsa.block-size 24"
    arguments += " --data.paths a b.gz --optimizer.name muon"
    config = tyro.cli(TrainConfig, args=arguments.split())
    assert config.steps == 7
    assert config.model.nsa.block_size == 24
    assert config.data.paths == ("a", "b.gz")
    assert config.optimizer.name == "muon"


def test_unknown_fields_are_named():
    with pytest.raises(UserError, match=r"model\.width is not a field"):
        TrainConfig.from_json({"model": {"width": 3}})


def test_differences_name_the_fields_of_another_run():
    one = TrainConfig(model=ModelConfig(features=128), seed=1)
    two = TrainConfig(model=ModelConfig(features=64), seed=1, steps=9, out="elsewhere")
    assert differences(one, two) == ["model.features is 128 there and 64 here"]
    assert differences(one, dataclasses.replace(one, log_every=3)) == []


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("model", {"scheme": "denser"}, "one of dense, .*m2bert; got 'denser'"),
        ("model", {"layers": "dense mobile"}, "model.layers must be one of"),
        ("model", {"num_layers": 0}, "model.num_layers must be greater than 0; got 0"),
        ("model", {"num_heads": 3}, "model.features must be a multiple"),
        ("model", {"num_kv_heads": 3}, "multiple of model.num_kv_heads; got 4 and 3"),
        ("data", {"batch_size": -1}, "data.batch_size must be greater than 0"),
        ("data", {"validation_fraction": 1.0}, "between 0 and 1; got 1.0"),
        ("optimizer", {"name": "sgd"}, "one of adamw, muon; got 'sgd'"),
        ("optimizer", {"end_factor": 1.5}, "from 0 to 1; got 1.5"),
        ("optimizer", {"learning_rate": float("nan")}, "greater than 0; got nan"),
        (None, {"accumulation": 3}, "multiple of accumulation; got 8 and 3"),
        (None, {"dtype": "float16"}, "one of float32, bfloat16"),
        (None, {"seed": -1}, "seed must be 0 or greater"),
    ],
)
def test_errors_say_what_is_wrong(part, fields, message):
    config = TrainConfig() if part is None else getattr(TrainConfig(), part)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **fields)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"context_length": 250}, "context_length must be a multiple .* 250 and 8"),
        ({"align": 4}, "align must be a multiple .*patch_size.* 4 and 8"),
    ],
)
def test_megabyte_needs_whole_patches(data, message):
    config = TrainConfig()
    model = dataclasses.replace(config.model, scheme="megabyte")
    assert dataclasses.replace(config, model=model).align == 8
    with pytest.raises(UserError, match=message):
        dataclasses.replace(
            config, model=model, data=dataclasses.replace(config.data, **data)
        )


def test_only_a_part_of_the_softmax_weight_may_be_skipped():
    with pytest.raises(UserError, match="at least 0 and less than 1; got 1"):
        SelectiveConfig(skip_error=1.0)
