"""Named configurations to start from; flags and `dataclasses.replace` change them."""

from collections.abc import Mapping
from types import MappingProxyType

from jattn.train.config import (
    DataConfig,
    ExpertsConfig,
    ModelConfig,
    OptimizerConfig,
    SimplicialConfig,
    TrainConfig,
)

# The 2-simplicial Transformer of arXiv 2507.02754 in a size for one GPU of 80 GB.
#
# From the paper: every fourth layer is 2-simplicial with windows 512 x 32 and trilinear
# logits, 64 query heads share a kv head, the feed-forward is a mixture of experts, and
# AdamW's learning rate rises in 4000 steps to 4e-3 and falls along a cosine to a
# hundredth of that, with a weight decay of 0.0125.
#
# The paper does not disclose numbers of layers and experts, widths, length of the
# context, batch, tokens in all, data, tokenizer, other constants of the optimizer, nor
# whether its layers have rotary positions: these values are our own. Its models have 1
# to 3.5 billion active parameters, and at 1 billion it found no gain; this one has 0.24
# billion active of 0.54 billion.
_SIMPLICIAL_TRANSFORMER = TrainConfig(
    model=ModelConfig(
        scheme="simplicial",
        layers="dense dense dense simplicial",
        num_layers=16,
        features=1024,
        num_heads=64,
        num_kv_heads=1,
        head_dim=64,
        hidden=1024,
        remat=True,
        experts=ExpertsConfig(num_experts=8, top_k=2),
        simplicial=SimplicialConfig(windows=(512, 32), form="trilinear"),
    ),
    data=DataConfig(context_length=4096, batch_size=32),
    optimizer=OptimizerConfig(
        name="adamw",
        learning_rate=4e-3,
        schedule="cosine",
        warmup_steps=4000,
        end_factor=0.01,
        weight_decay=0.0125,
    ),
    steps=20_000,
    accumulation=8,
    dtype="bfloat16",
    eval_every=500,
    checkpoint_every=500,
)

PRESETS: Mapping[str, TrainConfig] = MappingProxyType(
    {"simplicial-transformer": _SIMPLICIAL_TRANSFORMER}
)
