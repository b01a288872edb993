"""How values move: x <- x - gamma dF/dx, all nodes at once (Jacobi), Eq. 6 and 10 of the paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_pc.nodes import Node


class Inference:
    """The values' gradient descent over one batch.

    Args:
        gamma: Inference rate, > 0.
        gamma_decay: Factor of gamma after a step at which the energy has not fallen (the paper,
            D.3), in (0, 1]; 1 leaves gamma alone.
    """

    def __init__(self, gamma: float, gamma_decay: float) -> None:
        self.gamma: float | Tensor = gamma
        self.gamma_decay = gamma_decay
        self._last: Tensor | None = None

    @torch.no_grad()
    def observe(self, energy: Tensor) -> None:
        """Takes in F of this step, [], before the values move; stays on the device."""
        if self.gamma_decay < 1.0 and self._last is not None:
            if energy.device.type == "cpu":
                self.gamma *= 1.0 if energy < self._last else self.gamma_decay
            else:
                kept = torch.as_tensor(self.gamma, dtype=energy.dtype, device=energy.device)
                self.gamma = torch.where(energy < self._last, kept, kept * self.gamma_decay)
        self._last = energy

    @torch.no_grad()
    def move(self, nodes: Sequence[Node], scale: float) -> None:
        """Moves every node that an error has reached.

        Args:
            nodes: Nodes with ``dx`` (dE/dx) and ``below`` (the gradient through the module).
            scale: Factor that turns ``below`` into the gradient of the sum F.
        """
        for slope, factor in (("dx", 1.0), ("below", scale)):
            moving = [n for n in nodes if getattr(n, slope) is not None]
            if not moving:
                continue
            values = [n.x for n in moving]
            slopes: Sequence[Tensor] = [getattr(n, slope) for n in moving]
            if isinstance(self.gamma, Tensor):  # a rate on the device has no alpha
                slopes = torch._foreach_mul(list(slopes), self.gamma)
                torch._foreach_add_(values, list(slopes), alpha=-factor)
            else:
                torch._foreach_add_(values, list(slopes), alpha=-factor * self.gamma)
