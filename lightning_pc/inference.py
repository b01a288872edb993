"""How values move: x <- x - gamma dF/dx, all nodes at once (Jacobi), Eq. 6 and 10 of the paper.

With momentum m they move by a velocity, v <- m v + dF/dx and x <- x - gamma v (Polyak's heavy
ball), as in PCX (Pinchetti et al. 2024). Values start at rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_pc.nodes import Node

#: ``T="auto"`` ends inference when a step moves F by less than this share of all its movement.
CONVERGED = 0.01


class Inference:
    """The values' gradient descent over one batch.

    Args:
        gamma: Inference rate, > 0.
        gamma_decay: Factor of gamma after a step at which the energy has not fallen (the paper,
            D.3), in (0, 1]; 1 leaves gamma alone.
        momentum: Share of a node's velocity that it keeps from step to step, in [0, 1).

    Attributes:
        chosen_for: The largest curvature of F by which gamma was chosen, None where it was given.
    """

    #: Each step has a rate and a momentum of its own, so that F's growth says nothing of gamma.
    own_rates: ClassVar[bool] = False

    def __init__(self, gamma: float, gamma_decay: float, momentum: float = 0.0) -> None:
        self.start_gamma = gamma
        self.chosen_for: float | None = None
        self.gamma_decay = gamma_decay
        self.momentum = momentum
        self.begin()

    def begin(self) -> None:
        """Values descend from their start, be it once more."""
        self.gamma: float | Tensor = self.start_gamma
        self._first: Tensor | None = None
        self._last: Tensor | None = None
        self._moved: Tensor | None = None

    @property
    def converged(self) -> Tensor | None:
        """Whether F fell, at last by less than 1 % of what it has fallen so far, []; None at first.

        Also where it cannot move at all.
        """
        if self._moved is None or self._last is None or self._first is None:
            return None
        return self._moved <= CONVERGED * (self._first - self._last)

    @property
    def ends(self) -> Tensor | None:
        """F when the values began to move and now, [2]; None at first."""
        if self._last is None or self._first is None:
            return None
        return torch.stack([self._first, self._last])

    @torch.no_grad()
    def observe(self, energy: Tensor) -> None:
        """Takes in F of this step, [], before the values move; stays on the device."""
        if self.gamma_decay < 1.0 and self._last is not None:
            if energy.device.type == "cpu":
                self.gamma *= 1.0 if energy < self._last else self.gamma_decay
            else:
                kept = self.gamma
                if not isinstance(kept, Tensor):  # filled in, since a copy would be waited for
                    kept = torch.full_like(energy, kept)
                self.gamma = torch.where(energy < self._last, kept, kept * self.gamma_decay)
        if self._last is None:
            self._first = energy
        else:
            # A velocity keeps values moving where F happens to stand still, at a turn.
            moved, before = (energy - self._last).abs(), self._moved
            self._moved = moved if before is None else moved.maximum(self.momentum * before)
        self._last = energy

    def finish(self, energy: Tensor) -> None:
        """Takes in F of an evaluation, [], after which no value moves."""
        self._last = energy

    @torch.no_grad()
    def move(self, nodes: Sequence[Node], scale: float) -> None:
        """Moves every node that an error has reached.

        Args:
            nodes: Nodes with their ``slopes`` and ``below`` (the gradient through the module).
            scale: Factor that turns ``below`` into the gradient of the sum F.
        """
        values = [node.coordinates for node in nodes]
        for node in nodes:  # a rate on the device is not waited for
            rate = self.start_gamma if isinstance(self.gamma, Tensor) else self.gamma
            node.moved(rate, self.momentum)
        if not self.momentum:
            descend(values, nodes, scale, self.gamma)
            return
        for node in nodes:
            if node.velocity is None:
                node.velocity = torch.zeros_like(node.coordinates, requires_grad=False)
        velocities = [node.velocity for node in nodes if node.velocity is not None]
        torch._foreach_mul_(velocities, self.momentum)
        descend(velocities, nodes, scale, -1.0)
        add(values, velocities, 1.0, self.gamma)


def descend(
    targets: Sequence[Tensor], nodes: Sequence[Node], scale: float, gamma: float | Tensor
) -> None:
    """Moves targets by -gamma dF/dx, each where an error has reached its node."""
    pulls: dict[float, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for target, node in zip(targets, nodes, strict=True):
        if node.slopes is not None:
            pulls[node.slopes.factor].append((target, node.slopes.dx))
        if node.below is not None:
            pulls[scale].append((target, node.below))
    for factor, pairs in pulls.items():
        moved, gradients = [list(tensors) for tensors in zip(*pairs, strict=True)]
        add(moved, gradients, factor, gamma)


def add(
    targets: list[Tensor], gradients: list[Tensor], factor: float, gamma: float | Tensor
) -> None:
    """Moves targets by -gamma * factor * gradient."""
    if isinstance(gamma, Tensor):  # a rate on the device has no alpha
        gradients = list(torch._foreach_mul(gradients, gamma))
        torch._foreach_add_(targets, gradients, alpha=-factor)
    else:
        torch._foreach_add_(targets, gradients, alpha=-factor * gamma)
