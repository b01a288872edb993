"""Small modules of many kinds; some also say what they compute with values in place.

Their ``run(x, at)`` is that: ``at`` is given each node's prediction and hands on its value, as
those of `oracle.Explicit` do.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def stays(mu, dim=None):
    """The ``at`` of no value at all."""
    return mu


def MLP(sizes, f="tanh", bias=True):
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), ACTIVATIONS[f]()]
    return nn.Sequential(*layers[:-1])


def chain(depth, gain=1.0, width=12):
    """Linear layers alone, so that the curvature of F follows from the weights."""
    layers = [nn.Linear(width, width) for _ in range(depth)]
    for layer in layers:
        layer.weight.data *= gain
    return nn.Sequential(*layers, nn.Linear(width, 5))


def run_layers(model, x, at):
    """What an `MLP` computes."""
    for layer in model:
        x = layer(x) if isinstance(layer, nn.Linear) else layer(at(x))
    return x


def CNN():
    """BatchNorm in train mode, pooling, in-place activations."""
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True)),
        *(nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, bias=False), nn.BatchNorm2d(4)),
        *(nn.LeakyReLU(0.1, inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)),
    )


def Dropped():
    return nn.Sequential(
        *(nn.Dropout(0.2), nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.5)),
        *(nn.Linear(9, 7), nn.Dropout(0.3), nn.GELU(), nn.Linear(7, 4)),
    )


class ResidualBlock(nn.Module):
    """The skip is added in place and passes an in-place activation."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.b(self.act(self.a(x)))
        h += x
        return self.act(h)


class Residual(nn.Module):
    def __init__(self, width=6, blocks=3):
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.layers = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def run(self, x, at):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.relu(at(layer.b(torch.relu(at(layer.a(x)))) + x))
        return self.head(x)


class SmoothResidual(nn.Module):
    """The loss reads the last block's sum, in which no node stands."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.a, self.b = (nn.ModuleList(nn.Linear(6, 6) for _ in range(3)) for _ in range(2))

    def forward(self, x):
        return self.run(x, stays)

    def run(self, x, at):
        x = self.stem(x)
        for a, b in zip(self.a, self.b, strict=True):
            x = x + b(torch.tanh(at(a(torch.tanh(at(x))))))
        return self.head(x)


class Skips(nn.Module):
    """The second nonlinearity reads a sum that runs around the first."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        h = self.a(x)
        return self.c((h + self.b(h.tanh())).relu())

    def run(self, x, at):
        h = self.a(x)
        return self.c(torch.relu(at(h + self.b(torch.tanh(at(h))))))


class LongSkip(nn.Module):
    """The first node is read by the loss too: its neighbours' errors come before their depth."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.run(x, stays)

    def run(self, x, at):
        values = [at(self.layers[0](x)).tanh()]
        for layer in self.layers[1:]:
            values.append(at(layer(values[-1])).tanh())
        return self.head(values[-1] + values[0])


class Towers(nn.Module):
    """Two towers of different depth into one head."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 5)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        return self.run(x, stays)

    def run(self, x, at):
        deep = at(self.c(at(self.b(x[:, 3:])).tanh())).tanh()
        return self.head(torch.cat([at(self.a(x[:, :3])).tanh(), deep], 1))


class Skipping(nn.Module):
    """Residual, the loss reads every node: ``stem``, so many ``branches``, ``head``."""

    def __init__(self, branches=3, f=torch.tanh, width=8, outputs=4):
        super().__init__()
        self.stem, self.head, self.f = nn.Linear(6, width), nn.Linear(width, outputs), f
        self.branches = nn.ModuleList(nn.Linear(width, width) for _ in range(branches))

    def forward(self, x):
        h = self.stem(x)
        for branch in self.branches:
            h = h + branch(self.f(h)) / len(self.branches) ** 0.5
        return self.head(h)


class Thrice(nn.Module):
    """One Linear used three times, or as told, in a chain."""

    def __init__(self, times=3):
        super().__init__()
        self.shared, self.head, self.times = nn.Linear(6, 6), nn.Linear(6, 4), times

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.shared(x))
        return self.head(x)


class Tied(nn.Module):
    """The embedding is the head."""

    def __init__(self, vocabulary=11):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 6)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        h = self.b(F.gelu(self.a(self.embedding(ids))))
        return self.head(torch.tanh(h)).flatten(0, 1)


class Transformer(nn.Module):
    """torch's own encoder behind an embedding."""

    def __init__(self, vocabulary=11, width=8, layers=2, dropout=0.1, **kwargs):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 2, 12, dropout, batch_first=True, **kwargs)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        return self.head(self.encoder(self.embedding(ids))).flatten(0, 1)


class UNet(nn.Module):
    """Skips from the way down to the way up."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.up2, self.up1 = nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        one = self.act(self.down1(x))
        two = self.act(self.down2(F.max_pool2d(one, 2)))
        h = self.act(self.middle(two))
        h = self.act(self.up2(torch.cat([h, two], 1)))
        h = F.interpolate(h, scale_factor=2)
        return self.head(self.act(self.up1(torch.cat([h, one], 1))))


class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids):
        h, _ = self.lstm(self.embedding(ids))
        return self.head(torch.relu(self.fc(h[:, -1])))


class Cell(nn.Module):
    """An LSTM cell by hand: gates, and a state that runs around them."""

    def __init__(self):
        super().__init__()
        self.gates, self.head = nn.Linear(2 + 3, 12), nn.Linear(3, 4)

    def forward(self, x):
        return self.run(x, stays)

    def run(self, x, at):
        h = c = x.new_zeros(len(x), 3)
        for step in x.split(2, 1):
            i, f, o, g = self.gates(torch.cat([step, h], 1)).chunk(4, 1)
            c = at(f).sigmoid() * c + at(i).sigmoid() * at(g).tanh()
            h = at(o).sigmoid() * at(c).tanh()
        return self.head(h)


class ConvNorm(nn.Module):
    """A node's prediction couples the samples of a batch through BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.next = (
            nn.Conv2d(1, 3, 2, bias=False),
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 4, 2),
        )
        self.relu, self.pool, self.head = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Linear(4, 4)

    def forward(self, x):
        h = self.relu(self.norm(self.conv(x)))
        return self.head(self.relu(self.next(self.pool(h))).mean((2, 3)))

    def run(self, x, at):
        h = self.conv(x)
        centred = h - h.mean((0, 2, 3), keepdim=True)
        h = centred / (centred.pow(2).mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        h = at(h * self.norm.weight.view(3, 1, 1) + self.norm.bias.view(3, 1, 1))
        h = at(self.next(F.max_pool2d(torch.relu(h), 2)))
        return self.head(torch.relu(h).mean((2, 3)))


class Attends(nn.Module):
    """F_KL at the attention logits, a Gaussian node behind it; the loss is a mean over tokens."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = x + F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.head(F.gelu(self.o(h))).transpose(1, 2)

    def run(self, x, at):
        logits = at(self.q(x) @ self.k(x).transpose(1, 2) / 2, dim=-1)
        h = at(self.o(x + logits.softmax(-1) @ self.v(x)))
        return self.head(F.gelu(h)).transpose(1, 2)


class Masked(nn.Module):
    """Causal attention, its logits masked by the -inf or the -1e9 of the user."""

    def __init__(self, mask=-math.inf):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        self.head, self.mask = nn.Linear(4, 3), mask
        with torch.no_grad():
            self.q.weight.mul_(4), self.v.weight.mul_(6)  # the attention logits have a say

    def forward(self, x):
        return self.masked(x, stays, self.mask)

    def run(self, x, at):
        return self.masked(x, at, -1e9)

    def masked(self, x, at, mask):
        hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
        logits = (self.q(x) @ self.k(x).transpose(1, 2) / 2).masked_fill(hidden, mask)
        h = at(self.o(x + at(logits, -1).softmax(-1) @ self.v(x)))
        return self.head(torch.tanh(h)).transpose(1, 2)
