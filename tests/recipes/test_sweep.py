"""The search: resumes, is shared, refuses another grid, and counts what converges as the paper."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass, field

import pytest
import yaml

from lightning_pc.errors import DivergenceError

pytest.importorskip("optuna")
from pathlib import Path

from recipes import sweep

RECIPES = Path(sweep.__file__).parent
IPC = RECIPES / "image_classification" / "alexnet" / "ipc.yaml"
BP = IPC.with_name("bp.yaml")
SMALL = {sweep.LR: [1e-4, 1e-2], sweep.DECAY: [1e-4, 1e-1], sweep.GAMMA: [0.1, 1.0]}


@dataclass
class Ran:
    test_accuracy: float
    val_accuracy: list[float] = field(default_factory=list)
    diverged: bool = False


def fake(calls):
    """Instead of a training: learning rate 0.01 diverges at gamma 1, and is bad at gamma 0.1."""

    def train(config, seed, overrides):
        given = dict(o.removeprefix("--").split("=") for o in overrides)
        calls.append(given)
        rate, gamma = float(given[sweep.LR]), float(given.get(sweep.GAMMA, 0))
        if rate == 1e-2 and gamma == 1:
            raise DivergenceError("The loss is nan.")
        return Ran(40.0 if rate == 1e-2 else 70 + gamma, [30.0, 50 + gamma])

    return train


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(sweep, "train", fake(found))
    return found


@pytest.fixture
def command(tmp_path):
    ranges = tmp_path / "ranges.yaml"
    ranges.write_text(yaml.safe_dump(SMALL))
    return [str(IPC), "--journal", str(tmp_path / "s.journal"), "--ranges", str(ranges)]


def test_the_papers_grid():
    assert [len(v) for v in sweep.ranges_of(IPC, None).values()] == [8, 4, 3]
    assert list(sweep.ranges_of(BP, None)) == [sweep.LR, sweep.DECAY]
    rates = sweep.PAPER[sweep.LR]
    assert (min(rates), max(rates), 5e-5 in rates) == (1e-6, 1e-2, True)


def test_every_combination_is_tried_once_and_what_converges_is_counted(
    calls, command, tmp_path, capsys
):
    sweep.main([*command, "--data.data_dir=somewhere"])
    tried = {tuple(float(c[name]) for name in SMALL) for c in calls}
    assert len(calls) == len(tried) == 8
    assert all(c["data.data_dir"] == "somewhere" for c in calls)
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["converged"] == {"alexnet/ipc": 4}  # the others are 31 points behind, or lost
    rows = written["searches"]["alexnet/ipc"]
    assert sorted(row["test"] for row in rows) == [0, 0, 40, 40, 70.1, 70.1, 71, 71]
    assert sum(row["diverged"] for row in rows) == 2
    assert (tmp_path / "s.png").exists()
    assert "8 of 8 tried, 4 converge" in capsys.readouterr().out
    sweep.main([*command, "--data.data_dir=elsewhere"])  # nothing is left to do
    assert len(calls) == 8


def test_a_stopped_search_goes_on(calls, command, monkeypatch):
    train = sweep.train

    def killed(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(sweep, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(command)
    assert len(calls) == 3
    monkeypatch.setattr(sweep, "train", train)
    sweep.main(command)
    assert len({tuple(c.values()) for c in calls}) == 8
    assert len(calls) == 8


def test_no_run_is_started_after_the_time(calls, command):
    sweep.main([*command, "--minutes", "0"])
    assert calls == []


def test_another_grid_is_refused(calls, command, tmp_path, capsys):
    sweep.main([*command, "--minutes", "0"])
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(SMALL | {sweep.LR: [1e-3]}))
    for change in (["--ranges", str(other)], ["--sampler", "tpe"], ["--trainer.max_epochs=1"]):
        with pytest.raises(SystemExit):
            sweep.main([*command, *change])
        assert "another --journal or --name" in capsys.readouterr().err
    sweep.main([*command, "--ranges", str(other), "--name", "other", "--minutes", "0"])


def test_ranges_that_are_none_are_refused(command, tmp_path, capsys):
    (tmp_path / "ranges.yaml").write_text("optimizer.lr: 0.1")
    with pytest.raises(SystemExit):
        sweep.main(command)
    assert "expected lists of values" in capsys.readouterr().err


def test_tpe_tries_between_the_ends(calls, command):
    sweep.main([*command, "--sampler", "tpe", "--trials", "6"])
    rates = [float(c[sweep.LR]) for c in calls]
    assert len(rates) == 6
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert len(set(rates) - {1e-4, 1e-2}) == 6


def test_a_recipe_is_really_trained(tmp_path):
    ranges = tmp_path / "ranges.yaml"
    ranges.write_text(yaml.safe_dump({sweep.LR: [1e-5, 1e-2], sweep.GAMMA: [0.1]}))
    config = str(RECIPES / "digits" / "ipc.yaml")
    journal = tmp_path / "d.journal"
    more = ["--ranges", str(ranges), "--trainer.max_epochs=1"]
    sweep.main([config, "--journal", str(journal), *more])
    slow, fast = json.loads(journal.with_suffix(".json").read_text())["searches"]["digits/ipc"]
    assert (slow["lr"], fast["lr"]) == (1e-5, 1e-2)
    assert fast["val"] > slow["val"] + 20


def _process(command, file):
    calls = []
    sweep.train = fake(calls)
    sweep.main(command)
    Path(file).write_text(str(len(calls)))


@pytest.mark.slow
def test_two_processes_share_a_search(command, tmp_path):
    context = multiprocessing.get_context("fork")  # quick: the imports are there
    files = [tmp_path / f"{n}.txt" for n in range(2)]
    both = [context.Process(target=_process, args=(command, file)) for file in files]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert all(process.exitcode == 0 for process in both)
    # a combination that both took at the same moment is run twice and counted once
    assert sum(int(file.read_text()) for file in files) >= 8
    assert len(json.loads((tmp_path / "s.json").read_text())["searches"]["alexnet/ipc"]) == 8


def test_the_criterion_is_the_papers():
    tried = [{"test": value} for value in (72.0, 62.01, 62.0, 10.0)]
    assert [row["test"] for row in sweep.converged(tried)] == [72.0, 62.01]
