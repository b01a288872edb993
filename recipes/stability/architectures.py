"""Twelve architectures learn one batch by heart: the loss after 50 steps, by gamma.

    python -m recipes.stability.architectures

Each row has the best of three learning rates.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from math import inf
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

from lightning_pc.errors import DivergenceError
from recipes.common.queue import Figures, Job, Row, Study, main
from recipes.stability.networks import NETWORKS, Loss, problem
from recipes.stability.training import PLAIN, Learner, rate

GAMMAS: tuple[Job, ...] = (*({"gamma": g} for g in (1.0, 0.5, 0.1, 0.01, "auto")), PLAIN)
RATES = (3e-4, 1e-3, 3e-3)
ALGORITHMS = ("ipc", "pc")
SIZES: tuple[dict[str, Any], ...] = (
    {"seeds": (0,), "steps": 50},
    {"seeds": (1, 2, 3), "steps": 50},
)
DRAWS = 64  # of dropout masks


def jobs() -> list[Job]:
    """432 of the smallest size, 1,296 of the next."""
    return [
        {"size": size, "network": network, "algorithm": algorithm, **given, "seed": seed}
        | {"steps": settings["steps"], "lr": lr, "weight_decay": 0.01}
        for size, settings in enumerate(SIZES)
        for network, algorithm in product(NETWORKS, ALGORITHMS)
        for given in GAMMAS
        for lr in RATES
        for seed in settings["seeds"]
    ]


def run(job: Job, data_dir: str | None = None) -> Figures:
    """Learns the batch; ``loss`` is None where it diverged."""
    net, loss = problem(job["network"], job["seed"])
    learner = Learner(net, job, value_nodes=NETWORKS[job["network"]][2])
    losses: list[float] = []
    start, final = (time.perf_counter(), time.process_time()), None
    try:
        losses += [learner.step(loss) for _ in range(job["steps"])]
        final = expected(loss)
    except DivergenceError:
        pass
    return {
        "loss": final,
        "last_losses": None if final is None else round(fmean(losses[-5:]), 6),
        "seconds": round(time.perf_counter() - start[0], 2),
        "cpu_seconds": round(time.process_time() - start[1], 2),
        "gamma_at_end": learner.gamma,
        "diverged": final is None,
    }


def expected(loss: Loss) -> float:
    """The training loss, a mean over dropout masks.

    Raises:
        DivergenceError: It is not finite.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        mean = float(torch.stack([loss() for _ in range(DRAWS)]).mean())
    if not abs(mean) < inf:
        raise DivergenceError(f"The loss is {mean}.")
    return round(mean, 6)


def losses(rows: Sequence[Row], network: str, algorithm: str) -> dict[Any, float]:
    """Gamma -> loss: mean over seeds, best of the learning rates; infinite if each diverged."""
    found: dict[Any, dict[float, list[float]]] = {}
    for row in rows:
        if (row["network"], row["algorithm"]) == (network, algorithm):
            loss = inf if row["loss"] is None else row["loss"]
            found.setdefault(rate(row), {}).setdefault(row["lr"], []).append(loss)
    return {gamma: min(map(fmean, by_lr.values())) for gamma, by_lr in found.items()}


def ratio(found: dict[Any, float]) -> float | None:
    """Auto's loss over that of the best fixed gamma; None before both are known."""
    fixed = [loss for gamma, loss in found.items() if not isinstance(gamma, str)]
    if "auto" not in found or not fixed:
        return None
    best = min(fixed)
    return 1.0 if found["auto"] == best else found["auto"] / best if best else inf


def tables(rows: list[Row]) -> list[Table]:
    """Losses by gamma, a table for each algorithm."""
    return [_table(rows, algorithm) for algorithm in ALGORITHMS]


def _table(rows: list[Row], algorithm: str) -> Table:
    steps = rows[0]["steps"]
    table = Table(title=f"size {rows[0]['size']}: {algorithm}, loss after {steps} steps")
    table.add_column("network")
    gammas = [rate(given) for given in GAMMAS]
    for heading in (*(f"gamma {which}" for which in gammas), "auto / best fixed"):
        table.add_column(heading, justify="right")
    for network in NETWORKS:
        found = losses(rows, network, algorithm)
        if found:
            against = ratio(found)
            cells = (f"{found[g]:.4g}" if g in found else "" for g in gammas)
            table.add_row(network, *cells, "" if against is None else f"{against:.2f}")
    lrs = sorted({row["lr"] for row in rows})
    within = [f"{_within(rows, algorithm)} with the best learning rate"] if len(lrs) > 1 else []
    for lr in lrs:
        within += [f"{_within([row for row in rows if row['lr'] == lr], algorithm)} with {lr:g}"]
    table.caption = f"auto within 10 % of the best fixed gamma: {', '.join(within)}"
    return table


def _within(rows: Sequence[Row], algorithm: str) -> str:
    ratios = [ratio(losses(rows, network, algorithm)) for network in NETWORKS]
    known = [each for each in ratios if each is not None]
    return f"{sum(each <= 1.1 for each in known)} of {len(known)}"


def picture(rows: list[Row]) -> Figure:
    """Loss of each network by gamma, best of the learning rates, a panel for each algorithm."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(len(ALGORITHMS), 1, sharex=True)
    for axes, algorithm in zip(panels, ALGORITHMS, strict=True):
        found = [losses(rows, network, algorithm) for network in NETWORKS]
        for which in map(rate, GAMMAS):
            values = [each.get(which, inf) for each in found]
            marker = "*" if isinstance(which, str) else "o"
            axes.plot(
                list(NETWORKS),
                values,
                marker,
                ms=11 if marker == "*" else 6,
                label=f"gamma {which}",
            )
        axes.set_yscale("log")
        axes.set_title(algorithm)
        axes.tick_params("x", rotation=30)
    panels[-1].legend(fontsize=8)
    figure.supylabel("loss")
    return figure


STUDY = Study("recipes.stability.architectures", "one random batch", jobs, run, tables, picture)

if __name__ == "__main__":
    main(STUDY)
