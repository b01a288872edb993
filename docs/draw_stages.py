"""Draws the pictures of docs/how_it_works.md; run it from the root of the repository.

    python docs/draw_stages.py

It needs no data and writes docs/pictures/stages.png and docs/pictures/inference.png.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_pc import Description, StepReport, describe
from lightning_pc.optim import PC
from lightning_pc.plots import plot_energy

WHERE = Path("docs/pictures")
SHEET, EDGE, INK, VALUE, ERROR = "#eef2f6", "#b9c4d0", "#22303c", "#3b6ea5", "#b5483a"
#: On the page: width of a module, gap between modules, from a stage to a node, radius of a node.
BOX, GAP, REACH, RADIUS, SHEET_HEIGHT = 0.86, 0.12, 0.42, 0.18, 0.64


def example() -> tuple[nn.Sequential, Callable[[], Tensor]]:
    """The network of the page, and its loss on a batch."""
    torch.manual_seed(0)
    layers = {
        "lift": nn.Linear(8, 16),
        "act1": nn.Tanh(),
        "norm": nn.BatchNorm1d(16),
        "mix": nn.Linear(16, 16),
        "act2": nn.Tanh(),
        "deep": nn.Linear(16, 16),
        "act3": nn.Tanh(),
        "head": nn.Linear(16, 3),
    }
    net = nn.Sequential(OrderedDict(layers))
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    return net, lambda: cross_entropy(net(x), y)


def stages_of(net: nn.Module, found: Description) -> list[list[str]]:
    """The names of the modules of each stage: a node stands at the input of the one it names."""
    nodes = {row.name for row in found.rows}
    stages: list[list[str]] = [[]]
    for name, _ in net.named_children():
        if name in nodes:
            stages.append([])
        stages[-1].append(name)
    stages[-1].append("loss")
    return stages


def box(ax: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    """A rounded box around (x, y)."""
    corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=colour, ec=EDGE, lw=1.0))


def arrow(ax: Axes, x: float, start: float, end: float, colour: str) -> None:
    """An upright arrow."""
    how = {"arrowstyle": "-|>", "color": colour, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (x, end), (x, start), arrowprops=how)


def draw_stages(net: nn.Module, found: Description, ax: Axes) -> None:
    """Draws the network, cut into stages by its value nodes; what is above is nearer the input."""
    weights = [row.parameters for row in found.rows] + [found.loss_parameters]
    middle = {"ha": "center", "va": "center", "color": INK, "fontsize": 9}
    left, right = {**middle, "ha": "right"}, {**middle, "ha": "left", "color": "#5b6b7a"}
    stages = stages_of(net, found)
    widest = max(map(len, stages)) * (BOX + GAP) + GAP
    y = 0.0
    ax.text(0.0, y, "input", **middle)
    arrow(ax, 0.0, y - 0.14, y - 0.4, INK)
    y -= 0.4 + SHEET_HEIGHT / 2
    for number, modules in enumerate(stages):
        width = len(modules) * (BOX + GAP) + GAP
        box(ax, 0.0, y, width, SHEET_HEIGHT, SHEET)
        for place, name in enumerate(modules):
            x = (place - (len(modules) - 1) / 2) * (BOX + GAP)
            box(ax, x, y, BOX, 0.4, "white")
            ax.text(x, y, name, family="monospace", **middle)
        title = "stage of the loss" if modules[-1] == "loss" else f"stage {number + 1}"
        ax.text(-widest / 2 - 0.2, y, title, **left)
        ax.text(widest / 2 + 0.2, y, f"{weights[number]:,} weights", **right)
        y -= SHEET_HEIGHT / 2
        if number == len(found.rows):
            break
        row, centre = found.rows[number], y - REACH - RADIUS
        ax.add_patch(Circle((0.0, centre), RADIUS, fc=VALUE, ec="none"))
        ax.text(0.0, centre, "$x$", **{**middle, "color": "white", "fontsize": 11})
        for top in (y, centre - RADIUS):
            arrow(ax, -0.1, top - 0.03, top - REACH + 0.03, VALUE)
            arrow(ax, 0.1, top - REACH + 0.03, top - 0.03, ERROR)
        beside = y - REACH / 2
        ax.text(-0.26, beside, r"$\mu$", **{**middle, "color": VALUE, "fontsize": 11})
        ax.text(0.26, beside, r"$\varepsilon$", **{**middle, "color": ERROR, "fontsize": 11})
        blue = {"color": VALUE}
        ax.text(-widest / 2 - 0.2, centre, f"node {row.name}", **{**left, **blue})
        ax.text(widest / 2 + 0.2, centre, f"depth {row.depth}", **{**right, **blue})
        ax.plot((-widest / 2 - 0.1, -RADIUS - 0.1), (centre, centre), ":", lw=0.8, **blue)
        ax.plot((RADIUS + 0.1, widest / 2 + 0.1), (centre, centre), ":", lw=0.8, **blue)
        y = centre - RADIUS - REACH - SHEET_HEIGHT / 2
    ax.set(xlim=(-widest / 2 - 1.6, widest / 2 + 1.6), ylim=(y - 0.1, 0.2), aspect="equal")
    ax.axis("off")


def infer(net: nn.Module, loss: Callable[[], Tensor]) -> StepReport:
    """One batch of pc."""
    optimizer = PC(torch.optim.SGD(net.parameters(), lr=0.1), net, T=12, gamma=0.3)
    optimizer.step(loss)
    assert optimizer.report is not None
    return optimizer.report


def main() -> None:
    """Writes both pictures."""
    WHERE.mkdir(parents=True, exist_ok=True)
    net, loss = example()
    found = describe(net, loss, algorithm="pc", print_table=False)
    figure, ax = plt.subplots(figsize=(6.4, 6.2), layout="constrained")
    draw_stages(net, found, ax)
    figure.savefig(WHERE / "stages.png", dpi=130)
    figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    plot_energy(infer(net, loss), ax)
    figure.savefig(WHERE / "inference.png", dpi=130)


if __name__ == "__main__":
    main()
