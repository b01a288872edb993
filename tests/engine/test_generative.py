"""Latent variables and inference in a trained model, against closed forms and by hand."""

from __future__ import annotations

import copy
import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pc import EnergyMonitor, PCStrategy, infer
from lightning_pc.losses import squared_error
from lightning_pc.nn import Latent
from lightning_pc.optim import IPC, PC
from tests.engine.decoders import Decoder, Linear, made, noise, posterior
from tests.engine.lightning_problems import trainer


@pytest.mark.parametrize("start", ["zeros", "normal"])
@pytest.mark.parametrize("gamma", ["auto", 0.2])
def test_the_posterior_mean_of_a_linear_model(gamma, start):
    model, y = made(Linear, start=start), noise(7, 5)
    found = infer(model, lambda: (squared_error(out := model(7), y), out), gamma=gamma)
    mean = posterior(model, y)
    assert found.converged
    assert torch.allclose(found.values["z"], mean, atol=1e-6, rtol=0)
    assert torch.allclose(found.output, model.a(mean), atol=1e-6, rtol=0)
    assert float(found.loss) == pytest.approx(float(squared_error(found.output, y)))
    assert not found.output.requires_grad
    assert found.report.steps < (20 if gamma == "auto" else 500)


def test_without_a_prior_it_is_least_squares():
    model, y = made(Linear, prior=False), noise(7, 5)
    found = infer(model, lambda: squared_error(model(7), y))
    W, b = model.a.weight.detach(), model.a.bias.detach()
    assert torch.allclose(found.values["z"], (y - b) @ torch.linalg.pinv(W).T, atol=1e-6, rtol=0)
    assert found.output is None
    assert float(found.report.peak_energy["z"]) == 0


@pytest.mark.parametrize("free", [False, True])
def test_two_layers(free):
    """The block system of both values; without the energy of the second it is another."""
    model, y = made(Linear, deep=True), noise(7, 8)
    given = {"free": ["a"]} if free else {}
    found = infer(model, lambda: squared_error(model(7), y), value_nodes="modules", **given)
    (W, b), (V, c) = ((m.weight.detach(), m.bias.detach()) for m in (model.a, model.b))
    held = 0.0 if free else 1.0
    one, two = torch.eye(3).double(), torch.eye(5).double()
    top = torch.cat([one + held * W.T @ W, -held * W.T], 1)
    low = torch.cat([-held * W, held * two + V.T @ V], 1)
    right = torch.cat([(-held * W.T @ b).expand(7, 3), held * b + (y - c) @ V], 1)
    solved = torch.linalg.solve(torch.cat([top, low]), right.T).T
    assert torch.allclose(found.values["z"], solved[:, :3], atol=1e-6, rtol=0)
    assert torch.allclose(found.values["a"], solved[:, 3:], atol=1e-6, rtol=0)


def test_what_a_mask_leaves_out_is_completed():
    model, y = made(Linear), noise(7, 5)
    seen = torch.tensor([True, True, False, True, False])
    found = infer(
        model, lambda: (squared_error((out := model(7)) * seen, y * seen), out), loss_terms=7
    )
    mean = posterior(model, y, seen)
    assert torch.allclose(found.values["z"], mean, atol=1e-6, rtol=0)
    assert torch.allclose(found.output[:, ~seen], model.a(mean)[:, ~seen], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [PC, IPC])
def test_weights_span_the_subspace_of_probabilistic_pca(kind):
    torch.manual_seed(0)
    causes, mixed = torch.randn(400, 3).double(), torch.randn(3, 8).double()
    x = causes @ mixed + 0.1 * torch.randn(400, 8).double()
    x = x - x.mean(0)
    model = nn.ModuleDict({"z": Latent(3), "w": nn.Linear(3, 8, bias=False)}).double()
    optimizer = kind(torch.optim.SGD(model.parameters(), 0.1), model)
    for _ in range(200):
        optimizer.step(lambda: squared_error(model["w"](model["z"](400)), x))
    principal = torch.linalg.svd(x, full_matrices=False).Vh[:3].T
    learned = torch.linalg.qr(model["w"].weight.detach()).Q
    cosines = torch.linalg.svdvals(principal.T @ learned).clamp(max=1.0)
    assert float(cosines.arccos().max()) < 0.01


# By hand ----------------------------------------------------------------------------------------


def by_hand(model, z, y, T, incremental, rate=0.05, gamma=0.1):
    """Values and weights by autograd of the whole F, all at once."""
    first, _, last = model.net
    h, terms = first(z).detach(), len(y)
    parameters = [*model.net.parameters()]
    for t in range(T):
        z, h = z.detach().requires_grad_(), h.detach().requires_grad_()
        loss = 0.5 * (last(torch.tanh(h)) - y).square().sum()
        energy = 0.5 * z.square().sum() + 0.5 * (h - first(z)).square().sum()
        (*moves,) = torch.autograd.grad(loss + energy, (z, h), retain_graph=True)
        if incremental or t == T - 1:
            gradients = torch.autograd.grad((loss + energy) / terms, parameters)
            with torch.no_grad():
                for p, gradient in zip(parameters, gradients, strict=True):
                    p -= rate * gradient
        if incremental or t < T - 1:
            z, h = z - gamma * moves[0], h - gamma * moves[1]
    return z.detach()


@pytest.mark.parametrize("samples", [None, 9])
@pytest.mark.parametrize("start", ["zeros", "normal"])
@pytest.mark.parametrize("kind", [PC, IPC])
@pytest.mark.parametrize("how", [{}, {"compile": {"backend": "eager"}}])
def test_as_by_hand(kind, start, samples, how):
    model = made(Decoder, samples=samples, start=start, seed=3)
    other, y = copy.deepcopy(model), noise(5, 6)
    optimizer = kind(torch.optim.SGD(model.parameters(), 0.05), model, gamma=0.1, T=6, **how)
    numbers = torch.tensor([8, 0, 3, 4, 1])
    for batch in range(4):
        torch.manual_seed(batch)
        optimizer.step(lambda: squared_error(model(5 if samples is None else numbers), y))
        torch.manual_seed(batch)
        with torch.no_grad():
            z = other.z(5 if samples is None else numbers)
        ended = by_hand(other, z, y, 6, kind is IPC)
        if samples:
            other.z.keep(numbers, ended)
        assert torch.allclose(optimizer.values["z"], ended, atol=1e-12, rtol=0)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-12, rtol=0), name
    if samples:
        assert torch.allclose(model.z.values, other.z.values, atol=1e-12, rtol=0)
        begun, others = made(Decoder, samples=9, start=start, seed=3), [2, 5, 6, 7]
        assert torch.equal(model.z.values[others], begun.z.values[others])


# Samples by number ------------------------------------------------------------------------------


class Generative(L.LightningModule):
    def __init__(self, samples=40):
        super().__init__()
        torch.manual_seed(0)
        self.net = Decoder(samples=samples)

    def training_step(self, batch, _):
        number, x = batch
        return squared_error(self.net(number), x)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def numbered(workers=0):
    x = torch.randn(40, 6, generator=torch.manual_seed(2))
    order = torch.randperm(40, generator=torch.manual_seed(7)).tolist()
    data = TensorDataset(torch.arange(40), x)
    return DataLoader(data, 10, sampler=order, num_workers=workers)


@pytest.mark.parametrize("algorithm", ["pc", "ipc"])
def test_the_trainer_goes_on_to_the_bit(algorithm, tmp_path):
    whole, half = Generative(), Generative()
    monitor, loader = EnergyMonitor(), numbered()
    fit = trainer(algorithm, max_epochs=4, callbacks=[monitor])
    fit.fit(whole, loader)
    first = trainer(algorithm, max_epochs=2)
    again = numbered()
    first.fit(half, again)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Generative()
    second = trainer(algorithm, max_epochs=4)
    second.fit(resumed, again, ckpt_path=tmp_path / "half.ckpt")
    assert "net.z.values" in whole.state_dict()
    assert whole.net.z.values.abs().amin() > 0
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_strategy_by_name_says_what_to_do():
    module = Generative()
    fit = trainer(PCStrategy(), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"'net\.z' is a Latent"):
        fit.fit(module, numbered())


def test_workers_and_order_leave_samples_alone():
    found = []
    for workers in (0, 2):
        module = Generative()
        trainer("pc", max_epochs=2).fit(module, numbered(workers))
        found.append(module.net.z.values.clone())
    assert torch.equal(*found)


def test_many_samples_cost_memory_for_their_values_alone():
    model = Decoder(samples=100_000)
    assert model.z.values.nbytes == 100_000 * 3 * 4
    optimizer = PC(torch.optim.Adam(model.parameters(), 1e-2), model)
    numbers, y = torch.arange(5), torch.randn(5, 6)
    optimizer.step(lambda: squared_error(model(numbers), y))
    before = model.z.values
    optimizer.step(lambda: squared_error(model(numbers), y))
    assert model.z.values is before
    assert int(before.any(1).sum()) == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PC, IPC])
def test_digits_are_told_by_sixteen_causes(kind):
    """100 digits, 150 epochs, all defaults."""
    x = torch.tensor(load_digits().data[:100] / 16, dtype=torch.float32)
    torch.manual_seed(0)
    model = Decoder(16, 64, 64)
    optimizer = kind(torch.optim.Adam(model.parameters(), 1e-2), model)
    order = random.Random(0)
    for _ in range(150):
        numbers = [*range(100)]
        order.shuffle(numbers)
        for some in np.array_split(np.array(numbers), 5):
            optimizer.step(lambda: squared_error(model(len(some)), x[some]))  # noqa: B023
    found = infer(model, lambda: (squared_error(out := model(100), x), out))
    assert float((found.output - x).square().mean()) < 0.2 * float(x.var(0, False).mean())
