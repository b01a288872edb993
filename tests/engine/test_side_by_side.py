"""Layers side by side: the numbers of one stage after the other, and no trace left behind."""

from __future__ import annotations

import copy

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc import PCStrategy
from lightning_pc.errors import ConfigError
from lightning_pc.optim import IPC, PC, PredictiveCoding
from tests.compare import far, twin
from tests.engine.inside import count_gradients
from tests.engine.lightning_problems import Module, data, loader
from tests.engine.modules import MLP
from tests.engine.stacks import CLOSE, OPTIMIZERS, STACKS, adamw, batches, deep, made, sgd, train

pytestmark = pytest.mark.filterwarnings("ignore:T=5 inference steps never reach")

ROWS = {
    "ipc, SGD": (IPC, sgd, {"gamma": 0.3}),
    "ipc, AdamW": (IPC, adamw, {"gamma": 0.3, "T": 5}),
    "ipc, momentum": (IPC, adamw, {"gamma": 0.2, "momentum": 0.5}),
    "ipc, conjugate": (IPC, adamw, {"momentum": "conjugate"}),
    "pc, defaults": (PC, adamw, {}),
    "pc, two betas": (PC, adamw, {"gamma": 0.3, "beta": (0.3, -0.3)}),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("module", STACKS)
def test_the_same_numbers_as_one_by_one(module, row):
    make, nodes = STACKS[module].make, STACKS[module].value_nodes
    door, optimizer, settings = ROWS[row]
    one, side = made(make), made(make)
    start = twin(one)
    before = train(one, door, optimizer, parallel=False, value_nodes=nodes, **settings)
    after = train(side, door, optimizer, parallel=True, value_nodes=nodes, **settings)
    assert not before.report.side_by_side
    assert max(map(len, after.report.side_by_side)) >= 3
    assert far(side, one, entry=0.01)[0] < CLOSE
    assert far(start, one)[0] > 1e4 * CLOSE
    assert torch.allclose(before.report.energy, after.report.energy, rtol=1e-8, atol=1e-14)
    assert before.report.learned == after.report.learned
    torch.testing.assert_close(before.values, after.values, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("T", [1, 3, 12])
def test_values_that_are_kept(T, momentum):
    one, side = made(deep), made(deep)
    x, y = batches(1)[0]
    for model, parallel in ((one, False), (side, True)):
        how = {"gamma": 0.2, "momentum": momentum, "reset": "never", "T": T}
        pc = IPC(sgd(model.parameters()), model, parallel=parallel, **how)
        for _ in range(24 // T):
            pc.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
    assert far(side, one)[0] < CLOSE


PLAIN = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "a tensor rate": {"lr": torch.tensor(0.01)},
}


@pytest.mark.parametrize("kind", PLAIN)
def test_steps_in_place_are_those_of_sgd(kind, monkeypatch):
    def optimizer(parameters):
        return torch.optim.SGD(parameters, **{"lr": 0.01, **PLAIN[kind]})

    one, side = made(deep), made(deep)
    train(one, IPC, optimizer, parallel=False, gamma=0.3, T=20)
    stored = count_gradients(monkeypatch)
    train(side, IPC, optimizer, parallel=True, gamma=0.3, T=20)
    assert far(side, one)[0] < CLOSE
    # Each evaluation but the first few and the last leaves the alike layers' gradients out.
    assert stored[0] < count_of(one, optimizer) / 2


def count_of(model, optimizer):
    with pytest.MonkeyPatch.context() as patch:
        found = count_gradients(patch)
        train(twin(model), IPC, optimizer, parallel=False, gamma=0.3, T=20)
    return found[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_optimizer(optimizer):
    one, side = made(deep), made(deep)
    train(one, IPC, OPTIMIZERS[optimizer], parallel=False, gamma=0.3)
    train(side, IPC, OPTIMIZERS[optimizer], parallel=True, gamma=0.3)
    assert far(side, one)[0] < CLOSE


def test_an_optimizer_of_some_parameters():
    def some(parameters):
        return sgd([p for i, p in enumerate(parameters) if i != 5])

    one, side, start = made(deep), made(deep), made(deep)
    train(one, IPC, some, parallel=False, gamma=0.3)
    train(side, IPC, some, parallel=True, gamma=0.3)
    assert far(side, one)[0] < CLOSE
    left = [*side.parameters()][5]
    assert torch.equal(left, [*start.parameters()][5])
    torch.testing.assert_close(left.grad, [*one.parameters()][5].grad)


# Where, and where not ---------------------------------------------------------------------------


def side_of(model, **settings):
    pc = IPC(sgd(model.parameters()), model, **{"gamma": 0.3, **settings})
    x, y = batches(1)[0]
    pc.step(lambda: F.cross_entropy(model(x), y))
    return pc.report.side_by_side


def test_the_default_takes_many_small_stages():
    assert side_of(made(lambda: deep(layers=6))) == [["3", "5", "7", "9", "11", "13"]]
    assert side_of(made(lambda: deep(layers=5))) == []
    assert side_of(made(lambda: deep(width=190, layers=6))) == []
    assert [len(g) for g in side_of(made(lambda: deep(width=190)), parallel=True)] == [5]
    assert side_of(made(lambda: deep(layers=6)), parallel=False) == []
    assert side_of(made(lambda: deep(layers=6)), gamma="auto") == []


@pytest.mark.parametrize(
    ("algorithm", "settings", "why"),
    [
        ("auto", {}, "auto sends gradients from stage to stage"),
        ("epc", {}, "epc sends gradients"),
        ("zil", {}, "one stage runs at a time"),
        ("ipc", {"precisions": "spiking"}, "one stage runs at a time"),
        ("ipc", {}, "Give gamma a number"),
        ("pc", {"inference": torch.optim.Adam}, "Use gamma and momentum"),
    ],
)
def test_true_says_why_it_cannot(algorithm, settings, why):
    model = deep()
    with pytest.raises(ConfigError, match=f"parallel=True: .*{why}"):
        PredictiveCoding(
            sgd(model.parameters()), model, algorithm=algorithm, parallel=True, **settings
        )


@pytest.mark.parametrize("given", ["yes", 2, None, 0.5])
def test_a_wrong_argument(given):
    model = deep()
    with pytest.raises(ConfigError, match=r"parallel=.*: expected True, False or 'auto'"):
        IPC(sgd(model.parameters()), model, parallel=given)


def test_true_says_where_no_stages_are_alike():
    model = made(lambda: MLP([6, 5, 7, 4]))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="no two neighbouring stages run as one"):
        side_of(model, parallel=True)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_true_says_what_the_trial_met():
    model = made(FORMS["mean of some"])
    with pytest.raises(ConfigError, match=r"run as one.* Tried together: RuntimeError: stack"):
        side_of(model, parallel=True)


@pytest.mark.parametrize("flags", [{}, {"gradient_clip_val": 0.1}])
@pytest.mark.parametrize("algorithm", ["ipc", "pc"])
def test_the_trainer(algorithm, flags):
    trained = []
    for parallel in (False, True):
        torch.manual_seed(0)
        module = Module(net=MLP([5, 7, 7, 7, 7, 3])).double()
        strategy = PCStrategy(algorithm, gamma=0.3, parallel=parallel)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        L.Trainer(strategy=strategy, max_epochs=3, accelerator="cpu", **quiet, **flags).fit(
            module, loader(data(dtype=torch.float64))
        )
        trained.append(module)
        assert bool(strategy.report.side_by_side) is parallel
    assert far(trained[1], trained[0])[0] < CLOSE


# Forms that met a fault once --------------------------------------------------------------------


class Fed(nn.Module):
    """Each layer reads the input, too."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 7), nn.Linear(7, 4)
        self.w = nn.ModuleList(nn.Linear(7, 7) for _ in range(6))
        self.u = nn.ModuleList(nn.Linear(6, 7) for _ in range(6))

    def forward(self, x):
        h = self.stem(x)
        for w, u in zip(self.w, self.u, strict=True):
            h = w(torch.tanh(h)) + u(x)
        return self.head(torch.tanh(h))


class DownAndUp(nn.Module):
    """The way up reads the values of the way down."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 4)
        self.down = nn.ModuleList(nn.Linear(7, 7) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(14, 7) for _ in range(4))

    def forward(self, x):
        h, seen = self.stem(x), []
        for layer in self.down:
            h = torch.tanh(h)
            seen.append(h)
            h = layer(h)
        h = self.middle(F.gelu(h))
        for layer in self.up:
            h = layer(torch.cat([torch.sigmoid(h), seen.pop()], -1))
        return self.head(F.silu(h))


class Normed(nn.Module):
    """One weight, divided by its norm, which is computed without gradients at each use."""

    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 4)

    def forward(self, x):
        for _ in range(7):
            with torch.no_grad():
                norm = self.w.norm()
            x = F.linear(torch.tanh(x), self.w / norm)
        return self.head(torch.tanh(x))


class Indexed(nn.Module):
    """What stands between activation and layer is ``how(layer, h)``."""

    def __init__(self, how, **buffers):
        super().__init__()
        self.stem, self.head, self.how = nn.Linear(6, 7), nn.Linear(7, 4), how
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(7))
        for name, value in buffers.items():
            for number, layer in enumerate(self.layers):
                made = value(number)
                if isinstance(made, torch.Tensor):
                    layer.register_buffer(name, made)
                else:
                    setattr(layer, name, made)

    def forward(self, x):
        h = self.stem(x)
        for layer in self.layers:
            h = self.how(layer, torch.tanh(h))
        return self.head(torch.tanh(h))


def permuted(number):
    return np.random.default_rng(number).permutation(7)


def mask(number):
    return torch.tensor([True] * 7)


FORMS = {
    "fed": Fed,
    "skips": DownAndUp,
    "normed": Normed,
    "arrays": lambda: Indexed(lambda layer, h: layer(h[:, layer.p]), p=permuted),
    "masks": lambda: Indexed(lambda layer, h: layer(h[:, layer.m]), m=mask),
    "data": lambda: Indexed(lambda layer, h: F.linear(h, layer.weight.data) + layer(h)),
    "mean of some": lambda: Indexed(lambda layer, h: layer(h) + h[h > 0].mean()),
    "a vector": lambda: Indexed(
        lambda layer, h: layer(h) + F.linear(h, layer.weight[0]).unsqueeze(-1)
    ),
    "one bias": lambda: Indexed(lambda layer, h: F.linear(h, layer.weight, layer.bias[:1])),
    "sparse": lambda: Indexed(lambda layer, h: torch.eye(5).double().to_sparse() @ layer(h)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("row", ["ipc, SGD", "ipc, AdamW", "pc, defaults"])
def test_forms_that_met_a_fault(form, row):
    door, optimizer, settings = ROWS[row]
    settings = {name: value for name, value in settings.items() if name != "T"}
    one, side = made(FORMS[form]), made(FORMS[form])
    train(one, door, optimizer, 4, parallel=False, **settings)
    train(side, door, optimizer, 4, parallel="auto", **settings)
    assert far(side, one, entry=0.01)[0] < CLOSE


@pytest.mark.parametrize("how", [{"reset": "never", "T": 4}, {"T": 4}])
@pytest.mark.parametrize("door", [PC, IPC])
@pytest.mark.filterwarnings("ignore:T=4 inference steps never reach")
def test_an_automatic_gamma_is_the_same(door, how):
    found = []
    x, y = batches(1)[0]
    for parallel in (False, "auto"):
        model = made(lambda: deep(layers=9))
        with torch.no_grad():
            for p in model.parameters():
                p *= 1.8
        pc = door(sgd(model.parameters()), model, parallel=parallel, **how)
        for _ in range(2):
            pc.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
        moved = far(model, made(lambda: deep(layers=9), 1))[0]
        found.append((pc.report.gamma, pc.report.curvature, moved))
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_one_that_differs_parts_a_group():
    names = [len(group) for group in side_of(made(lambda: deep(layers=8)), parallel=True)]
    assert names == [8]
    model = made(lambda: deep(layers=8))
    model[8].requires_grad_(False)
    assert [len(group) for group in side_of(model, parallel=True)] == [3, 4]


def test_stages_that_t_never_reaches_are_left_out():
    model = made(lambda: deep(layers=9))
    with pytest.warns(UserWarning, match="never reach"):
        names = side_of(model, parallel=True, T=5)
    assert [len(group) for group in names] == [5]
