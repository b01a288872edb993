"""The first step of a value on a chain takes up the whole error, so that errors travel on."""

import pytest
import torch
from problems import Thrice
from test_curvature import classifier, sgd
from torch import nn

from lightning_pc.conjugate import MENDING, Conjugate, taking_up
from lightning_pc.energies import Gaussian
from lightning_pc.nodes import Node
from lightning_pc.optim import IPC, PC, ZIL


def deep(skip=False):
    """Sixteen orthogonal tanh layers; a skip connection past one of them."""
    torch.manual_seed(3)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(16))
            self.head = nn.Linear(6, 3)
            for layer in self.layers:
                nn.init.orthogonal_(layer.weight)

        def forward(self, x):
            for n, layer in enumerate(self.layers):
                x = torch.tanh(layer(x)) + (x if skip and n == 8 else 0)
            return self.head(x)

    return Net().double()


def tops(kind, **given):
    """Length of each node's error when it first has one, by depth."""
    torch.manual_seed(5)
    x, y, net = torch.randn(6, 6).double(), torch.arange(6) % 3, deep()
    optimizer = kind(sgd(net, 1e-9), net, **given)
    optimizer.step(classifier(net, x, y))
    report = optimizer.report
    assert report.depth == 16
    energy = dict(zip(report.depths, report.energy.T, strict=True))
    return torch.stack([(2 * energy[d][d]).sqrt() for d in sorted(energy)])


@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_errors_come_to_the_top_of_a_chain(algorithm):
    """A fifth at least of Z-IL's, which are backprop's; by gamma alone nothing would come.

    The first step is gamma's, when F tells of no better one yet, and steps that turn out too long
    are made shorter.
    """
    exact = tops(ZIL)
    given = {"gamma": 0.35, "T": 17 + MENDING}
    assert (tops(algorithm, momentum="conjugate", **given) > 0.2 * exact).all()
    assert tops(algorithm, momentum=0, **given)[-1] < 1e-6 * exact[-1]


@pytest.mark.parametrize(("algorithm", "late"), [(PC, 2), (IPC, 0)])
def test_where_weights_learn_at_the_end_alone_steps_follow_that_mend(algorithm, late):
    """With T = depth + 1 errors come to the two topmost values of PC too late for a longer step."""
    free, due = (tops(algorithm, momentum="conjugate", gamma=0.35, T=T) for T in (17 + MENDING, 17))
    torch.testing.assert_close(due[: 16 - late], free[: 16 - late])
    assert (due[16 - late :] < 0.5 * free[16 - late :]).all()


@pytest.mark.parametrize(
    ("gamma", "weight", "expected"),
    [
        (0.35, 1, 1),  # a curvature of 4, of stages that leave errors as long as they are
        (0.5, 1, 1),
        (1.5, 1, 1.5),
        (1.4 / 9, 1, 1 / 4),  # a stage that makes them twice as long
        (0.7 / 9, 2, 1 / 8),
        (0.7, 2, 0.7),
        (0.7, 0.5, 2),
        (0.01, 1, 0.01),
    ],
)
def test_the_step_that_takes_up_an_error(gamma, weight, expected):
    """1 / (weight * stretch ** 2) where weight * (1 + stretch) ** 2 is 1.4 / gamma of the start.

    At most 1 / weight, at least gamma.
    """
    nodes = [Node("n", torch.zeros(1).requires_grad_(), Gaussian(), depth=d) for d in (1, 2)]
    nodes[1].weight = weight
    conjugate = Conjugate(gamma, 0.5, front=2)
    for t, energy in enumerate((1.0, 2.0)):  # it has risen, so that gamma is half
        conjugate.observe(torch.tensor(energy))
        nodes[0].below, nodes[1].below = torch.ones(1), torch.ones(1) if t else None
        conjugate.move(nodes, 1.0)
    assert conjugate.gamma == gamma / 2
    torch.testing.assert_close(-nodes[1].x.detach(), torch.tensor([float(expected)]))


@pytest.mark.parametrize("stretch", [0.5, 1.0, 2.0])
def test_it_is_the_exact_line_search_where_all_that_is_stretched_is_stretched_as_far(stretch):
    """Nothing is left of the child's error, but where that would take more than the whole error."""
    q = torch.linalg.qr(torch.randn(5, 5).double())[0] * stretch
    e = torch.randn(5).double()
    step = taking_up((1 + stretch) ** 2, 1.0)
    left = e - step * q @ (q.T @ e)
    torch.testing.assert_close(left, e * (1 - min(1.0, 1 / stretch**2) * stretch**2))


@pytest.mark.parametrize(
    ("make", "algorithm", "front"),
    [
        (deep, IPC, True),
        (lambda: deep(skip=True), IPC, False),
        (lambda: Thrice().double(), IPC, False),
        (lambda: Thrice().double(), PC, True),
    ],
    ids=["a chain", "a skip", "a weight that iPC shares", "one that PC shares"],
)
def test_only_where_errors_arrive_all_at_once(make, algorithm, front, monkeypatch):
    x, y = torch.randn(6, 6).double(), torch.arange(6) % 3

    def run():
        torch.manual_seed(1)
        net = make()
        optimizer = algorithm(sgd(net), net, gamma=0.3, momentum="conjugate")
        optimizer.step(classifier(net, x, y))
        return optimizer.report.free_energy

    given = run()
    monkeypatch.setattr(Conjugate, "_carry_on", lambda *_: None)
    assert torch.equal(given, run()) is not front


def test_kept_values_have_had_their_first_step(monkeypatch):
    """``reset="never"``: the first call has a front, the next has none."""
    x, y = torch.randn(6, 6).double(), torch.arange(6) % 3
    net = deep()
    given = {"gamma": 0.3, "momentum": "conjugate", "reset": "never", "T": 17}
    optimizer = PC(sgd(net, 0.0), net, **given)
    seen = []
    carried = Conjugate._carry_on
    monkeypatch.setattr(Conjugate, "_carry_on", lambda c, n: seen.append(1) or carried(c, n))
    for _ in range(2):
        optimizer.step(classifier(net, x, y))
        assert len(seen) == 17 - 2 - MENDING  # neither the first step nor those that mend
