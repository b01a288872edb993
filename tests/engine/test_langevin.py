"""Monte Carlo predictive coding follows the likelihood, which predictive coding does not."""

import pytest
import torch
from torch import nn

from lightning_pc.errors import ConfigError
from lightning_pc.langevin import Langevin
from lightning_pc.optim import PC


class Chain(nn.Module):
    """x ~ N(w1 u, 1), y ~ N(w2 x, 1), with a node at x."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.constant_(self.first.weight, 0.8)
        nn.init.constant_(self.second.weight, 1.5)

    def forward(self, u):
        return self.second(self.dropout(self.first(u)))


def gradients(inference, T, samples=100_000):
    """Of w1 and w2 as PC has them, and of the negative log-likelihood of y given u."""
    torch.manual_seed(0)
    model = Chain().double()
    u, y = torch.full((samples, 1), 0.7).double(), torch.full((samples, 1), 1.1).double()
    optimizer = PC(
        torch.optim.SGD(model.parameters(), 0.0),
        model,
        T=T,
        value_nodes=["first"],
        inference=inference,
        loss_terms=samples,
    )
    optimizer.step(lambda: 0.5 * (model(u) - y).square().mean())
    ours = torch.stack([p.grad.squeeze() for p in model.parameters()])
    w1, w2 = (p.detach().clone().squeeze().requires_grad_() for p in model.parameters())
    s = 1 + w2.square()  # the variance of y
    nll = 0.5 * (1.1 - w2 * w1 * 0.7).square() / s + 0.5 * s.log()
    return ours, torch.stack(torch.autograd.grad(nll, (w1, w2)))


def test_samples_follow_the_likelihood():
    """The variance, 0.31, errs by lr * curvature / 2 = 0.016 of itself, the means by 0.003."""
    ours, exact = gradients(lambda values: Langevin(values, lr=0.01), T=600)
    assert (ours - exact).abs().max() < 0.02


def test_the_minimum_does_not():
    """It would have w2 grow, which the likelihood has shrink."""
    ours, exact = gradients(lambda values: torch.optim.SGD(values, lr=0.2), T=100)
    assert exact[1] > 0 > ours[1]


def test_noise_differs_from_step_to_step_beside_dropout():
    torch.manual_seed(0)
    model, seen = Chain(0.5), []

    class Watched(Langevin):
        def step(self, closure=None):
            (x,) = self.param_groups[0]["params"]
            before = x.detach().clone()
            super().step()
            seen.append(x.detach() - before)

    optimizer = PC(
        torch.optim.SGD(model.parameters(), 0.0),
        model,
        T=4,
        value_nodes=["first"],
        inference=lambda values: Watched(values, lr=1e-8),  # next to nothing but noise
        loss_terms=64,
    )
    for _ in range(2):
        optimizer.step(lambda: 0.5 * (model(torch.ones(64, 1)) - 1).square().mean())
    noise = torch.stack(seen).flatten(1) / 2e-8**0.5
    assert noise.shape == (6, 64)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.6
    assert noise.std() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("lr", [0, -0.1, "0.1", float("nan"), torch.tensor(0.1)])
def test_rates(lr):
    with pytest.raises(ConfigError, match=r"Langevin: lr=.*expected a positive rate"):
        Langevin([torch.ones(1)], lr=lr)
