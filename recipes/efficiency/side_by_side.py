"""A batch of iPC with layers side by side against one stage after the other.

    python -m recipes.efficiency.side_by_side --write recipes/efficiency/side_by_side.json

Processor time of one thread. Both learn a batch in turn, round after round; the median of the
rounds' ratios is told. T is two more than there are nodes, so that errors reach all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from lightning_pc.optim import IPC
from recipes.common.machine import machine
from recipes.efficiency.cost import cpu_seconds
from recipes.efficiency.networks import Transformer
from recipes.efficiency.update_time import network

#: (layers, width, batch size) of tanh networks.
NETWORKS = (
    *((4, 64, 32), (6, 64, 32), (6, 16, 128), (8, 64, 32)),
    *((16, 64, 32), (16, 64, 128), (16, 128, 32), (16, 256, 32), (16, 256, 128), (8, 512, 32)),
)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-4, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, 1e-3),
}


def learner(net: nn.Module, loss: Callable[[], Tensor], optimizer: str, **how: Any) -> Any:
    """What learns a batch."""
    ipc = IPC(OPTIMIZERS[optimizer](net.parameters()), net, **how)
    return lambda: ipc.step(loss)


def tanh(layers: int, width: int, size: int, optimizer: str, parallel: bool) -> Any:
    """What learns a batch of a network of tanh layers."""
    net = network(layers, width, 0)
    x, y = torch.randn(size, width), torch.randn(size, width)
    loss = lambda: 0.5 * (net(x) - y).square().sum() / size  # noqa: E731
    how = {"T": layers + 1, "gamma": 0.5, "loss_terms": size, "parallel": parallel}
    return learner(net, loss, optimizer, **how)


def blocks(optimizer: str, parallel: bool) -> Any:
    """What learns 32 sequences of 32 tokens: 12 transformer blocks of width 128."""
    torch.manual_seed(0)
    net = Transformer(12, 128)
    x, y = torch.randn(32, 32, 128), torch.randint(0, 10, (32,))
    how = {"T": 14, "gamma": 0.1, "value_nodes": "blocks", "parallel": parallel}
    return learner(net, lambda: F.cross_entropy(net(x), y), optimizer, **how)


def measure(make: Callable[[bool], Any], rounds: int) -> float:
    """Time side by side against one after the other."""
    both = [make(False), make(True)]
    for learn in both:
        learn()
    times = [[cpu_seconds(learn, 1) for learn in both] for _ in range(rounds)]
    return round(statistics.median(side / one for one, side in times), 3)


def main() -> None:
    """Measures, shows and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", type=Path, help="JSON to write")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    cells: list[dict[str, Any]] = []
    for layers, width, size in track(NETWORKS, "networks"):
        cell: dict[str, Any] = {"network": f"{layers} tanh layers", "width": width, "batch": size}
        for name in OPTIMIZERS:
            made = lambda side: tanh(layers, width, size, name, side)  # noqa: B023, E731
            cell[name] = measure(made, given.rounds)
        cells.append(cell)
    cell = {"network": "12 transformer blocks", "width": 128, "batch": "32 x 32"}
    for name in OPTIMIZERS:
        cell[name] = measure(lambda side: blocks(name, side), 3)  # noqa: B023
    cells.append(cell)
    table = Table(*cells[0], title="side by side, against one stage after the other")
    for row in cells:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if given.write:
        command = f"python -m recipes.efficiency.side_by_side --rounds {given.rounds}"
        told = {"command": command, **machine(), "cells": cells}
        given.write.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
