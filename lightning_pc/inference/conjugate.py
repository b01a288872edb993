"""Values that move along conjugate gradients, one evaluation a step: ``momentum="conjugate"``.

Conjugate gradients are heavy ball with the best rate and the best momentum of each step. On a
quadratic F no choice from the same gradients comes lower. But the rate takes the curvature along
the step, which is known once the step is done, from the gradients at its two ends. So each step is
first tried at gamma, and its right length is made up for in the step after it.

Weights must stand meanwhile: of gradients that they move, too, the curvature cannot be told.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pc.inference.movers import Descent
from lightning_pc.nodes.node import Node

#: The longest step, in units of gamma. With 8 inference comes little further (0.53 for 0.51 of the
#: way in a tiny ResNet), and where F is steeper further off (activations x * x) it ends higher.
LONGEST = 6.0


class Conjugate(Descent):
    """The values' conjugate gradients over one batch.

    With r = -dF/dx at x, and s the step's direction (first r): the next gradients are those at
    x + gamma s, which gives F's change of slope along s, and with it the length of the step that
    leads to the minimum along s, the r there (linearly, without another evaluation), and the next
    direction r + m s, with m in [0, 1] by Polak & Ribiere. Behind rectifiers, where F bends, the
    bound on m keeps directions from growing without end.

    F may still rise where it is much steeper further off than a step has seen (activations such as
    x ** 3). After a step at which F has not fallen, that step is made no longer than it was tried,
    and the next goes down the gradient.

    Args:
        gamma: Length of the tried step, stable in every direction (below 2 / curvature).
        gamma_decay: Factor of gamma after a step at which the energy has not fallen.
    """

    remedy = "Values went too far along conjugate gradients: use momentum=0."

    def __init__(self, gamma: float, gamma_decay: float) -> None:
        super().__init__(gamma, gamma_decay)
        self._stalled: Tensor | None = None  # whether F has not fallen, []
        # Of all nodes' entries together: the direction's opposite, and dF/dx where the step of the
        # right length ends, both in the scale of parameter gradients.
        self._uphill: Tensor | None = None
        self._slopes: Tensor | None = None
        self._moving: set[Node] = set()  # nodes that an error has reached
        self._tried: float | Tensor = 0.0

    @override
    @torch.no_grad()
    def observe(self, energy: Tensor) -> None:
        if self._last is not None:
            self._stalled = self._last <= energy
        super().observe(energy)

    @override
    @torch.no_grad()
    def move(self, nodes: Sequence[Node], scale: float) -> None:
        self._moving = {n for n in nodes if n in self._moving or n.gradient is not None}
        slopes = torch.cat([_flat_gradient(node) for node in nodes])
        if self._uphill is None or self._slopes is None:
            self._slopes, self._uphill = slopes, slopes.clone()
        else:
            self._correct(nodes, slopes, self._slopes, self._uphill, scale)
        self._tried = self.gamma * scale
        self._go(nodes, self._uphill, self._tried)

    def _go(self, nodes: Sequence[Node], uphill: Tensor, length: float | Tensor) -> None:
        """Moves values against ``uphill``, by a length that may be on the device."""
        parts = torch.split(uphill, [node.coordinates.numel() for node in nodes])
        for node, part in zip(nodes, parts, strict=True):
            if node in self._moving:
                step = part.view_as(node.coordinates)
                if isinstance(length, Tensor):
                    node.coordinates.addcmul_(step, length, value=-1.0)
                else:
                    node.coordinates.sub_(step, alpha=length)

    def _correct(
        self, nodes: Sequence[Node], slopes: Tensor, before: Tensor, uphill: Tensor, scale: float
    ) -> None:
        """From the tried step's end to the right one's, and the next direction; all in place."""
        change = slopes.sub_(before)
        dots = torch.dot(uphill, change), torch.dot(uphill, before)
        along, ahead = self.ranks.sum(*dots, scale=scale**2)
        # In units of the tried step, which stands where no minimum is ahead or none can be told.
        length = torch.where(along < 0, -ahead / along, 1.0)
        length = length.nan_to_num(1.0).clamp(0.0, LONGEST)
        if self._stalled is not None:
            length = torch.where(self._stalled, length.clamp(max=1.0), length)
        self._go(nodes, uphill, (length - 1.0) * self._tried)
        was = torch.dot(before, before)
        before.add_(change.mul_(length))
        along, was = self.ranks.sum(torch.dot(before, change), was, scale=scale**2)
        momentum = (along / was).nan_to_num(0.0).clamp(0.0, 1.0)
        if self._stalled is not None:
            momentum = momentum.masked_fill(self._stalled, 0.0)
        uphill.mul_(momentum).add_(before)


def _flat_gradient(node: Node) -> Tensor:
    """In the scale of parameter gradients, [entries]; zero before an error arrives."""
    if node.gradient is None:
        return torch.zeros_like(node.coordinates, requires_grad=False).flatten()
    return node.gradient.flatten()
