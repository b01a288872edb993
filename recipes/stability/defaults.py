"""Every argument at its default against backprop, and one at a time at another value.

    python -m recipes.stability.defaults --data_dir data/mnist

Handwritten digits as they are, with inputs 30 times as large, and with 6 hidden layers and the
squared error; at size 1 MNIST with such inputs as well. Every row has the learning rate with the
best mean validation accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from recipes.common.queue import Figures, Job, Row, Study, main
from recipes.digits.data import Digits
from recipes.stability.data import Images, mnist
from recipes.stability.training import accuracy, classify, variant

Splits = dict[str, tuple[Tensor, Tensor]]  # images [N, pixels] and labels [N]

DIGITS: dict[str, Job] = {
    "digits": {"layers": 2, "scale": 1.0, "loss": "cross-entropy"},
    "inputs x 30": {"layers": 2, "scale": 30.0, "loss": "cross-entropy"},
    "6 layers, squared error": {"layers": 6, "scale": 1.0, "loss": "squared"},
}
#: With MNIST, an epoch of which is 46 times as long.
LARGE: dict[str, Job] = {"MNIST, inputs x 30": DIGITS["inputs x 30"] | {"epochs": 5}}
TASKS = DIGITS | LARGE
HELD_OUT = 10_000  # the last of MNIST's training images, for validation
LONGER = (16, 32)  # than T's default
FIXED: tuple[tuple[str, Job], ...] = tuple(("ipc", {"gamma": g}) for g in (1.0, 0.5, 0.1, 0.01))
#: Algorithm and what is not at its default.
ROWS: tuple[tuple[str, Job], ...] = (
    ("bp", {}),
    ("pc", {}),
    ("ipc", {}),
    ("epc", {}),
    ("iepc", {}),
    ("pc", {"momentum": 0}),
    ("ipc", {"momentum": 0}),
    ("ipc", {"precisions": "spiking"}),
    *FIXED,
    *(("pc", {"T": T}) for T in LONGER),
)
#: Of which MNIST has these.
BRIEF = (("bp", {}), ("pc", {}), ("ipc", {}), ("ipc", {"precisions": "spiking"}), *FIXED)
#: A batch of iPC or iePC takes T steps of its own; with spiking precisions one counts in full.
RATES = {
    "bp": (2e-4, 1e-3, 5e-3),
    "pc": (2e-4, 1e-3, 5e-3),
    "epc": (2e-4, 1e-3, 5e-3),
    "ipc": (1e-4, 3e-4, 1e-3),
    "iepc": (1e-4, 3e-4, 1e-3),
}
#: Of MNIST, which takes eight times as many steps in all and has twelve times as many inputs.
SLOW = {
    "bp": (5e-5, 2e-4, 1e-3),
    "pc": (5e-5, 2e-4, 1e-3),
    "ipc": (3e-5, 1e-4, 3e-4),
}
SIZES: tuple[dict[str, Any], ...] = (
    {"seeds": 2, "epochs": 15, "batch": 64, "width": 64},
    {"seeds": 5, "epochs": 30, "batch": 64, "width": 64},
)


def jobs() -> list[Job]:
    """Of the first size all rows of the digits, of the other not those of a longer T, and MNIST."""
    found: list[Job] = []
    for size, settings in enumerate(SIZES):
        fixed = {"size": size, "weight_decay": 0.01, "gamma": "auto", **settings}
        tasks = TASKS if size else DIGITS
        for seed, (task, details) in product(range(fixed.pop("seeds")), tasks.items()):
            found += [
                fixed
                | {"task": task, **details, "algorithm": name, "T": None, "lr": rate, "seed": seed}
                | given
                for name, given in (BRIEF if task in LARGE else ROWS)
                if not size or given.get("T") not in LONGER
                for rate in (SLOW if task in LARGE else RATES)[
                    "pc" if "precisions" in given else name
                ]
            ]
    return found


def run(job: Job, data_dir: str | None) -> Figures:
    """Trains one network; the digits are part of scikit-learn, MNIST is read or downloaded."""
    read = _mnist(data_dir) if job["task"] in LARGE else _digits()
    splits = {split: (job["scale"] * images, labels) for split, (images, labels) in read.items()}
    torch.manual_seed(job["seed"])
    sizes = [splits["train"][0].shape[1]] + [job["width"]] * job["layers"]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(sizes[-1], 10))
    figures = classify(net, Images(splits["train"], splits["test"]), job)
    return figures | {"validation": accuracy(net, *splits["val"])}


def _digits() -> Splits:
    return {
        split: (torch.from_numpy(images), torch.from_numpy(labels))
        for split, (images, labels) in Digits().load().items()
    }


def _mnist(data_dir: str | None) -> Splits:
    (images, labels), (tested, answers) = mnist(data_dir, 60_000, 10_000)
    images, learned = images.flatten(1), len(images) - HELD_OUT
    return {
        "train": (images[:learned], labels[:learned]),
        "val": (images[learned:], labels[learned:]),
        "test": (tested.flatten(1), answers),
    }


def chosen(rows: Sequence[Row], task: str, name: str, given: Job) -> list[Row]:
    """A row's runs with its best learning rate."""
    found: dict[float, list[Row]] = {}
    wanted = {"gamma": "auto"} | given
    for row in rows:
        keys = ("gamma", "T", "momentum", "precisions")
        same = all(row.get(key) == wanted.get(key) for key in keys)
        if same and (row["task"], row["algorithm"]) == (task, name):
            found.setdefault(row["lr"], []).append(row)
    return max(found.values(), key=lambda runs: fmean(r["validation"] for r in runs), default=[])


def tables(rows: list[Row]) -> list[Table]:
    """A table for each task that has been run."""
    known = {row["task"] for row in rows}
    return [_table(rows, task) for task in TASKS if task in known]


def _table(rows: list[Row], task: str) -> Table:
    table = Table(title=f"size {rows[0]['size']}: {task}, test accuracy, %")
    table.add_column("algorithm")
    for heading in ("T", "lr", "accuracy", "against bp", "evaluations", "CPU s", "seeds"):
        table.add_column(heading, justify="right")
    backprop = chosen(rows, task, "bp", {})
    for name, given in ROWS:
        runs = chosen(rows, task, name, given)
        if not runs:
            continue
        scores = [row["accuracy"] for row in runs]
        spread = f" ± {stdev(scores):.2f}" if len(scores) > 1 else ""
        against = fmean(scores) - fmean(row["accuracy"] for row in backprop) if backprop else 0.0
        table.add_row(
            _called(name, given),
            "-" if name == "bp" else str(given.get("T", "default")),
            f"{runs[0]['lr']:g}",
            f"{fmean(scores):.2f}{spread}",
            f"{against:+.2f}",
            f"{fmean(row['steps'] for row in runs):.1f}",
            f"{fmean(row['cpu_seconds'] for row in runs):.1f}",
            str(len(runs)),
        )
    return table


def _called(name: str, given: Job) -> str:
    gamma = f"gamma {given['gamma']}" if "gamma" in given else ""
    return ", ".join(filter(None, (name, gamma, variant(given))))


def picture(rows: list[Row]) -> Figure:
    """Accuracy of every row, a panel for each task."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    known = [row for row in ROWS if any(chosen(rows, task, *row) for task in tasks)]
    figure = Figure(figsize=(4 * len(tasks), 5), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for place, row in enumerate(known):
            scores = [run["accuracy"] for run in chosen(rows, task, *row)]
            axes.plot(scores, [place] * len(scores), "o", alpha=0.6)
        axes.set_title(task, fontsize=10)
    labels = [
        _called(name, given) + (f", T={given['T']}" if "T" in given else "")
        for name, given in known
    ]
    panels[0].set_yticks(range(len(known)), labels, fontsize=8)
    panels[0].invert_yaxis()
    figure.supxlabel("test accuracy, %")
    return figure


STUDY = Study(
    "recipes.stability.defaults",
    "scikit-learn's digits: 1,077 training, 360 validation, 360 test images; MNIST: 50,000, 10,000 "
    "and 10,000",
    jobs,
    run,
    tables,
    picture,
)

if __name__ == "__main__":
    main(STUDY)
