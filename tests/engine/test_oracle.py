"""PC, iPC and ePC against explicit equations: NumPy by hand, and F written out for autograd."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc.optim import EPC, IEPC, IPC, PC
from tests.compare import far, relative, twin
from tests.engine.modules import MLP
from tests.engine.oracle import ErrorCoordinates, Explicit, Oracle, cross_entropy, squared_error
from tests.engine.problems import PROBLEMS

SIZES = (8, 8, 5)  # ragged last batch
LOSSES = {  # name -> the user's loss, the oracle's, terms M of a batch of n with 4 outputs
    "ce": (F.cross_entropy, cross_entropy, lambda n: n),
    "ce_sum": (
        lambda o, y: F.cross_entropy(o, y, reduction="sum") / len(y),
        cross_entropy,
        lambda n: n,
    ),
    "mse": (F.mse_loss, squared_error, lambda n: 4 * n),
    "mse_sum": (
        lambda o, y: F.mse_loss(o, y, reduction="sum") / len(y),
        squared_error,
        lambda n: n,
    ),
}


def batches(loss):
    for n in SIZES:
        x = torch.randn(n, 6, dtype=torch.float64)
        yield x, torch.randint(0, 4, (n,)) if loss.startswith("ce") else torch.randn(n, 4).double()


def compare(model, share, algorithm, f, loss, gamma, gamma_decay, lr, T, momentum=0.0):
    linears = list(dict.fromkeys(m for m in model.modules() if isinstance(m, nn.Linear)))
    user_loss, own_loss, terms = LOSSES[loss]
    oracle = Oracle(
        [m.weight.detach().numpy().copy() for m in linears],
        [m.bias.detach().numpy().copy() for m in linears],
        *(f, own_loss, lr, gamma, T, algorithm is IPC, gamma_decay, share, momentum),
    )
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    sgd = torch.optim.SGD(model.parameters(), lr)
    given = {"gamma": gamma, "gamma_decay": gamma_decay, "momentum": momentum}
    optimizer = algorithm(sgd, model, T=T, **given)
    for x, y in batches(loss):
        value = optimizer.step(lambda x=x, y=y: user_loss(model(x), y))
        oracle.batch(x.numpy(), y.numpy(), terms(len(x)))
        assert optimizer.report.loss_terms == pytest.approx(terms(len(x)))
        assert optimizer.report.steps == T
        assert value.item() == pytest.approx(oracle.losses[0], rel=1e-12)
        for own, node in zip(oracle.values, optimizer.values.values(), strict=True):
            assert relative(node.detach(), torch.from_numpy(own)) < 1e-9
        np.testing.assert_allclose(optimizer.report.loss, oracle.losses, rtol=1e-9)
        np.testing.assert_allclose(optimizer.report.energy, oracle.energies, rtol=1e-7, atol=1e-16)
        assert optimizer.report.gamma == pytest.approx(oracle.used_gamma, rel=1e-12)
    for own, module in zip(oracle.weights, linears, strict=True):
        assert relative(module.weight.detach(), torch.from_numpy(own)) < 1e-9
    for own, module in zip(oracle.biases, linears, strict=True):
        assert relative(module.bias.detach(), torch.from_numpy(own)) < 1e-9
    end = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert relative(end, start) > 0.01  # it learned something to compare
    return oracle


@pytest.mark.parametrize("gamma_decay", [1.0, 0.9])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("f", ["tanh", "relu"])
@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_equals_explicit_equations(algorithm, f, loss, gamma_decay):
    model = MLP((6, 7, 5, 4), f).double()
    lr = 0.1 * (4 if loss == "mse" else 1)
    compare(model, None, algorithm, f, loss, 0.2, gamma_decay, lr, 6)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("gamma_decay", [1.0, 0.9])
@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_momentum_equals_explicit_equations(algorithm, gamma_decay, momentum):
    model = MLP((6, 7, 5, 5, 4), "tanh").double()
    oracle = compare(model, None, algorithm, "tanh", "ce", 0.8, gamma_decay, 0.1, 12, momentum)
    if momentum == 0.9 and gamma_decay < 1:
        assert oracle.used_gamma < 0.8  # it overshoots, and both play together


@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_gamma_decays_where_the_energy_rises(algorithm):
    """At this gamma the energy does rise, so that the decay of the equations above is tried."""
    model = MLP((6, 7, 5, 4), "tanh").double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    oracle = compare(model, None, algorithm, "tanh", "ce", 1.2, 0.9, 0.05, 9)
    assert oracle.used_gamma < 1.2 * 0.9


@pytest.mark.parametrize("share", [[0, 1, 1, 1, 2], [0, 1, 0, 1, 2], [0, 1, 2, 1]])
@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_shared_weights_equal_explicit_equations(algorithm, share):
    """A weight that moves for a low layer moves the prediction of a high one at once."""
    first, wide = nn.Linear(6, 4), [nn.Linear(4, 4) for _ in range(2)]
    if share[2:3] == [0]:
        first = nn.Linear(6, 6)
        wide = [nn.Linear(6, 6), nn.Linear(6, 4)]
    parts = [first, *wide]
    model = nn.Sequential(*itertools.chain(*((parts[i], nn.Tanh()) for i in share)))[:-1].double()
    compare(model, share, algorithm, "tanh", "ce", 0.2, 1.0, 0.3, 8)


GRAPHS = ("deep", "skips", "long skip", "cell", "towers", "conv", "attention")


@pytest.mark.parametrize("algorithm", [PC, IPC, EPC, IEPC])
@pytest.mark.parametrize("graph", GRAPHS)
def test_any_graph_equals_its_free_energy_written_out(graph, algorithm):
    problem = PROBLEMS[graph]
    model = problem.make().double()
    other, lr, T = twin(model), 0.05, 6
    written_out = ErrorCoordinates if algorithm in (EPC, IEPC) else Explicit
    explicit = written_out(problem.explicit)
    optimizer = algorithm(
        torch.optim.SGD(model.parameters(), lr), model, T=T, gamma=0.2, gamma_decay=1
    )
    start = twin(model)
    for n in SIZES:
        x, y = problem.doubles(n)
        optimizer.step(lambda x=x, y=y: problem.loss(model, x, y))
        explicit.batch(other, (x, y), 0.2, T, lr, algorithm in (IPC, IEPC))
        for own, node in zip(explicit.values, optimizer.values.values(), strict=True):
            assert relative(node.detach(), own.detach()) < 1e-9
    assert far(model, other)[0] < 1e-9
    assert far(model, start)[0] > 0.01
