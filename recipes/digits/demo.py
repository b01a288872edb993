"""``make demo``: four ways to train one unmodified network on real handwritten digits.

    python -m recipes.digits.demo [--seeds N] [--epochs N] [--results DIR]

Everything about the runs stands in the YAMLs next to this file.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from lightning_pc.plots import plot_energy
from recipes.study import NAMES, Results, configs, study, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"bp": "0.35", "pc": "tab:orange", "ipc": "tab:blue", "zil": "tab:green"}


def save_energy(results: Results, path: Path) -> None:
    """Energy against inference step: one batch of each algorithm, a line per value node."""
    import matplotlib.pyplot as plt

    reports = {n: runs[0].first_report for n, runs in results.items() if runs[0].first_report}
    figure, axes = plt.subplots(
        1, len(reports), figsize=(4.0 * len(reports), 3.8), sharey=True, layout="constrained"
    )
    for ax, (name, report) in zip(axes, reports.items(), strict=True):
        assert report is not None
        plot_energy(report, ax)
        ax.set(title=NAMES[name])
        ax.grid(alpha=0.25)
        ax.get_legend().remove()
    for ax in axes[1:]:
        ax.set_ylabel("")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("Digits: energy while one batch is learned, at the end of the first epoch")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save_learning(results: Results, path: Path) -> None:
    """Validation accuracy and node energy against epoch, means over seeds."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, runs in results.items():
        style = {"color": COLOURS[name], "label": NAMES[name], "lw": 1.6}
        # Z-IL's curve is backprop's: dashed, so that both can be seen
        style["ls"] = "--" if name == "zil" else "-"
        _curve(left, [run.val_accuracy for run in runs], style)
        if runs[0].energy:
            _curve(right, [run.energy for run in runs], style)
    worst = min(run.val_accuracy[-1] for runs in results.values() for run in runs)
    left.set(title="validation accuracy (%)", ylim=(min(90.0, worst - 5), 100))
    right.set(title="energy of the value nodes after inference, per sample", yscale="log")
    left.legend(frameon=False, loc="lower right")
    for ax in (left, right):
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curve(ax: Axes, lines: list[list[float]], style: dict[str, object]) -> None:
    means = [statistics.fmean(values) for values in zip(*lines, strict=True)]
    ax.plot(range(1, len(means) + 1), means, **style)


def main(args: Sequence[str] | None = None) -> None:
    """Trains, prints the table and saves the plots."""
    import matplotlib

    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(prog="python -m recipes.digits.demo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default 1)")
    parser.add_argument("--epochs", type=int, help="default: the YAMLs'")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where plots go")
    options = parser.parse_args(args)
    torch.set_num_threads(1)  # matrices this small lose time on a second thread
    console = Console()
    console.print(
        "\n[bold]lightning_pc[/]: 1,077 handwritten digits, one network (64-64-64-10),\n"
        "left as its author wrote it, trained in four ways\n"
    )
    overrides = [f"--trainer.max_epochs={options.epochs}"] if options.epochs else []
    results = study(configs("digits"), options.seeds, overrides, console)
    console.print()
    console.print(table(results, "Handwritten digits: 360 test images"))
    options.results.mkdir(parents=True, exist_ok=True)
    plots = {"energy": save_energy, "learning": save_learning}
    for name, save in plots.items():
        path = options.results / f"digits_{name}.png"
        save(results, path)
        console.print(f"{name} plot: {path}")


if __name__ == "__main__":
    main()
