"""A learning rate that starts small."""

from __future__ import annotations

from typing import Any

import lightning as L


class WarmUp(L.Callback):
    """Raises the learning rates from 0 to the optimizer's own over the first batches.

    Args:
        batches: Over how many; 0 leaves the rates alone.

    Raises:
        ValueError: ``batches`` is negative.
    """

    def __init__(self, batches: int) -> None:
        if batches < 0:
            raise ValueError(f"batches={batches}: expected 0 or more.")
        self.batches = batches
        self._rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Sets the rates of this batch."""
        step = trainer.global_step
        if step > self.batches or not self.batches:
            return
        if not self._rates:
            self._rates = [[g["lr"] for g in o.param_groups] for o in trainer.optimizers]
        share = min(1.0, (step + 1) / self.batches)
        for optimizer, rates in zip(trainer.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = share * rate

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own rates."""
        return {"rates": self._rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._rates = state["rates"]
