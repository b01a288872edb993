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

    In error coordinates inference moves ``e``, and ``x = mu + e`` follows (ePC, Goemaere et al.
    2025, arXiv 2505.20137). F(e) is the loss of the whole network plus ``0.5 * ||e||^2`` of each
    node, so dF/de is ``e`` plus the gradient that arrives by ordinary backprop through all that is
    below, undamped at any depth. Its minima are those of F(x). The energy must depend on ``x - mu``
    alone, as the Gaussian does.

    Attributes:
        name: Dotted name of its place; a second call of the same place is ``name#2``.
        x: The value, float32 or wider, [B, *].
        energy: Its node energy.
        e: In error coordinates the error ``x - mu``, [B, *], zero at first; else None.
        depth: Fewest stages on any path to the loss; a node that the loss reads has 1.
        arrival: First inference step at which its error may not be zero: its depth on a chain,
            sooner where a connection skips stages, or where iPC shares a weight between stages;
            1 in error coordinates.
        rounding: Relative, of the arithmetic that computes its prediction.
        weight: Of its energy in F, at the coming evaluation.
        followed: Share of what its prediction moves by that its value moves with it, in [0, 1]. At
            0, as in the paper, the value stays. At 1 its error does.
        open: Gradients at its value go on to its prediction (see `Passage`).
        whole: Parameters learn from ``e`` as if that had come all of its way.
        velocity: Discounted sum of the gradients it has moved by, [B, *]; None without momentum.
        gradient: dF/dx at this evaluation, [B, *], in the scale of parameter gradients; None before
            an error arrives.
        total: Its energy at this evaluation, with its weight, []; None before an error arrives.
    """

    name: str
    x: Tensor
    energy: Energy
    e: Tensor | None = None
    depth: int = 0
    arrival: int = 0
    rounding: float = torch.finfo(torch.float32).eps
    weight: float = 1.0
    followed: float = 0.0
    open: bool = False
    whole: bool = False
    velocity: Tensor | None = None
    gradient: Tensor | None = None
    total: Tensor | None = None
    _before: Tensor | None = None  # the prediction as of the last evaluation, where it is followed
    # How far a lone error has come that a constant gradient of -1 pulls at, and its velocity. Its
    # whole way is 1 / weight. To first order all entries have come the same share of theirs.
    _come: float | Tensor = 0.0
    _pace: float | Tensor = 0.0

    @property
    def coordinates(self) -> Tensor:
        """What inference moves, [B, *]: the value, or its error."""
        return self.x if self.e is None else self.e

    def parts(self, rows: Tensor) -> list[tuple[Node, Tensor]]:
        """Each node with its part of a tensor as large as ``x``."""
        return [(self, rows)]

    def evaluate(self, mu: Tensor, scale: float | Tensor) -> Slopes:
        """The energy and its gradients at a prediction, which the value follows first.

        Args:
            mu: The prediction, [B, *].
            scale: Factor from the energy's gradient to the parameters' (1 / M and accumulation).
        """
        self.stand(mu)
        x, mu = self.x.detach(), mu.detach().to(self.x.dtype)
        if self.e is not None:
            # Not of x and mu, whose difference rounds away an error that is small beside them.
            slopes = self.energy.evaluate(self.e.detach(), mu.new_zeros(()), scale, self.weight)
            if self.whole and self.weight and (isinstance(self._come, Tensor) or self._come):
                dmu = slopes.dmu / (self.weight * self._come)
                slopes = Slopes(dmu, slopes.own(), slopes.total)
        else:
            if self._before is not None:
                error = x - self._before
                move = torch.sub(mu, self._before, out=self._before)
                if self.energy.masks:  # -inf stays
                    move.masked_fill_(~move.isfinite(), 0.0)
                else:  # what brings a row [*, D] nearer to its value, weights would learn again
                    along = (move * error).sum(-1, keepdim=True) / error.square().sum(-1, True)
                    along = along.nan_to_num_(0.0).clamp_(0.0, 1.0)
                    move.addcmul_(along, error, value=-1.0)
                x.add_(move, alpha=self.followed)
                self._before.copy_(mu)  # the module may write over it
            slopes = self.energy.evaluate(x, mu, scale, self.weight)
        self.total = slopes.total
        return slopes

    def stand(self, mu: Tensor) -> Tensor:
        """Its value, [B, *], before an error arrives where its prediction is ``mu``."""
        if self.e is not None:
            self.x.detach().copy_(mu.detach()).add_(self.e)
        return self.x

    def follow(self, share: float) -> None:
        """Lets its value, which equals its prediction now, follow it."""
        self.followed, self._before = share, self.x.detach().clone()

    def moved(self, gamma: float | Tensor, momentum: float) -> None:
        """Takes in that its coordinates have made a step."""
        self._pace = momentum * self._pace + 1.0 - self.weight * self._come
        self._come = self._come + gamma * self._pace

    def restart(self, start: Tensor) -> None:
        """Its coordinates are back where they started, at rest."""
        self.coordinates.data.copy_(start)
        self.velocity = None
        self._come = self._pace = 0.0

    def forget(self) -> None:
        """Drops what belongs to one evaluation."""
        self.gradient = self.total = None


@dataclass(eq=False)
class NodeRows(Node):
    """Nodes that move as one: ``x``, ``gradient`` and ``velocity`` are [n, B, *], ``total`` [n].

    Attributes:
        members: The n nodes, whose values are the rows of ``x``.
    """

    members: list[Node] = field(default_factory=list)

    @classmethod
    def of(cls, members: list[Node], rows: Tensor) -> NodeRows:
        """Moves the values of ``members`` into ``rows``."""
        for member, row in zip(members, rows.unbind(), strict=True):
            member.x.data = row.copy_(member.x.detach())
        first = members[0]
        made = cls(first.name, rows, first.energy, members=members, rounding=first.rounding)
        made.depth, made.arrival = first.depth, min(member.arrival for member in members)
        if any(member.velocity is not None for member in members):
            none = torch.zeros_like(first.x, requires_grad=False)
            each = [none if m.velocity is None else m.velocity for m in members]
            made.velocity = torch.stack(each)
        return made

    def evaluate_some(self, part: slice, mu: Tensor, scale: float | Tensor, moves: bool) -> Tensor:
        """Some members' energies at their predictions [n, B, *]; gradients where it ``moves``.

        Returns:
            dE/dmu in the scale of parameter gradients, [n, B, *].
        """
        x, each = self.x[part], [member.weight for member in self.members[part]]
        slopes = self.energy.evaluate_rows(x, mu.detach().to(x.dtype), scale, each)
        whole = len(each) == len(self.members)
        if self.total is None:
            self.total = slopes.total if whole else slopes.total.new_zeros(len(self.members))
        self.total[part] = slopes.total
        if moves and whole and self.gradient is None:
            self.gradient = slopes.own()
        elif moves:
            self.slope()[part].add_(slopes.own())
        return slopes.dmu

    def slope(self) -> Tensor:
        """``gradient``, zero where no error has arrived."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.x)
        return self.gradient

    def gather(self) -> None:
        """Takes in what evaluations of single members have left in these."""
        for i, member in enumerate(self.members):
            if member.total is not None:
                if self.total is None:
                    self.total = member.total.new_zeros(len(self.members))
                self.total[i], member.total = member.total, None
            if member.x.grad is not None:
                self.slope()[i].add_(member.x.grad)
                member.x.grad = None

    @override
    def parts(self, rows: Tensor) -> list[tuple[Node, Tensor]]:
        return [*zip(self.members, rows.unbind(), strict=True)]

    def leave(self) -> None:
        """Leaves its velocity to the members, for values that are kept."""
        for member, row in self.parts(self.velocity) if self.velocity is not None else ():
            member.velocity = row
