"""Bad input: one clear error each, and nothing has changed."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import (
    FSDPPrecision,
    HalfPrecision,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_pc
from lightning_pc.errors import (
    ClosureError,
    ConfigError,
    DivergenceError,
    PCError,
    PlacementError,
    RecordingError,
    UnsupportedError,
)
from lightning_pc.optim import EPC, IEPC, IPC, PC, ZIL
from lightning_pc.precisions import Constant, Spiking
from lightning_pc.settings import Settings
from tests.engine.lightning_problems import (
    ALGORITHMS,
    C,
    D,
    H,
    Module,
    data,
    loader,
    mlp,
    traces,
    trainer,
    weights,
)
from tests.engine.modules import MLP
from tests.engine.problems import ce
from tests.engine.wrappers import WRAPPERS
from tests.marks import mostly_slow

# --- arguments -----------------------------------------------------------------------------------


def adam(values: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(values, lr=0.05)


ARGUMENTS = [
    ({"algorithm": "backprop"}, "'backprop' is unknown.*'ipc', 'pc', 'zil', 'epc'"),
    ({"algorithm": "IPC"}, "unknown"),
    ({"algorithm": None}, "unknown"),
    *(
        ({name: given}, f"^{name}=.*: expected a Python number")
        for name in ("T", "gamma", "gamma_decay", "momentum", "loss_terms", "precisions", "beta")
        for given in (torch.tensor(0.1), np.array([0.1, 0.2]), torch.ones(2), [np.array(0.1)])
    ),
    *(
        ({name: given}, f"{name}=.*expected")
        for name in ("T", "gamma", "gamma_decay", "momentum", "loss_terms", "precisions", "beta")
        for given in (np.True_, np.float32("nan"), Decimal(1), 1j, [[1]])
    ),
    ({"reset": np.array(["batch"])}, "reset=.*: expected"),
    ({"softmax_energy": ["gaussian"]}, r"softmax_energy=\['gaussian'\]: expected"),
    ({"T": 0}, "T=0: expected a whole number"),
    ({"T": -3}, "T=-3"),
    ({"T": 8.0}, r"T=8\.0"),
    ({"T": "8"}, "T='8'"),
    ({"T": True}, "T=True"),
    ({"T": "auto"}, "T='auto': expected a whole number"),
    ({"gamma": 0}, "gamma=0: expected a positive"),
    ({"gamma": -0.1}, "gamma=-0.1"),
    ({"gamma": math.nan}, "gamma=nan"),
    ({"gamma": math.inf}, "gamma=inf"),
    ({"gamma": "0.1"}, "gamma='0.1'"),
    ({"gamma": True}, "gamma=True"),
    ({"gamma_decay": 0.0}, r"gamma_decay=0.0: expected a factor in \(0, 1\]"),
    ({"gamma_decay": 1.1}, "gamma_decay=1.1"),
    ({"gamma_decay": -1}, "gamma_decay=-1"),
    ({"gamma_decay": math.nan}, "gamma_decay=nan"),
    ({"gamma_decay": "0.9"}, "gamma_decay='0.9'"),
    ({"momentum": 1.0}, r"momentum=1.0: expected the share .* in \[0, 1\)"),
    ({"momentum": -0.1}, "momentum=-0.1"),
    ({"momentum": math.nan}, "momentum=nan"),
    ({"momentum": True}, "momentum=True"),
    ({"momentum": "0.5"}, "momentum='0.5'"),
    ({"algorithm": "zil", "momentum": 0.5}, "momentum=0.5: zil is exact at 0"),
    ({"algorithm": "zil", "momentum": "conjugate"}, "momentum='conjugate': zil is exact at 0"),
    ({"algorithm": "pc", "momentum": "conjugate", "precisions": "spiking"}, "change F itself"),
    ({"algorithm": "pc", "momentum": "auto"}, "'conjugate' or None"),
    ({"algorithm": "zil", "T": 3}, "T=3: zil"),
    ({"algorithm": "zil", "gamma": 0.5}, "gamma=0.5: zil"),
    ({"algorithm": "zil", "reset": "never"}, "reset='never'"),
    ({"algorithm": "iepc", "reset": "never"}, "reset='never': iepc would go on.*'ipc' or 'pc'"),
    ({"reset": "always"}, "reset='always'"),
    ({"reset": None}, "reset=None"),
    ({"loss_terms": 0}, "loss_terms=0"),
    ({"loss_terms": -1.0}, "loss_terms=-1"),
    ({"loss_terms": math.nan}, "loss_terms=nan"),
    ({"loss_terms": "batch"}, "loss_terms='batch'"),
    ({"softmax_energy": "kl"}, "'kl'.*'categorical'"),
    ({"precisions": "spikes"}, "'spikes': expected one of 'constant', 'spiking', a pos"),
    ({"precisions": "depth"}, r"'depth' is gone: write precisions=lambda depth, t: 0.9 \*\* \(d"),
    ({"precisions": "lightning_pc.precisions.Depth"}, "Depth' is gone: write precisions=lambda d"),
    ({"precisions": "decaying"}, "'decaying' is gone: write precisions=lambda depth, t: 0.0 if t"),
    ({"precisions": None}, "precisions=None: expected one of"),
    ({"precisions": True}, "precisions=True"),
    ({"precisions": Spiking}, "precisions=<class"),
    ({"precisions": 0}, r"precisions=0.0: expected a Python number > 0"),
    ({"precisions": -1.5}, "precisions=-1.5"),
    ({"precisions": math.nan}, "precisions=nan"),
    ({"algorithm": "zil", "precisions": "spiking"}, "zil is exact for plain"),
    ({"algorithm": "ipc", "precisions": "spiking", "reset": "never"}, "one wave through a batch"),
    ({"algorithm": "zil", "precisions": 2.0}, "zil is exact for plain"),
    ({"nudging": "both"}, r"nudging= is gone, write beta=0.3 .*\(0.3, -0.3\)"),
    ({"beta": "centered"}, "beta='centered': expected the loss's factor in F"),
    ({"beta": (1.0, 0.0)}, r"beta=\(1.0, 0.0\): expected"),
    ({"gama": 0.1}, r"no argument gama=. Did you mean gamma=\?"),
    ({"steps": 8}, r"no argument steps=. Did you mean T=\? It takes (algorithm, )?T, gamma"),
    ({"t": 8}, r"no argument t=. Did you mean T=\?"),
    ({"x_lr": 0.1}, r"no argument x_lr=. Did you mean gamma=\?"),
    ({"compile": "yes"}, "compile='yes': expected True, False or a dict"),
    *(
        ({name: 0.1}, f"no argument {name}=. It belongs to the wrapped optimizer: give it to that")
        for name in ("lr", "weight_decay", "betas", "eps", "nesterov", "rho", "fused")
    ),
    ({"value_node": "linear"}, r"Did you mean value_nodes=\?"),
    ({"inference": 0.05}, "inference=0.05: expected a callable that makes an optimizer"),
    ({"inference": adam([torch.ones(1)])}, "inference=<Adam>: expected a callable that makes"),
    ({"inference": lambda: None}, "expected a callable that makes an optimizer"),
    ({"inference": lambda values, rate: None}, "expected a callable that makes an optimizer"),
    ({"inference": adam, "gamma": 0.1}, "its own way: gamma would have no effect"),
    ({"inference": adam, "gamma_decay": 0.9, "momentum": 0.5}, "way: gamma_decay, momentum would"),
    ({"algorithm": "zil", "inference": adam}, "zil is exact in one way alone"),
    ({"beta": 0}, "beta=0: expected the loss's factor"),
    ({"beta": math.inf}, "beta=inf"),
    ({"beta": "1"}, "beta='1'"),
    ({"algorithm": "ipc", "beta": (1.0, -1.0)}, "beta=.*: ipc moves the weights.*'pc'"),
    ({"algorithm": "iepc", "beta": (1.0, -1.0)}, "beta=.*: iepc moves the.*'pc'"),
    ({"algorithm": "iepc", "momentum": "conjugate"}, "iepc stays near its start .* use 'ipc'"),
    ({"algorithm": "pc", "beta": (1.0, -1.0), "T": 1}, "T=1 leaves the values of pc no step"),
    ({"algorithm": "pc", "beta": (1.0, -1.0), "reset": "never"}, "use reset='batch'"),
    ({"algorithm": "zil", "beta": -1.0}, "zil is exact for plain"),
    ({"algorithm": "zil", "beta": (1.0, -1.0)}, "zil is exact for plain"),
    ({"algorithm": "zil", "beta": 0.5}, "zil is exact for plain"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_arguments(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        lightning_pc.PCStrategy(**arguments)
    arguments = dict(arguments)
    wrapper = WRAPPERS.get(arguments.pop("algorithm", "ipc"))
    if wrapper is None:
        return
    model = mlp()
    with pytest.raises(ConfigError, match=message):
        wrapper(torch.optim.SGD(model.parameters(), lr=0.1), model, **arguments)


@pytest.mark.parametrize("given", [["ipc"], {}, nn.Sequential(nn.Tanh()), np.zeros(2)])
def test_no_algorithm(given):
    with pytest.raises(MisconfigurationException, match=r"algorithm=.*: expected "):
        lightning_pc.PCStrategy(given)


@pytest.mark.parametrize("wrapper", WRAPPERS.values())
def test_a_wrapper_is_one_algorithm(wrapper):
    model = mlp()
    for name in ("algorithm", "steps"):
        with pytest.raises(ConfigError, match=rf"no argument {name}=.* It takes T, gamma"):
            wrapper(torch.optim.SGD(model.parameters(), lr=0.1), model, **{name: "pc"})


NUMBERS = {
    "T": [np.int64(4), np.uint8(4)],
    "gamma": [np.float32(0.125), np.float64(0.125), np.float16(0.125), Fraction(1, 8), np.int64(1)],
    "gamma_decay": [np.float32(0.5), np.int32(1)],
    "momentum": [np.float32(0.5), np.int32(0), Fraction(1, 2)],
    "loss_terms": [np.float32(3.0), np.int64(3)],
    "precisions": [np.float32(0.5), np.float64(0.5), Fraction(1, 2), np.int64(2)],
    "beta": [np.float32(0.5), (np.float32(0.5), np.float64(-0.5)), [np.float32(0.5), -0.5]],
}


@pytest.mark.parametrize(("name", "given"), [(n, v) for n, row in NUMBERS.items() for v in row])
def test_numbers_of_other_libraries(name, given):
    made = Settings(algorithm="pc", **{name: given})
    stored = getattr(made, name)
    assert stored == given
    for number in stored if isinstance(stored, (tuple, list)) else [stored]:
        assert type(number) in (int, float)
    model, (x, y) = mlp(), data()[0]
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model, **{name: given})
    assert optimizer.step(lambda: ce(model, x, y)).isfinite()


class Needy(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


MADE = {
    "None": lambda values: None,
    "LBFGS": torch.optim.LBFGS,
    "a closure": lambda values: Needy(values, 0.1),
    "another's": lambda values: torch.optim.Adam(mlp().parameters(), 0.1),
    "some": lambda values: torch.optim.SGD(values[:1], 0.1),
    "more": lambda values: torch.optim.SGD([*values, torch.ones(1)], 0.1),
    "copies": lambda values: torch.optim.SGD([v.detach().clone() for v in values], 0.1),
    "no optimizer": lambda values: nn.Tanh(),
}


@pytest.mark.parametrize("wrapper", [PC, IPC, EPC])
@pytest.mark.parametrize("name", MADE)
def test_what_inference_makes_must_move_the_values(name, wrapper):
    model, (x, y) = mlp(nn.BatchNorm1d(H)), data()[0]
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = wrapper(sgd, model, inference=MADE[name])
    before = weights(model)
    with pytest.raises(
        ConfigError, match=r"inference= made \w+: expected a torch optimizer of all"
    ):
        optimizer.step(lambda: ce(model, x, y))
    assert torch.equal(weights(model), before)
    assert sgd.state_dict()["state"] == {}


@pytest.mark.parametrize("device", [0.5, "gpu", [], None])
def test_no_device(device):
    with pytest.raises(MisconfigurationException, match=r"device=.*: expected a torch\.device"):
        lightning_pc.PCStrategy(device=device)


def test_strategies_and_messages_show_what_was_given_on_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    strategy = lightning_pc.PCStrategy("pc", T=8, gamma=np.float64(0.5), precisions="spiking")
    assert repr(strategy) == "PCStrategy('pc', T=8, gamma=0.5, precisions='spiking')"
    assert repr(lightning_pc.PCStrategy()) == "PCStrategy('auto')"
    assert "lightning.pytorch" not in repr(strategy)
    given = adam([torch.ones(1)])
    assert "\n" in repr(given)
    for name in (f.name for f in fields(Settings) if f.name != "value_nodes"):
        with pytest.raises(MisconfigurationException, match=f"^{name}=<Adam>") as told:
            lightning_pc.PCStrategy(**{name: given})
        assert "\n" not in str(told.value)
    model = mlp()
    with pytest.raises(ConfigError, match="entry <Adam>"):
        PC(torch.optim.SGD(model.parameters(), 0.1), model, value_nodes=given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spiking(rest=-0.1), r"Spiking: rest=-0.1: expected a Python number >= 0"),
        (lambda: Spiking(rest="0"), "Spiking: rest='0'"),
        (lambda: Constant(True), "precisions=True: expected a Python number > 0"),
        (lambda: Constant(torch.tensor(1.0)), "precisions=tensor.*expected a Python number"),
        (lambda: Spiking(np.zeros(2)), "rest=array.*expected a Python number"),
        (lambda: lightning_pc.precisions.Depth, "Depth is gone: write precisions=lamb"),
        (lambda: lightning_pc.precisions.Decaying, "g is gone: write precisions=lambd"),
    ],
)
def test_arguments_of_precisions(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# --- modules that fail in the first batch or before: through both doors --------------------------


class Detached(nn.Module):
    """A node that only feeds what is detached."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, C)
        self.unused = nn.Linear(H, H)

    def forward(self, x):
        return self.c(torch.tanh(self.a(x)) + self.b(x).detach())


class Integers(nn.Module):
    def forward(self, x):
        return (x > 0).long()


class Mixed(nn.Module):
    """Integers on the way, as token ids are."""

    def __init__(self):
        super().__init__()
        self.token, self.embed = Integers(), nn.Embedding(2, H)
        self.head = MLP((H, H, C))

    def forward(self, x):
        return self.head(self.embed(self.token(x[:, 0])))


class Bare(nn.Module):
    """Calls forward itself, so that no hook of the layer fires."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(D, H), nn.Linear(H, C)

    def forward(self, x):
        return self.c(torch.tanh(self.a.forward(x)))


class Selects(nn.Module):
    """Boolean indexing by the values: the number of rows changes as they move."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, H), nn.Linear(1, H), nn.Linear(H, C)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        picked = h[h.abs() > h.abs().flatten()[-1]][:, None]
        return self.c(h) + self.c(torch.relu(self.b(picked))).mean(0)


class Experts(nn.Module):
    """Top-1 routing by the values."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, H)
        self.router = nn.Linear(H, 2)
        self.experts = nn.ModuleList(MLP((H, H, H)) for _ in range(2))

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        gate = self.router(h).softmax(-1)
        best = gate.argmax(-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            rows = best == i
            if rows.any():
                out[rows] = expert(h[rows]) * gate[rows, i : i + 1]
        return out


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe, self.head = Experts(), nn.Linear(H, C)

    def forward(self, x):
        return self.head(self.moe(x))


class Checkpointed(nn.Module):
    """Its first block within a gradient checkpoint, or (None) as it is."""

    def __init__(self, reentrant: bool | None):
        super().__init__()
        torch.manual_seed(1)
        self.block = MLP((D, H, H))
        self.between = nn.Sequential(nn.Linear(H, H), nn.ReLU())
        self.head = nn.Linear(H, C)
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.head(self.between(self.block(x)))
        x = x.clone().requires_grad_()
        return self.head(self.between(checkpoint(self.block, x, use_reentrant=self.reentrant)))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is deprecated, and used

    @torch.jit.script
    def scripted(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * 2


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.between, self.c = nn.Linear(D, H), nn.ReLU(), nn.Linear(H, C)

    def forward(self, x):
        return self.c(self.between(scripted(self.a(x))))


def frozen() -> nn.Module:
    return mlp().requires_grad_(False)


def compiled_inside() -> nn.Module:
    model = mlp()
    model[2] = torch.compile(model[2])
    return model


def compiled_in_place() -> nn.Module:
    model = mlp()
    model.compile()
    return model


def compiled_part() -> nn.Module:
    model = mlp()
    model[2].compile()
    return model


def poisoned() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[4].weight[0, 0] = math.nan
    return model


def penalty(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), y)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + grad.square().sum()


def first_order(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """An adversarial example, made within the step."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    return F.cross_entropy(model(x.detach() + 0.1 * grad.sign()), y)


def backwards(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def per_sample(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def detached(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y).detach()


def constant(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    model(x)
    return torch.zeros((), requires_grad=True) + 1


def infinite(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y) / 0


Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], Any]

#: name -> model, value_nodes, loss, error, message
PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Any, Loss, type[Exception], str]] = {
    "no match": (mlp, ["net.9"], ce, PlacementError, "net.9"),
    "near miss": (Routed, "moe.inned", ce, PlacementError, "moe.inner"),
    "one of two matches": (mlp, [nn.Tanh, nn.GELU], ce, PlacementError, "GELU"),
    "callable matches nothing": (mlp, lambda n, m: False, ce, PlacementError, "lambda"),
    "bad regex": (mlp, "(", ce, ConfigError, r"\("),
    "empty list": (mlp, [], ce, ConfigError, "value_nodes"),
    "wrong type": (mlp, 3, ce, ConfigError, "3"),
    "no node": (lambda: nn.Linear(D, C), "auto", ce, PlacementError, "No value node"),
    "no blocks": (mlp, "blocks", ce, PlacementError, "blocks"),
    "never called": (Detached, "unused", ce, PlacementError, "unused'.*never"),
    "called by forward": (Bare, "a", ce, PlacementError, "a'.*never called"),
    "unread": (Detached, "b", ce, PlacementError, "b' is not read by the loss"),
    "output": (Detached, "c", ce, PlacementError, "c' is an output"),
    "integers": (Mixed, "token", ce, PlacementError, "token'.*floating"),
    "frozen": (frozen, "auto", ce, UnsupportedError, "no trainable parameter"),
    "compiled inside": (compiled_inside, "auto", ce, UnsupportedError, "torch.compile"),
    "compiled in place": (compiled_in_place, "auto", ce, UnsupportedError, "compile"),
    "compiled part": (compiled_part, "auto", ce, UnsupportedError, "2'.*torch.compile"),
    "NaN weight": (poisoned, "auto", ce, DivergenceError, "t = 0 the loss"),
    "infinite loss": (mlp, "auto", infinite, DivergenceError, "t = 0 the loss"),
    "penalty": (mlp, "auto", penalty, ClosureError, "differentiates while.*torch.autograd.grad"),
    "gradient": (mlp, "auto", first_order, ClosureError, "differentiates while"),
    "backward": (mlp, "auto", backwards, ClosureError, "not call .backward"),
    "no scalar": (mlp, "auto", per_sample, ClosureError, r"scalar loss.*\(4,\)"),
    "detached": (mlp, "auto", detached, ClosureError, "no trainable parameter"),
    "constant": (mlp, "auto", constant, PCError, "No value node|no trainable parameter"),
    "TorchScript": (Scripted, "auto", ce, RecordingError, "cannot see.*TorchScript"),
}
#: refused before any batch, so Lightning's own type of error
AT_THE_DOOR = {
    *("no match", "near miss", "one of two matches", "callable matches nothing", "bad regex"),
    *("empty list", "wrong type", "no blocks"),
    *("frozen", "compiled inside", "compiled in place", "compiled part"),
}


def prefixed(value_nodes: Any) -> Any:
    presets = ("auto", "modules", "linear", "blocks", "(")
    if isinstance(value_nodes, str) and value_nodes not in presets:
        return f"net.{value_nodes}"
    return value_nodes


class Any_(Module):
    def __init__(self, net: nn.Module, loss: Loss, fails_at: int = 0) -> None:
        super().__init__(net=net)
        self.loss = loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, *batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def kept(model: nn.Module) -> Any:
    """Everything that must be as it was."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, traces(model), torch.get_rng_state()


def assert_kept(model: nn.Module, before: Any) -> None:
    state, trace, random = before
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)
    assert traces(model) == trace
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_optimizer_refuses(name, algorithm):
    make, value_nodes, loss, error, message = PROBLEMS[name]
    model = make()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = kept(model)
    x, y = data()[0]

    def train():
        optimizer = WRAPPERS[algorithm](sgd, model, value_nodes=value_nodes)
        optimizer.step(lambda: loss(model, x, y))

    with pytest.raises(error, match=message) as caught:
        train()
    assert isinstance(caught.value, PCError)
    assert "\n" not in str(caught.value)
    assert_kept(model, before)
    assert sgd.state_dict()["state"] == {}


@pytest.mark.parametrize("name", PROBLEMS)
def test_strategy_refuses(name):
    make, value_nodes, loss, error, message = PROBLEMS[name]
    module = Any_(make(), loss)
    before = kept(module)
    error = MisconfigurationException if name in AT_THE_DOOR else error
    fit = trainer({"algorithm": "ipc", "value_nodes": prefixed(value_nodes)})
    with pytest.raises(error, match=message):
        fit.fit(module, loader(data()))
    state, trace, _ = before
    assert traces(module) == trace
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("make", "value_nodes"),
    [
        (Detached, ["a"]),
        (Mixed, ["embed"]),
    ],
)
def test_what_the_message_advises_works(make, value_nodes):
    model = make()
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model, value_nodes=value_nodes)
    x, y = data()[0]
    losses = [float(optimizer.step(lambda: ce(model, x, y))) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert optimizer.report.nodes == value_nodes


# --- what once was refused -----------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpoints_change_nothing(reentrant, algorithm):
    nodes, found = [], []
    for kind in (reentrant, None):
        module = Any_(Checkpointed(kind), ce)
        fit = trainer(algorithm)
        fit.fit(module, loader(data()))
        nodes.append(fit.strategy.report.nodes)
        found.append(weights(module))
    assert nodes == [["net.block.1", "net.between.1"]] * 2
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("algorithm", mostly_slow(["ipc", "pc", "epc", "iepc"], "ipc", "epc"))
@pytest.mark.parametrize("value_nodes", ["auto", "modules"])
@pytest.mark.parametrize("make", [Selects, Routed])
def test_control_flow_that_follows_the_values(make, value_nodes, algorithm):
    """It stays as it was in the forward, however far values move."""
    torch.manual_seed(0)
    model = make()
    x, y = data(1, 16)[0]
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = WRAPPERS[algorithm](sgd, model, value_nodes=value_nodes, gamma=0.3, T=16)
    before = traces(model)
    losses = [float(optimizer.step(lambda: ce(model, x, y))) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert min(v for n, v in optimizer.report.learned.items() if "experts" not in n) > 0
    assert traces(model) == before


# --- divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ipc", "pc"])
def test_divergence_names_node_and_step(algorithm):
    model = mlp().double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = WRAPPERS[algorithm](sgd, model, gamma=1e60, gamma_decay=1.0, T=16)
    x, y = data(dtype=torch.float64)[0]
    before = weights(model)
    with pytest.raises(DivergenceError, match=r"t = [1-9].*(value node '[13]'|the loss).*gamma"):
        optimizer.step(lambda: ce(model, x, y))
    assert weights(model).isfinite().all()
    if algorithm == "pc":
        assert torch.equal(weights(model), before)
        assert sgd.state_dict()["state"] == {}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_batch_whose_loss_is_nan(algorithm):
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = WRAPPERS[algorithm](sgd, model)
    x, y = data()[0]
    optimizer.step(lambda: ce(model, x, y))
    before, trace = weights(model), traces(model)
    with pytest.raises(DivergenceError, match="t = 0 the loss"):
        optimizer.step(lambda: ce(model, x, y) * math.nan)
    assert torch.equal(weights(model), before)
    assert traces(model) == trace
    optimizer.step(lambda: ce(model, x, y))  # and training can go on


@pytest.mark.parametrize("algorithm", ["ipc", "pc", "epc", "iepc"])
def test_a_loss_that_becomes_nan_when_values_move(algorithm):
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = WRAPPERS[algorithm](sgd, model, gamma=0.1)  # every evaluation is a step
    x, y = data()[0]

    def closure():
        loss = ce(model, x, y)
        return loss * (1 + (loss.detach() - float(loss.detach())) / 1e-5).sqrt()  # it may not fall

    before = traces(model)
    with pytest.raises(DivergenceError, match=r"t = [1-9] the loss"):
        optimizer.step(closure)
    assert weights(model).isfinite().all()
    assert traces(model) == before
    optimizer.step(lambda: ce(model, x, y))  # and training can go on


def test_a_diverging_trainer():
    module = Any_(mlp(), ce)
    fit = trainer({"algorithm": "ipc", "gamma": 1e30, "gamma_decay": 1.0, "T": 16})
    with pytest.raises(DivergenceError, match=r"t = [1-9]"):
        fit.fit(module, loader(data()))
    assert weights(module).isfinite().all()


# --- the Trainer's set-up ------------------------------------------------------------------------


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Two(Module):
    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])]


class NoOptimizer(Module):
    def configure_optimizers(self):
        return None


class AnothersOptimizer(Module):
    def configure_optimizers(self):
        return torch.optim.SGD(mlp().parameters(), lr=0.1)


class Memorizes(Module):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Wraps(Module):
    def configure_optimizers(self):
        return PC(super().configure_optimizers(), self)


class OwnBackward(Module):
    def backward(self, loss, *args, **kwargs):
        loss.backward()


class OwnStep(Module):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(optimizer_closure)


class Sharp(torch.optim.SGD):
    """Evaluates its closure twice, as sharpness-aware minimization does."""

    def step(self, closure=None):
        assert closure is not None, "needs a closure"
        closure()
        return super().step(closure)


class Sharpens(Module):
    def configure_optimizers(self):
        return Sharp(self.parameters(), lr=0.1)


class Iterates(Module):
    """Takes its batches itself."""

    def training_step(self, dataloader_iter):
        (x, y), _, _ = next(dataloader_iter)
        return F.cross_entropy(self(x), y)


class ConfiguredCompiled(Module):
    """Compiles a part only when the Trainer has begun."""

    def configure_model(self):
        if not hasattr(self, "fast"):
            self.fast = torch.compile(self.net)

    def forward(self, x):
        return self.fast(x)


TRAINER_PROBLEMS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "manual": (Manual, ALGORITHMS, {}, "Manual uses manual optimization"),
    "two optimizers": (Two, ALGORITHMS, {}, "multiple optimizers"),
    "no optimizer": (
        NoOptimizer,
        ALGORITHMS,
        {},
        r"none was returned\) holds no parameter of NoOptimizer",
    ),
    "another's": (AnothersOptimizer, ALGORITHMS, {}, "SGD. holds no parameter"),
    "LBFGS": (Memorizes, ALGORITHMS, {}, "LBFGS"),
    "a wrapper": (Wraps, ALGORITHMS, {}, "PC would do predictive coding twice"),
    "own backward": (OwnBackward, ALGORITHMS, {}, "OwnBackward overrides `backward`"),
    "own step": (OwnStep, ["ipc", "iepc"], {}, "overrides `optimizer_step`.*'pc'"),
    "accumulation": (
        Module,
        ["ipc", "iepc"],
        {"accumulate_grad_batches": 2},
        "larger batch, or 'pc'",
    ),
    "scheduled accumulation": (
        Module,
        ["ipc"],
        {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})], "max_epochs": 2},
        "larger batch, or 'pc'",
    ),
    "twice": (Sharpens, ALGORITHMS, {}, "Sharp evaluates its closure more than once"),
    "dataloader_iter": (Iterates, ALGORITHMS, {}, "dataloader_iter"),
    "compiled": (lambda: torch.compile(Module()), ALGORITHMS, {}, "torch.compile"),
    "compiled later": (ConfiguredCompiled, ALGORITHMS, {}, "'fast' is compiled by torch.compile"),
    "16-true": (Module, ALGORITHMS, {"plugins": HalfPrecision("16-true")}, "float16.*bf16"),
    "FSDP": (Module, ALGORITHMS, {"plugins": FSDPPrecision("32-true")}, "one device.*FSDP"),
}


@pytest.mark.parametrize(
    ("name", "algorithm"), [(n, a) for n, row in TRAINER_PROBLEMS.items() for a in row[1]]
)
def test_trainer_refuses(name, algorithm):
    make, _, settings, message = TRAINER_PROBLEMS[name]
    module = make()
    original = getattr(module, "_orig_mod", module)
    before = weights(original)
    error = RuntimeError if name == "two optimizers" else MisconfigurationException
    with pytest.raises(error, match=message):
        trainer(algorithm, **settings).fit(module, loader(data()))
    if name not in ("twice", "scheduled accumulation"):
        assert torch.equal(weights(original), before)
        assert all(p.grad is None for p in original.parameters())


@pytest.mark.parametrize("algorithm", ["pc", "zil", "epc"])
def test_own_optimizer_step_is_fine_where_there_is_one_step(algorithm):
    runs = []
    for kind in (OwnStep, Module):
        module = kind()
        trainer(algorithm).fit(module, loader(data()))
        runs.append(weights(module))
    assert torch.equal(*runs)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_devices(algorithm):
    with pytest.raises(
        MisconfigurationException, match=r"one device.*given 2: use PCDDPStrategy, or set devices=1"
    ):
        trainer(algorithm, devices=2).fit(Module(), loader(data()))


def test_a_callable_loss_terms_gets_the_batch():
    seen = []
    fit = trainer({"algorithm": "pc", "loss_terms": lambda batch: seen.append(batch) or 4})
    batches = data(2)
    fit.fit(Module(), loader(batches))
    assert [len(batch) for batch in seen] == [2, 2]
    assert all(torch.equal(got[0], x) for got, (x, _) in zip(seen, batches, strict=True))
    assert fit.strategy.report.loss_terms == 4
    with pytest.raises(MisconfigurationException, match=r"loss_terms gave 0\.0"):
        trainer({"loss_terms": lambda *batch: 0}).fit(Module(), loader(data(2)))


# --- the optimizers' set-up ----------------------------------------------------------------------


class NoClosure(torch.optim.SGD):
    def step(self):
        return super().step()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: torch.optim.LBFGS(m.parameters()), ConfigError, "LBFGS"),
        (lambda m: PC(torch.optim.SGD(m.parameters(), 0.1), m), ConfigError, "twice"),
        (lambda m: list(m.parameters()), ConfigError, "Expected a torch optimizer .*, got list"),
        (lambda m: None, ConfigError, "Expected a torch optimizer .*, got NoneType"),
        (lambda m: NoClosure(m.parameters(), 0.1), ConfigError, "NoClosure.step takes no closure"),
        (lambda m: torch.optim.SGD([torch.zeros(3)], 0.1), ConfigError, "no nn.Parameter"),
        (
            lambda m: torch.optim.SGD(mlp().parameters(), 0.1),
            ConfigError,
            "SGD. holds no parameter of Sequential",
        ),
    ],
    ids=["LBFGS", "wrapper", "list", "None", "no closure", "tensors", "another model's"],
)
def test_optimizer_cannot_be_wrapped(algorithm, make, error, message):
    model = mlp()
    with pytest.raises(error, match=message):
        WRAPPERS[algorithm](make(model), model)


@pytest.mark.parametrize("model", [mlp, None, lambda x: x], ids=["class", "None", "function"])
def test_no_module(model):
    sgd = torch.optim.SGD(mlp().parameters(), 0.1)
    with pytest.raises(ConfigError, match=r"expected the nn\.Module"):
        IPC(sgd, model)


def test_arguments_the_wrong_way_round():
    model = mlp()
    with pytest.raises(ConfigError, match=r"IPC\(optimizer, model\)"):
        IPC(model, torch.optim.SGD(model.parameters(), 0.1))


def test_compiled_model():
    model = mlp()
    with pytest.raises(UnsupportedError, match=r"torch\.compile"):
        IPC(torch.optim.SGD(model.parameters(), 0.1), torch.compile(model))


def test_compiled_after_wrapping():
    model = mlp()
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model)
    x, y = data()[0]
    model[2].compile()
    with pytest.raises(UnsupportedError, match=r"torch\.compile"):
        optimizer.step(lambda: ce(model, x, y))


def test_distributed_model():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(mlp())
        with pytest.raises(UnsupportedError, match="give the bare module here"):
            IPC(torch.optim.SGD(model.parameters(), 0.1), model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", WRAPPERS.values())
def test_no_closure(wrapper):
    model = mlp()
    optimizer = wrapper(torch.optim.SGD(model.parameters(), 0.1), model)
    x, y = data()[0]
    before = weights(model)
    for given, name in ((None, "NoneType"), (ce(model, x, y), "Tensor"), (5, "int")):
        with pytest.raises(
            ClosureError, match=f"needs a closure that returns the loss, got {name}"
        ):
            optimizer.step(given)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("wrapper", WRAPPERS.values())
def test_wrapper_under_an_ordinary_trainer(wrapper):
    class Wraps(Module):
        def configure_optimizers(self):
            return wrapper(super().configure_optimizers(), self)

    module = Wraps()
    before = weights(module)
    with pytest.raises(ClosureError, match=r"PCStrategy"):
        trainer("auto").fit(module, loader(data()))
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize("zeroes", [True, False])
def test_a_loop_with_its_own_backward_under_manual_optimization(zeroes):
    """Lightning gives the optimizer a closure that does nothing."""

    class Manual(Module):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            if batch_idx == 0:
                optimizer.step(lambda: super(Manual, self).training_step(batch, batch_idx))
                self.before = weights(self)
                return
            if zeroes:
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

        def configure_optimizers(self):
            return IPC(super().configure_optimizers(), self)

    module = Manual()
    with pytest.warns(UserWarning, match="does not use what backward.. made. Write optimizer.step"):
        trainer("auto").fit(module, loader(data(4)))
    assert torch.equal(weights(module), module.before)


@pytest.mark.parametrize("wrapper", WRAPPERS.values())
def test_a_closure_that_gives_no_tensor(wrapper):
    model = mlp()
    optimizer = wrapper(torch.optim.SGD(model.parameters(), 0.1), model)
    before = weights(model)
    x, y = data()[0]
    for closure in (lambda: 3.0, lambda: (ce(model, x, y), 1), lambda: {"loss": 1}):
        with pytest.raises(ClosureError, match="Expected a loss tensor"):
            optimizer.step(closure)
    assert optimizer.step(lambda: None) is None
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("wrapper", WRAPPERS.values())
def test_a_closure_that_runs_the_model_and_gives_none(wrapper):
    model = mlp(nn.BatchNorm1d(H), nn.Dropout(0.5))
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = wrapper(sgd, model)
    x, y = data()[0]
    before = kept(model)

    def closure():
        ce(model, x, y)

    with pytest.raises(ClosureError, match=r"ran the model and returned nothing.*return loss"):
        optimizer.step(closure)
    assert_kept(model, before)
    assert sgd.state_dict()["state"] == {}


def test_an_error_of_the_users_own_passes_unchanged():
    model = mlp()
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        optimizer.step(lambda: model(torch.zeros(2, D + 1)).sum())


def test_errors_can_be_caught_by_their_usual_types():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(PlacementError, ValueError)
    assert issubclass(DivergenceError, FloatingPointError)
    for error in (RecordingError, ClosureError, UnsupportedError):
        assert issubclass(error, RuntimeError)


@pytest.mark.parametrize("algorithm", [PC, IPC, ZIL, EPC, IEPC])
def test_what_was_computed_before_the_closure_is_refused(algorithm):
    """Its nonlinearities hold no node: in it this would be plain backprop."""
    model, x, y = mlp(), torch.randn(4, D), torch.randint(C, (4,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = algorithm(torch.optim.SGD(model.parameters(), 0.1), model)
    features = model[:2](x)
    with pytest.raises(ClosureError, match=r"'0\.weight', '0\.bias' by .* before the forward"):
        optimizer.step(lambda: F.cross_entropy(model[2:](features), y))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    inputs = 2 * x.requires_grad_()  # of no parameter: a saliency map, say
    optimizer.step(lambda: F.cross_entropy(model(inputs), y))
    assert len(optimizer.report.nodes) == 2


def test_a_state_that_is_carried_over_must_be_detached():
    class Carries(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.Linear(2 * D, D), nn.Linear(D, C)
            self.state, self.detaches = torch.zeros(4, D), False

        def forward(self, x):
            self.state = torch.tanh(self.cell(torch.cat([x, self.state], 1)))
            output = self.head(self.state)
            if self.detaches:
                self.state = self.state.detach()
            return output

    model, x, y = Carries(), torch.randn(4, D), torch.randint(C, (4,))
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    with pytest.raises(ClosureError, match=r"'cell\.weight'.*detach what is carried over"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    model.state, model.detaches = model.state.detach(), True
    for _ in range(2):
        optimizer.step(lambda: F.cross_entropy(model(x), y))


def test_a_view_of_a_weight_made_at_first_is_the_weight():
    """A tied decoder."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(D, 3)
            self.decoder = self.encoder.weight.t()

        def forward(self, x):
            return F.linear(torch.tanh(self.encoder(x)), self.decoder)

    model, x = Tied(), torch.randn(4, D)
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)
    for _ in range(2):
        optimizer.step(lambda: F.mse_loss(model(x), x))
    assert optimizer.report.nodes == ["tanh"]


def test_another_model_may_have_worked_before():
    """A critic of what a generator made, which another optimizer trains."""
    generator, critic = mlp(), MLP((C, 5, 1))
    fake = generator(torch.randn(4, D))
    optimizer = PC(torch.optim.SGD(critic.parameters(), 0.1), critic)
    optimizer.step(lambda: F.mse_loss(critic(fake), torch.zeros(4, 1)))
    assert optimizer.report.nodes == ["1"]
