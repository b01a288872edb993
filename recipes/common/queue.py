"""A queue of jobs that can be stopped and resumed at any time, and its command line."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures import ThreadPoolExecutor as Thread
from dataclasses import dataclass
from math import inf
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from recipes.common.machine import machine

ROOT = Path(__file__).parents[2]

Job = dict[str, Any]  # every setting of a run, "size" and "seed" among them
Figures = dict[str, Any]  # what came out of it
Row = dict[str, Any]  # a job and its figures in one


@dataclass(frozen=True)
class Study:
    """One command.

    Attributes:
        module: Where it is, dotted; the results file and the picture lie beside it.
        data: What is learned, in words.
        jobs: All jobs; those of the smallest ``"size"`` run first.
        run: Figures of a job, from the job and the folder of the data; a function of a module,
            since other processes may call it.
        tables: Tables of the rows of one size.
        picture: Picture of the rows of one size.
        pooled: Tables of the rows of all sizes together, None for none.
    """

    module: str
    data: str
    jobs: Callable[[], list[Job]]
    run: Callable[[Job, str | None], Figures]
    tables: Callable[[list[Row]], list[Table]]
    picture: Callable[[list[Row]], Figure]
    pooled: Callable[[list[Row]], list[Table]] | None = None

    @property
    def results(self) -> Path:
        """The results file."""
        return ROOT.joinpath(*self.module.split(".")).with_suffix(".json")


class Results:
    """The results file: figures by job, and the sittings that they come from.

    Args:
        path: JSON file, read where it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        written = json.loads(path.read_text()) if path.exists() else {"sittings": [], "jobs": []}
        self.sittings: list[dict[str, Any]] = written["sittings"]
        self._done: dict[str, dict[str, Any]] = {key(e["settings"]): e for e in written["jobs"]}

    def __contains__(self, job: Job) -> bool:
        return key(job) in self._done

    def rows(self, jobs: Sequence[Job]) -> list[Row]:
        """Those of ``jobs`` that are done, with their figures."""
        return [job | self._done[key(job)]["figures"] for job in jobs if job in self]

    def add(self, job: Job, figures: Figures, header: dict[str, Any]) -> None:
        """Adds a job of the last sitting and writes the file, all of it or nothing."""
        sitting = len(self.sittings) - 1
        self._done[key(job)] = {"settings": job, "figures": figures, "sitting": sitting}
        jobs = [json.dumps(entry) for entry in self._done.values()]
        text = json.dumps(header | {"sittings": self.sittings, "jobs": []}, indent=2)
        text = text.removesuffix("[]\n}") + "[\n    " + ",\n    ".join(jobs) + "\n  ]\n}\n"
        new = self.path.with_suffix(".json.new")
        new.write_text(text)
        os.replace(new, self.path)


def key(job: Job) -> str:
    """What tells a job from every other: all of its settings."""
    return json.dumps(job, sort_keys=True)


def ordered(jobs: Sequence[Job], sizes: Sequence[int] | None = None) -> list[Job]:
    """All jobs of the smallest size first; of ``sizes`` alone, if given."""
    return sorted((j for j in jobs if sizes is None or j["size"] in sizes), key=lambda j: j["size"])


def chosen(jobs: Sequence[Job], where: Sequence[str]) -> list[Job]:
    """Jobs with all of these settings.

    Args:
        jobs: To choose from.
        where: ``key=value`` each.

    Raises:
        ValueError: No job has such a setting.
    """
    left = list(jobs)
    for condition in where:
        name, _, value = condition.partition("=")
        left = [job for job in left if str(job.get(name)) == value]
        if not left:
            found = sorted({str(job[name]) for job in jobs if name in job})
            known = (
                f"{name} is one of {', '.join(found)}"
                if found
                else "jobs have " + ", ".join(sorted({name for job in jobs for name in job}))
            )
            raise ValueError(f"No job has {condition}: {known}.")
    return left


def work(
    run: Callable[[Job, str | None], Figures],
    jobs: Sequence[Job],
    data_dir: str | None = None,
    processes: int = 1,
    deadline: float = inf,
    threads: int = 1,
) -> Iterator[tuple[Job, Future[Figures]]]:
    """Runs jobs in order, and starts none after the deadline.

    Args:
        run: Figures of a job, as in `Study`.
        jobs: What to run.
        data_dir: Folder of the data.
        processes: How many at a time; one runs in this process.
        deadline: In seconds of `time.monotonic`.
        threads: Of torch, for each job.

    Yields:
        Each job as it ends.
    """
    waiting, running = iter(jobs), dict[Future[Figures], Job]()
    with _executor(processes, threads) as pool:
        while True:
            while len(running) < processes and time.monotonic() < deadline:
                job = next(waiting, None)
                if job is None:
                    break
                running[pool.submit(run, job, data_dir)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future


def _executor(processes: int, threads: int) -> Executor:
    if processes == 1:
        return Thread(1, initializer=torch.set_num_threads, initargs=(threads,))
    spawn = get_context("spawn")
    return ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (threads,))


def main(study: Study, args: Sequence[str] | None = None) -> None:
    """Runs a study from the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {study.module}")
    parser.add_argument("--data_dir", help="folder of the data; without it they are downloaded")
    parser.add_argument(
        "--minutes", type=float, default=inf, help="start no job after; 0 only shows"
    )
    parser.add_argument("--processes", type=int, default=1, help="jobs at a time (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads a job (default 1)")
    parser.add_argument("--size", type=int, nargs="+", help="only jobs of these sizes")
    parser.add_argument(
        "--where", nargs="+", default=[], metavar="KEY=VALUE", help="only jobs with these settings"
    )
    parser.add_argument(
        "--out", type=Path, default=study.results, help="the picture goes beside it"
    )
    given = list(sys.argv[1:] if args is None else args)
    options = parser.parse_args(given)
    command = shlex.join(["python", "-m", study.module, *given])

    everything = study.jobs()
    sizes = {job["size"] for job in everything}
    if not sizes.issuperset(options.size or ()):
        parser.error(f"--size: expected {', '.join(map(str, sorted(sizes)))}")
    for name in ("processes", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected 1 or more")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        jobs = ordered(chosen(everything, options.where), options.size)
    except ValueError as error:
        parser.error(str(error))
    with options.out.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"another command is at work on {options.out}: wait, or stop it.")
        _work_through(study, jobs, ordered(everything), options, command)


def _work_through(
    study: Study,
    jobs: Sequence[Job],
    everything: Sequence[Job],
    options: argparse.Namespace,
    command: str,
) -> None:
    console, results = Console(), Results(options.out)
    todo = [job for job in jobs if job not in results]
    header = {"data": study.data}
    sitting = {"command": command, "processes": options.processes, **machine(options.threads)}
    results.sittings.append(sitting)
    failures: Counter[str] = Counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(jobs), completed=len(jobs) - len(todo))
        deadline = time.monotonic() + 60 * options.minutes
        how = (options.data_dir, options.processes, deadline, options.threads)
        for job, future in work(study.run, todo, *how):
            error = future.exception()
            if isinstance(error, Exception):
                failures[f"{type(error).__name__}: {error}"] += 1
                continue
            results.add(job, future.result(), header)
            progress.update(bar, advance=1, description=f"size {job['size']}")
    show(study, everything, results, console)
    for message, count in failures.items():
        console.print(f"{count} jobs are left to the next sitting, for {message}", markup=False)
    if failures:
        raise SystemExit(1)


def show(study: Study, jobs: Sequence[Job], results: Results, console: Console) -> None:
    """Prints the tables of every size, and draws the largest size that is complete."""
    for number, size in enumerate(sorted({job["size"] for job in jobs})):
        of_size = [job for job in jobs if job["size"] == size]
        rows = results.rows(of_size)
        if rows:
            console.print(*study.tables(rows))
            if number == 0 or len(rows) == len(of_size):
                study.picture(rows).savefig(results.path.with_suffix(".png"), dpi=120)
    if study.pooled:
        console.print(*study.pooled(results.rows(jobs)))
