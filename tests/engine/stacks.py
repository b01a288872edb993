"""Stacks of equal stages, and how they are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.engine.modules import MLP, Thrice
from tests.engine.problems import Problem

# Ten batches of float64, 50 steps of weights and more with ipc. A batched product adds up in
# another order, 1e-16 of an entry. Adam divides small gradients by their own size, and conjugate
# gradients divide by small changes, which behind rectifiers are not smooth.
CLOSE = 1e-9


class Block(nn.Module):
    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.norm, self.a = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.b, self.drop = nn.Linear(2 * width, width), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.drop(self.b(F.gelu(self.a(self.norm(x)))))


class Stack(nn.Module):
    """Blocks behind a stem, with a head."""

    def __init__(self, blocks, width=6, outputs=4):
        super().__init__()
        self.stem, self.blocks = nn.Linear(6, width), nn.ModuleList(blocks)
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Encoder(nn.Module):
    """torch's own transformer blocks over six tokens of one number."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.stem, self.head = nn.Linear(1, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, dropout, batch_first=True) for _ in range(4)
        )

    def forward(self, x):
        x = self.stem(x.unsqueeze(-1))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(1, 4, 3, padding=1)]
        for _ in range(4):
            layers += [nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(4, 4)

    def forward(self, x):
        h = self.layers(x[:, :4].view(-1, 1, 2, 2))
        return self.head(F.silu(h).mean((2, 3)))


def deep(width=7, layers=5, f="tanh"):
    return MLP([6, *[width] * (layers + 1), 4], f)


def dropped():
    layers = [nn.Linear(6, 7)]
    for _ in range(4):
        layers += [nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 7)]
    return nn.Sequential(*layers, nn.GELU(), nn.Linear(7, 4))


class EqualTowers(nn.Module):
    """Two chains of equal layers from one value; then others of the same width."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 7), nn.Linear(7, 4)
        for name in "abc":
            setattr(self, name, nn.ModuleList(nn.Linear(7, 7) for _ in range(4)))

    def forward(self, x):
        h = left = right = self.stem(x)
        for a, b in zip(self.a, self.b, strict=True):
            left, right = a(torch.tanh(left)), b(torch.sigmoid(right))
        h = left + right
        for c in self.c:
            h = c(F.silu(h))
        return self.head(F.gelu(h))


def two_kinds():
    layers = [nn.Linear(6, 7)]
    for f in (nn.Tanh, nn.SiLU):
        for _ in range(4):
            layers += [f(), nn.Linear(7, 7)]
    return nn.Sequential(*layers, nn.GELU(), nn.Linear(7, 4))


def without_bias():
    layers = [nn.Linear(6, 7)]
    for _ in range(5):
        layers += [nn.SiLU(), nn.Linear(7, 7, bias=False)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(7, 4))


STACKS = {
    "two kinds": Problem(two_kinds),
    "towers": Problem(EqualTowers),
    "tanh": Problem(deep),
    "gelu": Problem(lambda: deep(f="gelu")),
    "no bias": Problem(without_bias),
    "dropout": Problem(dropped),
    "convolutions": Problem(Convolutions),
    "repeated": Problem(lambda: Thrice(5)),
    "blocks": Problem(lambda: Stack([Block(6) for _ in range(4)]), value_nodes="blocks"),
    "blocks, dropout": Problem(
        lambda: Stack([Block(6, 0.2) for _ in range(4)]), value_nodes="blocks"
    ),
    "encoder": Problem(Encoder, value_nodes="blocks"),
    "encoder, dropout": Problem(lambda: Encoder(0.2), value_nodes="blocks"),
}


def batches(n, size=5):
    torch.manual_seed(5)
    return [(torch.randn(size, 6).double(), torch.randint(0, 4, (size,))) for _ in range(n)]


def made(make, seed=0):
    torch.manual_seed(seed)
    return make().double().train()


def train(model, door, optimizer, steps=10, **settings):
    """Trains; returns the door."""
    pc = door(optimizer(model.parameters()), model, **settings)
    torch.manual_seed(3)
    for x, y in batches(steps):
        pc.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
    return pc


def adamw(parameters):
    return torch.optim.AdamW(parameters, 1e-3)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.02)


def groups(parameters):
    first, *others = parameters
    fast = {"params": others[4:8], "lr": 0.03}
    return torch.optim.SGD([{"params": [first, *others[:4], *others[8:]]}, fast], 0.01)


def watched(parameters):
    optimizer = torch.optim.SGD(parameters, 0.02)
    optimizer.register_step_pre_hook(_halve)
    return optimizer


def _halve(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad *= 0.5


class Replaces(torch.optim.Optimizer):
    """Puts other memory in a parameter's place."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.data = p.data - 0.02 * p.grad


OPTIMIZERS = {
    "two rates": groups,
    "hooks": watched,
    "momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "replaces": Replaces,
    "fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "foreach": lambda p: torch.optim.Adam(p, 1e-3, foreach=True),
}


def linears(model):
    return [module for module in model if isinstance(module, nn.Linear)]
