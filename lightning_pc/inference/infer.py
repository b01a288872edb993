"""The inference of one batch: the rate it begins with, and what the loop is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lightning_pc.inference.curvature import REACH, AutoGamma, largest_curvature
from lightning_pc.inference.movers import Mover
from lightning_pc.inference.relax import Trace, relax
from lightning_pc.inference.schedules import Schedule
from lightning_pc.nodes.node import Node
from lightning_pc.precisions import Precisions, checked_weight
from lightning_pc.stages.evaluator import Asked, Evaluator

#: Stages in a row down to which values follow all that their predictions move by.
FOLLOWING = 2


@dataclass
class Inference:
    """Infers the values of one batch, and learns its weights.

    Args:
        evaluator: Of the batch.
        schedule: Who moves when.
        precisions: Each energy's weight in F.
        auto: Chooses gamma, None where it is given.
        look_due: Look at the curvature, whoever gave gamma.
        follow: Values follow their predictions.
        seed: Factor of the loss in parameter gradients.
        terms: M, the number of terms that the loss is a mean of.
        T: Inference steps.
        age: Inference steps that kept values have behind them; None where values are made anew.
        update: One optimizer step on the gradients so far.

    Attributes:
        seen: What ``look_due`` saw: the largest curvature and the node where it is largest.
    """

    evaluator: Evaluator
    schedule: Schedule
    precisions: Precisions
    auto: AutoGamma | None
    look_due: bool
    follow: bool
    seed: float
    terms: float
    T: int
    age: int | None
    update: Callable[[], None]
    seen: tuple[float, Node] | None = None
    _beta: float = 1.0
    _pull: float = 1.0

    def run(
        self, mover: Mover, beta: float, diverged: Callable[[Trace, Mover], Exception]
    ) -> Trace:
        """Values descend F = E + beta * loss, weights learn from F / beta.

        Args:
            mover: How values move.
            beta: Factor of the loss in F, not 0.
            diverged: Makes the error for a loss or an energy that is not finite.
        """
        self._beta = beta
        return relax(
            self._evaluate,
            self.evaluator.nodes,
            self.schedule,
            mover,
            self._weigh,
            self._step,
            self.T,
            self.terms,
            self.terms * beta / self.seed,
            partial(self._begin, mover),
            lambda trace: diverged(trace, mover),
        )

    @property
    def _value_steps(self) -> int:
        """How many of the steps move values."""
        return self.T - (not self.schedule.moves(self.T - 1, self.T))

    def _weigh(self, t: int) -> float:
        nodes = self.evaluator.nodes
        if t and not self.precisions.varies:
            return self._pull
        weights = {
            depth: checked_weight(self.precisions, depth, t, self._value_steps)
            for depth in (0, *{node.depth for node in nodes})
        }
        for node in nodes:
            node.weight = weights[node.depth]
        self._pull = self._beta * weights[0]
        return self._pull

    def _asked(self, t: int, moves: bool, learns: bool) -> Asked:
        root, last = self.seed / self._beta, learns and t == self.T - 1
        return Asked((self.age or 0) + t, moves, learns, last, root * self._pull, root / self.terms)

    def _evaluate(self, t: int, moves: bool, learns: bool) -> tuple[Tensor, Tensor]:
        asked = self._asked(t, moves, learns)
        loss = self.evaluator(asked)
        if moves:
            self.evaluator.moved(n for n in self.evaluator.nodes if n.arrival <= asked.t + 1)
        return loss, self.evaluator.energies()

    def _begin(self, mover: Mover) -> None:
        """Chooses the rate; the gradients of the first evaluation stand in the nodes throughout."""
        nodes, auto, longest = self.evaluator.nodes, self.auto, self.evaluator.graph.longest
        asked = self._asked(0, True, False)
        deep = 1.0
        if auto is not None and self.schedule.deep is not None and self.age is None:
            deep = min(1.0, (self.schedule.deep / longest) ** 2)
        for node in nodes:
            node.whole = self.schedule.whole or deep < 1.0
        if self.look_due:
            self.seen = self._look(asked, 0, True)
        if auto is None:
            return
        if auto.due():
            auto.take_in(self._look(asked, auto.looks, auto.fine)[0])
        mover.start_gamma = mover.gamma = auto.gamma * deep
        for node in nodes if self.follow else ():
            node.follow(min(1.0, FOLLOWING / longest))

    def _look(self, asked: Asked, seed: int, fine: bool) -> tuple[float, Node]:
        """The largest curvature of F at this moment and the node it is largest at."""
        nodes, reach = self.evaluator.nodes, self.auto.reach if self.auto else REACH
        # All nodes' energies count.
        everything = replace(asked, t=asked.t + max(node.arrival for node in nodes))
        weights = [node.weight for node in nodes]
        for node in nodes:
            if self.precisions.varies and not asked.t:
                node.weight = self.precisions.lasting(node.depth, self._value_steps)
        self.evaluator.moved(nodes)
        try:
            evaluate = partial(self.evaluator, everything)
            return largest_curvature(nodes, evaluate, 1.0 / asked.scale, seed, fine, reach)
        finally:
            for node, weight in zip(nodes, weights, strict=True):
                node.weight = weight

    def _step(self) -> None:
        stepped = [p for p in self.evaluator.moving.values() if p.grad is not None]
        self.update()
        torch.clear_autocast_cache()
        self.evaluator.learned(stepped)
        clear_gradients(self.evaluator.moving.values())


def clear_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """An unreached parameter takes no step, not one of gradient zero."""
    for parameter in parameters:
        parameter.grad = None
