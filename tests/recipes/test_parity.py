"""The table of backprop against auto: its jobs, its rows, what they are compared by."""

import dataclasses

import pytest
import torch
from torch import nn

from recipes.parity import networks, study, tasks
from recipes.parity.study import AUTO, BACKPROP, ONLY, TIMED

SMALL = ["digits", "regression, noise 1", "Markov chain, GPT", "GRU in a loop of 8"]
SMALL += ["reversing, GRUs with attention"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Two batches a run."""
    made = tasks.TASKS

    def shortened(make):
        return lambda data_dir: dataclasses.replace(make(data_dir), batches=2)

    monkeypatch.setattr(study, "TASKS", {n: (f, shortened(m)) for n, (f, m) in made.items()})
    monkeypatch.setattr(study, "WARM", 1)
    monkeypatch.setattr(study, "TURNS", 2)
    study._task.cache_clear()
    yield
    study._task.cache_clear()


def test_jobs():
    jobs = study.jobs()
    rows = {task: {job["row"] for job in jobs if job["task"] == task} for task in tasks.TASKS}
    for task, found in rows.items():
        assert found == {BACKPROP, AUTO, TIMED} | {r for r, some in ONLY.items() if task in some}
    for row in (BACKPROP, AUTO, TIMED):  # the same tuning for each
        digits = [(j["lr"], j["seed"]) for j in jobs if (j["task"], j["row"]) == ("digits", row)]
        assert digits == [(rate, seed) for rate in study.RATES for seed in study.SEEDS]


@pytest.mark.parametrize("task", SMALL)
def test_rows(task):
    found = {}
    for row in (BACKPROP, AUTO, TIMED, *(row for row, some in ONLY.items() if task in some)):
        job = {"size": 0, "task": task, "row": row, "lr": 1e-3, "seed": 0}
        found[row] = job | study.run(job)
    assert found[BACKPROP]["batches"] == found[AUTO]["batches"] == 2
    assert found[TIMED]["batches"] == round(2 * found[TIMED]["cost"])
    assert found[AUTO]["figure"] == pytest.approx(found[BACKPROP]["figure"], rel=0.05)
    (table,) = study.tables(list(found.values()))
    assert table.row_count == 1
    study.picture(list(found.values()))


def test_the_best_rate_is_by_the_mean_of_seeds():
    def row(task, lr, figure):
        return {"task": task, "row": AUTO, "lr": lr, "figure": figure}

    rows = [row("digits", 0.1, 99.0), row("digits", 0.1, 1.0), row("digits", 0.2, 60.0)]
    rows += [row("regression, noise 1", 0.1, 3.0), row("regression, noise 1", 0.2, 4.0)]
    assert study.best(rows, "digits", AUTO) == (60.0, 0.2, [60.0])
    assert study.best(rows, "regression, noise 1", AUTO) == (3.0, 0.1, [3.0])
    assert study.best(rows, "digits", BACKPROP) is None


def test_seeds_draw_batches_and_weights_alike_for_all_rows():
    task = study._task("digits", None)
    one, other = (study.Trainee(task, row, 1e-3, 1) for row in (BACKPROP, AUTO))
    pairs = zip(one.net.parameters(), other.net.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert all(map(torch.equal, next(one.stream), next(other.stream)))
    assert not torch.equal(next(task.stream(0))[0], next(task.stream(1))[0])


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (networks.convolutions, (1, 28, 28)),
        (networks.resnet8, (3, 32, 32)),
        (lambda: networks.deep(True), (1, 28, 28)),
        (lambda: networks.deep(False), (1, 28, 28)),
        (networks.tanh_mlp, (1, 28, 28)),
    ],
)
def test_classifiers(make, size):
    assert make().eval()(torch.zeros(2, *size)).shape == (2, 10)
    layers = (nn.Conv2d, nn.Linear)
    if make is networks.resnet8:  # but for the ones beside
        found = [m for n, m in make().named_modules() if isinstance(m, layers) and "skip" not in n]
        assert len(found) == 8
