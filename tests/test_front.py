"""The first step of a value on a chain takes up what it can of an error, which travels on."""

import pytest
import torch
from problems import ByDepth, Thrice, classifier, sgd
from torch import nn

from lightning_pc.inference.conjugate import MENDING, Conjugate, following, stalled
from lightning_pc.nodes.energies import Gaussian
from lightning_pc.nodes.node import Node
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


@pytest.mark.parametrize("algorithm", [PC, IPC])
@pytest.mark.parametrize("precisions", [ByDepth(0.9), 0.1, 4.0])
def test_energies_that_weigh_otherwise_do_not_stop_them(algorithm, precisions):
    """The same error comes to the top, that is, the same energy times its weight."""
    given = {"momentum": "conjugate", "T": 17 + MENDING, "precisions": precisions}
    plain, own = tops(algorithm, **given | {"precisions": 1}), tops(algorithm, **given)
    weight = 0.9**15 if isinstance(precisions, ByDepth) else precisions
    assert own[-1] * weight**0.5 > 0.3 * plain[-1]  # a weighted error pulls by as much
    assert plain[-1] > 0.1 * tops(ZIL)[-1]


@pytest.mark.parametrize(
    ("gamma", "curvature", "weights", "expected"),
    [
        (0.35, None, (1, 1), 1),  # a curvature of 4: stages leave errors as long as they are
        (0.5, None, (1, 1), 1),
        (1.5, None, (1, 1), 1.5),
        (1.4 / 9, None, (1, 1), 1 / 4),  # a stage that makes them twice as long
        (0.1, 4.0, (1, 1), 1),  # gamma was chosen for less than it would bear
        (0.7 / 9, None, (2, 2), 1 / 8),
        (0.7, None, (0.5, 0.5), 2),
        (0.5, 0.4, (0.1, 0.1), 10),  # gamma has its upper limit
        (0.1, 9.0, (1, 0.5), 1 / 2),
        (0.01, None, (1, 1), 0.01),
    ],
)
def test_the_step_that_takes_up_an_error(gamma, curvature, weights, expected):
    """1 / (weight * s ** 2) where the curvature is (1 + s) ** 2 times the largest weight.

    At most 1 / weight, at least gamma, which is 1.4 / curvature where it was given.
    """
    nodes = [Node("n", torch.zeros(1).requires_grad_(), Gaussian(), depth=d) for d in (1, 2)]
    for node, weight in zip(nodes, weights, strict=True):
        node.weight = weight
    conjugate = Conjugate(gamma, 0.5, front=2)
    conjugate.chosen_for = curvature
    for t, energy in enumerate((1.0, 2.0)):  # it has risen, so that gamma is half
        conjugate.observe(torch.tensor(energy))
        nodes[0].gradient, nodes[1].gradient = torch.ones(1), torch.ones(1) if t else None
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
def test_only_where_errors_arrive_all_at_once(make, algorithm, front):
    x, y = torch.randn(6, 6).double(), torch.arange(6) % 3

    def run(rule=None):
        torch.manual_seed(1)
        net = make()
        optimizer = algorithm(sgd(net), net, gamma=0.3, momentum="conjugate")
        if rule:
            optimizer._learner._mover = lambda *_: Conjugate(0.3, 1.0, rule, front=0)
        optimizer.step(classifier(net, x, y))
        return optimizer.report.free_energy

    given = run()
    assert torch.equal(given, run(following if algorithm is IPC else stalled)) is not front


def test_kept_values_have_had_their_first_step():
    """``reset="never"``: the first call has a front, the next has none."""
    x, y = torch.randn(6, 6).double(), torch.arange(6) % 3

    def run(*fronts):
        net = deep()
        given = {"gamma": 0.3, "momentum": "conjugate", "reset": "never", "T": 17}
        optimizer = PC(sgd(net, 0.0), net, **given)
        movers = [Conjugate(0.3, 1.0, front=front) for front in fronts]
        if movers:
            optimizer._learner._mover = lambda *_: movers.pop(0)
        found = []
        for _ in range(2):
            optimizer.step(classifier(net, x, y))
            found.append(optimizer.report.free_energy)
        return torch.cat(found)

    front, found = 17 - 1 - MENDING, run()  # not the steps that mend
    assert torch.equal(found, run(front, 0))
    for other in ((front - 1, 0), (front + 1, 0), (front, front)):
        assert not torch.equal(found, run(*other))
