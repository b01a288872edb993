"""The first step of an iPC value on a chain passes on what it can of an error."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_pc.choose import mover_of
from lightning_pc.inference.movers import PassingOn
from lightning_pc.nodes.energies import Gaussian
from lightning_pc.nodes.node import Node
from lightning_pc.optim import IPC, ZIL
from tests.engine.inside import never_looks
from tests.engine.modules import Thrice
from tests.engine.problems import classifier, sgd


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


def tops(kind, gamma=None, **given):
    """Length of each node's error when it first has one, by depth."""
    torch.manual_seed(5)
    x, y, net = torch.randn(6, 6).double(), torch.arange(6) % 3, deep()
    optimizer = kind(sgd(net, 1e-9), net, **given)
    if gamma is not None:
        never_looks(optimizer).gamma = gamma
    optimizer.step(classifier(net, x, y))
    report = optimizer.report
    assert report.depth == 16
    energy = dict(zip(report.depths, report.energy.T, strict=True))
    return torch.stack([(2 * energy[d][d]).sqrt() for d in sorted(energy)])


def test_errors_come_to_the_top_of_a_chain():
    """A fifth at least of Z-IL's, which are backprop's; by gamma alone nothing would come.

    The first step is gamma's.
    """
    exact = tops(ZIL)
    assert (tops(IPC, 0.35) > 0.2 * exact).all()
    assert tops(IPC, 0.35, momentum=0)[-1] < 1e-6 * exact[-1]


@pytest.mark.parametrize("weight", [0.1, 4.0])
def test_energies_that_weigh_otherwise_do_not_stop_them(weight):
    """The same error comes to the top, that is, the same energy times its weight."""
    plain, own = tops(IPC, 0.35), tops(IPC, 0.35 / weight, precisions=weight)
    assert own[-1] * weight**0.5 > 0.3 * plain[-1]  # a weighted error pulls by as much


@pytest.mark.parametrize(
    ("gamma", "weight", "expected"),
    [
        (0.35, 1, 1),  # a curvature of 4: stages leave errors as long as they are
        (0.5, 1, 1),
        (1.5, 1, 1.5),
        (1.4 / 9, 1, 1 / 4),  # a stage that makes them twice as long
        (0.7 / 9, 2, 1 / 8),
        (0.7, 0.5, 2),
        (0.01, 1, 0.01),
    ],
)
def test_the_step_that_passes_an_error_on(gamma, weight, expected):
    """1 / (weight * s ** 2) where 1.4 / gamma is (1 + s) ** 2 times the weight.

    At most 1 / weight, at least gamma. A rate that has been lowered within the batch counts as it
    was.
    """
    nodes = [Node("n", torch.zeros(1).requires_grad_(), Gaussian(), depth=d) for d in (1, 2, 2)]
    nodes[2].weight = nodes[1].weight = nodes[0].weight = weight
    mover = PassingOn(gamma, 0.5, 1.4)
    for t, energy in enumerate((1.0, 2.0)):  # it has risen, so that gamma is half
        mover.observe(torch.tensor(energy))
        nodes[0].gradient, nodes[1].gradient = torch.ones(1), torch.ones(1) if t else None
        mover.move(nodes, 2.0)
    assert mover.gamma == gamma / 2
    assert float(nodes[0].x.detach()) == pytest.approx(-2.0 * 1.5 * gamma)
    assert float(nodes[1].x.detach()) == pytest.approx(-2.0 * expected)
    assert float(nodes[2].x.detach()) == 0.0  # no error has come


def test_a_rate_on_the_device_is_as_good():
    def moved(gamma):
        torch.manual_seed(0)
        nodes = [Node("n", torch.randn(3, 4).requires_grad_(), Gaussian(), depth=d) for d in (1, 2)]
        mover = PassingOn(0.2, 1.0, 1.4)
        for t, slope in enumerate(torch.randn(4, 3, 4)):
            mover.gamma = gamma
            for node in nodes:
                node.gradient = slope if node.depth <= t + 1 else None
            mover.move(nodes, 2.0)
        return [node.x.detach() for node in nodes]

    torch.testing.assert_close(moved(torch.tensor(0.2)), moved(0.2))


@pytest.mark.parametrize(
    ("make", "passes"),
    [(deep, True), (lambda: deep(skip=True), False), (lambda: Thrice().double(), False)],
    ids=["a chain", "a skip", "a weight that stages share"],
)
def test_only_where_errors_arrive_all_at_once(make, passes):
    x, y = torch.randn(6, 6).double(), torch.arange(6) % 3
    net = make()
    optimizer = IPC(sgd(net), net)
    learner = optimizer._learner
    with learner.undone():
        learner.begin(classifier(net, x, y), lambda loss: loss)
        mover = mover_of(learner.settings, learner.waiting.even)
    assert isinstance(mover, PassingOn) is passes


@pytest.mark.parametrize(
    "first",
    [
        "from lightning_pc import PCStrategy",
        "from lightning_pc import PCDDPStrategy",
        "import lightning_pc.strategy",
        "import lightning_pc.callbacks",
        "import lightning, lightning_pc",
    ],
)
def test_whatever_is_imported_first(first):
    """Lightning registers our names while some module of ours may be half imported."""
    names = "from lightning.pytorch.strategies import StrategyRegistry as S"
    made = "assert type(S.get('ipc_ddp')).__mro__[1] is type(S.get('pc_auto')).__mro__[1]"
    script = f"{first}\nimport lightning_pc\n{names}\n{made}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)
