"""THE LOOP: T inference steps of one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_pc.inference.movers import Mover
from lightning_pc.inference.schedules import Schedule
from lightning_pc.nodes.node import Node

#: ``evaluate(t, moves, learns)`` gives the loss; its gradients stand in nodes and parameters.
Evaluate = Callable[[int, bool, bool], tuple[Tensor, Tensor]]


@dataclass
class Trace:
    """What a relaxation went through.

    Attributes:
        losses: The loss at each evaluation, [] each.
        energies: Each node's energy at each evaluation, [n] each.
        pulls: Factor of the sum of the loss terms in F at each evaluation.
        free: F at each evaluation, [] each.
        learned_at: Inference steps at which the optimizer stepped.
    """

    losses: list[Tensor] = field(default_factory=list)
    energies: list[Tensor] = field(default_factory=list)
    pulls: list[float] = field(default_factory=list)
    free: list[Tensor] = field(default_factory=list)
    learned_at: list[int] = field(default_factory=list)

    def take_in(self, loss: Tensor, energies: Tensor, pull: float, terms: float) -> Tensor:
        """Keeps an evaluation; returns its F, []."""
        if loss.dim() or loss.element_size() < 4:
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32)).reshape(())
        self.losses.append(loss)
        self.energies.append(energies)
        self.pulls.append(pull)
        self.free.append(torch.add(energies.sum(), loss, alpha=terms * pull))
        return self.free[-1]


def relax(
    evaluate: Evaluate,
    nodes: Sequence[Node],
    schedule: Schedule,
    mover: Mover,
    weigh: Callable[[int], float],
    update: Callable[[], None],
    T: int,
    terms: float,
    scale: float,
    begin: Callable[[], None],
    diverged: Callable[[Trace], Exception],
) -> Trace:
    """Infers and learns; the gradients of the last update are left in ``.grad``.

    Args:
        evaluate: Predictions, energies and gradients at the values and weights of now.
        nodes: The value nodes.
        schedule: Who moves when.
        mover: How values move.
        weigh: Sets the weights of a step's energies, and gives that of the loss terms' sum in F.
        update: One optimizer step on the gradients so far, but for the last of the batch.
        T: Inference steps.
        terms: M, the number of terms that the loss is a mean of.
        scale: Factor from gradients of parameters' scale to those of F.
        begin: Called before the values' first move, gradients in the nodes.
        diverged: Makes the error for a loss or an energy that is not finite.
    """
    trace = Trace()
    for t in range(T):
        pull = weigh(t)
        moves, learns = schedule.moves(t, T), schedule.learns(t, T)
        loss, energies = evaluate(t, moves, learns)
        free = trace.take_in(loss, energies, pull, terms)
        if (learns or not t) and not math.isfinite(free):  # waits for a device
            raise diverged(trace)
        if moves:
            if not t:
                begin()
            mover.observe(free)
            mover.move(nodes, scale)
        if schedule.updates(t, T):
            trace.learned_at.append(t)
            if t < T - 1:
                update()
        for node in nodes:
            node.forget()
    return trace
