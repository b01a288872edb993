"""How many learning rates, weight decays and gammas make a small CNN learn CIFAR-10.

    python -m recipes.stability.learning_rates --data_dir data/cifar10

The search of the paper's appendix D.2 for AlexNet, and gamma="auto" beside its three gammas. The
paper gives the ends of its 8 learning rates and its best one, 5e-5; the others are chosen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import nn

from recipes.common.queue import Figures, Job, Row, Study, main
from recipes.stability.data import cifar10
from recipes.stability.training import classify

RATES = (1e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2)
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)
FIXED = (0.1, 0.5, 1.0)
GAMMAS = (*FIXED, "auto")
SIZES: tuple[dict[str, Any], ...] = (
    {"train": 400, "test": 1000, "epochs": 8, "batch": 16},
    {"train": 2000, "test": 1000, "epochs": 8, "batch": 16},
    {"train": 10_000, "test": 2000, "epochs": 8, "batch": 16},
)
#: Algorithm and gamma: the panels of the picture.
ROWS = [("bp", None), *product(("pc", "ipc"), GAMMAS)]


def jobs() -> list[Job]:
    """288 of each size."""
    return [
        {"size": size, "network": "cnn-32-64-256-gelu", "seed": 0, **settings}
        | {"algorithm": algorithm, "gamma": gamma, "lr": rate, "weight_decay": decay}
        for size, settings in enumerate(SIZES)
        for (algorithm, gamma), rate, decay in product(ROWS, RATES, DECAYS)
    ]


def cnn() -> nn.Module:
    """Two convolutions, the first with AlexNet's stride of 4, and two fully connected layers."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 5, stride=4, padding=2), nn.GELU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU()),
        *(nn.Flatten(), nn.Linear(1024, 256), nn.GELU(), nn.Linear(256, 10)),
    )


def run(job: Job, data_dir: str | None) -> Figures:
    """Trains the CNN."""
    torch.manual_seed(job["seed"])
    return classify(cnn(), cifar10(data_dir, job["train"], job["test"]), job)


def converged(rows: Sequence[Row]) -> list[Row]:
    """The paper's criterion: best test accuracy within 10 points of the algorithm's best."""
    best: dict[str, float] = {}
    for row in rows:
        name = row["algorithm"]
        best[name] = max(best.get(name, 0.0), row["best_accuracy"])
    return [row for row in rows if best[row["algorithm"]] - row["best_accuracy"] < 10]


def pairs(rows: Sequence[Row], algorithm: str, gamma: float | str | None) -> set[tuple[float, ...]]:
    """Learning rate and weight decay of the rows of an algorithm with this gamma."""
    return {
        (row["lr"], row["weight_decay"])
        for row in rows
        if (row["algorithm"], row["gamma"]) == (algorithm, gamma)
    }


def tables(rows: list[Row]) -> list[Table]:
    """How many converge, of all and of the pairs at which backprop does."""
    title = f"size {rows[0]['size']}: learning rates and weight decays that converge"
    table = Table(title=title, caption="converged: best accuracy within 10 points of the best")
    table.add_column("algorithm")
    for heading in ("gamma", "converged", "where backprop does", "diverged", "best accuracy"):
        table.add_column(heading, justify="right")
    good = converged(rows)
    reference = pairs(good, "bp", None)
    groups: tuple[tuple[Any, ...], ...] = (*((gamma,) for gamma in FIXED), FIXED, ("auto",))
    for algorithm, gammas in (("bp", (None,)), *product(("pc", "ipc"), groups)):
        mine = [r for r in rows if r["algorithm"] == algorithm and r["gamma"] in gammas]
        if not mine:
            continue
        won = [r for r in good if r in mine]
        ours = pairs(good, algorithm, gammas[0]) & reference
        table.add_row(
            algorithm,
            "all fixed" if len(gammas) > 1 else str(gammas[0] or "-"),
            f"{len(won)}/{len(mine)}",
            f"{len(ours)}/{len(reference)}" if len(gammas) == 1 else "",
            str(sum(r["diverged"] for r in mine)),
            f"{max(r['best_accuracy'] for r in mine):.1f} %",
        )
    return [table]


def picture(rows: list[Row]) -> Figure:
    """Best accuracy over learning rate and weight decay, a panel for each algorithm and gamma."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    panels = figure.subplots(2, 5)
    panels[1, 0].axis("off")
    top = max(row["best_accuracy"] for row in rows)
    for axes, (algorithm, gamma) in zip((*panels[0], *panels[1, 1:]), ROWS, strict=True):
        found = {
            (row["lr"], row["weight_decay"]): row["best_accuracy"]
            for row in rows
            if (row["algorithm"], row["gamma"]) == (algorithm, gamma)
        }
        grid = [[found.get((rate, decay), float("nan")) for rate in RATES] for decay in DECAYS]
        image = axes.imshow(grid, vmin=10, vmax=top, aspect="auto")
        axes.set_title(algorithm if gamma is None else f"{algorithm}, gamma {gamma}", fontsize=10)
        axes.set_xticks(
            range(len(RATES)), [f"{rate:.0e}" for rate in RATES], rotation=90, fontsize=7
        )
        axes.set_yticks(range(len(DECAYS)), [f"{decay:g}" for decay in DECAYS], fontsize=7)
    figure.colorbar(image, ax=panels, label="best test accuracy, %")
    figure.supxlabel("learning rate")
    figure.supylabel("weight decay")
    return figure


STUDY = Study(
    "recipes.stability.learning_rates",
    "the first images of CIFAR-10's training and test sets (numbers: train, test)",
    jobs,
    run,
    tables,
    picture,
)

if __name__ == "__main__":
    main(STUDY)
