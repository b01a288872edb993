"""Runs that are killed go on where they were."""

import os
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from tests.engine.killed import HOOKS

HERE = Path(__file__).parent
#: Processes talk to each other on this machine alone, whatever it is called.
LOOP = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


def run(folder, algorithm, hook="on_train_batch_end", batch=-1, count=1):
    """Whether the training came to its end."""
    start = [sys.executable]
    if count > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        start += [f"--nproc_per_node={count}"]
    where = str(HERE.parents[1])
    done = subprocess.run(
        [*start, str(HERE / "killed.py"), str(folder), algorithm, hook, str(batch)],
        env={**os.environ, "PYTHONPATH": where, "OMP_NUM_THREADS": "1", **LOOP},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert batch > 0 or done.returncode == 0, done.stderr[-2000:]
    return done.returncode == 0


@cache
def whole(algorithm, count):
    """The weights of a run that is left alone."""
    folder = Path(mkdtemp())
    assert run(folder, algorithm, count=count)
    return [torch.load(folder / f"end-{rank}.pt") for rank in range(count)]


POINTS = [(hook, batch) for hook in HOOKS for batch in range(1, 22)]
SOME = random.Random(0).sample(POINTS, 10)


@pytest.mark.parametrize(
    ("algorithm", "count", "point"),
    [
        ("ipc", 1, ("on_before_optimizer_step", 10)),
        *(pytest.param("ipc", 1, point, marks=pytest.mark.slow) for point in SOME),
        *(pytest.param("pc", 2, point, marks=pytest.mark.slow) for point in SOME),
        pytest.param("backprop", 1, ("on_train_batch_start", 10), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_bit(algorithm, count, point, tmp_path):
    assert not run(tmp_path, algorithm, *point, count=count)
    assert run(tmp_path, algorithm, count=count)
    for rank, expected in enumerate(whole(algorithm, count)):
        found = torch.load(tmp_path / f"end-{rank}.pt")
        assert all(map(torch.equal, found.values(), expected.values()))
