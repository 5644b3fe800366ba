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
# # How much memory Selective Attention needs
#
# Two models of more than 10 million parameters read the Python source of ten packages,
# in contexts of 512 and of 1024 tokens of a byte-pair tokenizer. One attends densely.
# The other is selective: it learns what it may forget, and the memory loss makes it
# forget much. Then `jattn prune` lowers the budget of each of its layers as far as it
# keeps the validation loss of the dense model.
#
# The runs took minutes on one GPU. This notebook shows what they left in a file of
# results, which `python -m benchmarks.selective_memory` makes:
#
# ```
# python -m benchmarks.selective_memory --context 512 --vocabulary 4096 \
#     --text torch.txt sympy.txt ... --memory-loss-weight 0.1 --out FILE
# ```
#
# with the layers, heads, weights and seeds below.

# %%
import json
import pathlib

import matplotlib.pyplot as plt

import jattn

path = (
    pathlib.Path(jattn.__file__)
    .parents[1]
    .joinpath("benchmarks", "results", "training", "selective_memory_h200.json")
)
results = json.loads(path.read_text())
print(results["device"], "jax", results["versions"]["jax"])


def name(result):
    layers, seed = result["layers"], result["seed"]
    return f"{result['context']} tokens, {layers} layers, seed {seed}"


for result in results["results"]:
    dense, selective, pruned = (
        result["measured"][model] for model in ("dense", "selective", "pruned")
    )
    print(
        f"{name(result)}: validation loss {dense['loss']:.4f} dense, "
        f"{selective['loss']:.4f} selective, {pruned['loss']:.4f} with "
        f"{dense['cache_bytes'] / pruned['cache_bytes']:.1f} times less cache"
    )
    print(
        f"    {result['runs']['dense']['parameters']:,} parameters, {result['heads']} "
        f"heads, memory loss times {result['memory_loss_weight']:g} from step "
        f"{result['memory_loss_warmup']} on"
    )

# %% [markdown]
# The losses are nats per token over all of the held-out text. The search compared
# losses on a few batches of it only; of the budgets it came across, the smallest ones
# count that keep the dense model's loss on all of that text.
#
# How far the cache shrinks depends on what the selective model gains over the dense
# one, and that differs from run to run by as much as it is. It is most with six heads
# in six layers. In one of two runs with four heads, of which one selects, nothing is
# gained, and no token can be spared. Layers beyond six need little cache, so that more
# of them make the ratio larger at the same gain.


# %%
def curve(rows, number):
    found = [(row["step"], row[number]) for row in rows if number in row]
    return zip(*found, strict=True)


high = -(-len(results["results"]) // 2)
figure, axes = plt.subplots(high, 2, figsize=(9, 3.2 * high), sharex=True, sharey=True)
for ax, result in zip(axes.flat, results["results"], strict=False):
    for scheme, color in (("dense", "C0"), ("selective", "C1")):
        rows = result["runs"][scheme]["rows"]
        ax.plot(*curve(rows, "loss"), color=color, alpha=0.3)
        ax.plot(*curve(rows, "validation_loss"), color=color, marker=".", label=scheme)
    ax.set_title(name(result))
    ax.set_ylim(top=4)
figure.supxlabel("step")
figure.supylabel("nats per token (pale: training)")
axes.flat[0].legend()

# %% [markdown]
# The part of the keys that the memory loss counts as needed, while the model learns:

# %%
figure, ax = plt.subplots(figsize=(6, 3.5))
for result in results["results"]:
    rows = result["runs"]["selective"]["rows"]
    ax.plot(*curve(rows, "selective_memory"), label=name(result))
ax.set_xlabel("step")
ax.set_ylabel("memory term")
ax.set_ylim(bottom=0)
ax.legend()

# %% [markdown]
# The search lowers one budget after the other, where a token costs the least loss. In
# the end one or two layers keep much of the context, and the others nearly nothing.

# %%
figure, ax = plt.subplots(figsize=(6, 3.5))
for result in results["results"]:
    steps = result["search"]["steps"]
    times = [step["unpruned_bytes"] / step["cache_bytes"] for step in steps]
    (line,) = ax.plot(times, [step["loss"] for step in steps], marker=".")
    line.set_label(name(result))
    ax.axhline(steps[-1]["limit"], color=line.get_color(), linestyle="--")
    chosen = steps[result["search"]["chosen"]]
    print(f"{name(result)}: budgets {chosen['budgets']}")
ax.set_xscale("log")
ax.set_xlabel("times less cache")
ax.set_ylabel("validation loss (dashed: to be kept)")
ax.legend()
