"""Values that move along conjugate gradients, one evaluation a step: ``momentum="conjugate"``.

Conjugate gradients are heavy ball with the best rate and the best momentum of each step (on a
quadratic F no choice from the same gradients comes lower), but the rate takes the curvature along
the step. It is known once the step is done, from the gradients at its two ends. So each step is
first tried at gamma, and its right length is made up for in the step after it.

In iPC the weights have moved between those gradients, too. While F falls fast that hardly matters.
Once it hardly falls, values only follow the weights, and gradients that the weights keep alike look
like a direction in which F is flat: there no step is longer than gamma (but for what follows), and
the next one goes straight down the gradient, or values would run ahead.

On a chain, where errors arrive depth by depth, the first step of a value that an error has just
reached, after t = 0, may be longer: `taking_up`. At gamma a third of an error would be left after
one stage and nothing after sixteen. Such a step may be too long and raise F; steps that follow mend
it. So where weights learn at the end alone, `MENDING` steps at least follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pc.inference.movers import Descent, reached, slope
from lightning_pc.inference.schedules import Schedule
from lightning_pc.nodes.node import Node

#: The longest step, in units of gamma. With 8 inference comes little further (0.53 for 0.51 of the
#: way in a tiny ResNet), and where F is steeper further off (activations x * x) it ends higher.
LONGEST = 6.0
#: Weights that move lead where a step lowers F by less than this share of all its fall in the call,
#: and of the first eight steps by less than 0.8 of the mean step's fall. (An F that falls evenly
#: counts as settled from the tenth step on.)
SETTLED, FIRST = 0.1, 8
#: Steps that at least follow a longer one before inference has converged. Weights that learn at the
#: end alone would learn what it leaves uncorrected.
MENDING = 2

#: Whether values have settled, [], by F at the start of the call, before the last step and after
#: it, and the number of steps: then that step is not made longer, and the next has no momentum.
Rule = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def stalled(first: Tensor, before: Tensor, now: Tensor, steps: int) -> Tensor:
    """F has not fallen."""
    return before <= now


def following(first: Tensor, before: Tensor, now: Tensor, steps: int) -> Tensor:
    """F has hardly fallen, so that values only follow the weights."""
    least = SETTLED * max(1.0, FIRST / steps)
    return before - now <= least * (first - now).clamp(min=0.0)


class Conjugate(Descent):
    """The values' conjugate gradients over one batch, of an F that changes by the weights at most.

    With r = -dF/dx at x, and s the step's direction (first r): the next gradients are those at
    x + gamma s, which gives F's change of slope along s, and with it the length of the step that
    leads to the minimum along s, the r there (linearly, without another evaluation), and the next
    direction r + m s, with m in [0, 1] by Polak & Ribiere. Behind rectifiers, where F bends, the
    bound on m keeps directions from growing without end.

    F may still rise where it is much steeper further off than a step has seen (activations such as
    x ** 3), or after a step of `taking_up`; then the values go down its gradient by gamma.

    Args:
        gamma: Length of the tried step, stable in every direction (below 2 / curvature).
        gamma_decay: Factor of gamma after a step at which the energy has not fallen.
        settled: From where no step is longer than gamma (but those of ``front``), and each goes
            down the gradient.
        front: In so many steps, the first excepted, a value that an error has just reached goes as
            far as `taking_up` says, settled or not. Errors arrive depth by depth, each all at once
            (`Graph.even`).
    """

    own_rates = True
    remedy = "Values went too far along conjugate gradients: use momentum=0."

    def __init__(
        self,
        gamma: float,
        gamma_decay: float,
        settled: Rule = stalled,
        front: int = 0,
    ) -> None:
        super().__init__(gamma, gamma_decay)
        self._rule, self._front = settled, front
        self._settled: Tensor | None = None
        self._steps = 0
        self._directions: list[Tensor] = []
        self._slopes: list[Tensor] = []  # dF/dx at the end of the step of the right length
        self._moving: list[bool] = []  # nodes that an error has reached
        self._tried: float | Tensor = 0.0

    @override
    @torch.no_grad()
    def observe(self, energy: Tensor) -> None:
        before = self._last
        super().observe(energy)
        if before is not None:
            assert self._first is not None
            self._steps += 1
            self._settled = self._rule(self._first, before, energy, self._steps)

    @override
    @torch.no_grad()
    def move(self, nodes: Sequence[Node], scale: float) -> None:
        values = [node.coordinates for node in nodes]
        before = self._moving or [False] * len(nodes)
        self._moving = [was or reached(node) for was, node in zip(before, nodes, strict=True)]
        slopes = [
            torch.zeros_like(value, requires_grad=False)
            if (own := slope(node, scale)) is None
            else own
            for value, node in zip(values, nodes, strict=True)
        ]
        if not self._directions:
            self._slopes = slopes
            self._directions = list(torch._foreach_neg(slopes))
        else:
            self._correct(values, slopes)
            if self._steps < self._front:
                self._carry_on(nodes)
        self._tried = self.gamma
        self._go(values, self._directions, self._tried)

    def _go(
        self, values: Sequence[Tensor], directions: Sequence[Tensor], length: float | Tensor
    ) -> None:
        """Moves values along directions, by a length that may be on the device."""
        for value, direction, moves in zip(values, directions, self._moving, strict=True):
            if not moves:
                continue
            if isinstance(length, Tensor):
                value.addcmul_(direction, length)
            else:
                value.add_(direction, alpha=length)

    def _correct(self, values: list[Tensor], slopes: list[Tensor]) -> None:
        """From the tried step's end to the right one's, and the next direction.

        In place: there are three tensors beside each value, and no more.
        """
        directions, before = self._directions, self._slopes
        torch._foreach_sub_(slopes, before)
        along = _dot(directions, slopes)
        # In units of the tried step, which stands where no minimum is ahead or none can be told.
        length = torch.where(along > 0, -_dot(directions, before) / along, 1.0)
        length = length.nan_to_num(1.0).clamp(0.0, LONGEST)
        if self._settled is not None:
            length = torch.where(self._settled, length.clamp(max=1.0), length)
        self._go(values, directions, (length - 1.0) * self._tried)
        was = _dot(before, before)
        torch._foreach_mul_(slopes, length)
        torch._foreach_add_(before, slopes)
        momentum = (_dot(before, slopes) / was).nan_to_num(0.0).clamp(0.0, 1.0)
        if self._settled is not None:
            momentum = momentum.masked_fill(self._settled, 0.0)
        torch._foreach_mul_(directions, momentum)
        torch._foreach_sub_(directions, before)

    def _carry_on(self, nodes: Sequence[Node]) -> None:
        """Makes the coming step of values that an error has just reached a longer one."""
        curvature = self.chosen_for or Schedule.aim / self.start_gamma
        largest = max(node.weight for node in nodes)
        for node, direction in zip(nodes, self._directions, strict=True):
            if node.depth == self._steps + 1 and node.weight:
                step = taking_up(curvature / largest) / node.weight
                direction.mul_(max(step, self.start_gamma) / self.gamma)


def taking_up(curvature: float) -> float:
    """The step of a value that takes up as much as it can of an error that has just come to it.

    In a long chain of stages that stretch what goes through them by a factor of at most s, the
    largest curvature is (1 + s) ** 2. Along a pull that is stretched by s, the error that pulls is
    gone after a step of 1 / s ** 2. And after a step of 1 a value's own error is all of what has
    arrived, as in Z-IL. (Where energies have weights, curvatures are in units of them.)
    """
    stretch = math.sqrt(max(curvature, 1.0)) - 1.0
    return 1.0 / max(stretch, 1.0) ** 2


def conjugate(
    gamma: float, gamma_decay: float, incremental: bool, arrive: bool, T: int
) -> Conjugate:
    """Of one batch.

    Args:
        gamma: As of `Conjugate`.
        gamma_decay: As of `Conjugate`.
        incremental: The weights move as well.
        arrive: Errors arrive depth by depth, each all at once (`Graph.even`).
        T: Evaluations at most.
    """
    settled, front = (following, T) if incremental else (stalled, T - 1 - MENDING)
    return Conjugate(gamma, gamma_decay, settled, front if arrive else 0)


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Of all nodes' entries together, []."""
    parts = [torch.dot(x.flatten(), y.flatten()) for x, y in zip(one, other, strict=True)]
    return torch.stack(parts).sum()
