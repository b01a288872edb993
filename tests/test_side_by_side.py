"""Layers side by side: the numbers of one stage after the other, and no trace left behind."""

from __future__ import annotations

import copy
import random

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.optim.sgd as torch_sgd
from lightning_problems import Module, data, loader
from problems import MLP, Thrice, far, twin
from torch import nn

from lightning_pc import PCStrategy
from lightning_pc.errors import ConfigError, DivergenceError
from lightning_pc.optim import IPC, PC, PredictiveCoding

# Ten batches of float64, 50 steps of weights and more with ipc. A batched product adds up in
# another order, 1e-16 of an entry. Adam divides small gradients by their own size, and conjugate
# gradients divide by small changes, which behind rectifiers are not smooth.
CLOSE = 1e-9
pytestmark = pytest.mark.filterwarnings("ignore:T=5 inference steps never reach")


class Block(nn.Module):
    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.norm, self.a = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.b, self.drop = nn.Linear(2 * width, width), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.drop(self.b(F.gelu(self.a(self.norm(x)))))


class Stack(nn.Module):
    """Blocks behind a stem, with a head."""

    def __init__(self, blocks, width=6, outputs=4):
        super().__init__()
        self.stem, self.blocks = nn.Linear(6, width), nn.ModuleList(blocks)
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Encoder(nn.Module):
    """torch's own transformer blocks over six tokens of one number."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.stem, self.head = nn.Linear(1, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, dropout, batch_first=True) for _ in range(4)
        )

    def forward(self, x):
        x = self.stem(x.unsqueeze(-1))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(1, 4, 3, padding=1)]
        for _ in range(4):
            layers += [nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(4, 4)

    def forward(self, x):
        h = self.layers(x[:, :4].view(-1, 1, 2, 2))
        return self.head(F.silu(h).mean((2, 3)))


def deep(width=7, layers=5, f="tanh"):
    return MLP([6, *[width] * (layers + 1), 4], f)


def dropped():
    layers = [nn.Linear(6, 7)]
    for _ in range(4):
        layers += [nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 7)]
    return nn.Sequential(*layers, nn.GELU(), nn.Linear(7, 4))


class Towers(nn.Module):
    """Two chains of equal layers from one value; then others of the same width."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 7), nn.Linear(7, 4)
        for name in "abc":
            setattr(self, name, nn.ModuleList(nn.Linear(7, 7) for _ in range(4)))

    def forward(self, x):
        h = left = right = self.stem(x)
        for a, b in zip(self.a, self.b, strict=True):
            left, right = a(torch.tanh(left)), b(torch.sigmoid(right))
        h = left + right
        for c in self.c:
            h = c(F.silu(h))
        return self.head(F.gelu(h))


def two_kinds():
    layers = [nn.Linear(6, 7)]
    for f in (nn.Tanh, nn.SiLU):
        for _ in range(4):
            layers += [f(), nn.Linear(7, 7)]
    return nn.Sequential(*layers, nn.GELU(), nn.Linear(7, 4))


MODULES = {
    "two kinds": (two_kinds, "auto"),
    "towers": (Towers, "auto"),
    "tanh": (deep, "auto"),
    "gelu": (lambda: deep(f="gelu"), "auto"),
    "no bias": (lambda: nn.Sequential(*without_bias()), "auto"),
    "dropout": (dropped, "auto"),
    "convolutions": (Convolutions, "auto"),
    "repeated": (lambda: Thrice(5), "auto"),
    "blocks": (lambda: Stack([Block(6) for _ in range(4)]), "blocks"),
    "blocks, dropout": (lambda: Stack([Block(6, 0.2) for _ in range(4)]), "blocks"),
    "encoder": (Encoder, "blocks"),
    "encoder, dropout": (lambda: Encoder(0.2), "blocks"),
}


def without_bias():
    yield nn.Linear(6, 7)
    for _ in range(5):
        yield from (nn.SiLU(), nn.Linear(7, 7, bias=False))
    yield from (nn.Tanh(), nn.Linear(7, 4))


def batches(n, size=5):
    torch.manual_seed(5)
    return [(torch.randn(size, 6).double(), torch.randint(0, 4, (size,))) for _ in range(n)]


def made(make, seed=0):
    torch.manual_seed(seed)
    return make().double().train()


def train(model, door, optimizer, steps=10, **settings):
    """Trains; returns the door."""
    pc = door(optimizer(model.parameters()), model, **settings)
    torch.manual_seed(3)
    for x, y in batches(steps):
        pc.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
    return pc


def adamw(parameters):
    return torch.optim.AdamW(parameters, 1e-3)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.02)


ROWS = {
    "ipc, SGD": (IPC, sgd, {"gamma": 0.3}),
    "ipc, AdamW": (IPC, adamw, {"gamma": 0.3, "T": 5}),
    "ipc, momentum": (IPC, adamw, {"gamma": 0.2, "momentum": 0.5}),
    "ipc, conjugate": (IPC, adamw, {"momentum": "conjugate"}),
    "pc, defaults": (PC, adamw, {}),
    "pc, two betas": (PC, adamw, {"gamma": 0.3, "beta": (0.3, -0.3)}),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("module", MODULES)
def test_the_same_numbers_as_one_by_one(module, row):
    make, nodes = MODULES[module]
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


def count_gradients(monkeypatch):
    """How many parameters torch's SGD was given gradients of."""
    found, step = [0], torch_sgd.sgd

    def counted(params, grads, *args, **kwargs):
        found[0] += len(grads)
        return step(params, grads, *args, **kwargs)

    monkeypatch.setattr(torch_sgd, "sgd", counted)
    return found


def count_of(model, optimizer):
    with pytest.MonkeyPatch.context() as patch:
        found = count_gradients(patch)
        train(twin(model), IPC, optimizer, parallel=False, gamma=0.3, T=20)
    return found[0]


def groups(parameters):
    first, *others = parameters
    fast = {"params": others[4:8], "lr": 0.03}
    return torch.optim.SGD([{"params": [first, *others[:4], *others[8:]]}, fast], 0.01)


def watched(parameters):
    optimizer = torch.optim.SGD(parameters, 0.02)
    optimizer.register_step_pre_hook(_halve)
    return optimizer


def _halve(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad *= 0.5


class Replaces(torch.optim.Optimizer):
    """Puts other memory in a parameter's place."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.data = p.data - 0.02 * p.grad


OPTIMIZERS = {
    "two rates": groups,
    "hooks": watched,
    "momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "replaces": Replaces,
    "fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "foreach": lambda p: torch.optim.Adam(p, 1e-3, foreach=True),
}


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


def memories(model):
    return [(p.data_ptr(), p.stride(), p.untyped_storage().nbytes()) for p in model.parameters()]


@pytest.mark.parametrize("door", [IPC, PC])
def test_weights_are_in_their_own_memory_afterwards(door, tmp_path):
    model = made(deep)
    before, objects = memories(model), [*map(id, model.parameters())]
    pc = train(model, door, sgd, 2, parallel=True, gamma=0.3)
    assert pc.report.side_by_side
    assert memories(model) == before
    assert [*map(id, model.parameters())] == objects
    torch.save(model[2].state_dict(), tmp_path / "layer.pt")
    alone = nn.Linear(7, 7).double()
    torch.save(alone.state_dict(), tmp_path / "alone.pt")
    assert (tmp_path / "layer.pt").stat().st_size == (tmp_path / "alone.pt").stat().st_size


def test_also_after_a_divergence():
    model = made(deep)
    before = memories(model)
    pc = IPC(torch.optim.SGD(model.parameters(), 1e9), model, parallel=True, gamma=0.5, T=30)
    x, y = batches(1)[0]

    def on():
        for _ in range(30):
            pc.step(lambda: F.cross_entropy(model(x), y))

    with pytest.raises(DivergenceError, match=r"At inference step t = \d+ .*'\d+'"):
        on()
    assert memories(model) == before


# What users do to weights between steps --------------------------------------------------------


def assign(model, draw):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def load(model, draw):
    model.load_state_dict({n: v + 0.01 * draw.random() for n, v in model.state_dict().items()})


def there_and_back(model, draw):
    model.float().double()


def replace(model, draw):
    for p in model.parameters():
        p.data = p.data.clone() + 0.01


def freeze(model, draw):
    for p in draw.choice(linears(model)).parameters():
        p.requires_grad_(not p.requires_grad)


def tie(model, draw):
    like = [m for m in linears(model) if m.in_features == m.out_features]
    a, b = draw.sample(like, 2)
    a.weight = b.weight


def share_memory(model, draw):
    like = [m for m in linears(model) if m.in_features == m.out_features]
    a, b = draw.sample(like, 2)
    if a.weight is not b.weight:
        a.weight.data = b.weight.data


def hook(model, draw):
    draw.choice(linears(model)).weight.register_hook(lambda gradient: 0.5 * gradient)


def transpose(model, draw):
    layer = draw.choice(linears(model))
    layer.weight.data = layer.weight.data.t().contiguous().t()


def nothing(model, draw):
    pass


CHANGES = [assign, load, there_and_back, replace, freeze, tie, share_memory, hook, transpose]


def linears(model):
    return [module for module in model if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("seed", range(50))
def test_weights_never_go_stale(seed):
    draw = random.Random(seed)
    width, layers = draw.choice([3, 6]), draw.choice([6, 8])
    kind = draw.choice(["sgd", "momentum", "adam"])
    changes = [draw.choice([nothing, *CHANGES]) for _ in range(6)]
    trained = []
    for parallel in (False, True):
        chosen = random.Random(seed)
        model = made(lambda: deep(width, layers), seed)
        for t, (x, y) in enumerate(batches(6)):
            # An optimizer is made anew, since some changes replace the parameters.
            optimizer = {
                "sgd": lambda p: torch.optim.SGD(p, 0.02, weight_decay=0.01),
                "momentum": lambda p: torch.optim.SGD(p, 0.02, momentum=0.5),
                "adam": lambda p: torch.optim.AdamW(p, 1e-3),
            }[kind](model.parameters())
            pc = IPC(optimizer, model, gamma=0.3, T=11, parallel="auto" if parallel else False)
            for _ in range(2):
                pc.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
            changes[t](model, chosen)
            if chosen.random() < 0.3:
                model = copy.deepcopy(model)
        trained.append(model)
    assert far(trained[1], trained[0])[0] < CLOSE


def test_a_hook_on_a_parameter_runs_as_often():
    counts = []
    for parallel in (False, "auto"):
        model, seen = made(lambda: deep(layers=8)), []
        model[4].weight.register_hook(seen.append)
        model[6].bias.register_post_accumulate_grad_hook(seen.append)
        train(model, IPC, sgd, 3, parallel=parallel, gamma=0.3)
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


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


class Skips(nn.Module):
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
    "skips": Skips,
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


def test_a_weight_that_is_not_contiguous_and_a_fused_optimizer():
    trained = []
    for parallel in (False, "auto"):
        model = made(lambda: deep(layers=8))
        for layer in linears(model):
            layer.weight.data = layer.weight.data.t().contiguous().t()
        train(model, IPC, OPTIMIZERS["fused"], 4, parallel=parallel, gamma=0.3)
        trained.append(model)
    assert far(trained[1], trained[0], entry=0.01)[0] < CLOSE


def clips(parameters):
    parameters = [*parameters]
    optimizer = torch.optim.SGD(parameters, 0.02)
    step = optimizer.step

    def clipped(closure=None):
        nn.utils.clip_grad_norm_(parameters, 0.01)
        return step(closure)

    optimizer.step = clipped
    return optimizer


class Keeps(torch.optim.Optimizer):
    """Holds on to a parameter's memory."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.memories = [p.data for p in self.param_groups[0]["params"]]

    def step(self, closure=None):
        for p, memory in zip(self.param_groups[0]["params"], self.memories, strict=True):
            if p.grad is not None:
                memory.sub_(p.grad, alpha=0.02)


@pytest.mark.parametrize("optimizer", [clips, Keeps])
def test_an_optimizer_with_ways_of_its_own(optimizer):
    one, side = made(deep), made(deep)
    train(one, IPC, optimizer, 4, parallel=False, gamma=0.3)
    assert train(side, IPC, optimizer, 4, parallel=True, gamma=0.3).report.side_by_side
    assert far(side, one)[0] < CLOSE


def test_a_scheduler_of_the_rate_leaves_steps_in_place(monkeypatch):
    def optimizer(parameters):
        made = torch.optim.SGD(parameters, 0.01)
        torch.optim.lr_scheduler.StepLR(made, 1)
        return made

    stored = count_gradients(monkeypatch)
    train(made(deep), IPC, optimizer, parallel=True, gamma=0.3, T=20)
    assert stored[0] < 200


def test_kept_values_leave_nothing_behind():
    model = made(lambda: deep(layers=8))
    how = {"reset": "never", "momentum": "conjugate", "gamma": 0.2, "T": 2}
    pc = PC(sgd(model.parameters()), model, **how)
    x, y = batches(1)[0]
    for _ in range(8):
        pc.step(lambda: F.cross_entropy(model(x), y))
    assert pc.report.side_by_side
    assert len(pc._learner._kept._moving) <= 4


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
