"""What the user and the automatic gamma are told of each batch; the user hears everything once."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from typing import Any

import torch

from lightning_pc.inference.curvature import AutoGamma
from lightning_pc.inference.relax import Inference
from lightning_pc.inference.schedules import Schedule
from lightning_pc.insight.explain import rises, silenced, unlearns, unseen
from lightning_pc.insight.report import StepReport
from lightning_pc.insight.trend import Trend


class Alerts:
    """Looks after the inference of one module, whose gamma ``auto`` chooses (None if it is given).

    The user is told where F rises in ``patience`` batches on end, by more than rounding: of data
    that are known by heart F is so small that any step raises it. So it may rise below the share
    ``known`` of the first batch's |F|, and it does by itself where the precisions vary. The user is
    also told where the training loss rises from batch to batch, or stays above that of a guess.

    Attributes:
        trend: Of the training loss.
        follows_trend: Not while learning rates are tried, which raises it on purpose.
        told: What the user has been told, by kind.
    """

    def __init__(
        self,
        schedule: Schedule,
        auto: AutoGamma | None,
        varies: bool,
        patience: int = 10,
        known: float = 0.01,
    ) -> None:
        self._auto, self._patience, self._known = auto, patience, known
        # An automatic gamma mends a rise by itself, unless weights move at the same time.
        self._counts = schedule.incremental or auto is None
        self._varies = varies
        self.told: dict[str, str] = {}
        self._batches = self._rising = 0  # all, and those on end in which F rose
        self._first = 0.0  # F at the very start
        self.trend, self.follows_trend = Trend(), True

    @property
    def look_due(self) -> bool:
        """Whether the next batch is to look at the curvature, for a warning's sake."""
        return self._rising == self._patience - 1 and "rises" not in self.told

    def state_dict(self) -> dict[str, Any]:
        """The trend, as plain numbers."""
        return {f"loss_{name}": number for name, number in asdict(self.trend).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state of `state_dict`; from one of an older version it begins anew."""
        trend = {n.removeprefix("loss_"): v for n, v in state.items() if n.startswith("loss_")}
        self.trend = Trend(**trend) if "recent" in trend else Trend()

    def say(self, key: str, message: str) -> None:
        """Warns, unless there is nothing to say or this kind of thing has been said."""
        if message and key not in self.told:
            self.told[key] = message
            # Python would tell only once in all what it has told from here before.
            warnings.warn_explicit(message, UserWarning, "lightning_pc", 0, registry={})

    def after(self, inference: Inference, report: StepReport) -> None:
        """Takes in the last phase of a batch."""
        self._batches += 1
        mover, free = inference.mover, inference.trace.free
        ends = [free[0], free[-1], report.loss[0].to(free[0].dtype)]
        first, last, loss = torch.stack(ends).tolist()
        if self._varies:
            first = last = 0.0
        # Where causes are inferred the loss begins anew in each batch.
        batch = inference.evaluator.batch
        if self.follows_trend and not batch.latent:
            self.trend.take_in(loss, batch.guess)
        report.trend = replace(self.trend)
        self.say("risen", unlearns(report))
        if self._batches == 1:  # once: reading the energies waits for the device
            self._first = abs(first)
            self.say("silent", silenced(report, batch.nodes, mover.start_gamma))
        # Values that push a loss up begin with F below zero, which weights that learn raise to it.
        size = abs(last) if report.pulls[0] > 0 else last
        rounding, counts = report.rounding * abs(first), self._counts and not report.sampled
        rose = counts and last - first > rounding and size > self._known * self._first
        self._rising = self._rising + 1 if rose else 0
        if self._rising >= self._patience and "rises" not in self.told:
            since, automatic = self._batches - self._rising + 1, self._auto is not None
            if report.free_energy[-1] > report.free_energy[0]:  # else in another process alone
                self.say("rises", rises(report, mover, inference.seen, automatic, since))
        if self._auto is not None:
            start = first if report.pulls[0] > 0 else max(first, 0.0)
            self._auto.after(report.steps, last - start > rounding)
            self.say("unseen", unseen(self._auto.failures, self._auto.gamma))
