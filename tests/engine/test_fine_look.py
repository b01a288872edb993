"""Where F is bent close to the values, the automatic gamma looks closer once inference raises F."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc.inference.curvature import AutoGamma
from lightning_pc.optim import IPC, PC


class Ripples(nn.Module):
    """Pretrained and steep, but for a sine a step of 0.05 flattens; its classifier is new."""

    def __init__(self, ripples=200.0):
        super().__init__()
        torch.manual_seed(0)
        self.ripples = ripples
        self.one, self.two, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        nn.init.normal_(self.one.weight, std=0.4)
        nn.init.normal_(self.head.weight, std=1e-4)

    def forward(self, x):
        return self.head(self.two(torch.sin(self.ripples * self.one(x))))


NODES = ["one", "two"]


def batch(samples=4):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(samples, 6, generator=draw), torch.tensor([0, 1, 2, 0])[:samples]


def exact_curvature(model, x, y):
    """The largest eigenvalue of d2F/dx2 at the predictions, written out."""
    with torch.no_grad():
        one = model.one(x)
        two = model.two(torch.sin(model.ripples * one))

    def free_energy(values):
        a, b = values[: one.numel()].view_as(one), values[one.numel() :].view_as(two)
        errors = (a - model.one(x)).square() / 2, (b - model.two(torch.sin(model.ripples * a))) ** 2
        loss = F.cross_entropy(model.head(b), y, reduction="sum")
        return errors[0].sum() + errors[1].sum() / 2 + loss

    values = torch.cat([one.flatten(), two.flatten()])
    return float(torch.linalg.eigvalsh(torch.func.hessian(free_energy)(values))[-1])


def trained(algorithm, model, x, y, batches):
    """Values move, down the gradient, weights do not."""
    sgd = torch.optim.SGD(model.parameters(), 0.0)
    optimizer = algorithm(sgd, model, value_nodes=NODES, momentum=0)
    for _ in range(batches):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_a_gamma_that_raises_F_is_chosen_anew_from_close_by(algorithm, dtype):
    model = Ripples().to(dtype)
    x, y = (t.to(dtype) if t.is_floating_point() else t for t in batch())
    exact = exact_curvature(model, x, y)
    optimizer = trained(algorithm, model, x, y, 1)
    far = optimizer.report
    assert far.gamma * exact > 4  # what it is about: too far, so that F rises
    assert far.free_energy[-1] > far.free_energy[0]
    for _ in range(8):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        near = optimizer.report
        assert 0.7 < near.gamma * exact < 2
        assert near.free_energy[-1] <= near.free_energy[0]
    assert optimizer.state_dict()["lightning_pc"]["fine"]


def test_the_rounding_of_bfloat16_is_no_curvature():
    """There a close look goes as far as any: shorter steps would round to none or to others."""
    found = []
    for samples in (1, 4):
        model = Ripples(ripples=1.0)
        x, y = batch(samples)
        for close in (False, True):
            optimizer = IPC(torch.optim.SGD(model.parameters(), 0.0), model, value_nodes=NODES)
            optimizer._learner.auto.fine = close
            with torch.autocast("cpu", torch.bfloat16):
                optimizer.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
            found.append(optimizer.report.curvature)
    assert found[0] == found[1]
    assert found[2] == found[3]


def test_a_close_look_goes_as_far_as_the_gradient_at_the_values():
    """With a classifier that pulls hard that is as far as any look, close by F is steeper."""
    (x, y), found = batch(), {}
    x = x.double()
    for pull in (1e-4, 10.0):
        for close in (False, True):
            model = Ripples().double()
            nn.init.normal_(model.head.weight, std=pull)
            optimizer = trained(PC, model, x, y, 0)
            optimizer._learner.auto.fine = close
            optimizer.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
            found[pull, close] = optimizer.report.curvature
    assert found[10.0, True] == found[10.0, False]
    assert found[1e-4, True] > 3 * found[1e-4, False]


def test_a_rise_after_the_last_move_counts():
    """PC's last evaluation moves no value any more."""
    model, (x, y) = Ripples(), batch()
    sgd = torch.optim.SGD(model.parameters(), 0.0)
    optimizer = PC(sgd, model, value_nodes=NODES, T=4, momentum=0.5)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    free = optimizer.report.free_energy
    assert free[2] <= free[0] < free[3]
    assert optimizer.state_dict()["lightning_pc"]["alarmed"]


def test_a_divergence_brings_the_looks_closer():
    auto = AutoGamma(0.8, 0.5, 1.2)
    auto.after_divergence()
    assert auto.fine
    assert auto.anew


def test_a_rise_brings_the_looks_closer_for_good():
    auto = AutoGamma(0.8, 0.5, 1.2)
    auto.after(8, False)
    assert not auto.fine
    auto.after(8, True)
    auto.after(8, False)
    assert auto.fine
    resumed = AutoGamma(0.8, 0.5, 1.2)
    resumed.load_state_dict(auto.state_dict())
    assert resumed.fine
