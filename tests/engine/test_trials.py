"""What people do in and around a closure, and what once trained nothing, or something else."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import pytorch_lightning
import torch
import torch.ao.quantization as quantization
import torch.nn.functional as F
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_pc
from lightning_pc.errors import ConfigError
from lightning_pc.optim import EPC, IEPC, IPC, PC, ZIL
from tests.compare import twin
from tests.engine.lightning_problems import (
    ALGORITHMS,
    D,
    Module,
    data,
    loader,
    mlp,
    trainer,
    weights,
)
from tests.engine.modules import MLP
from tests.marks import mostly_slow

WRAPPERS = [PC, IPC, ZIL, EPC, IEPC]
every = pytest.mark.parametrize("kind", WRAPPERS)


def learn(optimizer, loss_of, batches):
    return [float(optimizer.step(loss_of)) for _ in range(batches)]


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


# Lightning's tools -------------------------------------------------------------------------------


class Regression(L.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.lr, self.optimizer = 1e-3, optimizer
        self.net = nn.Sequential(
            *(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        )

    def training_step(self, batch):
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), self.lr)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("algorithm", mostly_slow(["ipc", "pc"], "pc"))
def test_a_learning_rate_finder_gets_its_curve(algorithm, optimizer, tmp_path):
    x = torch.randn(300, 10) * 3
    y = (x[:, :1] * x[:, 1:2]).sin() * 5 + x[:, 2:3]
    module = Regression(optimizer)
    before = weights(module)
    fit = trainer(algorithm, max_epochs=3, default_root_dir=tmp_path)
    batches = DataLoader(TensorDataset(x, y), 25, shuffle=True)
    found = Tuner(fit).lr_find(module, batches, num_training=40)
    assert 1e-7 < found.suggestion() < 1
    assert module.lr == found.suggestion()
    torch.testing.assert_close(weights(module), before)
    assert not fit.should_stop
    fit.fit(module, batches)
    assert fit.global_step == 36
    assert weights(module).isfinite().all()


class PlainModule(pytorch_lightning.LightningModule):
    """Of the other package."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def test_the_package_pytorch_lightning_is_told_from_lightning():
    with pytest.raises(Exception, match=r"lightning\.pytorch: write 'import lightning\.pytorch"):
        pytorch_lightning.Trainer(strategy=lightning_pc.PCStrategy("ipc"), logger=False)
    with pytest.raises(TypeError, match="LightningModule"):
        trainer("ipc").fit(PlainModule(), loader(data()))


class Semi(Module):
    """Draws its second batch itself."""

    def on_train_start(self):
        unlabelled = torch.arange(60.0 * D).view(60, D) / 60
        self.unlabelled = iter(DataLoader(TensorDataset(unlabelled), 2))

    def training_step(self, batch, batch_idx):
        (x, y), (u,) = batch, next(self.unlabelled)
        consistency = F.cross_entropy(self(u + 0.1), self(u).detach().softmax(1))
        return F.cross_entropy(self(x), y) + 0.1 * consistency


@pytest.mark.filterwarnings("ignore:Cannot read off the training loss")
@pytest.mark.parametrize("algorithm", ALGORITHMS[:2] + ALGORITHMS[3:])
def test_an_iterator_in_training_step_gives_one_batch_a_step(algorithm):
    module = Semi()
    trainer(algorithm).fit(module, loader(data(3)))
    (u,) = next(module.unlabelled)
    assert float(u[0, 0]) * 60 / D == pytest.approx(3 * 2)


# What is done to a module or its functions -------------------------------------------------------


def gated(h):
    return F.gelu(h) * torch.sigmoid(h)


def rms(h):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


class Net(nn.Module):
    def __init__(self, act, norm):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.act, self.norm = act, norm

    def forward(self, x):
        return self.c(torch.tanh(self.b(self.norm(self.act(self.a(x))))))


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("kind", [PC, IPC])
def test_compiled_functions_train_as_they_are_written(kind, fullgraph):
    x, y = torch.randn(16, 8), torch.randint(0, 4, (16,))

    def compiled(function):
        return torch.compile(function, backend="eager", fullgraph=fullgraph)

    def trained(act=gated, norm=rms, loss=F.cross_entropy):
        torch._dynamo.reset()
        model = Net(act, norm)
        optimizer = kind(torch.optim.Adam(model.parameters(), 1e-3), model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses = learn(optimizer, lambda: loss(model(x), y), 4)
        return losses, optimizer.report.nodes, weights(model)

    losses, nodes, expected = trained()
    for pieces in (
        {"act": compiled(gated)},
        {"norm": compiled(rms)},
        {"loss": compiled(F.cross_entropy)},
        {"act": compiled(gated), "norm": compiled(rms), "loss": compiled(F.cross_entropy)},
    ):
        now = trained(**pieces)
        assert now[:2] == (losses, nodes)
        assert torch.equal(now[2], expected)
    model, seen = Net(compiled(gated), rms), []
    model(x).sum().backward()  # and outside of a step it is compiled as ever
    with torch.compiler.set_stance("fail_on_recompile"):
        seen.append(model.act(model.a(x)))
    torch.testing.assert_close(seen[0], gated(model.a(x)))


class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.fc = nn.Linear(4 * 36, 4)

    def forward(self, x):
        h = self.relu(self.bn(self.conv(self.quant(x))))
        return self.dequant(self.fc(h.flatten(1)))


def quantized():
    torch.manual_seed(0)
    model = Quantized().train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.fuse_modules_qat(model, [["conv", "bn", "relu"]], inplace=True)
    return quantization.prepare_qat(model, inplace=True)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:Please use quant_min")
@every
def test_quantization_aware_training(kind):
    """Observers' buffers are empty before the first forward, which resizes them in place."""
    y = torch.arange(32) % 4
    x = torch.randn(32, 1, 8, 8) * 0.3
    x += F.one_hot(y, 4).view(32, 1, 4, 1).repeat_interleave(2, 2).float()
    model = quantized()
    optimizer = kind(torch.optim.Adam(model.parameters(), 2e-3), model)
    losses = learn(optimizer, lambda: F.cross_entropy(model(x), y), 20)
    assert losses[-1] < 0.7 * losses[0]
    assert min(optimizer.report.learned.values()) > 0
    assert int(model.conv.bn.num_batches_tracked) == 20


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:Please use quant_min")
@every
def test_observers_see_each_batch_once(kind):
    x, y = torch.randn(16, 1, 8, 8), torch.arange(16) % 4
    model = quantized()
    other = twin(model)
    optimizer = kind(torch.optim.SGD(model.parameters(), 0.0), model)
    for factor in (1.0, 2.0):
        optimizer.step(lambda factor=factor: F.cross_entropy(model(factor * x), y))
        other(factor * x)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


class Grows(nn.Module):
    """A buffer that the first forward makes longer, and that data fill."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x):
        if not len(self.seen):
            self.seen.resize_(4).fill_(1.0)
        self.seen += 1
        return self.net(x) * self.seen.mean() / self.seen.mean()


@every
def test_a_buffer_that_grows_in_the_first_forward(kind):
    model, (x, y) = Grows(), data()[0]
    optimizer = kind(torch.optim.SGD(model.parameters(), 0.05), model)
    losses = learn(optimizer, lambda: F.cross_entropy(model(x), y), 6)
    assert losses[-1] < losses[0]
    assert model.seen.tolist() == [7.0] * 4


# Accelerate --------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    state = pytest.importorskip("accelerate.state")

    def reset():
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()

    reset()
    yield lambda batches: accelerate.Accelerator(cpu=True, gradient_accumulation_steps=batches)
    reset()


def accelerated(accelerator, kind, batches):
    accelerator = accelerator(batches)
    model, seen = mlp(), []
    wrapped = kind(torch.optim.SGD(model.parameters(), 0.1), model)
    x, y = (torch.cat(parts) for parts in zip(*data(4), strict=True))
    model, optimizer, batches = accelerator.prepare(
        model, wrapped, DataLoader(TensorDataset(x, y), 4)
    )
    for x, y in batches:
        with accelerator.accumulate(model):

            def closure(x=x, y=y):
                seen.append(len(x))
                return F.cross_entropy(model(x), y)

            optimizer.step(closure)
    return seen, model


@every
def test_accelerate_trains_on_every_batch(accelerator, kind):
    seen, model = accelerated(accelerator, kind, 1)
    assert seen == [4] * 4
    expected = mlp()
    optimizer = kind(torch.optim.SGD(expected.parameters(), 0.1), expected)
    for x, y in data(4):
        optimizer.step(lambda x=x, y=y: F.cross_entropy(expected(x), y))
    assert torch.equal(weights(model), weights(expected))


@every
def test_accelerate_may_not_accumulate(accelerator, kind):
    with pytest.raises(ConfigError, match=r"Accelerate .* set gradient_accumulation_steps=1"):
        accelerated(accelerator, kind, 2)
