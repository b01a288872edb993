"""The automatic inference rate, from the largest curvature of the free energy.

The values' descent is stable while gamma * curvature < 2, the curvature being the largest
eigenvalue of d2F/dx2. It differs from module to module and grows with the weights, so it is looked
at before the first move of a batch, now and then. A look is a power iteration: each product of
d2F/dx2 and a direction is the difference of two gradients at the same weights. (Two successive
inference steps would give such a difference for nothing, but in iPC the weights have moved between
them, which passes for curvature; and errors that start at the output point where it is small.)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_pc.inference.movers import slope as _gradient
from lightning_pc.nodes.node import Node

#: Products of a look, one value-only evaluation each (about 0.75 of an ordinary one).
PRODUCTS = 4
#: Evaluations from one look to the next, the first sooner: looks take less than 2 % of the time.
EVERY = 300
#: Evaluations after which a look may follow a batch whose inference has raised the energy; four
#: times as many after each such look that has found gamma right, until gamma changes.
SOONEST = 40
#: Length of the step along a direction, against the values' size: far above bfloat16's rounding. A
#: rectifier's kinks are infinite curvature to a short step and hardly any to a long one: a shallow
#: ReLU network would do with 0.2, a tiny MobileNetV2 (BatchNorm, ReLU6) needs less than 0.1.
REACH = 0.05
#: gamma until a look has succeeded, and the largest, which is the paper's own gamma.
START, LARGEST = 0.1, 0.5
#: The size of an automatic beta, times the loss's curvature in error coordinates where that is
#: above 1. At equilibrium PC descends 0.5 r' S^-1 r of a residual r, where the eigenvalues of S lie
#: between 1 and 1 + this: what weights gain by growing to explain noise is of that size. The sign
#: changes, so that to first order they gain nothing.
ROOM = 0.05


@dataclass
class AutoGamma:
    """Chooses gamma, and remembers it from batch to batch.

    gamma is ``aim / curvature``, and is chosen again when gamma * curvature has left the band
    (during the first `EVERY` evaluations at every look). The band matters in iPC: a gamma that
    followed the curvature down at once would let the weights grow further, a gamma that stays
    makes them learn to keep the curvature near the limit, 2 / gamma.

    Args:
        aim: gamma * curvature where gamma is chosen, in (0, 2).
        low: Least gamma * curvature that is left alone.
        high: Largest gamma * curvature that is left alone.
        reach: Length of a look's steps.
        weighs: Chooses beta, too.

    Attributes:
        gamma: The rate in use.
        beta: The loss's weight in F, where that is automatic.
        curvature: As of the last look; None before the first.
        batches: Of training so far.
        evaluations: Evaluations of training so far.
        looked_at: ``evaluations`` at the last look.
        looks: Number of looks.
        failures: How many of the last looks on end have failed.
        anew: The next batch looks, and gamma is chosen whatever the band says.
        alarmed: Inference raised the energy in the last batch.
        fine: It has done so once, or diverged: looks go closer from then on.
        soonest: Evaluations from the last look to one that follows an alarm.
    """

    aim: float
    low: float
    high: float
    gamma: float = START
    beta: float = ROOM
    curvature: float | None = None
    batches: int = 0
    evaluations: int = 0
    looked_at: int = 0
    looks: int = 0
    failures: int = 0
    anew: bool = True
    alarmed: bool = False
    fine: bool = False
    soonest: int = SOONEST
    reach: float = REACH
    weighs: bool = False

    def __post_init__(self) -> None:
        self.gamma = min(self.gamma, self.aim)

    def due(self) -> bool:
        """Whether to look before the values of this batch move."""
        since = self.evaluations - self.looked_at
        wait = min(EVERY, self.looked_at)
        return self.anew or since >= (min(wait, self.soonest) if self.alarmed else wait)

    def take_in(self, curvature: float) -> None:
        """Chooses gamma after a look, and beta for the batches to come.

        A look that has failed (not finite, not positive) is ignored. Of the curvature in error
        coordinates 1 is the energies' own, and the rest the loss's.
        """
        fresh = self.anew or self.failures or self.evaluations < EVERY
        self.anew = False
        self.looks += 1
        self.looked_at = self.evaluations
        if not (math.isfinite(curvature) and curvature > 0):
            self.failures += 1
            return
        self.curvature, self.failures = curvature, 0
        if self.weighs:
            of_loss = (curvature - 1.0) / abs(self.beta)
            self.beta = math.copysign(ROOM, self.beta) / max(1.0, of_loss)
        if fresh or not self.low <= self.gamma * curvature <= self.high:
            before, self.gamma = self.gamma, min(self.aim / curvature, LARGEST)
            self.soonest = SOONEST if self.gamma != before else self.soonest
        elif self.alarmed:
            self.soonest = min(4 * self.soonest, EVERY)

    def after(self, evaluations: int, rose: bool) -> None:
        """Takes in a batch that is done: its evaluations, and whether inference raised F.

        The loss pulls at the values in one batch and pushes them in another. Scellier & Bengio 2017
        draw the sign of beta. Here it follows multiples of the golden ratio, so that it is balanced
        along every period: neither tasks in turn nor the batches of an epoch meet one sign alone.
        """
        self.evaluations += evaluations
        self.batches += 1
        if self.weighs:
            self.beta = abs(self.beta) * (-1) ** int((math.sqrt(5) - 1) * self.batches)
        self.alarmed = rose
        self.fine = self.fine or rose

    def after_divergence(self) -> None:
        """The next batch looks, closely, and gamma is chosen anew."""
        self.anew = self.fine = True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers."""
        given = ["aim", "low", "high", "reach", "weighs", *["beta"][self.weighs :]]
        return {name: value for name, value in asdict(self).items() if name not in given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state of `state_dict`."""
        for name in self.state_dict():
            if name in state:
                setattr(self, name, state[name])
        self.anew = self.anew or (state.get("looks", 0) > 0 and ("beta" in state) != self.weighs)
        if self.curvature is not None:  # of another algorithm it may be far too large
            chosen = min(self.aim / self.curvature, LARGEST)
            kept = self.low <= self.gamma * self.curvature <= self.high
            self.anew = self.anew or not (kept or self.gamma == chosen)


@torch.no_grad()
def largest_curvature(
    nodes: Sequence[Node],
    evaluate: Callable[[], object],
    scale: float,
    seed: int,
    fine: bool = False,
    reach: float = REACH,
    apart: bool = False,
) -> tuple[float, Node]:
    """The largest eigenvalue of d2F/dx2 by power iteration: mostly 0.7 to 0.95 of it.

    Behind rectifiers, where the gradient jumps, more: twice is usual in small batches. Less where F
    is bent otherwise further off: of a pretrained BERT with a new classifier, whose values hardly
    move, a seventh, unless it is looked at closely.

    Args:
        nodes: The batch's nodes with the gradients at their values; both are left as they are.
        evaluate: Gives every node its gradients at the values where they are now.
        scale: Factor from the nodes' gradients to those of F.
        seed: Of the first, random direction; torch's own generators are left alone.
        fine: Go no further than the gradient at the values is long, which is about as far as
            inference goes, nor less than the rounding of the forward allows.
        reach: Length of the step, against the size of the values.
        apart: In error coordinates an energy adds 1 to all curvatures. It is left out while the
            loss's largest is looked for, which may be far less, and added afterwards.

    Returns:
        The curvature (nan where it cannot be had) and the node that has most of its direction.
    """
    starts = [node.coordinates.detach().clone() for node in nodes]
    before = [(node.gradient, node.total) for node in nodes]
    generator = torch.Generator(starts[0].device).manual_seed(seed)
    direction = [torch.empty_like(x) for x in starts]
    for node, v, x in zip(nodes, direction, starts, strict=True):
        for _, part in node.parts(v):
            part.uniform_(-1, 1, generator=generator)
        v.masked_fill_(~x.isfinite(), 0)
    size = _size([x for node in nodes for _, x in node.parts(node.x)])
    length = reach * size * sum(x.numel() for x in starts) ** 0.5
    nothing = torch.zeros(())
    base = [nothing if (at := _gradient(node, scale)) is None else at for node in nodes]
    if fine:
        pull = _length(base)
        shortest = math.sqrt(max(node.rounding for node in nodes))
        length = min(length, max(pull, length * shortest / reach))
    try:
        for _ in range(PRODUCTS):
            norm = _length(direction)
            if not (math.isfinite(norm) and norm > 0):
                return 1.0 if apart and not norm else math.nan, nodes[0]
            step = length / norm
            for node, x, v in zip(nodes, starts, direction, strict=True):
                node.forget()
                node.coordinates.copy_(x).add_(v, alpha=step)
            evaluate()
            along: list[Tensor] = []
            for i, node in enumerate(nodes):
                slope = _gradient(node, scale)
                node.forget()
                change = torch.zeros_like(starts[i]) if slope is None else slope
                change.sub_(base[i])
                if apart:
                    change.sub_(direction[i], alpha=step)
                along.append(direction[i].mul_(change).sum())
                direction[i] = change.div_(step * norm)
            curvature = float(sum(along)) / (step * norm**2)
        if not curvature > 0:  # as much down as up: the length of the product will do
            curvature = _length(direction)
    finally:
        for node, x, (gradient, total) in zip(nodes, starts, before, strict=True):
            node.coordinates.copy_(x)
            node.gradient, node.total = gradient, total
    curvature += apart
    parts = [part for n, v in zip(nodes, direction, strict=True) for part in n.parts(v)]
    shares = torch.stack([torch.linalg.vector_norm(v).float() for _, v in parts])
    return curvature, parts[int(shares.argmax())][0]


@torch.no_grad()
def diagonal(
    nodes: Sequence[Node], evaluate: Callable[[], object], scale: float, seed: int
) -> list[Tensor]:
    """d2F/dx2 of each entry of some nodes, [B, *] each; the nodes are left as they are.

    A step v of random signs changes the gradient by d2F/dx2 v. Times v that has the diagonal for
    its mean (Hutchinson 1989, Bekas et al. 2007).

    Args:
        nodes: With the gradients at their values.
        evaluate: Gives every node its gradients at the values where they are now.
        scale: Factor from the nodes' gradients to those of F.
        seed: Of the signs; torch's own generators are left alone.
    """
    starts = [node.x.detach().clone() for node in nodes]
    generator = torch.Generator(starts[0].device).manual_seed(seed)
    signs = [torch.empty_like(x).bernoulli_(generator=generator).mul_(2).sub_(1) for x in starts]
    steps = [REACH * _size([x]) for x in starts]
    before = [(node.gradient, node.total) for node in nodes]
    found = []
    try:
        for node, sign, step in zip(nodes, signs, steps, strict=True):
            node.forget()
            node.x.detach().add_(sign, alpha=step)
        evaluate()
        for node, sign, step, (at, _) in zip(nodes, signs, steps, before, strict=True):
            assert node.gradient is not None
            assert at is not None
            found.append((node.gradient - at).mul_(sign).mul_(scale / step))
    finally:
        for node, x, (gradient, total) in zip(nodes, starts, before, strict=True):
            node.x.detach().copy_(x)
            node.gradient, node.total = gradient, total
    return found


def _length(direction: Sequence[Tensor]) -> float:
    """Of all nodes' entries together; a device is waited for once."""
    return math.sqrt(sum(torch.linalg.vector_norm(v).square() for v in direction))


def _size(values: Sequence[Tensor]) -> float:
    """The usual size of an entry: of each node's the lower quartile, of these the median.

    Robust against masks (-1e9 among attention logits) and against single nodes of another scale.
    """
    sizes = []
    for x in values:
        entries = x.detach().flatten()[:: max(1, x.numel() // 4096)].abs().float()
        entries = entries[entries.isfinite() & (entries > 0)]
        if entries.numel():
            sizes.append(math.log(float(entries.quantile(0.25))))
    return math.exp(statistics.median(sizes)) if sizes else 1.0
