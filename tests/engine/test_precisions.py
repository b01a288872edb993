"""Weights of the node energies: which there are, and what T and gamma become under a wave."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_pc.precisions
from lightning_pc import describe, explain
from lightning_pc.errors import ConfigError
from lightning_pc.optim import IPC, PC
from lightning_pc.precisions import (
    GONE,
    PRECISIONS,
    Constant,
    Custom,
    Precisions,
    Spiking,
    precisions,
)
from tests.compare import far, relative, twin
from tests.engine.modules import MLP


def fading(depth, t):
    """Decaying precisions (Qi et al. 2025), as a user writes them."""
    return 0.0 if t < depth else math.exp(depth - t)


def test_weights_of_the_papers():
    depths = range(4)
    table = [[Spiking().weight(d, t, 4) for d in depths] for t in range(5)]
    rest = 0.0
    assert table == [
        [1.0, rest, rest, rest],  # the loss, then the wave
        [rest, 1.0, rest, rest],
        [rest, rest, 1.0, rest],
        [rest, rest, rest, 1.0],
        [1.0, 1.0, 1.0, 1.0],  # pc learns
    ]
    assert [Constant(3.0).weight(d, 3, 4) for d in depths] == [1.0, 3.0, 3.0, 3.0]


def test_names_numbers_and_objects():
    assert precisions("spiking") == Spiking(0.0)
    assert precisions(2) == Constant(2.0)
    assert precisions(Spiking(0.5)) == Spiking(0.5)
    assert isinstance(precisions(max), Custom)
    assert all(precisions(name).name == name for name in PRECISIONS)


def test_the_callables_that_errors_name_work():
    """They are what stands for the schedules of earlier versions, which they call gone."""
    steps = {}
    for name, written in GONE.items():
        with pytest.raises(ConfigError) as told:
            precisions(name)
        assert str(told.value).endswith(f"is gone: write precisions={written}.")
        made = precisions(eval(written))
        steps[name] = [[made.weight(d, t, 4) for t in range(4)] for d in range(1, 4)]
        assert made.weight(0, 0, 4) == 1.0  # a callable is asked for nodes alone
    assert steps["depth"] == [[0.9**d] * 4 for d in range(3)]
    e = math.exp(-1)
    assert steps["decaying"] == [
        pytest.approx([0.0] * d + [e**i for i in range(4 - d)]) for d in range(1, 4)
    ]


def test_no_other_name_is_gone():
    with pytest.raises(AttributeError, match="no attribute 'Waves'"):
        lightning_pc.precisions.Waves  # noqa: B018


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, None, "much"])
def test_a_callable_that_gives_no_weight(weight):
    model = MLP((6, 5, 4))
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = PC(sgd, model, precisions=lambda depth, t: weight if t == 3 else 1.0)
    before = twin(model)
    with pytest.raises(ConfigError, match=r"precisions gave .* at depth 1, step 3: expected a"):
        optimizer.step(lambda: F.cross_entropy(model(torch.randn(5, 6)), torch.arange(5) % 4))
    assert far(model, before)[0] == 0


class Unheard(Precisions):
    def weight(self, depth, t, steps):
        return 0.0


def test_a_loss_without_weight_is_an_error():
    model = MLP((6, 5, 4))
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model, precisions=Unheard())
    with pytest.raises(ConfigError, match="depth 0, step 0"):
        optimizer.step(lambda: F.cross_entropy(model(torch.randn(5, 6)), torch.arange(5) % 4))


@pytest.mark.parametrize("reset", ["batch", "never"])
@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_a_weight_on_all_nodes_is_a_weaker_nudging(algorithm, reset):
    """c E + loss is c (E + loss / c): the two features agree, with kept values too."""
    model = MLP((6, 7, 5, 4)).double()
    other, c = twin(model), 4.0
    x, y = torch.randn(8, 6).double(), torch.randint(0, 4, (8,))
    arguments = {"T": 6, "gamma_decay": 1, "reset": reset}
    one = algorithm(
        torch.optim.SGD(model.parameters(), 0.1), model, gamma=0.05, precisions=c, **arguments
    )
    two = algorithm(
        torch.optim.SGD(other.parameters(), 0.1), other, gamma=0.05 * c, beta=1 / c, **arguments
    )
    for _ in range(3):
        one.step(lambda: F.cross_entropy(model(x), y))
        two.step(lambda: F.cross_entropy(other(x), y))
    assert far(model, other)[0] < 1e-12
    torch.testing.assert_close(one.report.free_energy, c * two.report.free_energy)


@pytest.mark.parametrize("given", ["spiking", fading])
def test_gamma_is_kept_where_weights_move_f(given):
    model = MLP((6, 7, 5, 4))
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = PC(sgd, model, T=9, gamma=0.9, precisions=given)
    x, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert optimizer.report.gamma == 0.9


# --- one wave ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_a_wave_is_backprop_damped_by_gamma_per_stage(gamma):
    """Where weights hardly move, in so few steps that the wave just reaches the lowest stage."""
    model, lr = MLP((6, 7, 5, 4)).double(), 1e-7
    x, y = torch.randn(8, 6).double(), torch.randint(0, 4, (8,))
    before, other = twin(model), twin(model)
    F.cross_entropy(other(x), y).backward()
    optimizer = IPC(
        torch.optim.SGD(model.parameters(), lr), model, gamma=gamma, precisions=Spiking(0.0)
    )
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert optimizer.report.steps == 3
    moved = {n: (before.get_parameter(n) - p).detach() / lr for n, p in model.named_parameters()}
    for name, depth in {"0": 2, "2": 1, "4": 0}.items():
        for kind in ("weight", "bias"):
            exact = gamma**depth * other.get_parameter(f"{name}.{kind}").grad
            assert relative(moved[f"{name}.{kind}"], exact) < 1e-5


@pytest.mark.parametrize("algorithm", [PC, IPC])
@pytest.mark.parametrize(
    ("given", "T", "steps"),
    [("spiking", None, 3), ("spiking", 9, 9), (fading, None, 8), ("constant", None, 8)],
)
def test_a_wave_ends_where_the_module_does(given, T, steps, algorithm):
    model = MLP((6, 7, 5, 4))
    optimizer = algorithm(torch.optim.SGD(model.parameters(), 0.1), model, T=T, precisions=given)
    x, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert optimizer.report.steps == steps
    assert all(optimizer.report.learned.values())
    torch.manual_seed(0)
    shown = describe(
        model, (x,), algorithm=algorithm.algorithm, T=T, precisions=given, print_table=False
    )
    assert steps == shown.T


class Shortcut(nn.Module):
    """The loss reads p and r, and r comes from p by way of q."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(6, 6) for _ in range(4))
        self.p, self.q, self.r = nn.Tanh(), nn.Tanh(), nn.Tanh()

    def forward(self, x):
        first = self.p(self.a(x))
        return self.head(first + self.r(self.c(self.q(self.b(first)))))


def test_a_shortcut_is_told_where_the_wave_strays():
    model, lr = Shortcut().double(), 1e-7
    x, y = torch.randn(8, 6).double(), torch.randint(0, 6, (8,))
    before, other = twin(model), twin(model)
    F.cross_entropy(other(x), y).backward()
    optimizer = IPC(torch.optim.SGD(model.parameters(), lr), model, gamma=0.5, precisions="spiking")
    told = r"'q' \(depth 2\) is predicted from 'p' \(depth 1\), which moves no later"
    with pytest.warns(UserWarning, match=told):
        optimizer.step(lambda: F.cross_entropy(model(x), y))

    def alike(name):
        moved = (before.get_parameter(name) - model.get_parameter(name)).detach() / lr
        return F.cosine_similarity(
            *(x.flatten() for x in (moved, other.get_parameter(name).grad)), 0
        )

    assert alike("b.weight") < 0.9  # what q is predicted with
    assert min(alike("a.weight"), alike("c.weight"), alike("head.weight")) > 0.95
    optimizer.step(lambda: F.cross_entropy(model(x), y))  # a second warning would be an error
    # said of no other weights, which do not end with the wave
    IPC(torch.optim.SGD(model.parameters(), 0.1), model, precisions=fading).step(
        lambda: F.cross_entropy(model(x), y)
    )


def test_a_wave_is_not_taken_for_energy_at_the_top():
    """At its last step nothing but the top has its full weight."""
    model = MLP((6, 7, 5, 4))
    x, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
    said = {}
    for given in ("constant", "spiking"):
        optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model, precisions=given)
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        said[given] = explain(optimizer.report)
    assert "at the top" in said["constant"]
    assert "at the top" not in said["spiking"]


def look(given):
    torch.manual_seed(0)
    model = MLP((6, 7, 5, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.0), model, precisions=given)
    x, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    return optimizer.report


@pytest.mark.parametrize("rest", [0.001, 0.3, 1.0])
def test_a_wave_is_held_back_by_what_lasts(rest):
    """As weights that never vary are: the loss counts in full in both."""
    found, same = look(Spiking(rest)), look(lambda depth, t: rest)
    assert found.curvature == pytest.approx(same.curvature, rel=1e-6)
    assert found.gamma == pytest.approx(same.gamma, rel=1e-6)


@pytest.mark.parametrize(("before", "after"), [("spiking", "constant"), ("constant", "spiking")])
def test_a_resumed_run_with_other_precisions_looks_at_once(before, after):
    torch.manual_seed(0)
    model = MLP((6, 7, 5, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    x, y = torch.randn(8, 6), torch.randint(0, 4, (8,))

    def made(given, state=None):
        optimizer = IPC(torch.optim.SGD(model.parameters(), 0.0), model, precisions=given)
        if state:
            optimizer.load_state_dict(state)
        for _ in range(1 if state else 60):
            optimizer.step(lambda: F.cross_entropy(model(x), y))
        return optimizer

    saved = made(before).state_dict()
    curvature = saved["lightning_pc"]["curvature"]
    assert made(before, saved).report.curvature == curvature  # no look was due
    resumed = made(after, saved).report
    assert resumed.curvature != pytest.approx(curvature, rel=0.3)
    assert resumed.gamma == pytest.approx(made(after).report.gamma, rel=0.15)


def test_a_wave_goes_faster_than_what_stays():
    assert look("spiking").gamma > 2 * look("constant").gamma
    assert look(Spiking(0.0)).gamma > 2 * look("constant").gamma


def test_the_steepest_step_counts_where_weights_fall_slowly():
    """A callable that is 3 at one of the eight steps is held back as one that always is."""
    assert look(lambda depth, t: 3.0 if t == 5 else 0.1).curvature == pytest.approx(
        look(lambda depth, t: 3.0).curvature, rel=1e-6
    )
