"""What the user and the automatic gamma are told of each batch; the user hears everything once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lightning_pc.inference.begin import Beginning
from lightning_pc.inference.curvature import AutoGamma
from lightning_pc.inference.movers import Mover
from lightning_pc.inference.relax import Trace
from lightning_pc.inference.schedules import Schedule
from lightning_pc.insight.explain import (
    LEAP,
    LONG_PATIENCE,
    PATIENCE,
    SURE,
    leapt,
    limit,
    overshot,
    silenced,
    unseen,
    unstable,
)
from lightning_pc.insight.report import StepReport
from lightning_pc.nodes.node import Node

#: Batches from a look that has found nothing to blame to the next.
SECOND_LOOK = 500


class _Streak:
    """Batches on end of one kind; below zero, batches until they count again."""

    length = 0

    def take_in(self, another: bool) -> None:
        self.length = self.length + 1 if another or self.length < 0 else 0

    def rest(self) -> None:
        self.length = -SECOND_LOOK


class Alerts:
    """Looks after the inference of one module.

    Args:
        schedule: Who moves when.
        auto: Chooses gamma, None where it is given.
        varies: The precisions vary, and F by itself.
    """

    def __init__(self, schedule: Schedule, auto: AutoGamma | None, varies: bool) -> None:
        self._schedule, self._auto, self._varies = schedule, auto, varies
        self._told: set[str] = set()
        self._batches = 0
        self._raised = _Streak()  # by inference, at a gamma that is given
        self._overshot = _Streak()  # by weights that learn while values move
        self._first = 0.0  # F at the very start
        self._largest = 0.0  # of all |F| at the start of a batch

    @property
    def look_due(self) -> bool:
        """Whether the next batch is to look at the curvature, for a warning's sake."""
        return (self._raised.length >= PATIENCE and "unstable" not in self._told) or (
            self._overshot.length == LONG_PATIENCE - 1 and "overshot" not in self._told
        )

    def say(self, key: str, message: str) -> None:
        """Warns, unless there is nothing to say or this kind of thing has been said."""
        if message and key not in self._told:
            self._told.add(key)
            warnings.warn(message, UserWarning, stacklevel=2)

    def after(
        self,
        nodes: Sequence[Node],
        age: int,
        trace: Trace,
        inference: Mover,
        beginning: Beginning,
        report: StepReport,
    ) -> None:
        """Takes in a batch that has been inferred."""
        self._batches += 1
        steps = report.steps
        ends = None if self._varies else inference.ends
        first, last = (0.0, 0.0) if ends is None else ends.tolist()
        rose = last > first
        self._largest = max(self._largest, abs(first))
        incremental = self._schedule.incremental
        # Weights that lower a loss which values push up raise F by what they learn.
        self._overshot.take_in(rose and incremental and trace.pulls[0] > 0)
        if self._auto is not None:
            self._auto.after(steps, rose)
            self.say("unseen", unseen(self._auto.failures, self._auto.gamma))
        elif beginning.seen is None and not self._schedule.fixed_gamma:
            self._raised.take_in(rose)
        if beginning.seen is not None:
            self._judge(*beginning.seen, inference, report)
        if incremental and self._auto is not None and last - first > LEAP * self._largest > 0:
            self.say("leapt", leapt(report, self._batches))
        if self._batches == 1:  # once: reading the energies waits for the device
            end, through = age + steps, self._schedule.through
            self.say("silent", silenced(report, [] if through else nodes, inference, end))
            self._first = float(report.free_energy[0])

    def _judge(self, curvature: float, node: Node, inference: Mover, report: StepReport) -> None:
        """Blames gamma or the weights for batches on end in which F rose, by the look at hand."""
        gamma, momentum = inference.start_gamma, inference.momentum
        if self._auto is None:
            bearable = self._schedule.bearable
            since = self._batches - max(self._raised.length, self._overshot.length - 1)
            self.say("unstable", unstable(node, gamma, momentum, curvature, bearable, since))
            self._raised.rest()
        if self._overshot.length == LONG_PATIENCE:
            since = self._batches - LONG_PATIENCE + 1
            given = self._auto is None and not inference.own_rates
            looked = (gamma, momentum, curvature, given)
            known = "unstable" in self._told and gamma * curvature >= SURE * limit(momentum)
            self.say("overshot", "" if known else overshot(report, *looked, self._first, since))
            self._overshot.rest()
