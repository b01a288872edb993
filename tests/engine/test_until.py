"""Inference that ends where F has settled, not after a count."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from lightning_pc.errors import ConfigError
from lightning_pc.optim import EPC, IPC, PC, PredictiveCoding
from tests.compare import far
from tests.engine.modules import MLP
from tests.engine.problems import doubles


def made():
    torch.manual_seed(0)
    return MLP([6, 7, 7, 4]).double()


def batch():
    torch.manual_seed(1)
    return doubles(9)


def learn(model, door, calls=1, **settings):
    x, y = batch()
    pc = door(torch.optim.SGD(model.parameters(), 0.05), model, **settings)
    reports = []
    for _ in range(calls):
        pc.step(lambda: F.cross_entropy(model(x), y))
        reports.append(pc.report)
    return reports


@pytest.mark.parametrize("door", [PC, IPC, EPC])
def test_it_ends_one_step_after_f_has_settled(door):
    one, other = made(), made()
    (report,) = learn(one, door, gamma=0.1, T=300, until=0.02)
    steps = report.steps
    free = report.free_energy
    changes = (free.diff().abs() / free[1:].abs()).tolist()
    settled = [max(pair) <= 0.02 for pair in itertools.pairwise(changes)]
    # Evaluations 0 to t + 2 have been seen where pair t is the first that is small.
    assert steps == settled.index(True) + 4 < 300
    learn(other, door, gamma=0.1, T=steps)
    assert far(one, other)[0] == 0.0


def test_not_before_errors_have_reached_all_nodes():
    torch.manual_seed(0)
    deep = MLP([6, *[7] * 9, 4]).double()
    (report,) = learn(deep, IPC, gamma=0.1, T=50, until=100.0)
    assert report.depth == 9
    assert report.steps == 11  # evaluation 9 is the first with all errors
    assert all(report.learned.values())


def test_t_is_the_most():
    (report,) = learn(made(), PC, gamma=0.1, T=5, until=1e-9)
    assert report.steps == 5


def test_values_that_are_kept_go_on_where_the_last_call_ended():
    one, other = made(), made()
    how = {"gamma": 0.1, "reset": "never"}
    reports = learn(one, IPC, calls=4, T=300, until=0.02, **how)
    steps = [report.steps for report in reports]
    assert all(4 <= n < 300 for n in steps)
    learn(other, IPC, T=sum(steps), **how)
    assert far(one, other)[0] < 1e-12


@pytest.mark.parametrize(
    ("algorithm", "settings", "why"),
    [
        ("ipc", {"until": 0.0}, "expected a share of F"),
        ("ipc", {"until": "soon"}, "expected a share of F"),
        ("ipc", {"until": True}, "expected a share of F"),
        ("zil", {"until": 0.1}, "F does not settle"),
        ("auto", {"until": 0.1}, "F does not settle"),
        ("iepc", {"until": 0.1}, "F does not settle"),
        ("ipc", {"until": 0.1, "precisions": "spiking"}, "F does not settle"),
        ("pc", {"until": 0.1, "precisions": lambda depth, t: 1.0}, "F does not settle"),
    ],
)
def test_what_does_not_settle_is_refused(algorithm, settings, why):
    model = made()
    sgd = torch.optim.SGD(model.parameters(), 0.05)
    with pytest.raises(ConfigError, match=rf"until=.*{why}"):
        PredictiveCoding(sgd, model, algorithm=algorithm, **settings)
