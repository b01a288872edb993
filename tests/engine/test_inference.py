"""One move of the values, with a rate on the host and with one on the device."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from lightning_pc import explain
from lightning_pc.errors import ConfigError
from lightning_pc.inference.movers import Descent, OptimizerMover
from lightning_pc.nodes.energies import Categorical, Gaussian
from lightning_pc.nodes.node import Node
from lightning_pc.optim import EPC, IEPC, IPC, PC
from tests.engine.modules import MLP


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


@pytest.mark.parametrize("kind", [PC, IPC, EPC])
def test_a_report_of_values_that_an_optimizer_moves(kind):
    net = MLP((4, 5, 2))
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    optimizer = kind(sgd, net, inference=lambda values: torch.optim.Adam(values, lr=0.05))
    optimizer.step(lambda: F.mse_loss(net(torch.ones(3, 4)), torch.zeros(3, 2)))
    assert optimizer.report.gamma == 0.05
    assert optimizer.report.momentum == 0.0
    assert optimizer.report.curvature is None
    assert optimizer.report.energies.numpy().any()


def test_iepc_refuses_an_optimizer_for_the_values():
    """It would not know how far an error has come, and weights would learn from tiny ones."""
    net = torch.nn.Linear(4, 2)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ConfigError, match="how far an error has come"):
        IEPC(sgd, net, inference=lambda values: torch.optim.SGD(values, 0.01))


@pytest.mark.filterwarnings("ignore:In the first batch all 2 value nodes")
def test_updates_are_counted_where_a_gradient_came():
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5), torch.nn.Tanh()
    ).append(torch.nn.Linear(5, 2))
    stepped = Counter()

    class Counts(torch.optim.SGD):
        def step(self, closure=None):
            stepped.update(name for name, p in net.named_parameters() if p.grad is not None)
            return super().step()

    ways = ({"precisions": "spiking", "T": 8}, {"precisions": lambda depth, t: float(depth > 1)})
    for way in ({}, *ways):
        stepped.clear()
        optimizer = IPC(Counts(net.parameters(), 0.1), net, **way)
        optimizer.step(lambda: F.mse_loss(net(torch.ones(3, 4)), torch.zeros(3, 2)))
        learned = optimizer.report.learned
        assert {name: times for name, times in learned.items() if times} == stepped
        assert (min(learned.values()) == 0) == (way is ways[1])


def test_a_pair_of_betas_is_two_phases_to_explain():
    net = MLP((4, 5, 2))
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    optimizer = PC(sgd, net, T=5, beta=(0.3, -0.3))
    optimizer.step(lambda: F.mse_loss(net(torch.ones(3, 4)), torch.zeros(3, 2)))
    assert optimizer.report.steps == 10
    assert "two phases" in explain(optimizer.report)
    assert "F went" not in explain(optimizer.report)


@pytest.mark.filterwarnings("ignore:T=2 inference steps never reach")
@pytest.mark.parametrize("gamma", [0.2, "auto"])
@pytest.mark.parametrize("kind", [PC, IPC])
def test_values_that_no_step_reaches_make_room(kind, gamma):
    """Nothing that is learned depends on them: kept ones, which stay, learn the same."""
    layers = [layer for _ in range(6) for layer in (torch.nn.Linear(4, 4), torch.nn.Tanh())]
    nets = [torch.nn.Sequential(*layers, torch.nn.Linear(4, 2)).double()]
    nets.append(copy.deepcopy(nets[0]))
    x, found = torch.randn(8, 4).double(), []
    for net, reset in zip(nets, ("batch", "never"), strict=True):
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        optimizer = kind(sgd, net, T=2, gamma=gamma, momentum=0.0, reset=reset)
        optimizer.step(lambda net=net: F.mse_loss(net(x), torch.ones(8, 2).double()))
        found.append(optimizer.values)
        assert optimizer.report.depth == 6
    assert list(found[0]) == ["7", "9", "11"]  # two depths move, the second is predicted by a third
    assert len(found[1]) == 6
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on another device."""

    device = torch.device("meta")


@pytest.mark.parametrize("gamma", [0.25, torch.tensor(0.25)], ids=["host", "device"])
def test_how_far_an_error_has_come_counts_the_rate_of_now(gamma):
    """Parameters of iePC learn from the error as if it had come all of its way."""
    node = Node("n", torch.zeros(3, 4), Gaussian(), e=torch.zeros(3, 4), whole=True)
    mover = Descent(0.5)
    mover.gamma = gamma
    for share in (0.25, 0.4375):  # of a way of 1 / weight
        node.gradient = node.e - 1.0
        mover.move([node], 1.0)
        torch.testing.assert_close(node.e, torch.full((3, 4), share))
        slopes = node.evaluate(torch.zeros(3, 4), 1.0)
        torch.testing.assert_close(slopes.dmu, -torch.ones(3, 4))
        torch.testing.assert_close(slopes.own(), node.e)


@pytest.mark.parametrize("kind", [torch.Tensor, Elsewhere])
def test_gamma_decays_when_the_energy_has_not_fallen(kind):
    inference = Descent(1.0, 0.5)
    seen = []
    for energy in (3.0, 2.0, 2.0, 5.0, 4.0):
        inference.observe(torch.tensor(energy).as_subclass(kind))
        seen.append(float(inference.gamma))
    assert seen == [1.0, 1.0, 0.5, 0.25, 0.25]
    assert isinstance(inference.gamma, torch.Tensor) == (kind is Elsewhere)  # stays where it is
