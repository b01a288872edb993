"""Predictive coding written out, slow and plain.

`Oracle`: a multilayer perceptron in NumPy, gradients by hand, float64. `Explicit`: any graph whose
free energy is written down with its values in it; gradients by autograd. `ErrorCoordinates`: the
same with the errors in it.

Eq. 5-7 and 9-11 of Salvatori et al. 2024 with F = sum of losses + 1/2 sum ||eps||^2. Layers count
from the input: v[0] is the input, mu[l] = f(v[l - 1]) @ W[l].T + b[l] (no f on the input),
eps[l] = v[l] - mu[l], and the last mu is what the loss reads. Jacobi: values and weights of t + 1
are made from those of t.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

F = {
    "tanh": (np.tanh, lambda a: 1 - np.tanh(a) ** 2),
    "relu": (lambda a: np.maximum(a, 0), lambda a: (a > 0).astype(a.dtype)),
}


def cross_entropy(output, target):
    """Loss of each term, [B], and its gradient, [B, C]."""
    shifted = output - output.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    hot = np.eye(output.shape[1])[target]
    return -(hot * log_p).sum(1), np.exp(log_p) - hot


def squared_error(output, target):
    """Loss of each term, [B, D], and its gradient, [B, D]."""
    return (output - target) ** 2, 2 * (output - target)


@dataclass
class Oracle:
    """`layers[l]` says which weight layer l uses, so that layers may share one."""

    weights: list
    biases: list
    f: str
    loss: object
    lr: float
    gamma: float
    T: int
    incremental: bool
    gamma_decay: float = 1.0
    layers: list | None = None
    momentum: float = 0.0
    used_gamma: float = 0.0
    values: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    energies: list = field(default_factory=list)

    def predictions(self, v, layers):
        f = F[self.f][0]
        below = [v[0], *(f(x) for x in v[1:])]
        return below, [
            x @ self.weights[i].T + self.biases[i] for x, i in zip(below, layers, strict=True)
        ]

    def batch(self, x, y, terms):
        """One batch of `terms` loss terms; weights move in place, values are kept for a look."""
        layers = list(range(len(self.weights))) if self.layers is None else self.layers
        slope = F[self.f][1]
        v = [x]
        for i in layers[:-1]:  # feed-forward initial values
            v.append((v[0] if len(v) == 1 else F[self.f][0](v[-1])) @ self.weights[i].T)
            v[-1] = v[-1] + self.biases[i]
        gamma, last = self.gamma, None
        velocities = [0.0 for _ in v[1:]]
        self.losses, self.energies = [], []
        for t in range(self.T):
            below, mu = self.predictions(v, layers)
            loss, dloss = self.loss(mu[-1], y)
            eps = [v[k + 1] - mu[k] for k in range(len(layers) - 1)]
            self.losses.append(loss.sum() / terms)
            self.energies.append([0.5 * (e**2).sum() for e in eps])
            F_t = loss.sum() + sum(self.energies[-1])
            moves = self.incremental or t < self.T - 1
            if moves and last is not None and not F_t < last:
                gamma *= self.gamma_decay
            if moves:
                last = F_t
            dmu = [*(-e for e in eps), dloss]  # dF/dmu
            dv = [
                eps[k] + slope(v[k + 1]) * (dmu[k + 1] @ self.weights[layers[k + 1]])
                for k in range(len(eps))
            ]
            if self.incremental or t == self.T - 1:
                dW = [np.zeros_like(w) for w in self.weights]
                db = [np.zeros_like(b) for b in self.biases]
                for k, i in enumerate(layers):
                    dW[i] += dmu[k].T @ below[k] / terms
                    db[i] += dmu[k].sum(0) / terms
                for i in range(len(self.weights)):
                    self.weights[i] = self.weights[i] - self.lr * dW[i]
                    self.biases[i] = self.biases[i] - self.lr * db[i]
            if moves:
                velocities = [
                    self.momentum * u + slope_ for u, slope_ in zip(velocities, dv, strict=True)
                ]
                v = [x, *(value - gamma * u for value, u in zip(v[1:], velocities, strict=True))]
        self.used_gamma, self.values = gamma, v[1:]


class Explicit:
    """F of any graph, written out: `at` adds a node's energy and hands on its value.

    F = sum of w(depth, t) E + beta * w(0, t) * loss. `depths` holds the nodes' depths in call
    order; `weigh(depth, t)` their weights, 1 where it is not given. Parameters learn from
    F / (beta M), of several betas from the mean, each phase started from the forward pass.
    """

    def __init__(self, forward, depths=None, weigh=lambda depth, t: 1.0):
        self.forward, self.depths, self.weigh, self.values = forward, depths, weigh, []

    def free_energy(self, model, batch, t=0, beta=1.0):
        self.index, self.energy, self.t = 0, 0.0, t
        loss, terms = self.forward(model, self.at, *batch)
        return self.energy + beta * self.weigh(0, t) * loss, terms

    def at(self, mu, dim=None):
        if self.index == len(self.values):
            self.values.append(mu.detach().clone().requires_grad_())
        x = self.values[self.index]
        weight = self.weigh(self.depths[self.index], self.t) if self.depths else 1.0
        self.index += 1
        if dim is None:
            self.energy = self.energy + weight * 0.5 * (x - mu).pow(2).sum()
        else:
            p, q = x.softmax(dim), mu.softmax(dim)
            self.energy = self.energy + weight * (p * (p.log() - q.log())).sum()
        return x

    def batch(self, model, batch, gamma, T, lr, incremental, betas=(1.0,), momentum=0.0):
        weights = [p for p in model.parameters() if p.requires_grad]
        learned, self.energies = [torch.zeros_like(w) for w in weights], []
        for beta in betas:
            self.values, velocities = [], None
            for t in range(T):
                free, terms = self.free_energy(model, batch, t, beta)
                self.energies.append(free.item())
                dx = torch.autograd.grad(free, self.values, retain_graph=True)
                dw = torch.autograd.grad(free / terms / beta / len(betas), weights)
                with torch.no_grad():
                    if incremental or t < T - 1:
                        velocities = velocities or [torch.zeros_like(x) for x in self.values]
                        for x, v, slope in zip(self.values, velocities, dx, strict=True):
                            x -= gamma * v.mul_(momentum).add_(slope)
                    if incremental:
                        for w, slope in zip(weights, dw, strict=True):
                            w -= lr * slope
            for total, slope in zip(learned, dw, strict=True):
                total += slope
        with torch.no_grad():
            for w, slope in zip(weights, learned, strict=True):
                w -= 0 if incremental else lr * slope


class ErrorCoordinates(Explicit):
    """ePC (Goemaere et al. 2025): F(e) = loss + 1/2 sum ||e||^2 with x = mu + e in the network.

    The errors descend F(e) through the whole network; then, incrementally at every step, the
    weights learn from F(x, theta) as in `Explicit`, with every value held at its x. Incrementally
    an energy counts as many times as makes that of a lone error, which a constant gradient pulls
    at, count as if it had come all of its way.
    """

    lone = ()  # that error, of each node

    def at(self, mu, dim=None):
        if self.settled:
            before, index = self.energy, self.index
            x = super().at(mu)
            if self.lone:
                share = self.weight(index) * self.lone[index]
                self.energy = before + (self.energy - before) / share
            return x
        if self.index == len(self.errors):
            self.errors.append(torch.zeros_like(mu, requires_grad=True))
        e = self.errors[self.index]
        self.energy = self.energy + self.weight(self.index) * 0.5 * e.pow(2).sum()
        self.index += 1
        self.values.append((mu + e).detach().requires_grad_())
        return mu + e

    def weight(self, index):
        return self.weigh(self.depths[index], self.t) if self.depths else 1.0

    def batch(self, model, batch, gamma, T, lr, incremental=False, betas=(1.0,), momentum=0.0):
        weights = [p for p in model.parameters() if p.requires_grad]
        learned = [torch.zeros_like(w) for w in weights]
        for beta in betas:
            self.errors, velocities, self.lone, paces = [], None, (), ()
            for t in range(T):
                self.values, self.settled = [], False
                free, _ = self.free_energy(model, batch, t, beta)
                slopes = torch.autograd.grad(free, self.errors)
                self.settled = True
                free, terms = self.free_energy(model, batch, t, beta)
                dw = torch.autograd.grad(free / terms / beta / len(betas), weights)
                with torch.no_grad():
                    if incremental or t < T - 1:
                        velocities = velocities or [torch.zeros_like(e) for e in self.errors]
                        for e, v, slope in zip(self.errors, velocities, slopes, strict=True):
                            e -= gamma * v.mul_(momentum).add_(slope)
                    if incremental:
                        lone = self.lone or [0.0] * len(slopes)
                        paces = paces or lone
                        pulls = [self.weight(i) * one - 1 for i, one in enumerate(lone)]
                        paces = [momentum * v + p for v, p in zip(paces, pulls, strict=True)]
                        self.lone = [e - gamma * v for e, v in zip(lone, paces, strict=True)]
                        for w, slope in zip(weights, dw, strict=True):
                            w -= lr * slope
            for total, slope in zip(learned, dw, strict=True):
                total += slope
        with torch.no_grad():
            for w, slope in zip(weights, learned, strict=True):
                w -= 0 if incremental else lr * slope
