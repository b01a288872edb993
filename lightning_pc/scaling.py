"""What float16 asks for: gradients are scaled, and where they overflow nothing moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pc.ranks import ALONE, Ranks


class Scaling:
    """Gradients as they are, for every dtype but float16.

    Attributes:
        half: Whether predictions may be of float16.
        factor: Of all gradients, of values and of parameters.
        overflowed: Values of this batch had gradients that were not finite.
    """

    half = overflowed = False
    factor = 1.0

    def begin(self) -> None:
        """A batch begins."""

    def fit(self, gradients: Iterable[Tensor | None]) -> bool:
        """Whether the values may move by these gradients."""
        return True

    def pass_on(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leaves word of an overflow in the gradients of these parameters."""

    def unscale(self, optimizer: Optimizer) -> None:
        """Before gradients are clipped: they are as large as they should be."""

    def step(self, optimizer: Optimizer, closure: Callable[[], Any]) -> None:
        """One optimizer step within a batch."""
        optimizer.step(closure)


#: Of a batch that has no float16.
UNSCALED = Scaling()


class Scaled(Scaling):
    """Gradients times a factor, which halves where they overflow: `torch.amp.GradScaler`'s.

    Values whose gradients overflow stay where they are at that inference step. The next optimizer
    step is left out then, whichever gradients overflowed, which is how the factor comes to fall.

    Args:
        scaler: Knows the factor; the last step of a batch is its owner's.
        ranks: The processes that share it.
    """

    half = True

    def __init__(self, scaler: torch.amp.GradScaler, ranks: Ranks = ALONE) -> None:
        self.scaler, self.ranks = scaler, ranks
        self._untold = False

    @override
    def begin(self) -> None:
        self.factor, self.overflowed = self.scaler.get_scale(), False

    @override
    def fit(self, gradients: Iterable[Tensor | None]) -> bool:
        sizes = [g.abs().amax() for g in gradients if g is not None and g.numel()]
        fits = not sizes or bool(torch.stack(sizes).amax().isfinite())
        if self.ranks.largest(float(not fits)):
            self.overflowed = self._untold = True
            return False
        return True

    @override
    def pass_on(self, parameters: Iterable[nn.Parameter]) -> None:
        grad = next((p.grad for p in parameters if p.grad is not None), None)
        if self._untold and grad is not None:
            grad.fill_(math.inf)
            self._untold = False

    @override
    def unscale(self, optimizer: Optimizer) -> None:
        if not getattr(optimizer, "_step_supports_amp_scaling", False):  # a fused one does it
            self.scaler.unscale_(optimizer)

    @override
    def step(self, optimizer: Optimizer, closure: Callable[[], Any]) -> None:
        self.scaler.step(optimizer)
        self.scaler.update()
        self.factor = self.scaler.get_scale()
