"""One move of the values, with a rate on the host and with one on the device."""

import pytest
import torch
import torch.nn.functional as F

from lightning_pc.inference.movers import Descent, OptimizerMover
from lightning_pc.nodes.energies import Categorical, Gaussian
from lightning_pc.nodes.node import Node
from lightning_pc.optim import EPC, IEPC, IPC, PC


def nodes():
    torch.manual_seed(0)
    made = []
    for energy, below in ((Gaussian(), True), (Gaussian(), False), (Categorical(), True)):
        node = Node("n", torch.randn(3, 4).requires_grad_(), energy)
        node.gradient = node.evaluate(torch.randn(3, 4), 0.25).own()
        if below:
            node.gradient += torch.randn(3, 4)
        made.append(node)
    fresh = Node("fresh", torch.randn(3, 4).requires_grad_(), Gaussian())  # no error of its own yet
    fresh.gradient = torch.randn(3, 4)
    return [*made, fresh, Node("untouched", torch.randn(3, 4).requires_grad_(), Gaussian())]


@pytest.mark.parametrize("gamma", [0.3, torch.tensor(0.3)], ids=["host", "device"])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_a_move_is_a_step_down_the_gradient_of_f(momentum, gamma):
    """The second is also one along the first, with momentum."""
    moved = nodes()
    expected = []
    for node in nodes():
        slope = torch.zeros(3, 4) if node.gradient is None else 4.0 * node.gradient
        expected.append(node.x.detach() - 0.3 * (2 + momentum) * slope)
    inference = Descent(0.3, 1.0, momentum)
    inference.gamma = gamma
    for _ in range(2):  # the gradients stay
        inference.move(moved, 4.0)
    for node, value in zip(moved, expected, strict=True):
        torch.testing.assert_close(node.x.detach(), value)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_an_optimizer_of_torchs_moves_values_down_the_same_gradient(momentum):
    ours, theirs = nodes(), nodes()
    descent = Descent(0.3, 1.0, momentum)
    mover = OptimizerMover(lambda values: torch.optim.SGD(values, 0.3, momentum))
    for _ in range(3):  # the gradients stay
        descent.move(ours, 4.0)
        mover.move(theirs, 4.0)
    for node, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(node.x.detach(), other.x.detach())
        assert other.x.grad is None


@pytest.mark.parametrize("kind", [PC, IPC, EPC, IEPC])
def test_a_report_of_values_that_an_optimizer_moves(kind):
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    optimizer = kind(sgd, net, inference=lambda values: torch.optim.Adam(values, lr=0.05))
    optimizer.step(lambda: F.mse_loss(net(torch.ones(3, 4)), torch.zeros(3, 2)))
    assert optimizer.report.gamma == 0.05
    assert optimizer.report.momentum == 0.0
    assert optimizer.report.curvature is None


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on another device."""

    device = torch.device("meta")


@pytest.mark.parametrize("kind", [torch.Tensor, Elsewhere])
def test_gamma_decays_when_the_energy_has_not_fallen(kind):
    inference = Descent(1.0, 0.5)
    seen = []
    for energy in (3.0, 2.0, 2.0, 5.0, 4.0):
        inference.observe(torch.tensor(energy).as_subclass(kind))
        seen.append(float(inference.gamma))
    assert seen == [1.0, 1.0, 0.5, 0.25, 0.25]
    assert isinstance(inference.gamma, torch.Tensor) == (kind is Elsewhere)  # stays where it is
