"""Twelve architectures learn one batch by heart: the loss after 50 steps, by gamma.

    python -m recipes.stability.architectures

At five learning rates; a gamma by itself and against the best fixed one.
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
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
ALGORITHMS = ("ipc", "pc")
SIZES: tuple[dict[str, Any], ...] = (
    {"seeds": (0,), "steps": 50},
    {"seeds": (1, 2, 3), "steps": 50},
    {"seeds": (4, 5, 6, 7), "steps": 50},
)
DRAWS = 64  # of dropout masks
WITHIN = (
    "on how many the loss is within 10 % of the best fixed gamma's, "
    "and how many times that it is on the worst"
)


def jobs() -> list[Job]:
    """720 of the smallest size, 2,160 of the next, 2,880 of the last."""
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
    """Learns the batch; ``loss`` is None where it diverged.

    ``left`` is the share of F at the start of a batch that is there at its end, mean of the second
    half of the steps.
    """
    net, loss = problem(job["network"], job["seed"])
    learner = Learner(net, job, value_nodes=NETWORKS[job["network"]][2])
    losses: list[float] = []
    left: list[float] = []
    start, final = (time.perf_counter(), time.process_time()), None
    try:
        for _ in range(job["steps"]):
            losses.append(learner.step(loss))
            left.append(learner.left)
        final = expected(loss)
    except DivergenceError:
        pass
    return {
        "loss": final,
        "last_losses": None if final is None else round(fmean(losses[-5:]), 6),
        "seconds": round(time.perf_counter() - start[0], 2),
        "cpu_seconds": round(time.process_time() - start[1], 2),
        "gamma_at_end": learner.gamma,
        "left": round(fmean(left[len(left) // 2 :]), 4) if left else None,
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


def ratio(found: dict[Any, float], gamma: Any = "auto") -> float | None:
    """A gamma's loss over that of the best fixed one; None before both are known."""
    fixed = [loss for which, loss in found.items() if not isinstance(which, str)]
    if gamma not in found or not fixed:
        return None
    best = min(fixed)
    return 1.0 if found[gamma] == best else found[gamma] / best if best else inf


def tables(rows: list[Row]) -> list[Table]:
    """For each algorithm the losses by gamma, how each does by learning rate, what F it leaves."""
    kinds = (_losses, _against_fixed, _left)
    return [table for name in ALGORITHMS for kind in kinds if (table := kind(rows, name)).rows]


def pooled(rows: list[Row]) -> list[Table]:
    """The losses by gamma of each learning rate at which all twelve have several seeds."""
    found = []
    for algorithm, lr in product(ALGORITHMS, RATES):
        some = [row for row in rows if (row["algorithm"], row["lr"]) == (algorithm, lr)]
        common = {network: _common_seeds(some, network) for network in NETWORKS}
        seeds = set.intersection(*common.values())
        if len(seeds) > 1:
            same = [row for row in some if row["seed"] in seeds and "momentum" not in row]
            title = f"{algorithm} at {lr:g}, seeds {', '.join(map(str, sorted(seeds)))}: loss"
            found.append(_losses(same, algorithm, title))
            within = {gamma: _within(same, algorithm, gamma) for gamma in map(rate, GAMMAS)}
            found[-1].caption = f"{WITHIN}: " + "; ".join(
                f"gamma {gamma}: {what}" for gamma, what in within.items() if what
            )
    return found


def _common_seeds(rows: Sequence[Row], network: str) -> set[int]:
    """Those that a network has at each gamma, plain descent apart."""
    gammas = [rate(given) for given in GAMMAS if given != PLAIN]
    mine = [row for row in rows if row["network"] == network]
    return set.intersection(*({r["seed"] for r in mine if rate(r) == gamma} for gamma in gammas))


def _losses(rows: Sequence[Row], algorithm: str, title: str = "") -> Table:
    steps = rows[0]["steps"]
    title = title or f"size {rows[0]['size']}: {algorithm}, loss after {steps} steps by gamma"
    table, gammas = _by_gamma(title, "network", "auto / best fixed")
    for network in NETWORKS:
        found = losses(rows, network, algorithm)
        if found:
            against = ratio(found)
            cells = (f"{found[g]:.3g}" if g in found else "" for g in gammas)
            table.add_row(network, *cells, "" if against is None else f"{against:.2f}")
    return table


def _against_fixed(rows: Sequence[Row], algorithm: str) -> Table:
    title = f"size {rows[0]['size']}: {algorithm}, networks learned as well, by gamma"
    table, gammas = _by_gamma(title, "learning rate")
    table.caption = WITHIN
    lrs = sorted({row["lr"] for row in rows if row["algorithm"] == algorithm})
    for name, some in ((f"{lr:g}", [row for row in rows if row["lr"] == lr]) for lr in lrs):
        table.add_row(name, *(_within(some, algorithm, gamma) for gamma in gammas))
    if len(lrs) > 1:
        table.add_row("best", *(_within(rows, algorithm, gamma) for gamma in gammas))
    return table


def _left(rows: Sequence[Row], algorithm: str) -> Table:
    """Of the rows that have it."""
    title = f"size {rows[0]['size']}: {algorithm}, share of F left at the end of a batch, by gamma"
    table, gammas = _by_gamma(title, "network, learning rate")
    for network, lr in product(NETWORKS, sorted({row["lr"] for row in rows})):
        found: dict[Any, list[float]] = {}
        for row in rows:
            same = (row["network"], row["algorithm"], row["lr"]) == (network, algorithm, lr)
            if same and row.get("left") is not None:
                found.setdefault(rate(row), []).append(row["left"])
        if found:
            cells = (f"{fmean(found[gamma]):.2f}" if gamma in found else "" for gamma in gammas)
            table.add_row(f"{network}, {lr:g}", *cells)
    return table


def _within(rows: Sequence[Row], algorithm: str, gamma: Any) -> str:
    ratios = [ratio(losses(rows, network, algorithm), gamma) for network in NETWORKS]
    known = [each for each in ratios if each is not None]
    if not known:
        return ""
    return f"{sum(each <= 1.1 for each in known)}/{len(known)}, {max(known):.3g}"


def _by_gamma(title: str, first: str, *last: str) -> tuple[Table, list[Any]]:
    """A table with a column for each gamma, and the gammas."""
    table, gammas = Table(first, title=title), [rate(given) for given in GAMMAS]
    for heading in (*map(str, gammas), *last):
        table.add_column(heading, justify="right")
    return table, gammas


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


STUDY = Study(
    "recipes.stability.architectures", "one random batch", jobs, run, tables, picture, pooled
)

if __name__ == "__main__":
    main(STUDY)
