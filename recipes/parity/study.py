"""Backprop against `auto` at the defaults, on many kinds of networks and data.

    python -m recipes.parity.study --data_dir data

Each has the best of three learning rates, by what is measured, and equal batches. A third row gives
backprop as many more batches as `auto` takes processor time. Where targets are noisy two further
rows, at one learning rate, show what happens otherwise: pc, and pc with sampled values.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table

from lightning_pc.langevin import Langevin
from lightning_pc.optim import PC, PredictiveCoding
from recipes.common.queue import Figures, Job, Row, Study, main
from recipes.parity.tasks import TASKS, Task

BACKPROP, AUTO, TIMED = "backprop", "auto", "backprop, equal time"
PLAIN, SAMPLED = "pc", "pc, Langevin"
ROWS: dict[str, Any] = {
    BACKPROP: None,
    AUTO: PredictiveCoding,
    TIMED: None,
    PLAIN: PC,
    # beta makes half of the squared error, a negative log-likelihood, of the whole.
    SAMPLED: partial(PC, T=50, beta=0.5, inference=partial(Langevin, lr=0.05)),
}
#: Of AdamW, of AdamW in 64 layers, of SGD.
RATES, DEEP_RATES, SGD_RATES = (3e-4, 1e-3, 3e-3), (1e-4, 3e-4, 1e-3), (0.03, 0.1, 0.3)
#: Of the rows beside backprop and auto, at one learning rate, the tasks.
ONLY = {
    PLAIN: [name for name in TASKS if "noise" in name or "random" in name or "Markov" in name],
    SAMPLED: [name for name in TASKS if "noise" in name],
}
SEEDS = (0, 1)
#: Batches by which a task's costs are compared; the first ones, with most looks, are left out.
WARM, TURNS = 40, 30


def jobs() -> list[Job]:
    """Task by task, the rows beside each other."""
    return [
        {"size": 0, "task": task, "row": row, "lr": rate, "seed": seed}
        for task in TASKS
        for row in ROWS
        if task in ONLY.get(row, TASKS)
        for rate in (rates(task) if row not in ONLY else (1e-3,))
        for seed in SEEDS
    ]


def rates(task: str) -> tuple[float, ...]:
    """The learning rates that backprop and auto are tried at."""
    return SGD_RATES if "SGD" in task else DEEP_RATES if "64 layers" in task else RATES


@lru_cache(maxsize=1)
def _task(name: str, data_dir: str | None) -> Task:
    torch.manual_seed(0)
    return TASKS[name][1](data_dir)


class Trainee:
    """A network that learns the batches of a task, by backprop or predictive coding."""

    def __init__(self, task: Task, row: str, rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.task, self.net = task, task.make().train()
        self.stream = task.stream(seed)
        parameters = self.net.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, rate) if task.sgd else torch.optim.AdamW(parameters, rate)
        )
        if ROWS[row]:
            self.optimizer = ROWS[row](self.optimizer, self.net, **task.given)

    def learn(self, batches: int) -> float:
        """Learns so many batches; the seconds of processor time."""
        start = time.process_time()
        for x, y in islice(self.stream, batches):
            self._learn(x, y)
        return time.process_time() - start

    def _learn(self, *batch: torch.Tensor) -> None:
        x, y = batch
        if isinstance(self.optimizer, PredictiveCoding):
            self.optimizer.step(lambda: self.task.loss(self.net(x), y))
            return
        self.optimizer.zero_grad()
        self.task.loss(self.net(x), y).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def cost(task: Task) -> float:
    """Processor time of a batch of `auto` against backprop's, measured in turns."""
    rate = SGD_RATES[0] if task.sgd else RATES[0]
    sides = [Trainee(task, row, rate, 0) for row in (AUTO, BACKPROP)]
    for side in sides:
        side.learn(WARM)
    spent = [[side.learn(1) for side in sides] for _ in range(TURNS)]
    return fmean(auto for auto, _ in spent) / fmean(backprop for _, backprop in spent)


def run(job: Job, data_dir: str | None = None) -> Figures:
    """Trains one network; ``figure`` is what the task's judge says, ``cost`` `cost`'s."""
    task = _task(job["task"], data_dir)
    warnings.filterwarnings("ignore", category=UserWarning)  # of pc, which un-learns
    ratio = round(cost(task), 2) if job["row"] == TIMED else None
    trainee = Trainee(task, job["row"], job["lr"], job["seed"])
    batches = round(task.batches * (ratio or 1.0))
    seconds = trainee.learn(batches)
    trainee.net.eval()
    with torch.no_grad():
        figure = task.judge(trainee.net)
    cost_of = {"cost": ratio} if ratio else {}
    return {"figure": figure, "batches": batches, "cpu_seconds": round(seconds, 2)} | cost_of


def by_rate(rows: Sequence[Row], task: str, row: str) -> dict[float, list[float]]:
    """Learning rate -> the figures of all seeds."""
    found: dict[float, list[float]] = {}
    for r in rows:
        if (r["task"], r["row"]) == (task, row):
            found.setdefault(r["lr"], []).append(r["figure"])
    return found


def best(rows: Sequence[Row], task: str, row: str) -> tuple[float, float, list[float]] | None:
    """Mean over seeds at the best learning rate, that rate, and the figures."""
    found = by_rate(rows, task, row)
    if not found:
        return None
    pick = max if _up(task) else min
    rate = pick(found, key=lambda r: fmean(found[r]))
    return fmean(found[rate]), rate, found[rate]


def _up(task: str) -> bool:
    return "accuracy" in TASKS[task][0]


def tables(rows: list[Row]) -> list[Table]:
    """A line for each task."""
    table = Table("", "figure", *ROWS, "auto's time", title="mean of seeds (best learning rate)")
    for task in dict.fromkeys(r["task"] for r in rows):
        cells = []
        for row in ROWS:
            found = best(rows, task, row)
            cells.append(f"{found[0]:.4g} ({found[1]:g})" if found else "")
        costs = [r["cost"] for r in rows if r["task"] == task and "cost" in r]
        table.add_row(task, TASKS[task][0], *cells, f"{fmean(costs):.2f} x" if costs else "")
    return [table]


def picture(rows: list[Row]) -> Figure:
    """The figure by learning rate, of backprop and auto, a panel for each task."""
    names = list(dict.fromkeys(r["task"] for r in rows))
    lines = -(-len(names) // 4)
    figure, axes = plt.subplots(lines, 4, figsize=(14, 2.4 * lines), squeeze=False)
    for axis, task in zip(axes.flat, names, strict=False):
        for row, mark in ((BACKPROP, "o-"), (AUTO, "x--")):
            found = by_rate(rows, task, row)
            axis.plot([*found], [fmean(f) for f in found.values()], mark, label=row)
        axis.set(xscale="log", title=task)
        axis.title.set_fontsize(8)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("learning rate", fontsize=9)
    figure.tight_layout()
    return figure


STUDY = Study(
    "recipes.parity.study",
    "drawn at random; scikit-learn's digits; the first images of MNIST, FashionMNIST and CIFAR-10; "
    "sentences of the One Billion Word Benchmark (recipes/parity/tasks.py)",
    jobs,
    run,
    tables,
    picture,
)

if __name__ == "__main__":
    main(STUDY)
