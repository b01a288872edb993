"""Whether the training loss rises from batch to batch, or stays where it should not."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean

#: Batches of a mean, and how many on end must say that the loss has risen.
MANY, ON_END = 20, 10
#: Batches after which a loss should have fallen below that of a guess, with 5 % of room.
LONG, ABOVE = 100, 1.05
#: Standard errors by which the line through all losses must rise. Of 500 simulated runs whose loss
#: is a constant and noise, 0.6 % have "risen" so within 400 batches, 1.2 % within 2,000. More do
#: where batches on end are alike (data that are not shuffled).
SURE = 3.5


@dataclass
class Trend:
    """Follows the loss at t = 0, batch by batch.

    It has risen where the straight line through the losses of all batches rises: by 2 % of the mean
    of the first 20, and by 3.5 times the standard error of its slope. The mean of the last 20 or so
    must stand above that of the first 20 as well. Or it has risen where that mean stands above its
    least, by 30 %, by a tenth of the first mean and by twice what a batch usually differs from the
    mean. Either must hold for 10 batches on end.

    It is stuck where, after 100 batches, its mean is 5 % above that of a guess for 10 batches on
    end, and the line through all losses does not fall. It is flat where, after 100 batches, the
    mean is no less than 2 % below that of the first 20.

    The mean of now is the lower of two: over exactly the last 20 batches, and with each older one
    counting less. The second is the steadier one, but remembers a leap for long.

    Attributes:
        batches: So far.
        mean: Over the last 20 batches or so, each older one counting less.
        recent: The losses of the last 20 batches.
        spread: Mean distance of a batch from the mean.
        first: The mean after 20 batches, infinite before.
        least: The least mean since.
        level: Mean over all batches.
        squares: Sum of (loss - level)^2 over all batches.
        products: Sum of (loss - level) times (number of the batch - mean number).
        high: Batches on end in which the mean stands too high for what it was.
        above: Batches on end in which it stands too high for a guess.
        guess: The loss of a guess in the last batch, infinite where it is not known.
    """

    batches: int = 0
    mean: float = 0.0
    recent: list[float] = field(default_factory=list)
    spread: float = 0.0
    first: float = math.inf
    least: float = math.inf
    level: float = 0.0
    squares: float = 0.0
    products: float = 0.0
    high: int = 0
    above: int = 0
    guess: float = math.inf

    def take_in(self, loss: float, guess: float = math.inf) -> None:
        """Takes in the loss of one batch, and that of a guess, where it is known."""
        self.batches, self.guess = self.batches + 1, guess
        share = 1 / min(self.batches, MANY)
        self.spread += share * (abs(loss - self.mean) - self.spread) if self.batches > 1 else 0.0
        self.mean += share * (loss - self.mean)
        self.recent = [*self.recent, loss][-MANY:]
        distance = loss - self.level
        self.level += distance / self.batches
        self.squares += distance * (loss - self.level)
        self.products += distance * (self.batches - 1) / 2
        if self.batches < MANY:
            return
        if self.batches == MANY:
            self.first = self.mean
        self.least = min(self.least, self.mean)
        size = abs(self.first)
        slope, error = self._line()
        climbs = slope > max(SURE * error, 0.02 * size / self.batches)
        now = self._now
        unlearned = climbs and now > self.first
        worse = now - self.least > max(0.3 * abs(self.least), 0.1 * size, 2 * self.spread)
        self.high = self.high + 1 if unlearned or worse else 0
        useless = self.batches >= LONG and now > ABOVE * guess and slope >= 0
        self.above = self.above + 1 if useless else 0

    def _line(self) -> tuple[float, float]:
        """Slope of the straight line through all losses (least squares), and its standard error."""
        number = self.batches
        numbers = number * (number**2 - 1) / 12  # sum of (number - mean number)^2
        slope = self.products / numbers
        left = max(self.squares - slope * self.products, 0.0) / (number - 2)
        return slope, math.sqrt(left / numbers)

    @property
    def risen(self) -> bool:
        """Whether the loss has risen."""
        return self.high >= ON_END

    @property
    def stuck(self) -> bool:
        """Whether the loss does not fall, though a guess has a lower one."""
        return self.above >= ON_END

    @property
    def flat(self) -> bool:
        """Whether the loss has not fallen in a long time."""
        return self.batches >= LONG and self._now > self.first - 0.02 * abs(self.first)

    @property
    def _now(self) -> float:
        return min(self.mean, fmean(self.recent))

    def __str__(self) -> str:
        """In words, "" before there is a mean."""
        if math.isinf(self.first):
            return ""
        guess = f" A guess among all classes has {self.guess:.3g}." if self.stuck else ""
        return (
            f"The training loss is {fmean(self.recent):.3g} over the last {MANY} batches; it was "
            f"{self.first:.3g} over the first {MANY} and about {self.least:.3g} at best.{guess}"
        )
