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
# Two models of 12 million parameters read the Python source of ten packages, in
# contexts of 512 and of 1024 tokens of a byte-pair tokenizer. One attends densely. The
# other is selective: it learns what it may forget, and the memory loss makes it forget
# much. Then `jattn prune` lowers the budget of each of its layers as far as it keeps
# the validation loss of the dense model.
#
# The runs took minutes on one GPU. This notebook shows what they left in a file of
# results, which `python -m benchmarks.selective_memory` makes:
#
# ```
# python -m benchmarks.selective_memory --context 512 --vocabulary 4096 \
#     --text torch.txt sympy.txt ... --memory-loss-weight 0.1 --out FILE
# ```

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
for result in results["results"]:
    dense, selective, pruned = (
        result["measured"][name] for name in ("dense", "selective", "pruned")
    )
    print(
        f"{result['context']} tokens, seed {result['seed']}: validation loss "
        f"{dense['loss']:.4f} dense, {selective['loss']:.4f} selective, "
        f"{pruned['loss']:.4f} with {dense['cache_bytes'] / pruned['cache_bytes']:.1f} "
        "times less cache"
    )

# %% [markdown]
# The losses are nats per token over all of the held-out text. The search compared
# losses on a few batches of it only; of the budgets it came across, the smallest ones
# count that keep the dense model's loss on all of that text.


# %%
def curve(rows, name):
    found = [(row["step"], row[name]) for row in rows if name in row]
    return zip(*found, strict=True)


figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
for ax, result in zip(axes, results["results"], strict=True):
    for scheme, color in (("dense", "C0"), ("selective", "C1")):
        rows = result["runs"][scheme]["rows"]
        ax.plot(*curve(rows, "loss"), color=color, alpha=0.3)
        ax.plot(*curve(rows, "validation_loss"), color=color, marker=".", label=scheme)
    ax.set_title(f"{result['context']} tokens")
    ax.set_xlabel("step")
    ax.set_ylim(top=4)
axes[0].set_ylabel("nats per token (pale: training)")
axes[0].legend()

# %% [markdown]
# The part of the keys that the memory loss counts as needed, while the model learns:

# %%
figure, ax = plt.subplots(figsize=(6, 3.5))
for result in results["results"]:
    rows = result["runs"]["selective"]["rows"]
    ax.plot(*curve(rows, "selective_memory"), label=f"{result['context']} tokens")
ax.set_xlabel("step")
ax.set_ylabel("memory term")
ax.set_ylim(bottom=0)
ax.legend()

# %% [markdown]
# The search lowers one budget after the other, where a token costs the least loss. In
# the end one or two layers of six keep much of the context, and the others nearly
# nothing.

# %%
figure, ax = plt.subplots(figsize=(6, 3.5))
for result in results["results"]:
    steps = result["search"]["steps"]
    times = [step["unpruned_bytes"] / step["cache_bytes"] for step in steps]
    (line,) = ax.plot(times, [step["loss"] for step in steps], marker=".")
    line.set_label(f"{result['context']} tokens")
    ax.axhline(steps[-1]["limit"], color=line.get_color(), linestyle="--")
    chosen = steps[result["search"]["chosen"]]
    print(f"{result['context']} tokens: budgets {chosen['budgets']}")
ax.set_xscale("log")
ax.set_xlabel("times less cache")
ax.set_ylabel("validation loss (dashed: to be kept)")
ax.legend()
