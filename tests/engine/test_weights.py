"""What counts as a weight: parameters, and what is computed from them, buffers and constants."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_pc import describe
from lightning_pc.optim import IPC, ZIL
from tests.engine.modules import MLP


def pruned(model):
    for layer in model[::2]:
        prune.l1_unstructured(layer, "weight", amount=0.3)
    return model


def spectral(model):
    for layer in model[::2]:
        parametrizations.spectral_norm(layer)
    return model


class Noisy(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight + 0.01 * torch.randn(self.weight.shape), self.bias)


def noisy(model):
    for layer in model[::2]:
        layer.__class__ = Noisy
    return model


@pytest.mark.parametrize("change", [lambda m: m, pruned, spectral, noisy])
def test_computed_weights_are_weights(change):
    model = change(MLP((6, 5, 5, 4), bias=False))
    rows = describe(model, torch.randn(3, 6), print_table=False).rows
    assert [row.name for row in rows] == ["1", "3"]


class Graph(nn.Module):
    """Node features are a buffer, no batch: their first layer is an activation all the same."""

    def __init__(self):
        super().__init__()
        self.register_buffer("features", torch.randn(7, 6))
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self):
        return self.b(torch.relu(self.a(self.features)))


class Started(nn.Module):
    """A learned initial state to which the batch is added in place."""

    def __init__(self):
        super().__init__()
        self.h0 = nn.Parameter(torch.randn(1, 5))
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.h0.repeat(len(x), 1)
        h += self.a(x)
        return self.b(torch.tanh(h))


def test_activations_computed_without_a_batch_or_from_a_parameter_are_nodes():
    graph = Graph()
    closure = lambda: F.cross_entropy(graph(), torch.arange(7) % 3)  # noqa: E731
    assert len(describe(graph, closure, print_table=False).rows) == 1
    assert len(describe(Started(), torch.randn(4, 6), print_table=False).rows) == 1


class Positions(nn.Module):
    def forward(self, x):
        return x + torch.sin(torch.arange(x.shape[-1]))


class Jitter(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x).clamp(-1, 1)


class Bounded(nn.Module):
    def forward(self, x):
        return x.clamp(-10, 10)


@pytest.mark.parametrize("module", [Positions, Jitter, Bounded])
def test_a_module_that_bends_no_activation_is_no_nonlinearity(module):
    model = nn.Sequential(nn.Linear(6, 5), module(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    rows = describe(model, torch.randn(4, 6), print_table=False).rows
    assert [row.name for row in rows] == ["3"]


def test_the_report_speaks_of_what_the_optimizer_holds():
    model = MLP((6, 5, 4), bias=False)
    optimizer = IPC(torch.optim.SGD(model[2].parameters(), 0.1), model)
    optimizer.step(lambda: F.cross_entropy(model(torch.randn(3, 6)), torch.tensor([0, 1, 2])))
    assert list(optimizer.report.learned) == ["2.weight"]


def test_zero_grad_in_the_closure_takes_nothing_from_zil():
    torch.manual_seed(0)
    model = MLP((6, 5, 5, 4), bias=False).double()
    twin = MLP((6, 5, 5, 4), bias=False).double()
    twin.load_state_dict(model.state_dict())
    x, y = torch.randn(8, 6).double(), torch.randint(0, 4, (8,))
    optimizer = ZIL(torch.optim.SGD(model.parameters(), 0.1), model)

    def closure():
        optimizer.zero_grad()
        model.zero_grad()
        return F.cross_entropy(model(x), y)

    optimizer.step(closure)
    F.cross_entropy(twin(x), y).backward()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(own, other, rtol=1e-12, atol=0)
