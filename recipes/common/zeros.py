"""Steps of parameters that no error has reached."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.optim import Optimizer


class ZeroSteps(L.Callback):
    """A parameter without a gradient takes its step all the same, on a gradient of zeros.

    Momentum and weight decay move it then, as in trainers that zero gradients instead of removing
    them.
    """

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Watches the optimizers."""
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(_fill)


def _fill(optimizer: Optimizer, *args: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
