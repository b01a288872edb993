"""Models of causes that give rise to data, and the posterior of a linear one."""

from __future__ import annotations

import torch
from torch import nn

from lightning_pc.nn import Latent
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


def posterior(model, y, seen=None):
    """Mean of the causes: (I + W'W)^-1 W'(y - b), of the outputs that are seen."""
    W, b = model.a.weight.detach(), model.a.bias.detach()
    if seen is not None:
        W, b, y = W[seen], b[seen], y[:, seen]
    return torch.linalg.solve(torch.eye(3).double() + W.T @ W, W.T @ (y - b).T).T
