"""Latent variables and inference in a trained model, against closed forms and by hand."""

from __future__ import annotations

import copy
import math
import random
import re

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pc import EnergyMonitor, PCStrategy, describe, explain, infer
from lightning_pc.errors import (
    ClosureError,
    ConfigError,
    DivergenceError,
    PlacementError,
    RecordingError,
    UnsupportedError,
)
from lightning_pc.losses import squared_error
from lightning_pc.nn import Latent
from lightning_pc.optim import EPC, IPC, PC, ZIL, PredictiveCoding
from tests.engine.lightning_problems import trainer
from tests.engine.modules import MLP


class Linear(nn.Module):
    """Causes, one or two linear layers, data."""

    def __init__(self, deep=False, **latent):
        super().__init__()
        self.z, self.a = Latent(3, **latent), nn.Linear(3, 5)
        self.b = nn.Linear(5, 8) if deep else nn.Identity()

    def forward(self, which):
        return self.b(self.a(self.z(which)))


class Decoder(nn.Module):
    def __init__(self, size=3, hidden=7, out=6, **latent):
        super().__init__()
        self.z = Latent(size, **latent)
        self.net = MLP((size, hidden, out))

    def forward(self, which):
        return self.net(self.z(which))


def made(kind, *args, seed=0, **settings):
    torch.manual_seed(seed)
    return kind(*args, **settings).double()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.manual_seed(seed)).double()


# Closed forms -----------------------------------------------------------------------------------


def posterior(model, y, seen=None):
    """Mean of the causes: (I + W'W)^-1 W'(y - b), of the outputs that are seen."""
    W, b = model.a.weight.detach(), model.a.bias.detach()
    if seen is not None:
        W, b, y = W[seen], b[seen], y[:, seen]
    return torch.linalg.solve(torch.eye(3).double() + W.T @ W, W.T @ (y - b).T).T


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


# Nothing is left behind -------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.z, self.a = Latent(3, samples=9), nn.Linear(3, 6)
        self.norm, self.drop, self.b = nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 4)

    def forward(self, which):
        return self.b(self.drop(torch.relu(self.norm(self.a(self.z(which))))))


@pytest.mark.parametrize("train", [True, False])
def test_infer_leaves_all_as_it_was(train):
    model = made(Normed).train(train)
    model.a.weight.grad = torch.ones_like(model.a.weight)
    state, y = copy.deepcopy(model.state_dict()), noise(5, 4)
    drawn = torch.get_rng_state()
    with torch.no_grad():
        found = infer(model, lambda: squared_error(model(torch.arange(5)), y))
    assert found.values["z"].abs().sum() > 0
    assert model.training is train
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(model.a.weight.grad, torch.ones_like(model.a.weight))
    assert model.b.weight.grad is None
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_models_are_inferred():
    model, y = made(Linear).requires_grad_(False), noise(7, 5)
    found = infer(model, lambda: squared_error(model(7), y))
    assert torch.allclose(found.values["z"], posterior(model, y), atol=1e-6, rtol=0)


def test_a_hidden_layer_of_a_classifier_is_freed():
    """A node that no prediction holds goes where the loss is least."""
    torch.manual_seed(0)
    net = MLP((4, 8, 3)).double()
    x, y = noise(5, 4), torch.randint(3, (5,))
    held, freed = (
        infer(net, lambda: F.cross_entropy(net(x), y), free=names, T=50) for names in ((), ("1",))
    )
    assert float(freed.loss) < 0.5 * float(held.loss) < float(F.cross_entropy(net(x), y))
    assert held.report.peak_energy["1"] > 0 == freed.report.peak_energy["1"]


def test_a_nonlinearity_of_the_causes_needs_no_other_value():
    """Eq. 1 of the paper: mu = W f(x)."""
    model = nn.ModuleDict({"z": Latent(3), "f": nn.Tanh(), "w": nn.Linear(3, 5)}).double()
    y = noise(4, 5)
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model, gamma=0.1)
    for _ in range(3):
        optimizer.step(lambda: squared_error(model["w"](model["f"](model["z"](4))), y))
    assert optimizer.report.nodes == ["z"]
    assert optimizer.values["z"].abs().min() > 0


# Whether F has converged ------------------------------------------------------------------------


def test_what_is_no_longer_finite_is_an_error():
    model, y = made(Decoder), noise(5, 6)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(DivergenceError):
        infer(model, lambda: squared_error(model(5), y), gamma=10.0)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", ["auto", 0.2, 0.02, 1e-6])
def test_converged_means_that_values_are_where_f_is_least(gamma, dtype):
    model = made(Linear).to(dtype)
    y = noise(7, 5).to(dtype)
    found = infer(model, lambda: squared_error(model(7), y), gamma=gamma, T=2000)
    mean = posterior(model.double(), y.double())
    far = (found.values["z"].double() - mean).norm() / mean.norm()
    # F lies above its least by half the squared slope at most, so by 4 eps F.
    assert found.converged is (gamma != 1e-6)
    assert bool(far < 3 * math.sqrt(8 * torch.finfo(dtype).eps)) is found.converged


def test_a_decoder_that_bends_f_much():
    torch.manual_seed(0)

    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.z, self.a, self.b = Latent(8), nn.Linear(8, 16), nn.Linear(16, 16)
            self.c = nn.Linear(16, 6)

        def forward(self, n):
            return self.c(torch.square(self.b(torch.square(self.a(self.z(n))))))

    model, y = Squares().double(), 3 * noise(5, 6)
    found = infer(model, lambda: squared_error(model(5), y), value_nodes="linear")
    assert float(found.report.free_energy[-1]) < 0.9 * float(found.report.free_energy[0])


def test_any_optimizer_of_values():
    model, y = made(Linear), noise(7, 5)
    found = infer(
        model,
        lambda: squared_error(model(7), y),
        inference=lambda values: torch.optim.Adam(values, 0.02),
        T=1500,
    )
    assert torch.allclose(found.values["z"], posterior(model, y), atol=1e-3, rtol=0)


def test_it_says_what_inference_mode_forbids():
    model = made(Linear)
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"Trainer.inference_mode=False"):
        infer(model, lambda: squared_error(model(7), torch.zeros(7, 5).double()))


def test_a_frozen_model_without_causes():
    torch.manual_seed(0)
    net = MLP((4, 8, 3)).double()
    x, y = noise(5, 4), torch.randint(3, (5,))
    free = infer(net, lambda: F.cross_entropy(net(x), y), T=20)
    frozen = infer(net.requires_grad_(False), lambda: F.cross_entropy(net(x), y), T=20)
    assert torch.equal(free.values["1"], frozen.values["1"])
    assert not any(p.requires_grad for p in net.parameters())


def test_weightless_calls_of_causes_hold_no_other_value():
    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.z, self.w = Latent(2, 3), nn.Linear(6, 5)

        def forward(self, n):
            return self.w(torch.tanh(self.z(n).view(n, 6) * 1.0))

    model, y = made(Shaped), noise(4, 5)
    for _ in range(2):
        assert list(infer(model, lambda: squared_error(model(4), y)).values) == ["z"]


def test_draws_of_a_seed_go_on_where_they_were():
    model, y = made(lambda: Decoder(start="normal", seed=3)), noise(5, 6)
    other = copy.deepcopy(model)
    infer(model, lambda: squared_error(model(5), y))
    assert torch.equal(model.eval()(5), other.eval()(5))
    state = copy.deepcopy(model.state_dict())
    following = model(5)
    again = made(lambda: Decoder(start="normal", seed=4))
    again.load_state_dict(state)
    assert torch.equal(again.eval()(5), following)


@pytest.mark.parametrize("beta", [-0.3, (0.3, -0.3)])
def test_causes_of_other_data_are_refused(beta):
    model = Decoder()
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model, beta=beta)
    with pytest.raises(ConfigError, match="'z' is a Latent: below 0 beta"):
        optimizer.step(lambda: squared_error(model(3), torch.zeros(3, 6)))


def test_a_latent_of_nobody():
    latent, net = Latent(3), MLP((3, 4, 6))
    optimizer = PC(torch.optim.SGD(net.parameters(), 0.1), net)
    with pytest.raises(RecordingError, match="no part of the model"):
        optimizer.step(lambda: squared_error(net(latent(3)), torch.zeros(3, 6)))


# Words ------------------------------------------------------------------------------------------


def test_describe_and_explain_show_it():
    model, y = made(Decoder), noise(5, 6)
    how = {"algorithm": "pc", "print_table": False}
    shown = describe(model, lambda: squared_error(model(5), y), **how)
    console = Console(width=100)
    with console.capture() as printed:
        console.print(shown)
    assert re.search(r"z +│ 5x3 +│ gaussian │ none", printed.get())
    assert [(row.name, row.shape, row.depth) for row in shown.rows] == [
        ("z", (5, 3), 2),
        ("net.1", (5, 7), 1),
    ]
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.01), model)
    optimizer.step(lambda: squared_error(model(5), y))
    assert "healthy" in explain(optimizer)
    assert optimizer.report.loss_terms == 5


def test_squared_error():
    out, y = noise(5, 6, 2), noise(5, 6, 2, seed=2)
    assert float(squared_error(out, y)) == pytest.approx(float((out - y).square().sum()) / 10)
    assert float(squared_error(out, y, "sum")) == pytest.approx(float((out - y).square().sum()) / 2)
    with pytest.raises(ConfigError, match=r"shape \(5, 6, 2\), the target \(5, 6\)"):
        squared_error(out, y[..., 0])
    with pytest.raises(ConfigError, match="expected 'mean'"):
        squared_error(out, y, "none")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (((), {}), "expected the sizes"),
        (((0,), {}), "expected the sizes"),
        (((3,), {"samples": 0}), "samples=0"),
        (((3,), {"start": "ones"}), "expected 'zeros' or 'normal'"),
        (((3,), {"prior": "no"}), "prior='no'"),
        (((3,), {"seed": "a"}), "seed='a'"),
    ],
)
def test_a_wrong_latent(given, why):
    with pytest.raises(ConfigError, match=why):
        Latent(*given[0], **given[1])


@pytest.mark.parametrize(
    ("samples", "which", "why"),
    [
        (None, torch.arange(3), r"called with a batch size.*tensor of shape \(3,\)"),
        (None, 0, "called with a batch size"),
        (9, 5, "keeps the values of 9 samples.*not with 5"),
        (9, torch.zeros(3), "whole numbers"),
        (9, torch.tensor([1, 9]), "numbered from 0 to 8.*asked for 1 to 9"),
        (9, torch.tensor([-1]), "asked for -1"),
        (9, torch.tensor([2, 2]), "given a number twice"),
        (9, torch.tensor([], dtype=torch.long), "given no number"),
    ],
)
def test_a_wrong_call(samples, which, why):
    model = Decoder(samples=samples)
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)
    with pytest.raises(ConfigError, match=why):
        optimizer.step(lambda: squared_error(model(which), torch.zeros(3, 6)))


def test_backprop_is_told():
    model = Decoder()
    with pytest.raises(UnsupportedError, match="inferred by predictive coding"):
        model(3)
    assert torch.equal(model.eval()(3), model.net(torch.zeros(3, 3)))
    with torch.no_grad():
        assert model.train()(3).shape == (3, 6)


@pytest.mark.parametrize("kind", [PredictiveCoding, EPC, ZIL])
def test_algorithms_that_need_a_prediction(kind):
    model = Decoder()
    state = copy.deepcopy(model.state_dict())
    optimizer = kind(torch.optim.SGD(model.parameters(), 0.1), model)
    with pytest.raises(ConfigError, match=r"'z' is a Latent.*algorithm='pc' or 'ipc'"):
        optimizer.step(lambda: squared_error(model(3), torch.zeros(3, 6)))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_places_where_nothing_can_be_inferred():
    model = Decoder()
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)

    def within_no_grad():
        with torch.no_grad():
            z = model.z(3)
        return squared_error(model.net(z), torch.zeros(3, 6))

    def unread():
        model.z(3)
        return squared_error(model.net(torch.ones(3, 3)), torch.zeros(3, 6))

    with pytest.raises(RecordingError, match=r"'z' is a Latent.*within torch.no_grad"):
        optimizer.step(within_no_grad)
    with pytest.raises(PlacementError, match="'z' is a Latent that is not read by the loss"):
        optimizer.step(unread)


def test_kept_values_are_those_of_one_batch():
    model = Decoder(samples=9)
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.01), model, gamma=0.1, reset="never")
    for _ in range(2):
        optimizer.step(lambda: squared_error(model(torch.arange(3)), torch.zeros(3, 6)))
    with pytest.raises(RecordingError, match="this batch has others"):
        optimizer.step(lambda: squared_error(model(torch.arange(3) + 1), torch.zeros(3, 6)))


@pytest.mark.parametrize(
    ("call", "error", "why"),
    [
        (lambda m: infer(m, 3), ClosureError, "needs a closure"),
        (lambda m: infer(m, lambda: None), ClosureError, "did not run the model"),
        (
            lambda m: infer(m, lambda: (m(3), None)[1]),
            ClosureError,
            "infer ran .* returned nothing",
        ),
        (lambda m: infer(m, lambda: loss(m), free=["net.2"]), PlacementError, "free=.*'net.2'"),
        (lambda m: infer(m, lambda: loss(m), algorithm="ipc"), ConfigError, "algorithm"),
        (lambda m: infer(m, lambda: loss(m), until=0.1), ConfigError, "leave until out"),
        (lambda m: infer(m, lambda: ()), ClosureError, "did not run the model"),
        (lambda m: infer(m, lambda: loss(m), free="z"), ConfigError, "expected a list of names"),
        (lambda m: infer(m, lambda: loss(m), T=None), ConfigError, "whole number of steps"),
        (lambda m: infer(m, lambda: loss(m), compile=True), ConfigError, "leave compile out"),
        (lambda m: infer(m, lambda: loss(m), precisions="spiking"), ConfigError, "stay the same"),
        (lambda m: infer(m, lambda: loss(m), tau=3), ConfigError, "no argument tau="),
        (lambda m: infer(m, lambda: loss(m), T=0), ConfigError, "T=0"),
        (lambda m: infer(m, lambda: loss(m), gamma=-1.0), ConfigError, "gamma=-1.0"),
        (lambda m: infer(3, lambda: loss(m)), ConfigError, "expected an nn.Module"),
        (lambda m: infer(m.net, lambda: m.net(torch.ones(2, 3))), ClosureError, "scalar"),
    ],
)
def test_what_infer_refuses(call, error, why):
    model = Decoder()
    with pytest.raises(error, match=why):
        call(model)


def loss(model):
    return squared_error(model(3), torch.zeros(3, 6))


def test_a_model_without_nodes():
    net = nn.Linear(3, 2)
    with pytest.raises(PlacementError, match="No value node stands in Linear"):
        infer(net, lambda: squared_error(net(torch.ones(2, 3)), torch.zeros(2, 2)))


def test_a_seed_of_its_own():
    first, second = (Latent(4, samples=5, start="normal", seed=3) for _ in range(2))
    assert torch.equal(first.values, second.values)
    copied = copy.deepcopy(Latent(4, start="normal", seed=3))
    assert torch.equal(copied.eval()(2), copy.deepcopy(Latent(4, start="normal", seed=3)).eval()(2))
    assert list(copied.state_dict()) == ["drawn"]


def test_a_strategy_by_name_says_what_to_do():
    module = Generative()
    fit = trainer(PCStrategy(), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"'net\.z' is a Latent"):
        fit.fit(module, numbered())
