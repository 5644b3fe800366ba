"""Learning-rate schedules and optimizers, chosen by an `OptimizerConfig`."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from jattn.train.config import OptimizerConfig

# Parameters of two and more dimensions that are no linear maps.
_NOT_DECAYED = ("bias", "embedding", "pad", "position", "scale")
# Learning rate of the features that Monarch Mixer's filters are functions of, over that
# of everything else: 1e-5 and 8e-4 where they were first trained.
_POSITION_FEATURES_RATE = 1 / 80
# What an expert's kernels are called; their first axis counts experts.
_EXPERT_KERNELS = ("gate", "up", "down")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by the number of updates made before.

    It rises linearly from 0 to its peak in the warm-up, which takes at most half of
    the steps, then falls to `end_factor` times the peak at the last step: along half
    a cosine ("cosine"), or linearly in the last `decay_fraction` of the steps after
    having stayed at the peak ("wsd").
    """
    peak, end = config.learning_rate, config.learning_rate * config.end_factor
    warmup = min(config.warmup_steps, steps // 2)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end)
    decay = min(round(config.decay_fraction * steps), steps - warmup)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, end, decay),
        ],
        boundaries=[warmup, steps - decay],
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW or Muon.

    Muon orthogonalises the updates of the layers' linear maps (all heads of a
    projection together, each expert, branch and diagonal block by itself) and leaves
    embeddings, heads, routers, filters, norms and biases to AdamW (with Nesterov
    momentum, as Muon itself). Its updates are scaled to AdamW's RMS, so that both
    share one learning rate and weight decay.
    """
    schedule = make_schedule(config, steps)
    if config.name == "muon":
        optimizer = optax.contrib.muon(
            schedule,
            beta=config.muon_beta,
            weight_decay=config.weight_decay,
            weight_decay_mask=decayed,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=muon_dimension_numbers,
            consistent_rms=0.2,
        )
    else:
        optimizer = optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decayed,
        )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optimizer,
        optax.masked(optax.scale(_POSITION_FEATURES_RATE), _is_position_features),
    )


def decayed(params: Any) -> Any:
    """Whether weight decay applies, for every leaf of params."""

    def decays(path, leaf):
        name = _names(path)[-1]
        return leaf.ndim >= 2 and not any(word in name for word in _NOT_DECAYED)

    return jax.tree_util.tree_map_with_path(decays, params)


def muon_dimension_numbers(params: Any) -> Any:
    """The axes of the linear map each leaf of params is, None where it is none."""

    def dimension_numbers(path, leaf):
        names = _names(path)
        if names[-1] in _EXPERT_KERNELS and leaf.ndim == 3:  # [E, in, out]
            return MuonDimensionNumbers(1, 2)
        if names[-1] != "kernel" or "head" in names:
            return None
        if leaf.ndim == 3 and any(
            name == "feed_forward" or name.startswith("mlp") for name in names
        ):
            # Block-diagonal: [blocks, in, out].
            return MuonDimensionNumbers(1, 2)
        if leaf.ndim == 3 and names[-2] == "out":  # [N, H, features]
            return MuonDimensionNumbers((0, 1), 2)
        if leaf.ndim == 4:  # [features, branches, K, H]
            return MuonDimensionNumbers(0, (2, 3))
        if leaf.ndim == 3:  # [features, N, H]
            return MuonDimensionNumbers(0, (1, 2))
        return MuonDimensionNumbers(0, 1)

    return jax.tree_util.tree_map_with_path(dimension_numbers, params)


def _is_position_features(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _names(path)[-1] == "position_features", params
    )


def _names(path) -> list[str]:
    return [str(getattr(key, "key", key)) for key in path]
