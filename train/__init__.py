"""Training, evaluation and comparison; import this package as ``jattn.train``."""

from jattn.train.build import build_model, parameter_count
from jattn.train.config import (
    DataConfig,
    ExpertsConfig,
    MegabyteConfig,
    MoBAConfig,
    ModelConfig,
    MonarchConfig,
    NSAConfig,
    OptimizerConfig,
    SelectiveConfig,
    SimplicialConfig,
    TrainConfig,
    UserError,
)
from jattn.train.data import Dataset, load_tokenizer
from jattn.train.evaluate import Evaluation, make_evaluator
from jattn.train.load import TrainedModel, load_run
from jattn.train.loop import TrainResult, train
from jattn.train.presets import PRESETS

__all__ = [
    "PRESETS",
    "DataConfig",
    "Dataset",
    "Evaluation",
    "ExpertsConfig",
    "MegabyteConfig",
    "MoBAConfig",
    "ModelConfig",
    "MonarchConfig",
    "NSAConfig",
    "OptimizerConfig",
    "SelectiveConfig",
    "SimplicialConfig",
    "TrainConfig",
    "TrainResult",
    "TrainedModel",
    "UserError",
    "build_model",
    "load_run",
    "load_tokenizer",
    "make_evaluator",
    "parameter_count",
    "train",
]
