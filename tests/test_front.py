"""The first step of a value on a chain takes up the whole error, so that errors travel on."""

import pytest
import torch
from problems import Thrice
from test_curvature import classifier, sgd
from torch import nn

from lightning_pc.conjugate import Conjugate
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


@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_errors_come_to_the_top_of_a_chain(algorithm):
    """A fifth at least of Z-IL's, which are backprop's; by gamma alone nothing would come.

    The first step is gamma's, when F tells of no better one yet, and steps that turn out too long
    are made shorter. PC whose last step must not be too long has hardly more.
    """
    x, y = torch.randn(6, 6).double(), torch.arange(6) % 3

    def tops(kind, **given):
        """Length of each node's error when it first has one."""
        net = deep()
        optimizer = kind(sgd(net, 1e-9), net, **given)
        optimizer.step(classifier(net, x, y))
        report = optimizer.report
        assert report.steps == report.depth + 1 == 17
        energy = dict(zip(report.depths, report.energy.T, strict=True))
        return torch.stack([(2 * energy[d][d]).sqrt() for d in sorted(energy)])

    exact = tops(ZIL)
    given = {m: tops(algorithm, gamma=0.34, momentum=m) for m in ("auto", "conjugate", 0)}
    assert (given["conjugate"] > 0.2 * exact).all()
    assert given[0][-1] < 1e-6 * exact[-1]
    if algorithm is IPC:
        assert torch.equal(given["auto"], given["conjugate"])
    else:
        assert given["auto"][-1] < 0.01 * exact[-1]


@pytest.mark.parametrize(
    ("gamma", "weight", "expected"),
    [(0.2, 1, 0.6), (0.5, 1, 1), (1.5, 1, 1.5), (0.5, 2, 0.5), (0.2, 0.1, 0.6), (0.2, 8, 0.2)],
)
def test_the_step_that_takes_up_an_error(gamma, weight, expected):
    """Three times the gamma of the batch's start, at most 1 / weight, at least gamma."""
    nodes = [Node("n", torch.zeros(1).requires_grad_(), Gaussian(), depth=d) for d in (1, 2)]
    nodes[1].weight = weight
    conjugate = Conjugate(gamma, 0.5, front=True)
    for t, energy in enumerate((1.0, 2.0)):  # it has risen, so that gamma is half
        conjugate.observe(torch.tensor(energy))
        nodes[0].below, nodes[1].below = torch.ones(1), torch.ones(1) if t else None
        conjugate.move(nodes, 1.0)
    assert conjugate.gamma == gamma / 2
    torch.testing.assert_close(-nodes[1].x.detach(), torch.tensor([float(expected)]))


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

    def free():
        torch.manual_seed(1)
        net = make()
        optimizer = algorithm(sgd(net), net, gamma=0.3, momentum="conjugate")
        optimizer.step(classifier(net, x, y))
        return optimizer.report.free_energy

    given = free()
    monkeypatch.setattr("lightning_pc.conjugate.FRONT", 1.0)
    assert torch.equal(given, free()) is not front


def test_kept_values_have_had_their_first_step(monkeypatch):
    """``reset="never"``: the first call has a front, the next has none."""
    x, y = torch.randn(6, 6).double(), torch.arange(6) % 3
    net = deep()
    given = {"gamma": 0.3, "momentum": "conjugate", "reset": "never", "T": 17}
    optimizer = PC(sgd(net, 0.0), net, **given)
    seen = []
    carried = Conjugate._carry_on
    monkeypatch.setattr(Conjugate, "_carry_on", lambda c, n: seen.append(1) or carried(c, n))
    for expected in (15, 15):
        optimizer.step(classifier(net, x, y))
        assert len(seen) == expected
