"""Trains a recipe's YAMLs over several seeds and writes ``recipes/<task>/results.json``.

    python -m recipes.study digits --seeds 5
    python -m recipes.study mnist --seeds 3 --data.data_dir data/mnist

Arguments that it does not know are LightningCLI's and hold for every run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from recipes.common.machine import machine
from recipes.common.training import Run, train

HERE = Path(__file__).parent
ORDER = ("bp", "pc", "ipc", "zil")
NAMES = {
    "bp": "backprop",
    "pc": "predictive coding (PC)",
    "ipc": "incremental PC (iPC)",
    "zil": "zero-divergence (Z-IL)",
}

SHORT = {"bp": "backprop", "pc": "PC", "ipc": "iPC", "zil": "Z-IL"}

Results = dict[str, list[Run]]


def configs(task: str) -> list[Path]:
    """The YAMLs of a task, backprop first."""
    return [path for name in ORDER if (path := HERE / task / f"{name}.yaml").exists()]


def study(
    paths: Sequence[Path], seeds: int, overrides: Sequence[str] = (), console: Console | None = None
) -> Results:
    """Trains every YAML with seeds 0, 1, ..., with a progress bar for each.

    Args:
        paths: The YAMLs; their stems name the algorithms.
        seeds: Number of seeds.
        overrides: Further arguments of LightningCLI.
        console: Where to show progress.

    Returns:
        Algorithm -> its runs.
    """
    results: Results = {path.stem: [] for path in paths}
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("[dim]{task.fields[epoch]}"),
        TextColumn("[green]{task.fields[accuracy]}"),
        TextColumn("[magenta]{task.fields[energy]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        blank = {"epoch": "", "accuracy": "", "energy": ""}
        rows = {
            name: progress.add_task(SHORT[name].ljust(8), start=False, total=seeds, **blank)
            for name in results
        }
        for path in paths:
            row = rows[path.stem]
            progress.start_task(row)
            for seed in range(seeds):

                def show(run: Run, share: float) -> None:
                    progress.update(row, completed=run.seed + share, **_state(run, seeds))  # noqa: B023

                run = train(path, seed, overrides, show)
                show(run, 1.0)
                results[path.stem].append(run)
            progress.stop_task(row)
    return results


def _state(run: Run, seeds: int) -> dict[str, str]:
    done = len(run.val_accuracy)
    which = f"seed {run.seed + 1}/{seeds} " if seeds > 1 else ""
    return {
        "epoch": f"{which}epoch {done:>2}/{run.epochs}",
        "accuracy": f"val {run.val_accuracy[-1]:4.1f} %" if done else "",
        "energy": f"energy {run.energy[-1]:.1e}" if run.energy else "",
    }


def table(results: Results, title: str) -> Table:
    """Test accuracy, energy and seconds of each algorithm, mean and standard deviation."""
    seeds = max(len(runs) for runs in results.values())
    grid = Table(
        title=title,
        caption="energy: of all value nodes after inference, per sample, mean of the last epoch"
        + ("; ± is the standard deviation over seeds" if seeds > 1 else ""),
    )
    grid.add_column("algorithm")
    for heading in ("test accuracy", "energy", "seconds", "seeds"):
        grid.add_column(heading, justify="right")
    best = max(_mean(runs, "test_accuracy") for runs in results.values())
    for name, runs in results.items():
        accuracy = f"{_spread(runs, 'test_accuracy', '.2f')} %"
        if _mean(runs, "test_accuracy") == best:
            accuracy = f"[bold green]{accuracy}[/]"
        energy = statistics.fmean(run.energy[-1] for run in runs) if runs[0].energy else None
        grid.add_row(
            NAMES[name],
            accuracy,
            "-" if energy is None else f"{energy:.2g}",
            f"{_mean(runs, 'seconds'):.1f}",
            str(len(runs)),
        )
    return grid


def record(results: Results, command: str) -> dict[str, Any]:
    """All figures of a study, ready for JSON; accuracies in percent."""
    return {
        "command": command,
        **machine(),
        "algorithms": {
            name: {
                "config": runs[0].config.relative_to(HERE.parent).as_posix(),
                "epochs": runs[0].epochs,
                "seeds": [run.seed for run in runs],
                "test_accuracy": [round(run.test_accuracy, 3) for run in runs],
                "test_accuracy_mean": round(_mean(runs, "test_accuracy"), 3),
                "test_accuracy_std": round(_deviation(runs, "test_accuracy"), 3),
                "val_accuracy": [round(run.val_accuracy[-1], 3) for run in runs],
                "energy": [float(f"{run.energy[-1]:.4g}") for run in runs if run.energy],
                "seconds": [round(run.seconds, 1) for run in runs],
            }
            for name, runs in results.items()
        },
    }


def _mean(runs: Sequence[Run], what: str) -> float:
    return statistics.fmean(getattr(run, what) for run in runs)


def _deviation(runs: Sequence[Run], what: str) -> float:
    return statistics.stdev(getattr(run, what) for run in runs) if len(runs) > 1 else 0.0


def _spread(runs: Sequence[Run], what: str, digits: str) -> str:
    deviation = f" ± {_deviation(runs, what):{digits}}" if len(runs) > 1 else ""
    return f"{_mean(runs, what):{digits}}{deviation}"


def main(args: Sequence[str] | None = None) -> None:
    """Runs a study from the command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.study", description=__doc__)
    parser.add_argument("task", choices=sorted(p.parent.name for p in HERE.glob("*/bp.yaml")))
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--out", type=Path, help="default: recipes/<task>/results.json")
    given = list(sys.argv[1:] if args is None else args)
    options, overrides = parser.parse_known_args(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    results = study(configs(options.task), options.seeds, overrides, console)
    console.print(table(results, f"{options.task}, {options.seeds} seeds"))
    out = options.out or HERE / options.task / "results.json"
    written = record(results, f"python -m recipes.study {shlex.join(given)}")
    out.write_text(json.dumps(written, indent=2) + "\n")
    console.print(f"Written to {out}")


if __name__ == "__main__":
    main()
