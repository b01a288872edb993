"""Searches the hyperparameters of a recipe with Optuna.

    python -m recipes.sweep recipes/image_classification/alexnet/ipc.yaml --data.data_dir FOLDER

Without ``--ranges`` the search is that of the paper's appendix D.2, every combination of 8 learning
rates, 4 weight decays and, of predictive coding, 3 gammas. The journal keeps what has been tried:
the same command goes on where it was stopped, and several processes or machines that see the file
share the work. Arguments that it does not know are LightningCLI's and hold for every run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from math import inf, prod
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_pc.errors import DivergenceError
from recipes.common.machine import machine
from recipes.common.training import hushed, train

try:
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState
except ImportError as error:
    raise ImportError("Searches need `pip install optuna`.") from error

LR, DECAY, GAMMA = (
    "optimizer.lr",
    "optimizer.weight_decay",
    "trainer.strategy.init_args.gamma",
)
#: The paper names the ends of the learning rates and its best, 5e-5; the others are chosen here.
PAPER: dict[str, list[Any]] = {
    LR: [1e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2],
    DECAY: [1e-4, 1e-3, 1e-2, 1e-1],
    GAMMA: [0.1, 0.5, 1.0],
}
CONVERGED = 10.0  # points of test accuracy to the best of the search

Ranges = dict[str, list[Any]]
Tried = dict[str, Any]  # settings by their short names, "val", "test" and "diverged"


def ranges_of(config: Path, given: Path | None) -> Ranges:
    """Values of each setting.

    Args:
        config: The recipe.
        given: YAML of lists by LightningCLI's names; None for the paper's.

    Raises:
        ValueError: The file is not that.
    """
    if given is None:
        strategy = yaml.safe_load(config.read_text())["trainer"].get("strategy")
        return {name: values for name, values in PAPER.items() if strategy or name != GAMMA}
    ranges = yaml.safe_load(given.read_text())
    if not isinstance(ranges, dict) or not all(isinstance(v, list) and v for v in ranges.values()):
        raise ValueError(f"{given}: expected lists of values by setting, such as {LR}: [0.1, 1].")
    return ranges


def opened(journal: Path, name: str, what: Mapping[str, Any], seed: int) -> optuna.Study:
    """The search of this name, new or gone on with.

    Args:
        journal: File that keeps it.
        name: Of the search.
        what: Its ``ranges``, ``sampler`` and all else that must stay as it was.
        seed: Of the sampler.

    Raises:
        ValueError: It was begun with other ones.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    search = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal))),
        sampler=optuna.samplers.TPESampler(seed=seed),
        study_name=name,
        direction="maximize",
        load_if_exists=True,
    )
    begun = search.user_attrs.setdefault("what", dict(what))
    for part, value in what.items():
        if begun[part] != value:
            raise ValueError(
                f"{journal} holds a search {name!r} with {part} {begun[part]}, not {value}: go on "
                "with those, or give another --journal or --name."
            )
    search.set_user_attr("what", dict(what))
    return search


def untried(search: optuna.Study, ranges: Ranges) -> dict[str, Any]:
    """The next combination of the grid.

    Those that another process is at come last: it may have been killed. Optuna's own sampler of
    grids would also take a combination for tried whose run was interrupted.
    """
    at_work = [t.params for t in search.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]
    tried = [t.params for t in search.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    combinations = (dict(zip(ranges, values, strict=True)) for values in product(*ranges.values()))
    left = [combination for combination in combinations if combination not in tried]
    return min(left, key=lambda combination: combination in at_work)


def suggested(trial: optuna.Trial, ranges: Ranges, sampler: str) -> dict[str, Any]:
    """Settings to try: of the grid, or anything between the ends of numbers."""
    found = {}
    for name, values in ranges.items():
        low, high = (min(values), max(values)) if _numbers(values) else (None, None)
        if sampler == "grid" or low is None or low == high:
            found[name] = trial.suggest_categorical(name, values)
        elif all(isinstance(value, int) for value in values):
            found[name] = trial.suggest_int(name, low, high)
        else:
            found[name] = trial.suggest_float(name, low, high, log=low > 0)
    return found


def _numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def done(search: optuna.Study) -> list[Tried]:
    """What has been tried to the end; a combination that several processes tried, once."""
    found: dict[str, Tried] = {}
    for trial in search.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        settings = {name.rpartition(".")[2]: value for name, value in trial.params.items()}
        found.setdefault(json.dumps(settings, sort_keys=True), settings | trial.user_attrs)
    return list(found.values())


def converged(tried: Sequence[Tried]) -> list[Tried]:
    """The paper's criterion: test accuracy within 10 points of the best of the search."""
    best = max((row["test"] for row in tried), default=0.0)
    return [row for row in tried if best - row["test"] < CONVERGED]


def table(name: str, tried: Sequence[Tried], of: int) -> Table:
    """The ten best on validation images."""
    grid = Table(
        title=f"{name}: {len(tried)} of {of} tried, {len(converged(tried))} converge",
        caption="converges: test accuracy within 10 points of the best of the search",
    )
    settings = [key for key in (tried[0] if tried else {}) if key not in ("val", "test")]
    for heading in (*settings, "validation, %", "test, %"):
        grid.add_column(heading, justify="right")
    for row in sorted(tried, key=lambda row: -row["val"])[:10]:
        cells = [f"{row[s]:.3g}" if isinstance(row[s], float) else str(row[s]) for s in settings]
        grid.add_row(*cells, f"{row['val']:.2f}", f"{row['test']:.2f}")
    return grid


def picture(searches: Mapping[str, Sequence[Tried]]) -> Figure:
    """Test accuracy over learning rate and weight decay; a cross where it does not converge.

    Args:
        searches: What has been tried, by name; a row each, a panel for each gamma. Settings beside
            these three are not told apart.
    """
    columns = max(len({row.get("gamma") for row in tried}) for tried in searches.values())
    figure = Figure(figsize=(4 * columns, 3.2 * len(searches)), layout="constrained")
    panels = figure.subplots(len(searches), columns, squeeze=False)
    for axes_row, (name, tried) in zip(panels, searches.items(), strict=True):
        good = converged(tried)
        for axes in axes_row:
            axes.axis("off")
        gammas = sorted({row.get("gamma") for row in tried}, key=str)
        for axes, gamma in zip(axes_row, gammas, strict=False):
            mine = [row for row in tried if row.get("gamma") == gamma]
            points = axes.scatter(
                [row["lr"] for row in mine],
                [row["weight_decay"] for row in mine],
                *(90, [row["test"] for row in mine]),
                vmin=0,
                vmax=100,
            )
            lost = [row for row in mine if row not in good]
            axes.plot([r["lr"] for r in lost], [r["weight_decay"] for r in lost], "rx")
            axes.axis("on")
            count = f"{len(mine) - len(lost)} of {len(mine)}"
            title = name if gamma is None else f"{name}, gamma {gamma:g}"
            axes.set(title=f"{title}: {count} converge", xscale="log", yscale="log")
            axes.set(xlabel="learning rate", ylabel="weight decay")
            figure.colorbar(points, ax=axes, label="test accuracy, %")
    return figure


def main(args: Sequence[str] | None = None) -> None:
    """Searches from the command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.sweep", description=__doc__)
    parser.add_argument("config", type=Path, help="the recipe's YAML")
    parser.add_argument("--journal", type=Path, default=Path("results/sweep.journal"))
    parser.add_argument("--name", help="of the search (default: the YAML's folder and name)")
    parser.add_argument("--ranges", type=Path, help="YAML of lists by setting (default: D.2's)")
    parser.add_argument("--sampler", choices=("grid", "tpe"), default="grid")
    parser.add_argument("--trials", type=int, default=96, help="of tpe, all in all (default 96)")
    parser.add_argument("--minutes", type=float, default=inf, help="start no run after")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of every run (default 0)")
    given = list(sys.argv[1:] if args is None else args)
    options, overrides = parser.parse_known_args(given)
    torch.set_num_threads(options.threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = options.name or f"{options.config.parent.name}/{options.config.stem}"
    try:
        ranges = ranges_of(options.config, options.ranges)
        what = {
            "config": options.config.as_posix(),
            "ranges": ranges,
            "sampler": options.sampler,
            "overrides": [o for o in overrides if not o.startswith("--data.data_dir")],
            "seed": options.seed,
        }
        search = opened(options.journal, name, what, options.seed)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    total = prod(map(len, ranges.values())) if options.sampler == "grid" else options.trials
    command = f"python -m recipes.sweep {shlex.join(given)}"
    _search(search, what, overrides, total, 60 * options.minutes)
    _write(options.journal, name, total, command)


def _search(
    search: optuna.Study, what: dict[str, Any], overrides: list[str], total: int, seconds: float
) -> None:
    """Tries until all is tried, by whichever process, or the time is over."""

    def objective(trial: optuna.Trial) -> float:
        settings = suggested(trial, what["ranges"], what["sampler"])
        values = [f"--{name}={value}" for name, value in settings.items()]
        try:
            run = train(Path(what["config"]), what["seed"], [*overrides, *values])
            val, test, lost = max(run.val_accuracy), run.test_accuracy, run.diverged
        except DivergenceError:
            val, test, lost = 0.0, 0.0, True
        for key, value in (("val", val), ("test", test), ("diverged", lost)):
            trial.set_user_attr(key, value)
        return val

    deadline = time.monotonic() + seconds
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with hushed(), Progress(*columns, TimeElapsedColumn()) as progress:
        bar = progress.add_task(search.study_name, total=total)
        while (count := len(done(search))) < total and time.monotonic() < deadline:
            progress.update(bar, completed=count)
            if what["sampler"] == "grid":
                search.enqueue_trial(untried(search, what["ranges"]))
            search.optimize(objective, n_trials=1)
        progress.update(bar, completed=count)


def _write(journal: Path, name: str, total: int, command: str) -> None:
    """Prints the search, and writes all searches of the journal and their picture beside it."""
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    names = optuna.get_all_study_names(storage)
    searches = {n: done(optuna.load_study(study_name=n, storage=storage)) for n in names}
    Console().print(table(name, searches[name], total))
    written = {"command": command, **machine(), "converged": {}, "searches": searches}
    written["converged"] = {n: len(converged(tried)) for n, tried in searches.items()}
    journal.with_suffix(".json").write_text(json.dumps(written, indent=2) + "\n")
    drawn = {n: t for n, t in searches.items() if t and {"lr", "weight_decay"} <= set(t[0])}
    if drawn:
        picture(drawn).savefig(journal.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
