"""momentum="conjugate": the values' conjugate gradients, one evaluation a step."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc.inference.conjugate import LONGEST, Conjugate
from lightning_pc.nodes.energies import Gaussian
from lightning_pc.nodes.node import Node
from lightning_pc.optim import EPC, IEPC, IPC, PC
from tests.compare import twin
from tests.engine.lightning_problems import Module, data, loader, trainer
from tests.engine.modules import MLP, chain
from tests.engine.oracle import ErrorCoordinates, Explicit
from tests.engine.problems import ByDepth, classifier, regressor, sgd, vectors

T = 9


def squares(model, at, x, y):
    """F's loss and its number of terms, with a value after each linear layer but the last."""
    for layer in model[:-1]:
        x = layer(x) if isinstance(layer, nn.ReLU) else at(layer(x))
    return (model[-1](x) - y).square().sum(), y.numel()


def written_out(kind, net, x, y, gamma):
    """F at each tried step of textbook conjugate gradients, and where the last one ends."""
    oracle = kind(squares)
    oracle.errors, oracle.settled = [], False
    oracle.free_energy(net, (x, y))
    values = oracle.errors if kind is ErrorCoordinates else oracle.values
    shapes, sizes = [v.shape for v in values], [v.numel() for v in values]

    def free_energy(flat):
        parts = [p.view(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
        oracle.errors, oracle.values = (parts, []) if kind is ErrorCoordinates else ([], parts)
        return oracle.free_energy(net, (x, y))[0]

    at = torch.cat([v.detach().flatten() for v in values])
    r = -torch.autograd.functional.jacobian(free_energy, at)
    p, tried, free = r, at, [free_energy(at)]
    rounding = len(at) * torch.finfo(at.dtype).eps * r.norm()  # of sums as long as the values are
    for _ in range(T - 1):
        if r.norm() <= rounding:  # the minimum: what is left has no direction, and F stands
            tried = at
            free.append(free_energy(at))
            continue
        tried = at + gamma * p
        free.append(free_energy(tried))
        bent = torch.autograd.functional.hvp(free_energy, at, p)[1]
        length = (r @ p) / (p @ bent)
        assert 0 < length < LONGEST * gamma
        at, before = at + length * p, r
        r = r - length * bent
        momentum = (r @ (r - before)) / (before @ before)
        assert 0 < momentum < 1 or r.norm() <= rounding  # or the bounds would hold it back
        p = r + momentum * p
    ends = [v.view(s) for v, s in zip(tried.split(sizes), shapes, strict=True)]
    return torch.stack(free).detach(), ends


@pytest.mark.parametrize("gamma", [0.2, 0.35])
@pytest.mark.parametrize("algorithm", [PC, EPC])
def test_equals_the_textbook_on_a_quadratic(algorithm, gamma):
    net, x, y = chain(2, 1.0, 5).double(), torch.randn(4, 5).double(), torch.randn(4, 5).double()
    kind = ErrorCoordinates if algorithm is EPC else Explicit
    free, values = written_out(kind, net, x, y, gamma)
    given = {"gamma": gamma, "gamma_decay": 1, "value_nodes": "linear", "T": T}
    optimizer = algorithm(sgd(net, 0.0), net, momentum="conjugate", **given)
    optimizer.step(regressor(net, x, y))
    assert optimizer.report.steps == T
    torch.testing.assert_close(optimizer.report.free_energy, free, rtol=1e-9, atol=0)
    plain = algorithm(sgd(net, 0.0), net, **given)
    plain.step(regressor(net, x, y))
    assert free[-1] < plain.report.free_energy[-1]
    if algorithm is PC:
        for node, value in zip(optimizer.values.values(), values, strict=True):
            torch.testing.assert_close(node.detach(), value, rtol=1e-8, atol=1e-10)


def stepped(net, x, y, gamma, steps):
    """F at each step with weights that stand, and what each step was like."""
    oracle = Explicit(squares)
    oracle.free_energy(net, (x, y))
    shapes, sizes = [v.shape for v in oracle.values], [v.numel() for v in oracle.values]
    at = torch.cat([v.detach().flatten() for v in oracle.values])
    free, kinds, s, before = [], set(), None, None
    for _ in range(steps):
        flat = at.clone().requires_grad_()
        oracle.values = [p.view(v) for p, v in zip(flat.split(sizes), shapes, strict=True)]
        energy, _ = oracle.free_energy(net, (x, y))
        (g,) = torch.autograd.grad(energy, [flat])
        free.append(energy.item())
        if s is None:
            s, before = -g, g
        else:
            stalled = free[-1] >= free[-2]
            bent = float(s @ (g - before))
            length = min(LONGEST, max(0.0, -float(s @ before) / bent)) if bent > 0 else 1.0
            length = min(length, 1.0) if stalled else length
            at = at + (length - 1) * gamma * s
            end = before + length * (g - before)
            momentum = min(1.0, max(0.0, float(end @ (end - before) / (before @ before))))
            kinds |= {(stalled, "short" if length < 1 else "long"), (stalled, momentum > 0)}
            s, before = (0.0 if stalled else momentum) * s - end, end
        at = at + gamma * s
    return free, kinds


def test_where_f_has_not_fallen_values_do_not_hurry():
    """No step is longer than gamma then or has momentum.

    Rectifiers' kinks are met, and steps that turn out too long.
    """
    torch.manual_seed(27)
    net = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(5, 5), nn.ReLU())))[:-1].double()
    x, y = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    for p in net.parameters():
        p.data *= 2.5
    free, kinds = stepped(net, x, y, 0.6, 24)
    assert kinds >= {(True, "short"), (True, True), (False, "long"), (False, True)}
    given = {"gamma": 0.6, "gamma_decay": 1, "value_nodes": "linear", "T": 24}
    optimizer = PC(sgd(net, 0.0), net, momentum="conjugate", **given)
    optimizer.step(regressor(net, x, y))
    expected = torch.tensor(free, dtype=torch.float64)
    torch.testing.assert_close(optimizer.report.free_energy, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("gamma", [0.1, torch.tensor(0.1)], ids=["a number", "on a device"])
def test_steps_that_raise_f_are_not_made_longer(gamma):
    """One that brings it down again is."""
    node = Node("n", torch.zeros(1, 1).requires_grad_(), Gaussian())

    def way(*energies):
        node.x.data.zero_()
        conjugate = Conjugate(0.1, 1.0)
        conjugate.gamma = gamma
        for energy in energies:
            conjugate.observe(torch.tensor(energy))
            node.gradient = 1e-4 * node.x.detach() - 1.0
            conjugate.move([node], 1.0)
        return float(node.x.detach()) / 0.1

    assert way(10.0, 1.0, 0.9, 0.8, 0.7) == pytest.approx(4 * LONGEST + 1, rel=0.01)
    assert way(1.0, 5.0, 5.1, 4.0) == pytest.approx(LONGEST + 3, rel=0.01)


@pytest.mark.parametrize("seed", range(6))
def test_kinks_do_not_throw_it_off(seed):
    """Six layers of rectifiers, where gradients jump: without a bound on momentum F may explode."""
    torch.manual_seed(seed)
    model, (x, y) = MLP((6, 8, 8, 8, 8, 8, 8, 4), "relu"), vectors(16)
    free = {}
    for momentum in (0.0, "conjugate"):
        optimizer = PC(sgd(model, 0.0), model, momentum=momentum, T=24)
        optimizer.step(classifier(model, x, y))
        free[momentum] = optimizer.report.free_energy
    fallen = free[0.0][0] - free[0.0][-1]
    assert (free["conjugate"][0] - free["conjugate"][7:] > 0.7 * fallen).all()


@pytest.mark.parametrize("algorithm", [PC, EPC])
def test_both_phases_of_a_centered_batch_start_at_rest(algorithm):
    model, (x, y) = MLP((6, 9, 7, 4)).double(), vectors(12)
    loss, free = classifier(model, x.double(), y), {}
    for nudging, beta in (("positive", 0.3), ("negative", -0.3), ("centered", (0.3, -0.3))):
        given = {"gamma": 0.2, "momentum": "conjugate", "beta": beta}
        optimizer = algorithm(sgd(model, 0.0), model, **given)
        optimizer.step(loss)
        free[nudging] = optimizer.report.free_energy
    phases = torch.cat([free["positive"], free["negative"]])
    torch.testing.assert_close(free["centered"], phases, rtol=1e-9, atol=0)


def test_kept_values_go_on_falling():
    """Each call begins with a plain step, from where the last one ended."""
    model, (x, y) = MLP((6, 9, 7, 4)).double(), vectors(12)
    optimizer = PC(sgd(model, 0.0), model, gamma=0.2, T=4, momentum="conjugate", reset="never")
    ends = []
    for _ in range(3):
        optimizer.step(classifier(model, x.double(), y))
        ends += optimizer.report.free_energy[[0, -1]].tolist()
    assert ends == sorted(ends, reverse=True)
    assert ends[-1] < ends[1]


def test_nothing_to_infer_moves_nothing():
    model, (x, _) = MLP((6, 9, 7, 4)), vectors(12)
    optimizer = PC(torch.optim.Adam(model.parameters(), 0.01), model, momentum="conjugate", T=6)
    before = twin(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: F.mse_loss(model(x), model(x).detach()))
    assert set(optimizer.report.peak_energy.values()) == {0.0}
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)


def test_masked_logits_stay_where_they_are():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
            logits = (self.q(x) @ x.transpose(1, 2)).masked_fill(hidden, -torch.inf)
            return self.head(logits.softmax(-1) @ self.v(x)).mean(1)

    model, x, y = Masked(), torch.randn(6, 5, 4), torch.randint(0, 3, (6,))
    optimizer = PC(sgd(model), model, momentum="conjugate")
    for _ in range(3):
        optimizer.step(classifier(model, x, y))
    (logits,) = optimizer.values.values()
    assert (logits.isinf().sum((1, 2)) == 10).all()
    assert optimizer.report.free_energy[-1] < optimizer.report.free_energy[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_on_the_device_is_as_good(dtype):
    """Where a device holds gamma, it is a tensor, of the energy's type."""

    def moved(gamma):
        torch.manual_seed(0)
        nodes = [Node("n", torch.randn(3, 4).requires_grad_(), Gaussian(), depth=d) for d in (1, 2)]
        slopes, conjugate = torch.randn(5, 3, 4), Conjugate(0.2, 1.0)
        for t, slope in enumerate(slopes):
            conjugate.observe(torch.tensor(5.0 - t, dtype=dtype))
            conjugate.gamma = gamma
            for node in nodes:
                node.gradient = slope if node.depth <= t + 1 else None
            conjugate.move(nodes, 2.0)
        return [node.x.detach() for node in nodes]

    torch.testing.assert_close(moved(torch.tensor(0.2, dtype=dtype)), moved(0.2))


@pytest.mark.parametrize(
    ("algorithm", "momentum"), list(itertools.product([PC, IPC], [0.0, 0.6, "conjugate"]))
)
def test_the_trainer_hands_it_on(algorithm, momentum):
    """The same batches leave the same weights as by the optimizer."""
    module, batches = Module(), data(3)
    model = copy.deepcopy(module)
    fit = trainer({"algorithm": algorithm.algorithm, "gamma": 0.2, "momentum": momentum})
    fit.fit(module, loader(batches))
    optimizer = algorithm(model.configure_optimizers(), model, gamma=0.2, momentum=momentum)
    for i, batch in enumerate(batches):
        optimizer.step(lambda batch=batch, i=i: model.training_step(batch, i))
    for p, q in zip(module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    own = optimizer.report.free_energy
    torch.testing.assert_close(fit.strategy.report.free_energy, own)


@pytest.mark.parametrize(
    ("algorithm", "given", "momentum"),
    [
        (PC, {}, "conjugate"),
        (PC, {"precisions": ByDepth(0.9)}, "conjugate"),
        *((algorithm, {}, 0.0) for algorithm in (EPC, IEPC)),
        *((algorithm, {"gamma": 0.2}, 0.0) for algorithm in (PC, IPC)),
        *((algorithm, {"precisions": "spiking"}, 0.0) for algorithm in (PC, IPC)),
        *((algorithm, {"reset": "never"}, 0.0) for algorithm in (PC, IPC)),
        *((algorithm, {"beta": -1.0}, 0.0) for algorithm in (PC, IPC)),
        (PC, {"beta": (1.0, -1.0)}, 0.0),
    ],
)
def test_where_values_move_along_them_by_default(algorithm, given, momentum):
    """Where gamma is automatic, too; a run with the argument given is the same to the bit."""
    start, (x, y), ends = MLP((6, 9, 7, 4)), vectors(16), []
    for told in ({}, {"momentum": momentum}):
        model = twin(start)
        optimizer = algorithm(torch.optim.Adam(model.parameters(), 0.01), model, **given, **told)
        for _ in range(3):
            optimizer.step(classifier(model, x, y))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert optimizer.report.momentum == momentum
    assert torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_the_default_is_not_the_papers_descent(algorithm):
    """Or the test above would say nothing."""
    start, (x, y), ends = MLP((6, 9, 7, 4)), vectors(16), []
    for momentum in (None, 0):
        model = twin(start)
        adam = torch.optim.Adam(model.parameters(), 0.01)
        optimizer = algorithm(adam, model, momentum=momentum)
        optimizer.step(classifier(model, x, y))
        ends.append(optimizer.report.free_energy[-1])
    assert ends[0] < ends[1]


def test_gradients_whose_squares_overflow_leave_the_tried_step():
    """Weights of 1e4 in a chain: its slopes' squares are infinite in float32."""
    net = chain(3)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1e4)
    x, y = torch.randn(16, 12), torch.randn(16, 5)
    optimizer = PC(sgd(net, 0.0), net, value_nodes="linear", momentum="conjugate")
    optimizer.step(regressor(net, x, y))
    free = optimizer.report.free_energy
    assert free.isfinite().all()
    assert free[-1] < free[0]


class Square(nn.Module):
    def forward(self, x):
        return x * x / 2


@pytest.mark.parametrize("seed", range(3))
def test_an_f_that_is_steeper_further_off(seed):
    """Where steps eight times as long as gamma lead above where F began."""
    torch.manual_seed(seed)
    net = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(10, 10), Square())))
    net.append(nn.Linear(10, 4))
    x, y = torch.randn(32, 10), torch.randn(32, 4)
    adam = torch.optim.Adam(net.parameters(), 3e-3)
    optimizer = PC(adam, net, value_nodes="linear")
    for _ in range(25):
        optimizer.step(regressor(net, x, y))
        assert optimizer.report.free_energy[-1] < optimizer.report.free_energy[0]


def test_no_autocast_rounds_the_products():
    def moved(autocast):
        torch.manual_seed(0)
        node, conjugate = (
            Node("n", torch.randn(3, 50).requires_grad_(), Gaussian()),
            Conjugate(1, 1),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for gradient in torch.randn(5, 3, 50):
                node.gradient = gradient
                conjugate.move([node], 1.0)
        return node.x.detach()

    assert torch.equal(moved(True), moved(False))
