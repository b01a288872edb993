"""
Where value nodes stand in a BERT
=================================

``describe`` shows the value nodes that a model gets, before any training. Here it is asked about a
small BERT, as its author wrote it, and what it tells is drawn.
"""

import matplotlib.pyplot as plt
import torch
from transformers import BertConfig, BertForMaskedLM

from lightning_pc import describe

torch.manual_seed(0)
config = BertConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=16,
)
bert = BertForMaskedLM(config)
tokens = torch.randint(100, (8, 12))
batch = {"input_ids": tokens, "labels": tokens}

# %%
# By default a node stands at the input of each nonlinearity, and at the logits of attention. There
# its energy is F_KL, the divergence of two softmaxes. With ``value_nodes="blocks"`` one stands at
# the output of each block. All choices: `Where value nodes stand <../guides/placement.html>`_.

kinds = ("auto", "blocks")
found = [describe(bert, batch, algorithm="ipc", value_nodes=k, print_table=False) for k in kinds]


def short(row):
    """The part of a node's name that tells it from the others."""
    common = ("bert", "encoder", "cls", "predictions", "self")
    kept = [part for part in row.name.split(".") if part not in common]
    return ".".join(kept[:3])


for kind, description in zip(kinds, found, strict=True):
    print(f'value_nodes="{kind}"')
    for row in description.rows:
        print(f"{short(row):27}{row.energy:12}depth {row.depth}")

# %%
# What lies between nodes is a stage, a box below, with the number of its weights. It predicts the
# node under it from the values that its arrows come from. The residual stream carries every value
# to all later stages, unless a node cuts it.

VALUE, STAGE = "#3b6ea5", "#eef2f6"


def draw(description, ax):
    """Stages from the input down to the loss, and the nodes between them."""
    rows = description.rows
    place = {row.name: -2 * number - 1 for number, row in enumerate(rows)}
    last = [row.name for row in rows if row.depth == 1]  # the loss reads them
    stages = [(row.parents, row.parameters) for row in rows] + [(last, description.loss_parameters)]
    for number, (parents, weights) in enumerate(stages):
        box = {"boxstyle": "round", "fc": STAGE, "ec": "#b9c4d0"}
        ax.text(0, -2 * number, f"{weights:,}", ha="center", va="center", size=10, bbox=box)
        for name in parents:
            bend = 0.0 if place[name] == 1 - 2 * number else 0.45
            how = {"arrowstyle": "-|>", "color": VALUE, "lw": 0.8, "alpha": 0.8}
            how |= {"shrinkA": 6, "shrinkB": 10, "connectionstyle": f"arc3,rad={-bend}"}
            ax.annotate("", (0, -2 * number), (0, place[name]), arrowprops=how)
    for row in rows:
        ax.plot(0, place[row.name], "o", ms=9, color=VALUE)
        ax.text(-0.25, place[row.name], short(row), ha="right", va="center", size=10, color=VALUE)
    for name, y in (("input", 0), ("loss", -2 * len(rows))):
        ax.text(-0.25, y, name, ha="right", va="center", size=10)
    ax.set(xlim=(-2, 1), ylim=(-2 * len(rows) - 0.8, 0.8))
    ax.axis("off")


heights = [len(description.rows) for description in found]
figure, axes = plt.subplots(2, 1, figsize=(4.8, 8.4), height_ratios=heights, layout="constrained")
for kind, description, ax in zip(kinds, found, axes, strict=True):
    draw(description, ax)
    ax.set_title(f'value_nodes="{kind}": depth {description.depth}')
plt.show()
