"""What the user and the automatic gamma are told of each batch; the user hears everything once."""

from __future__ import annotations

import math
import warnings

import torch

from lightning_pc.inference.curvature import AutoGamma
from lightning_pc.inference.relax import Inference
from lightning_pc.inference.schedules import Schedule
from lightning_pc.insight.explain import rises, silenced, unlearns, unseen
from lightning_pc.insight.report import StepReport

#: Over which the loss is smoothed.
BATCHES = 20


class Alerts:
    """Looks after the inference of one module, whose gamma ``auto`` chooses (None if it is given).

    The user is told where F rises in ``patience`` batches on end, by more than rounding: of data
    that are known by heart F is so small that any step raises it. So it may rise below the share
    ``known`` of the first batch's |F|, and it does by itself where the precisions vary.

    And where the loss of the forward rises from batch to batch. Its mean, of which each batch is a
    twentieth, then stands above that of the first twenty by the share ``worse`` of it, or above its
    least by the share ``lost``; and by more than single batches usually differ from it.
    """

    def __init__(
        self,
        schedule: Schedule,
        auto: AutoGamma | None,
        varies: bool,
        patience: int = 10,
        known: float = 0.01,
        worse: float = 0.02,
        lost: float = 0.3,
    ) -> None:
        self._auto, self._patience, self._known = auto, patience, known
        self._worse, self._lost = worse, lost
        # An automatic gamma mends a rise by itself, unless weights move at the same time.
        self._counts = schedule.incremental or auto is None
        self._varies = varies
        self._told: set[str] = set()
        self._batches = self._rising = 0  # all, and those on end in which F rose
        self._first = 0.0  # F at the very start
        self._early = self._mean = self._spread = 0.0  # of losses
        self._least = math.inf

    @property
    def look_due(self) -> bool:
        """Whether the next batch is to look at the curvature, for a warning's sake."""
        return self._rising == self._patience - 1 and "rises" not in self._told

    def say(self, key: str, message: str) -> None:
        """Warns, unless there is nothing to say or this kind of thing has been said."""
        if message and key not in self._told:
            self._told.add(key)
            # Python would tell only once in all what it has told from here before.
            warnings.warn_explicit(message, UserWarning, __name__, 0, registry={})

    def after(self, inference: Inference, report: StepReport) -> None:
        """Takes in the last phase of a batch."""
        self._batches += 1
        mover, free = inference.mover, inference.trace.free
        ends = [free[0], free[-1], inference.trace.losses[0].to(free[0].dtype)]
        first, last, loss = torch.stack(ends).tolist()
        first, last = (0.0, 0.0) if self._varies else (first, last)
        self._watch(loss, inference.schedule)
        if self._batches == 1:  # once: reading the energies waits for the device
            self._first = abs(first)
            self.say("silent", silenced(report, inference.evaluator.nodes, mover.start_gamma))
        # Values that push a loss up begin with F below zero, which weights that learn raise to it.
        size = abs(last) if report.pulls[0] > 0 else last
        rose = self._counts and last > first and size > self._known * self._first
        self._rising = self._rising + 1 if rose else 0
        if self._rising >= self._patience and "rises" not in self._told:
            since = self._batches - self._rising + 1
            self.say("rises", rises(report, mover, inference.seen, self._auto is not None, since))
        if self._auto is not None:
            self._auto.after(report.steps, last > first)
            self.say("unseen", unseen(self._auto.failures, self._auto.gamma))

    def _watch(self, loss: float, schedule: Schedule) -> None:
        """Takes in the loss of a batch's forward."""
        share = 1.0 / min(self._batches, BATCHES)
        self._mean += share * (loss - self._mean)
        self._spread += share * (abs(loss - self._mean) - self._spread)
        if self._batches <= BATCHES:
            self._early = self._least = self._mean
        self._least, start = min(self._least, self._mean), abs(self._early)
        rises = (self._mean - self._early, self._worse), (self._mean - self._least, self._lost)
        if any(rise > max(share * start, self._spread) for rise, share in rises):
            best = min(self._least, self._early)
            explains = not (schedule.wave or (self._auto is not None and self._auto.weighs))
            self.say("unlearns", unlearns(self._batches, best, self._mean, explains))
