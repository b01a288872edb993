"""Associative memory: how many pictures a generative network stores and recalls.

    python -m recipes.memory.recall --data_dir FOLDER

As in Salvatori et al. 2021: a network learns to generate N pictures, all in one batch. Then it is
given a cue, which is a picture without its lower half, or with noise, and inference completes it.
Errors are squared errors of what was not given (of noisy pictures: of all pixels), as a share of
the pictures' variance there: 1 is the mean picture.

The grid of originals, cues and recalls beside the figures is drawn by

    python -m recipes.memory.grid --data_dir FOLDER
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from lightning_pc import infer
from lightning_pc.losses import squared_error
from lightning_pc.optim import IPC
from recipes.common.queue import Figures, Job, Row, Study, main
from recipes.generation.data import pictures
from recipes.generation.energy import Generator

DATA, LAYERS, RATE, NOISE = "tiny_imagenet", 3, 1e-3, 0.4
COUNTS, WIDTHS = (25, 50, 100, 200), (32, 64, 128)
SEEDS, BATCHES = (0,), 100
CUES = ("half", "noise")


def jobs() -> list[Job]:
    """Memory by memory, the smallest number of pictures first."""
    return [
        {"size": 0, "width": width, "count": count, "seed": seed, "batches": BATCHES}
        for width, count, seed in product(WIDTHS, COUNTS, SEEDS)
    ]


class Recall(NamedTuple):
    """What became of a cue.

    Attributes:
        cue: What was given, [N, pixels].
        found: What was recalled, [N, pixels].
        error: Of what was not given, a share of the pictures' variance there.
        steps: Inference steps.
        converged: F has converged within them.
    """

    cue: Tensor
    found: Tensor
    error: float
    steps: int
    converged: bool


def store(x: Tensor, width: int, batches: int, seed: int) -> Generator:
    """A network that has learned pictures [N, pixels], by iPC with all defaults."""
    torch.manual_seed(seed)
    net = Generator(LAYERS, width, x.shape[1])
    optimizer = IPC(torch.optim.Adam(net.parameters(), RATE), net)
    for _ in range(batches):
        optimizer.step(lambda: squared_error(net(len(x)), x))
    return net


def recall(net: Generator, x: Tensor, cue: str, seed: int) -> Recall:
    """Recalls pictures [N, pixels] from their upper halves, or from noisy ones."""
    given = torch.ones(x.shape[1], dtype=torch.bool)
    if cue == "half":
        given[x.shape[1] // 2 :] = False
        shown = torch.where(given, x, x.mean())
        asked = ~given
    else:
        shown = x + NOISE * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        asked = given

    def closure() -> tuple[Tensor, Tensor]:
        out = net(len(x))
        return squared_error(out[:, given], shown[:, given]), out

    made = infer(net, closure)
    wrong = (made.output - x)[:, asked].square().sum()
    error = float(wrong / (x - x.mean(0))[:, asked].square().sum())
    return Recall(shown, made.output, error, made.report.steps, made.converged)


def run(job: Job, data_dir: str | None = None) -> Figures:
    """Stores pictures and recalls them from each cue."""
    x = pictures(DATA, job["count"], data_dir)
    net = store(x, job["width"], job["batches"], job["seed"])
    recalls = {cue: recall(net, x, cue, job["seed"]) for cue in CUES}
    return {
        **{cue: round(found.error, 5) for cue, found in recalls.items()},
        **{f"{cue}, steps": found.steps for cue, found in recalls.items()},
        **{f"{cue}, converged": found.converged for cue, found in recalls.items()},
    }


def _error(rows: Sequence[Row], width: int, count: int, cue: str) -> float | None:
    found = [r[cue] for r in rows if (r["width"], r["count"]) == (width, count)]
    return sum(found) / len(found) if found else None


def tables(rows: list[Row]) -> list[Table]:
    """Errors, a table for each cue."""
    made = []
    for cue in CUES:
        table = Table("units", *map(str, COUNTS), title=f"error of pictures recalled: {cue}")
        for width in WIDTHS:
            errors = [_error(rows, width, count, cue) for count in COUNTS]
            table.add_row(str(width), *["" if e is None else f"{e:.3g}" for e in errors])
        made.append(table)
    return made


def picture(rows: list[Row]) -> Figure:
    """Errors against the number of pictures."""
    figure, axes = plt.subplots(1, len(CUES), figsize=(8, 3.2))
    for axis, cue in zip(axes, CUES, strict=True):
        for width in WIDTHS:
            errors = [(n, _error(rows, width, n, cue)) for n in COUNTS]
            there = [(n, error) for n, error in errors if error is not None]
            axis.plot(*zip(*there, strict=True), marker="o", label=f"{width} units")
        axis.set(xscale="log", yscale="log", xlabel="pictures stored", title=cue)
    axes[0].set(ylabel="error, share of variance")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


STUDY = Study(
    "recipes.memory.recall",
    "the first training images of Tiny ImageNet, one a class",
    jobs,
    run,
    tables,
    picture,
)

if __name__ == "__main__":
    main(STUDY)
