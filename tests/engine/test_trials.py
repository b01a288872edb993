"""What people do in and around a closure, and what once trained nothing, or something else."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pc.errors import ConfigError
from lightning_pc.optim import EPC, IEPC, IPC, PC
from tests.engine.lightning_problems import (
    data,
    mlp,
    trainer,
    weights,
)
from tests.engine.modules import MLP
from tests.engine.wrappers import every, learn
from tests.marks import mostly_slow

# Loops as long as they need ----------------------------------------------------------------------


class ODE(nn.Module):
    """Heun's method with an embedded Euler step: the error decides how many steps there are."""

    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(8, 16), nn.Linear(16, 3)
        self.f = MLP((16, 32, 16))
        self.steps = []

    def forward(self, x):
        h, t, dt, steps = self.inp(x), 0.0, 0.5, 0
        while t < 1 - 1e-6:
            dt, steps = min(dt, 1 - t), steps + 1
            k1 = self.f(h)
            k2 = self.f(h + dt * k1)
            error = float((dt / 2 * (k2 - k1)).detach().norm(dim=1).mean())
            if error < 0.02 or dt < 0.05:
                h, t, dt = h + dt / 2 * (k1 + k2), t + dt, dt * 1.5
            else:
                dt /= 2
        self.steps.append(steps)
        return self.out(h)


@pytest.mark.filterwarnings("ignore:Inference")
@pytest.mark.parametrize("kind", mostly_slow([PC, IPC, EPC, IEPC], PC, IPC))
def test_an_adaptive_solver_trains(kind):
    x = torch.randn(16, 8)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1).long()
    model = ODE()
    # iPC takes eight steps a batch, and its values hold none of them back.
    optimizer = kind(torch.optim.Adam(model.parameters(), 3e-3), model)
    losses = learn(optimizer, lambda: F.cross_entropy(model(x), y), 8)
    assert losses[-1] < losses[0] - 0.05
    assert len(model.steps) == 8
    assert len(set(model.steps)) > 1
    assert min(optimizer.report.learned.values()) > 0


@pytest.mark.parametrize("kind", [PC, IPC])
@pytest.mark.parametrize("value_nodes", [["inp"], ["f"]])
def test_nodes_at_and_around_an_adaptive_solver(value_nodes, kind):
    x, y = torch.randn(16, 8), torch.arange(16) % 3
    model = ODE()
    optimizer = kind(torch.optim.Adam(model.parameters(), 1e-3), model, value_nodes=value_nodes)
    losses = learn(optimizer, lambda: F.cross_entropy(model(x), y), 4)
    assert losses[-1] < losses[0]
    assert len(model.steps) == 4


class Unread(nn.Module):
    """A branch that is computed in any case, and read now and then."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, both):
        t, u = torch.tanh(self.a(x)), torch.tanh(self.b(x))
        return self.c(t + u) if both else self.c(u)


@every
@pytest.mark.parametrize("before", [(), (False,), (True, False), (False, True, False)])
def test_nodes_do_not_depend_on_earlier_batches(before, kind):
    """Which calls the loss reads is known only when the forward is over."""
    model, x, y = Unread(), torch.randn(6, 4), torch.arange(6) % 2
    optimizer = kind(torch.optim.SGD(model.parameters(), 0.1), model)
    for both in (*before, True):
        optimizer.step(lambda both=both: F.cross_entropy(model(x, both), y))
    assert optimizer.report.nodes == ["tanh", "tanh#2"]
    assert min(optimizer.report.learned.values()) > 0


@pytest.mark.parametrize("kind", [PC, IPC])
def test_nodes_do_not_depend_on_earlier_losses(kind):
    """Two losses of one forward take turns."""
    model, x, y = Unread(), torch.randn(6, 4), torch.arange(6) % 2
    optimizer = kind(torch.optim.SGD(model.parameters(), 0.1), model)

    def losses():
        return [F.cross_entropy(model(x, both), y) for both in (False, True)]

    for _ in range(2):
        optimizer.step(lambda: losses()[0])
        assert optimizer.report.nodes == ["tanh#2"]
        optimizer.step(lambda: losses()[1])
        assert optimizer.report.nodes == ["tanh#3", "tanh#4"]


# Optimizers that ask more ------------------------------------------------------------------------


class SAM(torch.optim.Optimizer):
    """Climbs along ``.grad``, asks for the gradient up there, goes back and steps."""

    def __init__(self, params, base, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base = base(self.param_groups, **kwargs)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        ours = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in ours]).norm() + 1e-12
        for p in ours:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad * float(self.param_groups[0]["rho"] / norm))
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p in self.state:
            p.copy_(self.state[p]["old"])
        self.base.step()
        self.zero_grad()


@every
def test_sharpness_aware_minimization_is_refused(kind):
    model, (x, y) = mlp(), data()[0]
    optimizer = kind(SAM(model.parameters(), torch.optim.SGD, lr=0.1), model)
    with pytest.raises(ConfigError, match=r"SAM evaluates its closure .* use an optimizer of one"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))


class Polyak(torch.optim.Optimizer):
    """Its step is as long as the loss that its closure returns is large."""

    def __init__(self, params, most=0.1):
        super().__init__(params, {"most": most})
        self.seen = []

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        self.seen.append(float(loss))
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            square = float(sum(p.grad.square().sum() for p in moving)) + 1e-8
            for p in moving:
                p.sub_(p.grad * min(float(loss) / square, group["most"]))
        return loss


@every
def test_an_optimizer_that_reads_its_loss_gets_that_of_the_forward(kind):
    model, (x, y) = mlp(), data()[0]
    optimizer = kind(Polyak(model.parameters()), model)
    losses = learn(optimizer, lambda: F.cross_entropy(model(x), y), 8)
    assert losses[-1] < losses[0]
    updates = 8 if kind in (IPC, IEPC) else 1
    assert optimizer.optimizer.seen == [loss for loss in losses for _ in range(updates)]


class Modes(torch.optim.SGD):
    """Schedule-free ones must be told in which mode they are."""

    mode = None

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


@every
def test_modes_of_an_optimizer_are_handed_on(kind):
    model = mlp()
    sgd = Modes(model.parameters(), lr=0.1)
    optimizer = kind(sgd, model)
    optimizer.train()
    assert sgd.mode == optimizer.mode == "train"
    optimizer.eval()
    assert sgd.mode == optimizer.mode == "eval"
    with pytest.raises(AttributeError, match="no attribute 'pause'"):
        optimizer.pause()


# Several optimizers, one module ------------------------------------------------------------------


class GAN(L.LightningModule):
    """As Lightning's example: closures that log."""

    def __init__(self, wrap):
        super().__init__()
        self.automatic_optimization, self.wrap, self.first = False, wrap, []
        self.gen = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 2))
        self.dis = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def configure_optimizers(self):
        parts = (self.gen, self.dis)
        adams = [torch.optim.Adam(p.parameters(), 1e-3, betas=(0.5, 0.9)) for p in parts]
        return [self.wrap(adam, self) for adam in adams]

    def training_step(self, batch, batch_idx):
        (x,), z = batch, torch.randn(len(batch[0]), 4)
        ones, zeros = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        bce = F.binary_cross_entropy_with_logits

        def generator():
            loss = bce(self.dis(self.gen(z)), ones)
            self.log("g_loss", loss, on_step=False, on_epoch=True)
            self.log("g_batches", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
            return loss

        def discriminator():
            loss = 0.5 * (bce(self.dis(x), ones) + bce(self.dis(self.gen(z).detach()), zeros))
            self.log("d_batches", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
            return loss

        for optimizer, closure in zip(self.optimizers(), (generator, discriminator), strict=True):
            self.toggle_optimizer(optimizer)
            loss = optimizer.step(closure)
            if closure is generator:
                self.first.append(float(loss))
            self.untoggle_optimizer(optimizer)


@every
def test_a_closure_in_manual_optimization_logs_one_value_a_batch(kind):
    module = GAN(kind)
    before = [weights(module.gen), weights(module.dis)]
    fit = trainer("auto")
    fit.fit(module, DataLoader(TensorDataset(torch.randn(24, 2) * 0.1 + 1), 8))
    logged = {name: float(value) for name, value in fit.callback_metrics.items()}
    assert logged == {
        "g_loss": pytest.approx(sum(module.first) / 3),
        "g_batches": 3,
        "d_batches": 3,
    }
    for was, part in zip(before, (module.gen, module.dis), strict=True):
        assert not torch.equal(was, weights(part))
