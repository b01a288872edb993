"""Node energies: how far a value is from its prediction, and the two gradients of that distance.

Axis legend: B samples, * anything. ``x`` is the value of a node, ``mu`` its prediction, both
[B, *].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pc.errors import ConfigError, shown


class Slopes(NamedTuple):
    """What one inference step needs of a node's energy.

    Attributes:
        dmu: dE/dmu with E's weight, in the scale of parameter gradients, [B, *].
        dx: dE/dx likewise, [B, *]; None where it is -dmu.
        total: E summed over samples, with its weight, [].
    """

    dmu: Tensor
    dx: Tensor | None
    total: Tensor

    def own(self) -> Tensor:
        """dE/dx, [B, *]; ``dmu`` stays, since gradients and hooks may hold views of it."""
        return self.dmu.neg() if self.dx is None else self.dx


class Energy(ABC):
    """One kind of node energy E(x, mu); a variant is a subclass."""

    name: str
    #: Whether entries may be masked: at -inf, or far below all others.
    masks: ClassVar[bool] = True

    def instead_of(self, usual: Energy) -> Energy:
        """What stands at a place in the ``usual`` energy's stead."""
        return self

    @abstractmethod
    def evaluate(self, x: Tensor, mu: Tensor, scale: float | Tensor, weight: float = 1.0) -> Slopes:
        """Energy and gradients of one inference step.

        Args:
            x: The value, [B, *].
            mu: Its prediction, [B, *].
            scale: Factor from the energy's gradient to the parameters'.
            weight: The energy's weight in F, >= 0.
        """

    def evaluate_rows(
        self, x: Tensor, mu: Tensor, scale: float | Tensor, weights: Sequence[float]
    ) -> Slopes:
        """That of ``n`` nodes at once.

        Args:
            x: Their values, [n, B, *].
            mu: Their predictions, [n, B, *].
            scale: As of `evaluate`.
            weights: Of each node's energy in F, n of them.

        Returns:
            Gradients [n, B, *], energies [n].
        """
        rows = zip(x, mu, weights, strict=True)
        each = [self.evaluate(one, guess, scale, weight) for one, guess, weight in rows]
        own = None if each[0].dx is None else torch.stack([slopes.own() for slopes in each])
        return Slopes(
            torch.stack([slopes.dmu for slopes in each]),
            own,
            torch.stack([slopes.total for slopes in each]),
        )


class Gaussian(Energy):
    """``0.5 * precision * ||x - mu||^2``: Eq. 5 of Salvatori et al. 2024, with the usual 1/2.

    Args:
        precision: Inverse variance, > 0.
    """

    name = "gaussian"
    masks = False

    def __init__(self, precision: float = 1.0) -> None:
        self.precision = positive(precision, "precision")

    @override
    def evaluate(self, x: Tensor, mu: Tensor, scale: float | Tensor, weight: float = 1.0) -> Slopes:
        error = self._error(x, mu)
        flat, weight = error.flatten(), weight * self.precision
        total = torch.dot(flat, flat).mul_(0.5 * weight)
        return Slopes(error.mul_(-scale * weight), None, total)

    @override
    def evaluate_rows(
        self, x: Tensor, mu: Tensor, scale: float | Tensor, weights: Sequence[float]
    ) -> Slopes:
        if len({*weights}) > 1:
            return super().evaluate_rows(x, mu, scale, weights)
        error, weight = self._error(x, mu), weights[0] * self.precision
        flat = error.flatten(1)
        totals = torch.linalg.vecdot(flat, flat).mul_(0.5 * weight)
        return Slopes(error.mul_(-scale * weight), None, totals)

    @override
    def instead_of(self, usual: Energy) -> Energy:
        return MaskedGaussian(self.precision) if usual.masks else self

    def _error(self, x: Tensor, mu: Tensor) -> Tensor:
        return x - mu


class MaskedGaussian(Gaussian):
    """The Gaussian energy of attention logits: where both are the mask's -inf there is no error."""

    name = "gaussian_logits"
    masks = True

    @override
    def _error(self, x: Tensor, mu: Tensor) -> Tensor:
        return torch.where(x == mu, 0.0, x - mu)


class Free(Energy):
    """None: a value that no prediction holds."""

    name = "free"
    masks = False

    @override
    def evaluate(self, x: Tensor, mu: Tensor, scale: float | Tensor, weight: float = 1.0) -> Slopes:
        return Slopes(torch.zeros_like(x), None, x.new_zeros(()))


class Categorical(Energy):
    """``KL(softmax(x / tau) || softmax(mu / tau))`` of logits: the F_KL of Pinchetti et al. 2022.

    Logits at -inf, or at half the dtype's minimum and below, are masked: they carry no
    probability, no energy and no gradient.

    Args:
        dim: The axis of the softmax.
        temperature: tau, > 0.
    """

    name = "categorical"

    def __init__(self, dim: int = -1, temperature: float = 1.0) -> None:
        self.dim, self.temperature = dim, positive(temperature, "temperature")

    @override
    def evaluate(self, x: Tensor, mu: Tensor, scale: float | Tensor, weight: float = 1.0) -> Slopes:
        masked = mu <= torch.finfo(mu.dtype).min / 2
        mu, scale = mu.to(x.dtype), scale / self.temperature
        if self.temperature != 1.0:
            x, mu = x / self.temperature, mu / self.temperature
        log_p, log_q = torch.log_softmax(x, self.dim), torch.log_softmax(mu, self.dim)
        p, q = log_p.exp().masked_fill(masked, 0.0), log_q.exp().masked_fill(masked, 0.0)
        log_ratio = (log_p - log_q).masked_fill(masked, 0.0)
        divergence = (p * log_ratio).sum(self.dim, keepdim=True)
        dmu = q.sub_(p).mul_(scale * weight)
        dx = log_ratio.sub_(divergence).mul_(p).mul_(scale * weight)
        return Slopes(dmu, dx, divergence.sum().mul_(weight))


class Laplace(Energy):
    """``||x - mu||_1 / scale``: errors that are seldom and large; sparse causes of a `Latent`.

    Args:
        scale: > 0.
    """

    name = "laplace"
    masks = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = positive(scale, "scale")

    @override
    def evaluate(self, x: Tensor, mu: Tensor, scale: float | Tensor, weight: float = 1.0) -> Slopes:
        error, weight = x - mu, weight / self.scale
        size = torch.maximum(x.abs(), mu.abs()).mul_(8 * torch.finfo(x.dtype).eps)
        error.masked_fill_(error.abs() <= size, 0.0)  # or rounding would pull with all force
        return Slopes(error.sign().mul_(-scale * weight), None, error.abs().sum().mul_(weight))


class Huber(Energy):
    """The Gaussian where ``|x - mu| <= delta``, beyond it ``delta * (|x - mu| - delta / 2)``.

    Args:
        delta: > 0.
    """

    name = "huber"
    masks = False

    def __init__(self, delta: float = 1.0) -> None:
        self.delta = positive(delta, "delta")

    @override
    def evaluate(self, x: Tensor, mu: Tensor, scale: float | Tensor, weight: float = 1.0) -> Slopes:
        error = x - mu
        near = error.clamp(-self.delta, self.delta)
        total = (near * (error - 0.5 * near)).sum().mul_(weight)
        return Slopes(near.mul_(-scale * weight), None, total)


class Bernoulli(Energy):
    """``KL(sigmoid(x) || sigmoid(mu))`` of logits, entry by entry: F_KL of two classes."""

    name = "bernoulli"
    masks = False

    @override
    def evaluate(self, x: Tensor, mu: Tensor, scale: float | Tensor, weight: float = 1.0) -> Slopes:
        p, q, error = x.sigmoid(), mu.sigmoid(), x - mu
        none = x.new_zeros(())
        total = p * error + torch.logaddexp(mu, none) - torch.logaddexp(x, none)
        total = total.sum().mul_(weight)
        dx = (p * (1.0 - p) * error).mul_(scale * weight)
        return Slopes(q.sub_(p).mul_(scale * weight), dx, total)


def positive(number: float, name: str) -> float:
    """The number, if it is one above 0; else a ConfigError."""
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
        raise ConfigError(f"{name}={shown(number)}: expected a positive number.")
    return float(number)


def softmax_energy(name: str, dim: int) -> Energy:
    """The energy of that name at the logits of a softmax over ``dim``; else a ConfigError."""
    if name == "categorical":
        return Categorical(dim)
    if name == "gaussian":
        return MaskedGaussian()
    raise ConfigError(f"softmax_energy={shown(name)}: expected 'categorical' or 'gaussian'.")
