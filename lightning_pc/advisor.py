"""What the user and the automatic gamma are told of each batch; the user hears everything once."""

from __future__ import annotations

import warnings

from lightning_pc.curvature import AutoGamma
from lightning_pc.diagnosis import (
    LONG_PATIENCE,
    PATIENCE,
    overshot,
    silenced,
    unseen,
    unstable,
)
from lightning_pc.relaxation import Relaxation
from lightning_pc.report import StepReport
from lightning_pc.schedules import Schedule

#: Batches from a look that has found a given gamma not to blame to the next.
SECOND_LOOK = 500


class Advisor:
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
        self._rises = 0  # batches on end whose inference has raised the energy, since a look
        self._on_end = 0  # the same, whatever was looked at

    @property
    def curious(self) -> bool:
        """Whether the next batch is to look at the curvature, for a warning's sake."""
        return self._rises >= PATIENCE and "unstable" not in self._told

    def say(self, key: str, message: str) -> None:
        """Warns, unless there is nothing to say or this kind of thing has been said."""
        if message and key not in self._told:
            self._told.add(key)
            warnings.warn(message, UserWarning, stacklevel=2)

    def after(self, relaxation: Relaxation, report: StepReport) -> None:
        """Takes in a batch that has been inferred."""
        self._batches += 1
        inference, steps = relaxation.inference, len(relaxation.losses)
        rose = not self._varies and bool(inference.rose)
        self._on_end = self._on_end + 1 if rose else 0
        if self._auto is not None:
            self._auto.after(steps, rose)
            self.say("unseen", unseen(self._auto.failures, self._auto.gamma))
        elif relaxation.seen is not None:
            curvature, node = relaxation.seen
            gamma, momentum = inference.start_gamma, inference.momentum
            bearable, since = self._schedule.bearable, self._batches - self._rises
            said = unstable(node, gamma, momentum, curvature, bearable, since)
            self.say("unstable", said)
            self._rises = -SECOND_LOOK
        elif not self._schedule.fixed_gamma:
            self._rises = self._rises + 1 if rose or self._rises < 0 else 0
        blameless = "unstable" not in self._told  # gamma, be it given: it was looked at sooner
        if self._schedule.incremental and self._on_end >= LONG_PATIENCE and blameless:
            self.say("overshot", overshot(report, self._batches - self._on_end + 1))
        if self._batches == 1:  # once: reading the energies waits for the device
            end = relaxation.start + steps
            nodes = relaxation.graph.nodes
            self.say("silent", silenced(report, nodes, inference.start_gamma, end))
