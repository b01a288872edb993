"""Weights of the node energies, and nudging of the output, against F written out."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc.errors import ConfigError
from lightning_pc.optim import EPC, IEPC, IPC, PC
from lightning_pc.precisions import Spiking
from tests.compare import far, gradients, relative, twin
from tests.engine.inside import matrix_products
from tests.engine.modules import MLP
from tests.engine.oracle import ErrorCoordinates, Explicit
from tests.engine.problems import PROBLEMS, ByDepth, doubles
from tests.marks import mostly_slow

T = 7
STEPS = {PC: T - 1, IPC: T}  # at which values move


GRAPHS = ("mlp", "residual", "skips", "attention")


def spiking(rest, depth, t, steps):
    return 1.0 if t in (depth, steps) else rest


def decaying(depth, t):
    return 0.0 if t < depth else math.exp(depth - t)


WEIGHTS = {  # precisions=, and the weight at (depth, t) with so many value steps
    "number": (0.3, lambda d, t, n: 0.3 if d else 1.0),
    "depth": (ByDepth(0.9), lambda d, t, n: 0.9 ** (d - 1) if d else 1.0),
    "depth 2": (ByDepth(2.0), lambda d, t, n: 2.0 ** (d - 1) if d else 1.0),
    "spiking": ("spiking", partial(spiking, 0.0)),
    "spiking 0.001": (Spiking(0.001), partial(spiking, 0.001)),
    "decaying": (decaying, lambda d, t, n: decaying(d, t) if d else 1.0),
    "callable": (lambda d, t: 1.5 * d / (1 + t), lambda d, t, n: 1.5 * d / (1 + t) if d else 1.0),
    "callable 0": (lambda d, t: float(t % 2), lambda d, t, n: float(t % 2) if d else 1.0),
}
NUDGINGS = {
    "positive": (0.3,),
    "negative": (-0.3,),
    "centered": (0.3, -0.3),
}


def compare(graph, algorithm, weigh, betas=(1.0,), momentum=0.0, **arguments):
    problem = PROBLEMS[graph]
    model = problem.make().double()
    other, start, lr = twin(model), twin(model), 0.05
    oracle = Explicit(problem.explicit, problem.depths, weigh)
    sgd = torch.optim.SGD(model.parameters(), lr)
    given = {"gamma": 0.2, "gamma_decay": 1, "momentum": momentum, **arguments}
    optimizer = algorithm(sgd, model, T=T, **given)
    for n in (8, 8, 5):
        x, y = problem.doubles(n)
        optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        oracle.batch(other, (x, y), 0.2, T, lr, algorithm is IPC, betas, momentum)
        for mine, node in zip(oracle.values, optimizer.values.values(), strict=True):
            assert relative(node.detach(), mine.detach()) < 1e-9
        # Of a divergence of nearly equal distributions more is lost than of F.
        np.testing.assert_allclose(
            optimizer.report.free_energy, oracle.energies, rtol=1e-9, atol=1e-13
        )
        assert optimizer.report.steps == len(oracle.energies)
        learned = set(optimizer.report.learned.values())
        if algorithm is PC:  # a node without weight at the end teaches its stage nothing
            weights = [weigh(depth, T - 1) for depth in {*problem.depths, 0}]
            assert learned == {int(weight > 0) for weight in weights}
        assert learned <= set(range(9))
    assert far(model, other)[0] < 1e-9
    assert far(model, start)[0] > 0.01


@pytest.mark.filterwarnings("ignore:Spiking precisions take the value nodes for a chain")
@pytest.mark.parametrize("algorithm", [PC, IPC])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weighted_energies_equal_f_written_out(weights, graph, algorithm):
    given, weigh = WEIGHTS[weights]
    compare(graph, algorithm, lambda d, t: weigh(d, t, STEPS[algorithm]), precisions=given)


@pytest.mark.parametrize("algorithm", [PC, IPC])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("nudging", NUDGINGS)
def test_nudging_equals_f_written_out(nudging, graph, algorithm):
    if (nudging, algorithm) != ("centered", IPC):
        betas = NUDGINGS[nudging]
        compare(graph, algorithm, lambda d, t: 1.0, betas, beta=betas)


@pytest.mark.parametrize("graph", ["mlp", "residual"])
@pytest.mark.parametrize(
    ("algorithm", "nudging"),
    [*((EPC, name) for name in NUDGINGS), (IEPC, "positive"), (IEPC, "negative")],
)
@pytest.mark.parametrize(("weights", "momentum"), [("depth 2", 0.0), ("callable", 0.7)])
def test_error_coordinates_take_all(weights, momentum, algorithm, nudging, graph):
    given, weigh = WEIGHTS[weights]
    problem = PROBLEMS[graph]
    model = problem.make().double()
    other = twin(model)
    oracle = ErrorCoordinates(problem.explicit, problem.depths, lambda d, t: weigh(d, t, T - 1))
    optimizer = algorithm(
        torch.optim.SGD(model.parameters(), 0.05),
        model,
        **{"T": T, "gamma": 0.2, "gamma_decay": 1, "precisions": given},
        **{"momentum": momentum, "beta": NUDGINGS[nudging]},
    )
    for n in (8, 5):
        x, y = problem.doubles(n)
        optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        betas, incremental = NUDGINGS[nudging], algorithm is IEPC
        oracle.batch(other, (x, y), 0.2, T, 0.05, incremental, betas, momentum)
    assert far(model, other)[0] < 1e-9


@pytest.mark.parametrize("weights", ["spiking", Spiking(0.001)])
@pytest.mark.parametrize("algorithm", [EPC, IEPC])
def test_no_wave_runs_through_error_coordinates(algorithm, weights):
    model = MLP((6, 5, 4))
    with pytest.raises(ConfigError, match="use 'pc' or 'ipc'"):
        algorithm(torch.optim.SGD(model.parameters(), 0.1), model, precisions=weights)


@pytest.mark.parametrize("weights", ["depth 2", "spiking", "decaying"])
def test_both_at_once(weights):
    given, weigh = WEIGHTS[weights]
    arguments = {"precisions": given, "beta": (0.3, -0.3)}
    compare("mlp", PC, lambda d, t: weigh(d, t, T - 1), (0.3, -0.3), **arguments)


@pytest.mark.filterwarnings("ignore:Spiking precisions take the value nodes for a chain")
@pytest.mark.parametrize("weights", ["depth 2", "spiking"])
@pytest.mark.parametrize("algorithm", [PC, IPC])
@pytest.mark.parametrize("graph", GRAPHS)
def test_momentum_under_every_variant(graph, algorithm, weights):
    """Each phase of a centered batch starts at rest."""
    given, weigh = WEIGHTS[weights]
    betas = NUDGINGS["centered"] if algorithm is PC else (1.0,)
    nudged = {"beta": (0.3, -0.3)} if algorithm is PC else {}
    compare(
        graph,
        algorithm,
        lambda d, t: weigh(d, t, STEPS[algorithm]),
        betas,
        momentum=0.7,
        precisions=given,
        **nudged,
    )


# --- nudging -------------------------------------------------------------------------------------


def nudged(model, loss, nudging, beta, given="constant", T=200):
    sgd = torch.optim.SGD(model.parameters(), 0.0)
    arguments = {"T": T, "gamma": 0.3, "gamma_decay": 1, "precisions": given}
    betas = tuple(beta * sign / 0.3 for sign in NUDGINGS[nudging])
    PC(sgd, model, beta=betas, **arguments).step(loss)
    return gradients(model)


SMOOTH = {  # any fixed weights have the same limit; F_KL is flat, which its weight makes up for
    "mlp": "constant",
    "cell": lambda depth, t: 0.9 ** (depth - 1),
    "attention": lambda depth, t: 5.0 if depth == 2 else 1.0,
}


@pytest.mark.parametrize(("nudging", "order"), [("positive", 1), ("negative", 1), ("centered", 2)])
@pytest.mark.parametrize("graph", mostly_slow(SMOOTH, "mlp", "attention"))
def test_gradients_tend_to_backprops(graph, nudging, order):
    """With the order in beta that equilibrium propagation has (Laborieux et al. 2021)."""
    problem = PROBLEMS[graph]
    model = problem.make().double()
    x, y = problem.doubles(6)

    def loss():
        return F.cross_entropy(model(x), y)

    loss().backward()
    exact = gradients(model)
    betas = [0.04, 0.02, 0.01]
    found = [nudged(model, loss, nudging, beta, SMOOTH[graph]) for beta in betas]
    errors = [relative(gradient, exact) for gradient in found]
    fitted = np.polyfit(np.log(betas), np.log(errors), 1)[0]
    assert fitted == pytest.approx(order, abs=0.1), errors
    assert errors[-1] < 0.05


def test_negative_nudging_climbs_the_loss_and_learns_to_lower_it():
    """A saddle may rise or run away: no false alarm, no warning."""
    model = MLP((6, 7, 5, 4))
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = PC(sgd, model, T=8, gamma=0.1, beta=-0.5)
    x, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
    first = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            first.append(optimizer.step(lambda: F.cross_entropy(model(x), y)).item())
            report = optimizer.report
            assert (report.loss.diff() > 0).all()
            assert (report.free_energy.diff() < 0).all()
            assert report.gamma == 0.1  # it looks at the F that falls
        assert first[-1] < 0.7 * first[0]
        for p in model.parameters():  # far beyond what is stable
            p.data.mul_(3)
        loud = PC(sgd, model, T=30, gamma=1.2, gamma_decay=0.9, beta=-3.0)
        loud.step(lambda: F.cross_entropy(model(x), y))
    assert (loud.report.free_energy.diff() > 0).any()
    assert loud.report.gamma < 1.2


@pytest.mark.parametrize("nudging", ["negative", "centered"])
def test_a_mean_and_a_sum_are_nudged_alike(nudging):
    """Whether the loss is a mean or a sum, and M known before the first backward or after."""
    model = MLP((6, 7, 5, 4)).double()
    x, y = doubles(8)
    mean = nudged(model, lambda: F.cross_entropy(model(x), y), nudging, 0.01, T=20)
    total = nudged(
        model, lambda: F.cross_entropy(model(x), y, reduction="sum") / len(y), nudging, 0.01, T=20
    )
    assert relative(total, mean) < 1e-9


def test_a_second_phase_costs_what_the_first_does():
    x, y = torch.randn(6, 8), torch.randint(0, 3, (6,))
    products = {}
    for beta in (1.0, -0.3, (0.3, -0.3)):
        net = MLP((*[8] * 5, 3))
        optimizer = PC(torch.optim.SGD(net.parameters(), 0.1), net, T=9, gamma=0.1, beta=beta)
        for _ in range(2):  # a form that is met for the first time is checked
            products[beta] = matrix_products(optimizer, lambda net=net: F.cross_entropy(net(x), y))
    assert products[1.0] == products[-0.3]
    assert products[1.0] < products[0.3, -0.3] <= 2 * products[1.0]


def test_both_phases_see_the_same_masks():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4)).double()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = PC(sgd, model, T=3, gamma=0.1, beta=(0.1, -0.1))
    x, y = doubles(8)
    for _ in range(2):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        loss, energy = optimizer.report.loss, optimizer.report.energy
        assert loss[0].item() == pytest.approx(loss[3].item(), rel=1e-12)
        assert energy[0].sum() == energy[3].sum() == 0
