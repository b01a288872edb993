"""One phase of a batch: values descend F = E + beta * loss, weights learn from F / beta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_pc.inference.begin import Beginning
from lightning_pc.inference.movers import Mover
from lightning_pc.inference.relax import Trace, relax
from lightning_pc.inference.schedules import Schedule
from lightning_pc.precisions import Precisions, checked_weight
from lightning_pc.stages.evaluator import Asked, Evaluator


@dataclass
class Phase:
    """What the loop is given.

    Attributes:
        evaluator: Of the batch.
        schedule: Who moves when.
        precisions: Each energy's weight in F.
        mover: How values move.
        beginning: What happens before they do.
        beta: Factor of the loss in F, not 0.
        seed: Factor of the loss in parameter gradients.
        terms: M, the number of terms that the loss is a mean of.
        T: Inference steps.
        age: Inference steps that the values have behind them (``reset="never"``).
        kept: Values are kept from call to call.
        update: One optimizer step on the gradients so far.
    """

    evaluator: Evaluator
    schedule: Schedule
    precisions: Precisions
    mover: Mover
    beginning: Beginning
    beta: float
    seed: float
    terms: float
    T: int
    age: int
    kept: bool
    update: Callable[[], None]
    _pull: float = 0.0

    def run(self, diverged: Callable[[Trace, Mover], Exception]) -> Trace:
        """Infers and learns.

        Args:
            diverged: Makes the error for a loss or an energy that is not finite.
        """
        return relax(
            self._evaluate,
            self.evaluator.nodes,
            self.schedule,
            self.mover,
            self._weigh,
            self._step,
            self.T,
            self.terms,
            1.0 / self._scale,
            self._begin,
            lambda trace: diverged(trace, self.mover),
        )

    @property
    def _scale(self) -> float:
        """Factor from an energy's gradient to the parameters'."""
        return self.seed / (self.terms * self.beta)

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
        self._pull = self.beta * weights[0]
        return self._pull

    def _evaluate(self, t: int, moves: bool, learns: bool, pull: float) -> tuple[Tensor, Tensor]:
        now, root = self.age + t, self.seed * pull / self.beta
        last = t == self.T - 1
        loss = self.evaluator(Asked(now, moves, learns, last, root, self._scale))
        if moves:
            self.evaluator.moved(n for n in self.evaluator.nodes if n.arrival <= now + 1)
        return loss, self.evaluator.energies()

    def _begin(self, free: Tensor) -> None:
        root = self.seed * self._weigh(0) / self.beta
        asked = Asked(self.age, True, False, False, root, self._scale)
        self.beginning.begin(self.evaluator, self.mover, asked, free, self._value_steps, self.kept)

    def _step(self) -> None:
        stepped = [p for p in self.evaluator.moving if p.grad is not None]
        self.update()
        torch.clear_autocast_cache()
        self.evaluator.learned(stepped)
        clear_gradients(self.evaluator.moving)


def clear_gradients(parameters: list[nn.Parameter]) -> None:
    """An unreached parameter takes no step, not one of gradient zero."""
    for parameter in parameters:
        parameter.grad = None
