"""What other tools do to a module: Lightning's, compilers, quantization, Accelerate."""

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
from lightning_pc.optim import IPC, PC
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
from tests.engine.wrappers import every, learn
from tests.marks import mostly_slow

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
