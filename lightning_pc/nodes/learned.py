"""A Gaussian energy that learns how large its errors are, unit by unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pc.errors import ConfigError, shown
from lightning_pc.nodes.energies import Energy, Slopes
from lightning_pc.precisions import is_number


class LearnedGaussian(Energy):
    """``0.5 * ||x - mu||^2 / variance``, with a variance for each unit that is learned.

    After each batch the variance moves towards the mean of ``(x - mu)^2`` plus the variance of what
    inference leaves open, 1 / (d2F/dx2). That is a step of expectation maximisation for a posterior
    whose entries are independent. Without the second part the variance would shrink by itself:
    values that are held more tightly have smaller errors. It is right where inference converges,
    and too small where units are correlated in the posterior. F leaves out the half of
    ``log variance``, which neither values nor weights feel.

    A variance that falls makes F steeper. ``gamma="auto"`` follows that, a number does not. On data
    without noise it falls without end. Each batch takes two more evaluations, which tell the
    curvature. Values that did not move in a batch teach nothing. One object serves one node and
    keeps what it has learned; checkpoints hold it as well.

    Args:
        momentum: How far the variance moves after a batch, in (0, 1]; 0.1 as in ``nn.BatchNorm1d``.
        dim: The axis of the units in [B, *], 1 for the channels of images.

    Attributes:
        variance: Of each unit, [units], 1 at first; None before the first batch.
        pull: Curvature of F without this energy, a running mean, [units].
        batches: It has learned from.
    """

    name = "learned_gaussian"
    masks = False

    def __init__(self, momentum: float = 0.1, dim: int = -1) -> None:
        if not (is_number(momentum) and 0 < momentum <= 1):
            raise ConfigError(f"momentum={shown(momentum)}: expected a number in (0, 1].")
        if not (is_number(dim) and isinstance(dim, int)):
            raise ConfigError(f"dim={shown(dim)}: expected a whole number.")
        self.momentum, self.dim = float(momentum), dim
        self.variance: Tensor | None = None
        self.pull: Tensor | None = None
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
            told = (
                f"energies: the variances at '{name}' are of {len(self.variance)} units, but axis"
            )
            told = f"{told} dim={self.dim} of its values {tuple(x.shape)} has {units}"
            raise ConfigError(f"{told}: name the axis of the units, or give it a new object.")
        self.variance = self.variance.to(x)
        self.pull = torch.zeros_like(self.variance) if self.pull is None else self.pull.to(x)

    @override
    def evaluate(self, x: Tensor, mu: Tensor, scale: float | Tensor, weight: float = 1.0) -> Slopes:
        variance, error = self._variance(x), x - mu
        self._squares = self._mean(error.square())
        count = x.numel() / len(self._squares)
        total = (self._squares / variance.flatten()).sum().mul_(0.5 * weight * count)
        return Slopes(error.mul_(-scale * weight).div_(variance), None, total)

    def learn(self, squares: Tensor, curvature: Tensor | None) -> None:
        """Takes in a batch; nothing where its numbers are not finite.

        Args:
            squares: Mean of ``(x - mu)^2``, [units].
            curvature: d2F/dx2 of each entry, [B, *]; None of values that are samples.
        """
        assert self.variance is not None
        assert self.pull is not None
        pull, target = self.pull, squares
        if curvature is not None:
            share = max(self.momentum, 1.0 / (self.batches + 1))
            pull = pull.lerp(self._mean(curvature) - 1.0 / self.variance, share)
            target = squares + 1.0 / (pull.clamp(min=0.0) + 1.0 / self.variance)
        if target.isfinite().all():
            self.variance, self.pull = self.variance.lerp(target, self.momentum), pull
            self.batches += 1

    @property
    def squares(self) -> Tensor:
        """Mean of ``(x - mu)^2`` at the last evaluation, [units]."""
        assert self._squares is not None
        return self._squares

    def state_dict(self) -> dict[str, Any]:
        """What it has learned."""
        return {"variance": self.variance, "pull": self.pull, "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of `state_dict`."""
        self.variance, self.pull = state["variance"], state["pull"]
        self.batches = state["batches"]

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
