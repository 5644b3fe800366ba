# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart
#
# A function, a module, and a small language model trained on real text.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jattn

# %% [markdown]
# ## A function
#
# In mixture of block attention every query attends to the blocks of keys whose mean it
# likes best, its own block included. Shapes are those of
# `jax.nn.dot_product_attention`.

# %%
rng_query, rng_key, rng_value = jax.random.split(jax.random.key(0), 3)
query = jax.random.normal(rng_query, (1, 256, 4, 32))  # [B, T, N, H]
key = jax.random.normal(rng_key, (1, 256, 2, 32))  # [B, S, K, H]
value = jax.random.normal(rng_value, (1, 256, 2, 32))

out, lse = jattn.mixture_of_block_attention(
    query, key, value, block_size=32, top_k=3, return_lse=True
)
print(out.shape, lse.shape)

# %% [markdown]
# Which blocks were those? Each row is a query of head 0, each column a block of keys.

# %%
blocks = jattn.moba_select_blocks(query, key, block_size=32, top_k=3)  # [B, T, N, 3]
chosen = np.any(np.asarray(blocks[0, :, 0])[:, :, None] == np.arange(8), axis=1)
figure, axes = plt.subplots(figsize=(4, 4))
axes.imshow(chosen, aspect="auto", interpolation="nearest", cmap="Greys")
axes.set_xlabel("block of keys")
axes.set_ylabel("query")
# %% [markdown]
# ## A module
#
# Parameters and caches are values that go in and come out. Decoding token by token
# gives what the parallel form gives.

# %%
mixer = jattn.nn.MixtureOfBlockAttention(
    num_heads=4, head_dim=16, block_size=16, top_k=2
)
x = jax.random.normal(jax.random.key(1), (2, 48, 64))
params = mixer.init(jax.random.key(2), x)
parallel = mixer.apply(params, x)

cache = mixer.init_cache(2, 48, jnp.float32)
y, cache = mixer.apply(params, x[:, :40], cache=cache)
steps = [y]
step = jax.jit(lambda x, cache: mixer.apply(params, x, cache=cache))
for t in range(40, 48):
    y, cache = step(x[:, t : t + 1], cache)
    steps.append(y)
decoded = jnp.concatenate(steps, axis=1)
print("largest difference", float(jnp.abs(decoded - parallel).max()))
print("bytes of cache", jattn.nn.cache_bytes(cache))

# %% [markdown]
# ## Training
#
# A small model on the source of Python's standard library, as bytes. With `out=` it
# would keep checkpoints and could be continued.

# %%
from jattn.train import DataConfig, ModelConfig, OptimizerConfig, TrainConfig, train

config = TrainConfig(
    model=ModelConfig(scheme="moba", num_layers=2, features=64, num_heads=4),
    data=DataConfig(context_length=128, batch_size=8, max_bytes=1_000_000),
    optimizer=OptimizerConfig(name="muon", learning_rate=0.02, warmup_steps=5),
    steps=60,
    log_every=5,
    eval_every=20,
    eval_batches=2,
)
result = train(config)
print(f"{result.parameter_count:,} parameters")
print(f"{result.validation.bits_per_byte:.2f} bits per byte on held-out text")

# %%
training = [row for row in result.rows if "bits_per_byte" in row]
held_out = [row for row in result.rows if "validation_bits_per_byte" in row]
figure, axes = plt.subplots(figsize=(6, 3.5))
axes.plot(
    [row["step"] for row in training],
    [row["bits_per_byte"] for row in training],
    label="training",
)
axes.plot(
    [row["step"] for row in held_out],
    [row["validation_bits_per_byte"] for row in held_out],
    marker="o",
    label="held out",
)
axes.axhline(result.entropies.unigram, color="gray", linestyle="--")
axes.set_xlabel("step")
axes.set_ylabel("bits per byte")
axes.legend()
# %% [markdown]
# ## Generating
#
# All tokens are sampled inside one `jit`.

# %%
prompt = b"def "
tokens = jattn.generate(
    result.model,
    {"params": result.params},
    jnp.asarray(list(prompt))[None],
    max_new_tokens=64,
    rng=jax.random.key(0),
    temperature=0.7,
)
print((prompt + bytes(tokens[0].tolist())).decode(errors="replace"))
