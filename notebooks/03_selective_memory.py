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
# Two models of 22.8 million parameters, 12 layers of 6 heads, read the Python source of
# 77 packages, in contexts of 512 and of 1024 tokens of a byte-pair tokenizer, both for
# as many steps. One attends densely. The other is selective: it learns what it may
# forget, and the memory loss makes it forget much. When the learning rate begins to
# fall, after three quarters of the steps, `jattn prune` lowers the budgets of its
# layers, where a token costs least, to a given part of the context. The last quarter of
# the steps is made with these budgets, where the run was in the text and with its
# optimizer, by `jattn train --resume-from`. Both models see the same batches with the
# same learning rates.
#
# The runs took minutes, two of them at a time on one GPU: the speeds in the file are
# not those of a run that has a GPU to itself. This notebook shows what they left in a
# file of results, which `python -m benchmarks.selective_memory` makes:
#
# ```
# python -m benchmarks.selective_memory --context 512 --vocabulary 4096 --share 0.1235 \
#     --text torch sympy ... --seed 0 --out FILE
# ```

# %%
import itertools
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
    return f"{result['context']} tokens, seed {result['seed']}"


def times_less(result):
    measured = result["measured"]
    return measured["dense"]["cache_bytes"] / measured["tuned"]["cache_bytes"]


# Of the same two models, with several sizes of the cache.
in_order = sorted(results["results"], key=lambda x: (x["context"], x["seed"]))
experiments = [(title, list(some)) for title, some in itertools.groupby(in_order, name)]
for title, some in experiments:
    for result in some:
        loss = {k: v["loss"] for k, v in result["measured"].items()}
        print(
            f"{title}: validation loss {loss['dense']:.4f} dense, {loss['tuned']:.4f} "
            f"selective with {times_less(result):.1f} times less cache"
        )

# %% [markdown]
# The losses are nats per token over all of the held-out text, a twentieth of it all.
# The search for the budgets compared losses on two batches of it only.
#
# With 12.1 times less cache at 1024 tokens, and with 8.1 times less at 512, the
# selective model is better than the dense one with both seeds. With 16.1 times less at
# 1024 it is better with one seed and 0.012 worse with the other; with 10.1 times less
# at 512 it is 0.002 and 0.004 worse.


# %%
def curve(rows, number):
    found = [(row["step"], row[number]) for row in rows if number in row]
    return zip(*found, strict=True)


figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True, sharey=True)
for ax, (title, some) in zip(axes.flat, experiments, strict=True):
    runs = some[0]["runs"]
    for scheme, color in (("dense", "C0"), ("selective", "C1")):
        rows = runs[scheme]["rows"]
        ax.plot(*curve(rows, "loss"), color=color, alpha=0.3)
        ax.plot(*curve(rows, "validation_loss"), color=color, marker=".", label=scheme)
    for i, result in enumerate(some):
        points = curve(result["runs"]["tuned"]["rows"], "validation_loss")
        label = f"{times_less(result):.1f} times less cache"
        ax.plot(*points, color=f"C{2 + i}", marker=".", label=label)
    ax.set_title(title)
    ax.set_ylim(top=2.6)
    ax.legend()
figure.supxlabel("step")
figure.supylabel("nats per token (pale: training)")

# %% [markdown]
# The part of the keys that the memory loss counts as needed, while the model learns.
# The weight of that loss grows over the first 400 steps:

# %%
figure, ax = plt.subplots(figsize=(6, 3.5))
for title, some in experiments:
    rows = some[0]["runs"]["selective"]["rows"]
    ax.plot(*curve(rows, "selective_memory"), label=title)
ax.set_xlabel("step")
ax.set_ylabel("memory term")
ax.set_ylim(bottom=0)
ax.legend()

# %% [markdown]
# The search lowers one budget after the other, where a token costs the least loss.
# Three quarters of the cache cost next to nothing. Most of what is left in the end, one
# or two layers keep.

# %%
figure, ax = plt.subplots(figsize=(6, 3.5))
for title, some in experiments:
    smallest = min(some, key=lambda result: result["share"])
    steps = smallest["search"]["steps"]
    times = [step["unpruned_bytes"] / step["cache_bytes"] for step in steps]
    ax.plot(times, [step["loss"] - steps[0]["loss"] for step in steps], label=title)
    for result in some:
        budgets = result["search"]["steps"][-1]["budgets"]
        print(f"{title}, {times_less(result):.1f} times less cache: budgets {budgets}")
ax.set_xscale("log")
ax.set_xlabel("times less cache")
ax.set_ylabel("validation loss more than with the whole cache,\nbefore the last steps")
ax.legend()
