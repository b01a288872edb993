"""Processor time of one update of all weights, iPC against backprop: the paper's Fig. 6.

    python -m recipes.efficiency.update_time --write recipes/efficiency/update_time.json

Networks of equal tanh layers, one data point, plain SGD, one thread. iPC keeps its values and makes
64 updates a call. Rows make 64 updates in turn, round after round; a ratio is taken within each
round, the median is told. Numbers too small for the processor's ordinary form are flushed to
zero for all rows: in a deep net errors begin so small, and some processors are slow with them.

Rows beside iPC and backprop: iPC with layers side by side (``parallel=True``) and with compiled
steps (``compile=True``), backprop compiled, and both algorithms written out by hand, without
autograd, with weights that change in place.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from lightning_pc.optim import IPC
from recipes.common.machine import machine
from recipes.efficiency.cost import cpu_seconds

DEPTHS, WIDTHS = (2, 4, 8, 16, 32), (16, 64, 256, 1024)
UPDATES, RATE, GAMMA = 64, 1e-3, 0.5
BASE = "backprop"
#: Width -> (goal, limit) of iPC's ratio at depth 32.
LIMITS = {64: (0.12, 0.25), 256: (0.3, 0.6), 1024: (0.5, 1.0)}


def network(depth: int, width: int, seed: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    torch.manual_seed(seed)
    layers = [module for _ in range(depth) for module in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def loss_of(net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Half the squared error, []."""
    return 0.5 * (net(x) - y).square().sum()


def backprop(net: nn.Sequential, x: Tensor, y: Tensor, compiled: bool = False) -> Any:
    """What makes the updates by autograd and SGD."""
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    loss = torch.compile(loss_of) if compiled else loss_of

    def learn() -> None:
        for _ in range(UPDATES):
            optimizer.zero_grad()
            loss(net, x, y).backward()
            optimizer.step()

    return learn


def ipc(net: nn.Sequential, x: Tensor, y: Tensor, parallel: bool, compiled: bool = False) -> Any:
    """What makes the updates by iPC."""
    sgd = torch.optim.SGD(net.parameters(), RATE)
    how = {"gamma": GAMMA, "reset": "never", "T": UPDATES, "loss_terms": 1, "parallel": parallel}
    optimizer = IPC(sgd, net, compile=compiled, **how)
    return lambda: optimizer.step(lambda: loss_of(net, x, y))


class ByHand:
    """Both algorithms on stacked weights [L, D, D] and biases [L, D], without autograd.

    Args:
        net: Its weights to begin with.
        x: The data point, [1, D].
        y: Its target, [1, D].
    """

    def __init__(self, net: nn.Sequential, x: Tensor, y: Tensor) -> None:
        layers = [layer for layer in net if isinstance(layer, nn.Linear)]
        self.weight = torch.stack([layer.weight.detach() for layer in layers])
        self.bias = torch.stack([layer.bias.detach() for layer in layers])
        self.x, self.y = x, y
        self.values: Tensor | None = None  # of the nodes, and the target, [L, 1, D]

    @torch.no_grad()
    def backprop(self) -> None:
        """Makes the updates by backprop, layer by layer."""
        for _ in range(UPDATES):
            read = [self.x]
            for weight, bias in zip(self.weight, self.bias, strict=True):
                out = torch.addmm(bias, read[-1], weight.t())
                read.append(out.tanh())
            error = out - self.y
            for number in reversed(range(len(self.weight))):
                weight, a = self.weight[number], read[number]
                below = error @ weight if number else error
                weight.addmm_(error.t(), a, alpha=-RATE)
                self.bias[number].sub_(error[0], alpha=RATE)
                error = below * (1.0 - a * a)

    @torch.no_grad()
    def ipc(self) -> None:
        """Makes the updates by iPC, all layers at once."""
        if self.values is None:
            h, values = self.x, []
            for weight, bias in zip(self.weight, self.bias, strict=True):
                values.append(torch.addmm(bias, h, weight.t()))
                h = values[-1].tanh()
            self.values = torch.stack([*values[:-1], self.y])
        nodes = self.values[:-1]
        read = torch.empty_like(self.values)
        read[0] = self.x
        for _ in range(UPDATES):
            torch.tanh(nodes, out=read[1:])
            mu = torch.baddbmm(self.bias.unsqueeze(1), read, self.weight.mT)
            error = self.values - mu
            below = (error @ self.weight)[1:]
            slope = 1.0 - read[1:] * read[1:]
            self.weight.baddbmm_(error.mT, read, alpha=RATE)
            self.bias.add_(error[:, 0], alpha=RATE)
            nodes.add_(below.mul_(slope).sub_(error[:-1]), alpha=GAMMA)


def rows(depth: int, width: int, compiled: bool, seed: int = 0) -> dict[str, Callable[[], Any]]:
    """Name -> what makes 64 updates; all from the same weights, on the same data point."""
    torch.manual_seed(seed)
    x, y = torch.randn(1, width), torch.randn(1, width)
    made: dict[str, Callable[[], Any]] = {
        BASE: backprop(network(depth, width, seed), x, y),
        "iPC": ipc(network(depth, width, seed), x, y, False),
    }
    if depth > 3:  # two layers that are alike
        made["iPC, side by side"] = ipc(network(depth, width, seed), x, y, True)
        if compiled:
            made["iPC, side by side, compiled"] = ipc(network(depth, width, seed), x, y, True, True)
    if compiled:
        made["iPC, compiled"] = ipc(network(depth, width, seed), x, y, False, True)
    made["iPC, by hand"] = ByHand(network(depth, width, seed), x, y).ipc
    made["backprop, by hand"] = ByHand(network(depth, width, seed), x, y).backprop
    if compiled:
        made["backprop, compiled"] = backprop(network(depth, width, seed), x, y, True)
    return made


def cell(depth: int, width: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Time of an update of each row against backprop's, and backprop's own in microseconds."""
    each = rows(depth, width, compiled)
    for learn in [*each.values()] * 3:  # some steps are compiled in the third call
        learn()
    times = [{name: cpu_seconds(learn, 1) for name, learn in each.items()} for _ in range(rounds)]
    base = statistics.median(time[BASE] for time in times)
    ratios = {
        name: round(statistics.median(time[name] / time[BASE] for time in times), 3)
        for name in each
        if name != BASE
    }
    return {"depth": depth, "width": width, "microseconds": round(base / UPDATES * 1e6), **ratios}


def show(cells: list[dict[str, Any]]) -> Table:
    """A table of all cells."""
    names = list(dict.fromkeys(name for cell in cells for name in cell))
    table = Table(*names, title="time of an update against backprop's")
    for row in cells:
        table.add_row(*[str(row.get(name, "")) for name in names])
    return table


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """The paper's scatter plot: backprop's time against iPC's, a point for each network."""
    figure, axes = plt.subplots(figsize=(5.0, 4.5))
    shapes = {"iPC": "o", "iPC, side by side": "s", "iPC, by hand": "^"}
    for name, marker in (shapes | {"iPC, side by side, compiled": "*"}).items():
        found = [c for c in cells if name in c]
        base = [c["microseconds"] for c in found]
        times = [c[name] * b for c, b in zip(found, base, strict=True)]
        axes.scatter(base, times, s=16, marker=marker, label=name)
    ends = [min(c["microseconds"] for c in cells), max(c["microseconds"] for c in cells)]
    axes.plot(ends, ends, color="gray", linewidth=0.8, label="as long as backprop")
    axes.set(xscale="log", yscale="log", xlabel="backprop, microseconds an update")
    axes.set_ylabel("iPC, microseconds an update")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measures, shows and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="compiled rows at depth 32, too")
    parser.add_argument("--write", type=Path, help="JSON to write; the picture goes beside it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", "In the first batch no error reached")
    cells = []
    for depth, width in track([*product(given.depths, given.widths)], "updates"):
        cells.append(cell(depth, width, given.rounds, given.compiled and depth == 32))
    Console().print(show(cells))
    if given.write:
        told = {
            "command": f"python -m recipes.efficiency.update_time --rounds {given.rounds}"
            + " --compiled" * given.compiled,
            **machine(),
            "updates": UPDATES,
            "limits at depth 32": {str(width): limit for width, limit in LIMITS.items()},
            "cells": cells,
        }
        given.write.write_text(json.dumps(told, indent=2) + "\n")
        draw(cells, given.write.with_suffix(".png"))


if __name__ == "__main__":
    main()
