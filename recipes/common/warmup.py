"""A learning rate that starts small."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException


class WarmUp(L.Callback):
    """Raises the learning rates to the optimizer's own over the first batches: 1/n of it, 2/n, ..

    Args:
        batches: n; 0 leaves the rates alone.

    Raises:
        ValueError: ``batches`` is negative.
        MisconfigurationException: At the start of the fit: a learning rate scheduler sets them too.
    """

    def __init__(self, batches: int) -> None:
        if batches < 0:
            raise ValueError(f"batches={batches}: expected 0 or more.")
        self.batches = batches
        self._rates: list[list[float]] = []

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Refuses schedulers."""
        if trainer.lr_scheduler_configs:
            raise MisconfigurationException(
                "WarmUp and a learning rate scheduler would both set the rates: use one of them."
            )

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
