"""What depth costs: plain and residual MLPs of 2 to 64 hidden layers on MNIST.

    python -m recipes.stability.depth --data_dir data/mnist

The weights start orthogonal, which with tanh keeps signals and gradients alive in a plain MLP of 64
layers. The branches of the residual network are scaled by 1/sqrt(depth). Beside these MLPs of ReLU
units as torch draws them, in which signals shrink from layer to layer: 2 to 16 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from recipes.common.queue import Figures, Job, Row, Study, main
from recipes.stability.data import mnist
from recipes.stability.training import ALGORITHMS, PLAIN, SPIKING, classify, rate

DEPTHS = (2, 4, 8, 16, 32, 64)
GAMMAS = (1.0, 0.5, 0.1, 0.01, "auto")
#: The smaller its gamma, the closer epc is to backprop.
SMALL = 1e-4
#: What an algorithm has beside `GAMMAS`.
OWN: dict[str, tuple[Job, ...]] = {
    "pc": (PLAIN,),
    "ipc": (PLAIN, SPIKING),
    "epc": ({"gamma": SMALL},),
}
#: Each has the better of two; a batch of iPC or iePC takes T steps of its own, but with spiking
#: precisions one of them counts in full, so that iPC has PC's rates.
RATES = {
    "bp": (3e-4, 1e-3),
    "pc": (3e-4, 1e-3),
    "ipc": (1e-4, 3e-4),
    "iepc": (3e-5, 1e-4),
    "epc": (3e-4, 1e-3),
}
SIZES: tuple[dict[str, Any], ...] = (
    {"train": 3072, "test": 1000, "epochs": 4, "batch": 64, "width": 32, "seeds": 3},
    {"train": 8192, "test": 2000, "epochs": 4, "batch": 64, "width": 64, "seeds": 1},
    {"train": 20_480, "test": 10_000, "epochs": 4, "batch": 64, "width": 64, "seeds": 3},
)


def jobs() -> list[Job]:
    """Of each size the first seed's first, of each seed's the shallow ones."""
    found: list[Job] = []
    for size, settings in enumerate(SIZES):
        fixed = {"size": size, "weight_decay": 0.01, **settings}
        seeds = range(fixed.pop("seeds"))
        for seed, depth, network, name in product(seeds, DEPTHS, NETWORKS, ("bp", *ALGORITHMS)):
            if depth > NETWORKS[network][1]:
                continue
            found += [
                fixed
                | {"network": network, "depth": depth, "algorithm": name, **given}
                | {"lr": lr, "seed": seed}
                for given in _rates(name)
                for lr in RATES["pc" if given == SPIKING else name]
            ]
    return found


def _rates(algorithm: str) -> list[Job]:
    if algorithm == "bp":
        return [{"gamma": None}]
    if algorithm == "iepc":  # no fixed one was tried
        return [{"gamma": "auto"}]
    return [*({"gamma": gamma} for gamma in GAMMAS), *OWN[algorithm]]


def mlp(depth: int, width: int) -> nn.Module:
    """Hidden layers of tanh units, drawn orthogonal."""
    return _plain(depth, width, _orthogonal, nn.Tanh)


def relu(depth: int, width: int) -> nn.Module:
    """Hidden layers of ReLU units, drawn as `nn.Linear` does."""
    return _plain(depth, width, nn.Linear, nn.ReLU)


def _plain(
    depth: int, width: int, layer: Callable[[int, int], nn.Module], unit: Callable[[], nn.Module]
) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (784, *[width] * (depth - 1)):
        layers += [layer(inputs, width), unit()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class Residual(nn.Module):
    """x + W tanh(x) / sqrt(depth), ``depth`` times."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(784, width)
        self.branches = nn.ModuleList(_orthogonal(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, [B, 10], of images, [B, *]."""
        x = self.stem(images.flatten(1))
        for branch in self.branches:
            x = x + branch(torch.tanh(x)) / len(self.branches) ** 0.5
        logits: Tensor = self.head(x)
        return logits


#: How each is made of its depth and width, and the deepest.
NETWORKS: dict[str, tuple[Callable[[int, int], nn.Module], int]] = {
    "mlp": (mlp, 64),
    "residual": (Residual, 64),
    "relu": (relu, 16),
}


def _orthogonal(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def run(job: Job, data_dir: str | None) -> Figures:
    """Trains one network."""
    torch.manual_seed(job["seed"])
    net = NETWORKS[job["network"]][0](job["depth"], job["width"])
    return classify(net, mnist(data_dir, job["train"], job["test"]), job)


def curves(rows: Sequence[Row], network: str) -> dict[tuple[str, Any], dict[int, float]]:
    """(Algorithm, rate) -> depth -> accuracy: mean over seeds, best of the learning rates."""
    seeds: dict[tuple[str, Any], dict[int, dict[float, list[float]]]] = {}
    for row in rows:
        if row["network"] == network:
            curve = seeds.setdefault((row["algorithm"], rate(row)), {})
            curve.setdefault(row["depth"], {}).setdefault(row["lr"], []).append(row["accuracy"])
    return {
        which: {depth: max(map(fmean, rates.values())) for depth, rates in curve.items()}
        for which, curve in seeds.items()
    }


def shortfall(found: dict[tuple[str, Any], dict[int, float]], algorithm: str) -> dict[int, float]:
    """Depth -> points by which auto falls behind the best fixed gamma."""
    auto = found.get((algorithm, "auto"), {})
    gammas = [given["gamma"] for given in _rates(algorithm) if given["gamma"] != "auto"]
    fixed = [found.get((algorithm, gamma), {}) for gamma in gammas]
    return {
        depth: max(curve[depth] for curve in fixed if depth in curve) - value
        for depth, value in auto.items()
        if any(depth in curve for curve in fixed)
    }


def tables(rows: list[Row]) -> list[Table]:
    """Accuracy by depth, a table for each network."""
    return [_table(rows, network) for network in NETWORKS]


def _table(rows: list[Row], network: str) -> Table:
    found = curves(rows, network)
    table = Table(
        title=f"size {rows[0]['size']}: test accuracy, %, {network}",
        caption="behind: points by which auto falls behind the best fixed gamma (goal: at most 1)",
    )
    table.add_column("algorithm")
    for heading in ("gamma", *map(str, DEPTHS)):
        table.add_column(heading, justify="right")
    for name in ("bp", *ALGORITHMS):
        for which in map(rate, _rates(name)):
            curve = found.get((name, which), {})
            cells = (f"{curve[d]:.1f}" if d in curve else "" for d in DEPTHS)
            table.add_row(name, str(which or "-"), *cells)
        if behind := shortfall(found, name):
            cells = (_judged(behind[d]) if d in behind else "" for d in DEPTHS)
            table.add_row(name, "behind", *cells)
        table.add_section()
    return table


def _judged(points: float) -> str:
    return f"[{'green' if points <= 1 else 'red'}]{points:+.1f}[/]"


def picture(rows: list[Row]) -> Figure:
    """Accuracy against depth, a panel for each network and algorithm."""
    figure = Figure(figsize=(4 * len(ALGORITHMS), 10), layout="constrained")
    shape = len(NETWORKS), len(ALGORITHMS)
    panels = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
    for line, network in zip(panels, NETWORKS, strict=True):
        found = curves(rows, network)
        for axes, algorithm in zip(line, ALGORITHMS, strict=True):
            for which, curve in found.items():
                if which[0] in ("bp", algorithm):
                    label = "bp" if which[1] is None else f"gamma {which[1]}"
                    thick = 2.5 if which[1] in (None, "auto") else 1
                    axes.plot(
                        *zip(*sorted(curve.items()), strict=True), "o-", lw=thick, label=label
                    )
            axes.set_title(f"{network}, {algorithm}", fontsize=10)
            axes.set_xscale("log", base=2)
    panels[0, 0].legend(fontsize=8)
    figure.supxlabel("hidden layers")
    figure.supylabel("test accuracy, %")
    return figure


STUDY = Study(
    "recipes.stability.depth",
    "the first digits of MNIST's training and test sets (numbers: train, test)",
    jobs,
    run,
    tables,
    picture,
)

if __name__ == "__main__":
    main(STUDY)
