"""A Gaussian energy that learns how large its errors are, unit by unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pc.errors import ConfigError, shown
from lightning_pc.nodes.energies import Energy, Slopes


class LearnedGaussian(Energy):
    """``0.5 * ||x - mu||^2 / variance``, with a variance for each unit that is learned.

    After each batch the variance moves towards the mean of ``(x - mu)^2`` plus the variance of what
    inference leaves open, 1 / (d2F/dx2). That is a step of expectation maximisation with a
    diagonal Laplace approximation. Without the second part the variance of a hidden unit falls to
    zero: values that are held more tightly have smaller errors. F leaves out the half of
    ``log variance``, which neither values nor weights feel.

    Each batch takes two more evaluations, which tell the curvature. One object serves one node and
    keeps what it has learned; checkpoints hold it as well.

    Args:
        momentum: How far the variance moves after a batch, in (0, 1]; 0.1 as in ``nn.BatchNorm1d``.
        dim: The axis of the units in [B, *], 1 for the channels of images.

    Attributes:
        variance: Of each unit, [units], 1 at first; None before the first batch.
        batches: It has learned from.
    """

    name = "learned_gaussian"
    masks = False

    def __init__(self, momentum: float = 0.1, dim: int = -1) -> None:
        if (
            isinstance(momentum, bool)
            or not isinstance(momentum, float | int)
            or not 0 < momentum <= 1
        ):
            raise ConfigError(f"momentum={shown(momentum)}: expected a number in (0, 1].")
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise ConfigError(f"dim={shown(dim)}: expected a whole number.")
        self.momentum, self.dim = float(momentum), dim
        self.variance: Tensor | None = None
        self.batches = 0
        self._squares: Tensor | None = None  # mean of (x - mu)^2 at the last evaluation, [units]

    @property
    def precision(self) -> Tensor | None:
        """1 / variance, [units]; None before the first batch."""
        return None if self.variance is None else 1.0 / self.variance

    @override
    def instead_of(self, usual: Energy) -> Energy:
        if usual.masks:
            told = "energies: masked logits of a softmax have no variance to learn. Use 'gaussian'"
            raise ConfigError(f"{told} or 'categorical' there.")
        return self

    def fit(self, name: str, x: Tensor) -> None:
        """Has a variance for each unit of a node's value [B, *], or raises a ConfigError."""
        if not -x.dim() <= self.dim < x.dim() or self.dim % x.dim() == 0:
            told = f"energies: '{name}' has values of shape {tuple(x.shape)}"
            raise ConfigError(f"{told}; dim={self.dim} is no axis of units in that.")
        units = x.shape[self.dim]
        if self.variance is None:
            self.variance = x.new_ones(units, requires_grad=False)
        elif len(self.variance) != units:
            told = f"energies: the variances given to '{name}' are of {len(self.variance)} units"
            raise ConfigError(f"{told}, and its values have {units}: give it an object of its own.")
        self.variance = self.variance.to(x)

    @override
    def evaluate(self, x: Tensor, mu: Tensor, scale: float | Tensor, weight: float = 1.0) -> Slopes:
        variance, error = self._variance(x), x - mu
        self._squares = self._mean(error.square())
        count = x.numel() / len(self._squares)
        total = (self._squares / variance.flatten()).sum().mul_(0.5 * weight * count)
        return Slopes(error.mul_(-scale * weight).div_(variance), None, total)

    def learn(self, squares: Tensor, curvature: Tensor) -> None:
        """Takes in a batch.

        Args:
            squares: Mean of ``(x - mu)^2``, [units].
            curvature: d2F/dx2 of each entry, [B, *].
        """
        assert self.variance is not None
        # Its own part of the curvature is 1 / variance; where F bends down besides, that is all.
        left = torch.minimum(1.0 / self._mean(curvature).clamp(min=1e-30), self.variance)
        self.variance = self.variance.lerp(squares + left, self.momentum)
        self.batches += 1

    @property
    def squares(self) -> Tensor:
        """Mean of ``(x - mu)^2`` at the last evaluation, [units]."""
        assert self._squares is not None
        return self._squares

    def state_dict(self) -> dict[str, Any]:
        """What it has learned."""
        return {"variance": self.variance, "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of `state_dict`."""
        self.variance, self.batches = state["variance"], state["batches"]

    @staticmethod
    def states(energies: Mapping[str, Energy]) -> dict[str, Any]:
        """What has been learned by name of a place, under "energies"; {} where nothing learns."""
        learned = {n: e for n, e in energies.items() if isinstance(e, LearnedGaussian)}
        states = {name: energy.state_dict() for name, energy in learned.items()}
        return {"energies": states} if states else {}

    @staticmethod
    def load_states(energies: Mapping[str, Energy], state: Mapping[str, Any]) -> None:
        """Goes on from a state with those of `states`; what has none is as it was."""
        for name, learned in state.get("energies", {}).items():
            if isinstance(energy := energies.get(name), LearnedGaussian):
                energy.load_state_dict(learned)

    def _variance(self, x: Tensor) -> Tensor:
        """That of each unit, in a shape that divides [B, *]."""
        assert self.variance is not None
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return self.variance.view(shape)

    def _mean(self, entries: Tensor) -> Tensor:
        """Over all axes but that of the units, [units]."""
        return entries.movedim(self.dim, -1).flatten(0, -2).mean(0)
