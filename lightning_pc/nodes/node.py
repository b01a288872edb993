"""A value node: the value that stands where an activation stood, and its prediction error."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pc.nodes.energies import Energy, Slopes


@dataclass(eq=False)
class Node:
    """One value node.

    Attributes:
        name: Dotted name of its place; a second call of the same place is ``name#2``.
        x: The value, float32 or wider, [B, *].
        energy: Its node energy.
        depth: Fewest stages on any path to the loss; a node that the loss reads has 1.
        arrival: First inference step at which its error may not be zero: its depth on a chain,
            sooner where a connection skips stages, or where iPC shares a weight between stages;
            1 in error coordinates.
        rounding: Relative, of the arithmetic that computes its prediction.
        weight: Of its energy in F, at the coming evaluation.
        followed: Share of what its prediction moves by that its value moves with it, in [0, 1]. At
            0, as in the paper, the value stays. At 1 its error does.
        gradient: dF/dx at this evaluation, [B, *], in the scale of parameter gradients; None before
            an error arrives.
        total: Its energy at this evaluation, with its weight, []; None before an error arrives.
    """

    name: str
    x: Tensor
    energy: Energy
    depth: int = 0
    arrival: int = 0
    rounding: float = torch.finfo(torch.float32).eps
    weight: float = 1.0
    followed: float = 0.0
    gradient: Tensor | None = None
    total: Tensor | None = None
    _before: Tensor | None = None  # the prediction as of the last evaluation, where it is followed

    @property
    def coordinates(self) -> Tensor:
        """What inference moves, [B, *]: the value."""
        return self.x

    def evaluate(self, mu: Tensor, scale: float) -> Slopes:
        """The energy and its gradients at a prediction, which the value follows first.

        Args:
            mu: The prediction, [B, *].
            scale: Factor from the energy's gradient to the parameters' (1 / M and accumulation).
        """
        x, mu = self.x.detach(), mu.detach().to(self.x.dtype)
        if self._before is not None:
            move = mu - self._before
            if self.energy.masks:  # -inf stays
                move.masked_fill_(~move.isfinite(), 0.0)
            x.add_(move, alpha=self.followed)
            self._before = mu.clone()  # the module may write over it
        slopes = self.energy.evaluate(x, mu, scale, self.weight)
        self.total = slopes.total
        return slopes

    def follow(self, share: float) -> None:
        """Lets its value, which equals its prediction now, follow it."""
        self.followed, self._before = share, self.x.detach().clone()

    def stand(self, mu: Tensor) -> Tensor:
        """Its value, [B, *], where its prediction is ``mu``."""
        return self.x

    def moved(self, gamma: float, momentum: float) -> None:
        """Takes in that its coordinates have made a step."""

    def restart(self, start: Tensor) -> None:
        """Its coordinates are back where they started."""
        self.coordinates.data.copy_(start)

    def forget(self) -> None:
        """Drops what belongs to one evaluation."""
        self.gradient = self.total = None


@dataclass(eq=False)
class ErrorNode(Node):
    """A node in error coordinates: inference moves ``e``, and ``x = mu + e`` follows.

    Goemaere et al. 2025 (ePC, arXiv 2505.20137): F(e) is the loss of the whole network plus
    ``0.5 * ||e||^2`` of each node, so dF/de is ``e`` plus the gradient that arrives by ordinary
    backprop through all that is below, undamped at any depth. Its minima are those of F(x).
    The energy must depend on ``x - mu`` alone, as the Gaussian does.

    Attributes:
        e: The error ``x - mu``, in the value's dtype, [B, *]; starts at zero.
        come: How far a lone entry has come that a constant gradient of -1 pulls at; its whole way
            is 1 / weight. To first order all entries have come the same share of theirs.
        pace: The velocity of that entry.
        whole: Parameters learn from its error as if that had come all of its way.
    """

    e: Tensor = field(init=False)
    come: float = 0.0
    pace: float = 0.0
    whole: bool = False

    def __post_init__(self) -> None:
        self.e = torch.zeros_like(self.x, requires_grad=False)

    @property
    @override
    def coordinates(self) -> Tensor:
        """What inference moves, [B, *]: the error."""
        return self.e

    @override
    def stand(self, mu: Tensor) -> Tensor:
        self.x.detach().copy_(mu.detach()).add_(self.e.detach())
        return self.x

    @override
    def evaluate(self, mu: Tensor, scale: float) -> Slopes:
        self.stand(mu)
        # Not of x and mu, whose difference rounds away an error that is small beside them.
        e = self.e.detach()
        slopes = self.energy.evaluate(e, e.new_zeros(()), scale, self.weight)
        self.total = slopes.total
        return Slopes(slopes.dmu * self._gain, slopes.own(), slopes.total)

    @override
    def moved(self, gamma: float, momentum: float) -> None:
        self.pace = momentum * self.pace + 1.0 - self.weight * self.come
        self.come += gamma * self.pace

    @override
    def restart(self, start: Tensor) -> None:
        super().restart(start)
        self.come = self.pace = 0.0

    @property
    def _gain(self) -> float:
        """Factor of the error that parameters learn from."""
        share = self.weight * self.come if self.whole else 1.0
        return 1.0 / share if share > 0 else 1.0
