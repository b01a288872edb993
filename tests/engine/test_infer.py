"""`infer` and latent variables: nothing is left behind, and what is told or refused."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from lightning_pc import describe, explain, infer
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
from tests.engine.decoders import Decoder, Linear, made, noise, posterior
from tests.engine.modules import MLP

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
