"""Models from their configuration."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jattn.models
from jattn.train.config import ModelConfig, TrainConfig, UserError
from jattn.train.data import PADDING_SEGMENT, bos_id, mask_id


def build_model(config: TrainConfig, vocab_size: int) -> nn.Module:
    """The model of a configuration.

    Args:
      config: Of the run.
      vocab_size: Tokens of the tokenizer.

    Returns:
      A `jattn.models.DecoderLM`, `Megabyte` or `M2Bert`.

    Raises:
      UserError: Sizes do not fit each other. What a mixer or an operation has to say
        about its own sizes it says when it is traced; see `model_errors`.
    """
    with model_errors():
        match config.model.scheme:
            case "megabyte":
                return _megabyte(config, vocab_size)
            case "m2bert":
                return _m2bert(config, vocab_size)
            case _:
                return _decoder(config, vocab_size)


@contextlib.contextmanager
def model_errors() -> Iterator[None]:
    """Turns what a model raises when it is built or traced into a `UserError`."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"the model cannot be built: {error}") from error


def parameter_count(params: Any) -> int:
    """How many numbers are trained, from parameters or their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def context_cache_bytes(model: Any, config: TrainConfig) -> int:
    """Bytes of the cache of one sequence as long as the context.

    Args:
      model: A language model that continues text.
      config: Of its run.
    """
    cache = jax.eval_shape(
        lambda: model.init_cache(1, config.data.context_length, jnp.dtype(config.dtype))
    )
    return jattn.nn.cache_bytes(cache)


def _decoder(config: TrainConfig, vocab_size: int) -> nn.Module:
    model = config.model
    mixers = model.layers or model.scheme
    if "moba" in mixers.split():
        blocks = -(-config.data.context_length // model.moba.block_size)
        if model.moba.top_k > blocks:
            raise UserError(
                f"model.moba.top_k may be at most {blocks}, the blocks of "
                f"{model.moba.block_size} tokens in a context of "
                f"{config.data.context_length}; got {model.moba.top_k}"
            )
    return jattn.models.DecoderLM(
        vocab_size=vocab_size,
        bos_id=bos_id(vocab_size),
        tie_embeddings=model.tie_embeddings,
        **_stack(config, mixers, model.num_layers),
    )


def _megabyte(config: TrainConfig, vocab_size: int) -> nn.Module:
    model, sizes = config.model, config.model.megabyte
    head_dim = _head_dim(model)
    if sizes.local_features % head_dim:
        raise UserError(
            "model.megabyte.local_features must be a multiple of the width of a head; "
            f"got {sizes.local_features} and {head_dim}"
        )
    local = dataclasses.replace(
        model,
        features=sizes.local_features,
        num_heads=sizes.local_features // head_dim,
        num_kv_heads=None,
    )
    return jattn.models.Megabyte(
        vocab_size=vocab_size,
        bos_id=bos_id(vocab_size),
        patch_size=sizes.patch_size,
        positions="rope",
        tie_embeddings=model.tie_embeddings,
        global_stage=jattn.models.BlockStack(
            **_stack(config, sizes.global_mixers, sizes.global_layers)
        ),
        local_stage=jattn.models.BlockStack(
            **_stack(
                dataclasses.replace(config, model=local),
                *(sizes.local_mixers, sizes.local_layers),
            )
        ),
    )


def _m2bert(config: TrainConfig, vocab_size: int) -> nn.Module:
    model = config.model
    return jattn.models.M2Bert(
        vocab_size=mask_id(vocab_size) + 1,
        max_length=config.data.context_length,
        num_layers=model.num_layers,
        features=model.features,
        hidden=_hidden(model),
        num_blocks=model.monarch.num_blocks,
        filter_order=model.monarch.filter_order,
        dropout_rate=0.0,
        dtype=jnp.dtype(config.dtype),
        implementation=model.implementation,
    )


def _stack(config: TrainConfig, mixers: str, num_layers: int) -> dict[str, Any]:
    """Fields of a BlockStack."""
    model = config.model
    return {
        "features": model.features,
        "num_layers": num_layers,
        "num_heads": model.num_heads,
        "head_dim": _head_dim(model),
        "hidden": _hidden(model),
        "num_kv_heads": model.num_kv_heads,
        "mixers": mixers,
        "mixer_options": _mixer_options(config, mixers),
        "feed_forward": model.feed_forward
        or ("block_diagonal" if model.scheme == "monarch" else "swiglu"),
        "num_experts": model.experts.num_experts,
        "experts_per_token": model.experts.top_k,
        "num_shared_experts": model.experts.num_shared,
        "remat": model.remat,
        "qk_norm": model.qk_norm,
        "dtype": jnp.dtype(config.dtype),
    }


def _head_dim(model: ModelConfig) -> int:
    return model.head_dim or model.features // model.num_heads


def _hidden(model: ModelConfig) -> int:
    # SwiGLU has three matrices instead of two: 8/3 keeps the usual 8 features**2.
    return model.hidden or -(-model.features // 3) * 8


def _mixer_options(config: TrainConfig, mixers: str) -> dict[str, dict[str, Any]]:
    """What mixers need beyond heads and features, by name."""
    model = config.model
    budgets = model.selective.budgets
    sizes = {
        "nsa": dataclasses.asdict(model.nsa),
        "moba": dataclasses.asdict(model.moba),
        "simplicial": dataclasses.asdict(model.simplicial),
        "selective": {
            "budget": budgets[0] if len(budgets) == 1 else budgets or None,
            "memory_tau": model.selective.memory_tau,
            "skip_error": model.selective.skip_error,
            "padding_segment": PADDING_SEGMENT,
        },
        "monarch": {
            "filter_order": model.monarch.filter_order,
            "max_length": config.data.context_length,
        },
    }
    return {
        mixer: {"implementation": model.implementation, **sizes.get(mixer, {})}
        for mixer in mixers.split()
    }
