"""The wrappers are optimizers like any other: all that torch and Fabric do with one works."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from lightning_pc import StepReport
from lightning_pc.errors import ClosureError, ConfigError
from lightning_pc.optim import EPC, IEPC, IPC, PC, ZIL, PredictiveCoding
from tests.engine.lightning_problems import C, D, H, data, mlp, weights
from tests.engine.modules import MLP
from tests.engine.oracle import Explicit
from tests.engine.wrappers import WRAPPERS

FIXED = {
    PC: {"gamma": 0.1},
    IPC: {"gamma": 0.1},
    ZIL: {},
    EPC: {"gamma": 0.1},
    IEPC: {"gamma": 0.1},
}
every = pytest.mark.parametrize("wrapper", WRAPPERS.values())


def made(
    wrapper: type[PredictiveCoding], inner: Any = torch.optim.Adam, lr: float = 0.01, **kw
) -> tuple[nn.Module, PredictiveCoding]:
    model = mlp()
    return model, wrapper(inner(model.parameters(), lr=lr), model, **kw)


def step(model: nn.Module, optimizer: Any, index: int = 0) -> torch.Tensor:
    x, y = data()[index]
    return optimizer.step(lambda: F.cross_entropy(model(x), y))


@every
def test_is_an_optimizer_that_shares_everything(wrapper):
    model, optimizer = made(wrapper)
    inner = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults == inner.defaults
    step(model, optimizer)
    assert len(optimizer.state) == 6
    assert optimizer.state is inner.state
    assert repr(optimizer) == f"{wrapper.__name__}({inner!r})"
    shown = repr(wrapper(inner, model, value_nodes="linear", loss_terms=np.int64(3)))
    assert shown == f"{wrapper.__name__}({inner!r}, value_nodes='linear', loss_terms=3)"
    optimizer.param_groups[0]["lr"] = 0.5
    assert inner.param_groups[0]["lr"] == 0.5


@every
@pytest.mark.parametrize("gamma", ["fixed", "auto"])
def test_state_loads_into_the_plain_optimizer_and_back(wrapper, gamma):
    """Beside the wrapped optimizer's state there is the automatic gamma's alone: plain values."""
    fixed = FIXED[wrapper] if gamma == "fixed" else {}
    model, optimizer = made(wrapper, **fixed)
    step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    plain = torch.optim.Adam(model.parameters(), lr=1.0)
    automatic = gamma == "auto" and wrapper is not ZIL
    assert saved.keys() - plain.state_dict().keys() == ({"lightning_pc"} if automatic else set())
    kept = dict(saved.get("lightning_pc", {}))
    assert all(type(loss) is float for loss in kept.pop("loss_recent", []))
    assert {type(v) for v in kept.values()} <= {float, int, bool, str}
    plain.load_state_dict(saved)
    assert plain.param_groups[0]["lr"] == 0.01
    assert plain.state_dict().keys() == {"state", "param_groups"}
    other_model, other = made(wrapper, **fixed)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(plain.state_dict())
    if automatic:  # the plain optimizer has not kept it
        assert other.state_dict()["lightning_pc"]["looks"] == 0
        other.load_state_dict(saved)
    assert other.optimizer.state is other.state
    for _ in range(3):
        step(model, optimizer, 1)
        step(other_model, other, 1)
    assert torch.equal(weights(model), weights(other_model))


@every
def test_returns_the_loss_of_the_ordinary_forward(wrapper):
    model, optimizer = made(wrapper)
    x, y = data()[0]
    expected = F.cross_entropy(model(x), y)
    assert isinstance(optimizer.report, type(None))
    loss = step(model, optimizer)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    report = optimizer.report
    assert isinstance(report, StepReport)
    assert report.nodes == list(optimizer.values) == ["1", "3"]
    assert report.energy.shape == (report.steps, 2)
    assert report.loss[0] == expected
    assert min(report.learned.values()) >= 1


@every
def test_zero_grad(wrapper):
    model, optimizer = made(wrapper)
    step(model, optimizer)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())


@every
def test_old_gradients_do_not_leak_into_a_step(wrapper):
    runs = []
    for value in (None, 100.0):
        model, optimizer = made(wrapper, torch.optim.SGD)
        for p in model.parameters():
            p.grad = None if value is None else torch.full_like(p, value)
        step(model, optimizer)
        runs.append(weights(model))
    assert torch.equal(*runs)


@every
def test_parameters_of_other_optimizers_gain_the_last_gradient(wrapper):
    """As in a GAN: on top of what they had, of one evaluation, the last."""
    model, critic = mlp(), nn.Linear(C, 2)
    x, _ = data()[0]
    seen: list[list[torch.Tensor]] = []
    calls: list[torch.Tensor] = []
    critic.weight.register_hook(calls.append)
    for start in (None, 5.0):
        other = copy.deepcopy(model)
        mine = wrapper(torch.optim.SGD(other.parameters(), lr=0.01), other, **FIXED[wrapper])
        for p in critic.parameters():
            p.grad = None if start is None else torch.full_like(p, start)
        mine.step(lambda other=other: F.cross_entropy(critic(other(x)), torch.ones(len(x)).long()))
        seen.append([p.grad.clone() for p in critic.parameters()])
        assert len(calls) == len(seen)
    assert torch.equal(calls[-1], seen[0][0])
    for fresh, added in zip(*seen, strict=True):
        assert fresh.any()
        torch.testing.assert_close(added, fresh + 5.0)


@every
def test_a_loss_of_another_model_is_an_error(wrapper):
    model, optimizer = made(wrapper)
    other, before = copy.deepcopy(model), weights(model)
    with pytest.raises(ClosureError, match="none of the parameters that the optimizer holds"):
        step(other, optimizer)
    assert torch.equal(weights(model), before)
    step(model, optimizer)
    assert not torch.equal(weights(model), before)


@every
def test_add_param_group(wrapper):
    model = mlp()
    sgd = torch.optim.SGD(model[4].parameters(), lr=0.1)
    optimizer = wrapper(sgd, model)
    before = weights(model[:4])
    step(model, optimizer)
    assert torch.equal(weights(model[:4]), before)
    optimizer.add_param_group({"params": list(model[:4].parameters()), "lr": 0.05})
    assert [g["lr"] for g in sgd.param_groups] == [0.1, 0.05]
    step(model, optimizer)
    assert not torch.equal(weights(model[:4]), before)


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.1),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
}


@every
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("error::UserWarning")
def test_schedulers(wrapper, name):
    model, optimizer = made(wrapper)
    plain = torch.optim.Adam(mlp().parameters(), lr=0.01)
    pair = [(o, SCHEDULERS[name](o)) for o in (optimizer, plain)]
    rates: list[list[float]] = [[], []]
    for _ in range(6):
        step(model, optimizer)
        plain.step()
        for seen, (each, scheduler) in zip(rates, pair, strict=True):
            scheduler.step(*([1.0] if name == "plateau" else []))
            seen.append([each.param_groups[0]["lr"], each.param_groups[0].get("betas")])
    assert rates[0] == rates[1]
    assert optimizer.optimizer.param_groups[0]["lr"] == rates[0][-1][0] != 0.01


@every
def test_step_hooks(wrapper):
    model, optimizer = made(wrapper)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", type(o))))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", type(o))))
    optimizer.optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("inner"))
    step(model, optimizer)
    updates = optimizer.report.steps if wrapper in (IPC, IEPC) else 1
    assert seen == [("pre", wrapper), *["inner"] * updates, ("post", wrapper)]


@pytest.mark.filterwarnings("ignore:.*inference steps never reach")
@pytest.mark.parametrize("T", [3, 4, 6])  # of four nodes in a row
@pytest.mark.parametrize("how", ["gradients of zero", "in place"])
@pytest.mark.parametrize("parallel", [False, True])
def test_step_hooks_may_move_weights_that_no_error_has_reached(how, parallel, T):
    """Against a loop in which every weight shrinks at every step, errors there or not."""
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(4, 4), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    by_hand = copy.deepcopy(model)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    decay = {"weight_decay": 1.0} if how == "gradients of zero" else {}
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, **decay)

    def fill(optimizer, args, kwargs):
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    @torch.no_grad()
    def shrink(optimizer, args, kwargs):
        for p in model.parameters():
            p.mul_(0.9)

    if decay:
        sgd.register_step_pre_hook(fill)
    else:
        sgd.register_step_post_hook(shrink)
    optimizer = IPC(sgd, model, gamma=0.3, T=T, parallel=parallel)
    optimizer.step(lambda: F.cross_entropy(model(x), y))

    def forward(model, at, x, y):
        for layer in model:
            x = at(x) if isinstance(layer, nn.Tanh) else x
            x = layer(x)
        return F.cross_entropy(x, y, reduction="sum"), len(y)

    explicit, rate = Explicit(forward), 0.1
    for _ in range(T):
        free, terms = explicit.free_energy(by_hand, (x, y))
        values = explicit.values
        dx = torch.autograd.grad(free, values, retain_graph=True)
        dw = torch.autograd.grad(free / terms, [*by_hand.parameters()])
        with torch.no_grad():
            for value, slope in zip(values, dx, strict=True):
                value -= 0.3 * slope
            for p, slope in zip(by_hand.parameters(), dw, strict=True):
                start = p.clone()
                p -= rate * slope
                p -= rate * start if decay else 0.1 * p
    for mine, wanted in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-12)
    short = IPC(sgd, model, gamma=0.3, T=2)  # the lowest value is let go
    with pytest.raises(ConfigError, match="give T=3 or more"):
        short.step(lambda: F.cross_entropy(model(x), y))


@every
def test_state_dict_hooks_and_profiler(wrapper):
    model, optimizer = made(wrapper)
    with torch.profiler.profile() as profile:
        step(model, optimizer)
    names = {event.key for event in profile.key_averages()}
    assert f"Optimizer.step#{wrapper.__name__}.step" in names


@every
@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_with_its_model(wrapper, how):
    """A copy of model and optimizer goes on as the original does."""
    model, optimizer = made(wrapper)
    step(model, optimizer)
    other_model, other = how((model, optimizer))
    assert type(other) is wrapper
    for _ in range(2):
        step(model, optimizer, 1)
        step(other_model, other, 1)
    assert torch.equal(weights(model), weights(other_model))


@every
@pytest.mark.parametrize(
    "inner",
    [
        torch.optim.SGD,
        torch.optim.AdamW,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.NAdam,
        torch.optim.Adafactor,
        lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True, maximize=False),
        lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
        lambda p, lr: torch.optim.Adam([{"params": [q]} for q in p], lr=lr, amsgrad=True),
    ],
)
def test_any_optimizer(wrapper, inner):
    model, optimizer = made(wrapper, inner)
    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        assert closure is not None
        return super().step(closure)


class Repeats(torch.optim.SGD):
    def step(self, closure=None):
        closure()
        return super().step(closure)


@every
def test_optimizers_with_closures(wrapper):
    model, optimizer = made(wrapper, NeedsClosure)
    plain_model, plain = made(wrapper, torch.optim.SGD)
    assert step(model, optimizer) == step(plain_model, plain)
    assert torch.equal(weights(model), weights(plain_model))
    model, optimizer = made(wrapper, Repeats)
    before = weights(model)
    with pytest.raises(ValueError, match="Repeats evaluates its closure more than once"):
        step(model, optimizer)
    assert torch.equal(weights(model), before)


@every
def test_the_closure_may_do_all_that_a_closure_does(wrapper):
    """zero_grad, several forwards, in-place data, logging of floats."""
    model, optimizer = made(wrapper, **FIXED[wrapper])
    x, y = data()[0]
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + 0.1 * F.cross_entropy(model(x + 1), y)
        seen.append(loss.item())
        return loss

    first = optimizer.step(closure)
    assert seen[0] == float(first)
    assert len(seen) == 1


@every
def test_under_no_grad(wrapper):
    model, optimizer = made(wrapper)
    before = weights(model)
    with torch.no_grad():
        step(model, optimizer)
    assert not torch.equal(weights(model), before)


@every
def test_random_numbers_are_drawn_once(wrapper):
    model = mlp(nn.Dropout(0.5))
    optimizer = wrapper(torch.optim.SGD(model.parameters(), lr=0.0), model)
    torch.manual_seed(0)
    loss = step(model, optimizer)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    x, y = data()[0]
    assert torch.equal(loss, F.cross_entropy(model(x), y))
    assert torch.equal(after, torch.get_rng_state())


@every
def test_part_of_a_larger_program(wrapper):
    """The model is a part, a frozen head follows, and another optimizer has the rest."""
    body, head = MLP((D, H, H)), nn.Linear(H, C)
    head.requires_grad_(False)
    optimizer = wrapper(torch.optim.SGD(body.parameters(), lr=0.1), body)
    x, y = data()[0]
    before, frozen = weights(body), weights(head)
    for _ in range(10):
        loss = optimizer.step(lambda: F.cross_entropy(head(body(x)), y))
    assert not torch.equal(weights(body), before)
    assert torch.equal(weights(head), frozen)
    assert loss.isfinite()


@every
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_fabric(wrapper, precision):
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
    model = mlp()
    optimizer = wrapper(torch.optim.SGD(model.parameters(), lr=0.1), model)
    wrapped, fabric_optimizer = fabric.setup(model, optimizer)
    scheduler = lr_scheduler.StepLR(fabric_optimizer, 5, 0.5)
    x, y = data()[0]
    losses = []
    for _ in range(10):
        losses.append(float(fabric_optimizer.step(lambda: F.cross_entropy(wrapped(x), y))))
        scheduler.step()
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert optimizer.report.nodes == ["1", "3"]
    assert all(torch.finfo(x.dtype).bits >= 32 for x in optimizer.values.values())
    assert fabric_optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@every
def test_fabric_clips_and_saves(wrapper, tmp_path):
    fabric = L.Fabric(accelerator="cpu", devices=1)
    model, optimizer = made(wrapper)
    wrapped, fabric_optimizer = fabric.setup(model, optimizer)
    x, y = data()[0]
    fabric_optimizer.step(lambda: F.cross_entropy(wrapped(x), y))
    state = {"model": wrapped, "optimizer": fabric_optimizer}
    fabric.save(tmp_path / "state.ckpt", state)
    other, other_optimizer = made(wrapper)
    setup = fabric.setup(other, other_optimizer)
    fabric.load(tmp_path / "state.ckpt", dict(zip(state, setup, strict=True)))
    assert torch.equal(weights(other), weights(model))
    assert len(other_optimizer.state) == 6
