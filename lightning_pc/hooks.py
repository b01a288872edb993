"""Hooks between gradients and optimizer step, where an algorithm takes several steps a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_pc.replay import shadowed
from lightning_pc.schedules import SCHEDULES


class HookWatch:
    """Tells, once, of hooks that change gradients of which the step takes one of several.

    Args:
        algorithm: One that steps within a batch; the others' hooks see all that they step on.
    """

    def __init__(self, algorithm: str) -> None:
        self._algorithm = algorithm
        self._over = not SCHEDULES[algorithm].incremental
        self._watching = False
        self._seen: Tensor | None = None

    def begin(self, optimizer: Optimizer | None) -> None:
        """Notes the gradients of the last step, before any hook may change them."""
        if self._watching and optimizer is not None:
            self._seen = _gist(optimizer)

    @contextmanager
    def watching(self, trainer: pl.Trainer, optimizer: Optimizer) -> Iterator[None]:
        """Looks at them again when all hooks are through: where they are about to be clipped."""
        self._seen = None
        self._watching = not self._over and _hooked(trainer)
        if not self._watching:
            yield
            return
        plugin = trainer.precision_plugin
        clip = plugin._clip_gradients

        def look_and_clip(*args: Any, **kwargs: Any) -> None:
            if self._seen is not None and not torch.equal(self._seen, _gist(optimizer)):
                self._over = True
                rank_zero_warn(
                    "on_after_backward or on_before_optimizer_step, of the module or a callback, "
                    "has changed gradients. They run once a batch, before the last of the steps "
                    f"that {self._algorithm} takes in it: at the others nothing is changed. "
                    "configure_gradient_clipping and hooks of parameters (register_hook) act at "
                    "each.",
                    category=UserWarning,
                )
            clip(*args, **kwargs)

        with shadowed({(plugin, "_clip_gradients"): look_and_clip}):
            yield


def _hooked(trainer: pl.Trainer) -> bool:
    """Whether a hook runs between gradients and step."""
    owners: list[tuple[object, type]] = [(trainer.lightning_module, pl.LightningModule)]
    owners += [(callback, pl.Callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return any(
        name in vars(owner) or getattr(type(owner), name) is not getattr(base, name)
        for owner, base in owners
        for name in ("on_after_backward", "on_before_optimizer_step")
    )


def _gist(optimizer: Optimizer) -> Tensor:
    """Norm and sum of each gradient, [2 p]; of what is not finite 0."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    there = [g.detach() for g in gradients if g is not None]
    numbers = [number.float() for g in there for number in (g.norm(), g.sum())]
    return torch.stack(numbers or [torch.zeros(())]).nan_to_num(0.0, 0.0, 0.0)
