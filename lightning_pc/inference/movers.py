"""Movers: how values move along dF/dx, all nodes at once (Jacobi).

A mover is to the values what an optimizer is to the weights, an object with state that lasts one
batch. `Descent` is the paper's; `PassingOn` is that with a longer first step on a chain;
`OptimizerMover` is any optimizer of torch's; conjugate gradients are in
`lightning_pc.inference.conjugate`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pc.errors import ConfigError, misfit
from lightning_pc.nodes.node import Node
from lightning_pc.ranks import ALONE, Ranks


class Mover(ABC):
    """Moves the values of one batch.

    Args:
        gamma: Inference rate, > 0.

    Attributes:
        gamma: The rate at this step, on a device maybe a tensor.
        start_gamma: The rate at the start of the batch.
        momentum: Share of a node's velocity that it keeps from step to step.
        ranks: Processes that have other values of the same batch.
    """

    #: What to change where values went too far: each step has a rate and a momentum of its own, so
    #: that gamma is not to blame. "" where it is.
    remedy: ClassVar[str] = ""
    momentum: float = 0.0
    #: Values are samples, at which F is higher than at their start.
    samples = False
    #: Share of F by which it may fail to fall before gamma decays, for rounding's sake.
    slack = 0.0
    ranks: Ranks = ALONE

    def __init__(self, gamma: float) -> None:
        self.start_gamma = gamma
        self.gamma: float | Tensor = gamma
        self._last: Tensor | None = None  # F of the step before

    def observe(self, energy: Tensor) -> None:
        """Takes in F of this step, [], before the values move; stays on the device."""
        self._last = energy

    @abstractmethod
    def move(self, nodes: Sequence[Node], scale: float) -> None:
        """Moves every node that an error has reached.

        Args:
            nodes: Nodes with their ``gradient``.
            scale: Factor from these to the gradient of the sum F.
        """


class Descent(Mover):
    """x <- x - gamma dF/dx: Eq. 6 and 10 of the paper.

    With momentum m values move by a velocity, v <- m v + dF/dx and x <- x - gamma v (Polyak's heavy
    ball), as in PCX (Pinchetti et al. 2024). They start at rest.

    Args:
        gamma: Inference rate, > 0.
        gamma_decay: Factor of gamma after a step at which the energy has not fallen (the paper,
            D.3), in (0, 1]; 1 leaves gamma alone.
        momentum: Share of a node's velocity that it keeps from step to step, in [0, 1).
    """

    def __init__(self, gamma: float, gamma_decay: float = 1.0, momentum: float = 0.0) -> None:
        super().__init__(gamma)
        self.gamma_decay, self.momentum = gamma_decay, momentum

    @override
    @torch.no_grad()
    def observe(self, energy: Tensor) -> None:
        if self.gamma_decay < 1.0 and self._last is not None:
            fallen = energy < self._last
            if self.slack:
                fallen = fallen | (energy - self._last <= self.slack * energy.abs())
            if energy.device.type == "cpu":
                self.gamma *= 1.0 if fallen else self.gamma_decay
            else:
                kept = self.gamma
                if not isinstance(kept, Tensor):  # filled in, since a copy would be waited for
                    kept = torch.full_like(energy, kept)
                self.gamma = torch.where(fallen, kept, kept * self.gamma_decay)
        super().observe(energy)

    @override
    @torch.no_grad()
    def move(self, nodes: Sequence[Node], scale: float) -> None:
        moves = {node: node.gradient for node in nodes if node.gradient is not None}
        if self.momentum:
            for node in nodes:
                if node.velocity is not None:
                    node.velocity.mul_(self.momentum)
            for node, gradient in moves.items():
                node.velocity = gradient + (0.0 if node.velocity is None else node.velocity)
            moves = {node: node.velocity for node in nodes if node.velocity is not None}
        for node in moves:
            if node.whole:
                node.moved(self.gamma, self.momentum)
        descend(moves, scale, self.gamma)


class PassingOn(Descent):
    """Descent in which a value passes on as much as it can of an error that has just reached it.

    For nodes whose errors arrive depth by depth, each all at once (`Graph.even`). At gamma a third
    of an error would be left after one stage, and nothing after sixteen.

    In a long chain of stages that stretch what goes through them by a factor of at most s, the
    largest curvature is (1 + s) ** 2. Along a pull that is stretched by s, the error that pulls is
    gone after a step of 1 / s ** 2. And after a step of 1 a value's own error is all of what has
    arrived, as in Z-IL. (Where energies have weights, curvatures and steps are in units of them.)

    Args:
        gamma: As of `Descent`.
        gamma_decay: As of `Descent`.
        aim: gamma times the largest curvature of F.
    """

    def __init__(self, gamma: float, gamma_decay: float, aim: float) -> None:
        super().__init__(gamma, gamma_decay)
        self._aim, self._steps = aim, 0

    @override
    @torch.no_grad()
    def move(self, nodes: Sequence[Node], scale: float) -> None:
        super().move(nodes, scale)
        self._steps += 1
        for node in nodes:
            if node.depth == self._steps > 1 and node.gradient is not None and node.weight:
                stretch = math.sqrt(self._aim / (self.start_gamma * node.weight)) - 1.0
                step = 1.0 / (max(stretch, 1.0) ** 2 * node.weight)
                longer = max(step, self.start_gamma) - self.gamma
                descend({node: node.gradient}, scale, longer)


class OptimizerMover(Mover):
    """Any optimizer of torch's on the values, made anew for each batch.

    Args:
        make: Makes the optimizer from the list of values.
    """

    remedy = "Values went too far: lower the rate of the optimizer that inference= makes."

    def __init__(self, make: Callable[[list[Tensor]], Optimizer]) -> None:
        super().__init__(float("nan"))
        self._make = make
        self._optimizer: Optimizer | None = None

    @override
    @torch.no_grad()
    def move(self, nodes: Sequence[Node], scale: float) -> None:
        values = [node.coordinates for node in nodes]
        if self._optimizer is None:
            self._optimizer = made = self._make([value.requires_grad_() for value in values])
            groups = made.param_groups if isinstance(made, Optimizer) else []
            held = {id(value) for group in groups for value in group["params"]}
            if held != {*map(id, values)} or misfit(made.step):
                told = f"inference= made {type(made).__name__}: expected a torch optimizer of all"
                raise ConfigError(f"{told} the values and no others, whose step needs no closure.")
            self.samples = getattr(made, "samples", False)
            self.start_gamma = self.gamma = float(self._optimizer.param_groups[0].get("lr", "nan"))
        for node, value in zip(nodes, values, strict=True):
            value.grad = slope(node, scale)
        self._optimizer.step()
        for value in values:
            value.grad = None


def slope(node: Node, scale: float) -> Tensor | None:
    """dF/dx, ``scale`` times a node's gradient, [B, *]; None where no error has reached it."""
    return None if node.gradient is None else node.gradient * scale


def descend(moves: Mapping[Node, Tensor], scale: float, gamma: float | Tensor) -> None:
    """Moves the values of nodes by -gamma * scale times what is given of each."""
    if not moves:
        return
    values, gradients = [node.coordinates for node in moves], [*moves.values()]
    if isinstance(gamma, Tensor):  # a rate on the device has no alpha
        gradients = list(torch._foreach_mul(gradients, gamma))
        torch._foreach_add_(values, gradients, alpha=-scale)
    else:
        torch._foreach_add_(values, gradients, alpha=-scale * gamma)
