"""Learning rates that start small, and end small."""

from __future__ import annotations

from math import inf
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException


class WarmUp(L.Callback):
    """Raises the learning rates to the optimizer's own over the first batches: 1/n of it, 2/n, ..

    Args:
        batches: n; 0 starts with the optimizer's own.
        decay: All rates are multiplied by the share of the fit's batches that is left.

    Raises:
        ValueError: ``batches`` is negative.
        MisconfigurationException: At the start of the fit: a learning rate scheduler sets them
            too; or they shall decay and the fit has no end.
    """

    def __init__(self, batches: int, decay: bool = False) -> None:
        if batches < 0:
            raise ValueError(f"batches={batches}: expected 0 or more.")
        self.batches, self.decay = batches, decay
        self._rates: list[list[float]] = []
        self._last = inf

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Refuses schedulers, counts the batches, and forgets an earlier fit's rates."""
        if trainer.global_step == 0:
            self._rates = []
        if trainer.lr_scheduler_configs:
            raise MisconfigurationException(
                "WarmUp and a learning rate scheduler would both set the rates: use one of them."
            )
        if not self.decay:
            return
        self._last = trainer.estimated_stepping_batches
        if self._last == inf:
            raise MisconfigurationException(
                "WarmUp(decay=True): the fit has no end, at which the rates would be 0: set "
                "max_epochs or max_steps."
            )

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Sets the rates of this batch."""
        step = trainer.global_step
        if not self._rates:
            self._rates = [[g["lr"] for g in o.param_groups] for o in trainer.optimizers]
        share = min(1.0, (step + 1) / self.batches) if self.batches else 1.0
        if self.decay:
            share *= max(0.0, 1 - step / self._last)
        elif step >= self.batches:
            return
        for optimizer, rates in zip(trainer.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = share * rate

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own rates."""
        return {"rates": self._rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._rates = state["rates"]
