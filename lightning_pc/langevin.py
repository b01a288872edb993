"""Values that are sampled: Monte Carlo predictive coding (Oliviers et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_pc.errors import ConfigError, shown
from lightning_pc.precisions import is_number


class Langevin(Optimizer):
    """Langevin steps of the values: x <- x - lr dF/dx + sqrt(2 lr) noise.

    After many small steps values are a sample of exp(-F), and weights learn from a sample instead
    of from the minimum of F. On average that follows the likelihood of the generative model, so
    weights gain nothing by explaining noise (Oliviers, Bogacz & Meulemans 2024, Learning
    probability distributions of sensory inputs with Monte Carlo predictive coding). The loss is to
    be a negative log-likelihood, such as 0.5 times a squared error.
    ``PCStrategy("pc", T=100, inference=Langevin)``.

    Args:
        values: The values.
        lr: Rate of the steps, below 2 / curvature; the variance errs by lr * curvature / 2.

    Raises:
        ConfigError: ``lr`` is no positive number.
    """

    #: F rises on the way, which is no fault.
    samples = True

    def __init__(self, values: Iterable[Tensor], lr: float = 0.02) -> None:
        if not (is_number(lr) and lr > 0):
            raise ConfigError(f"Langevin: lr={shown(lr)}: expected a positive rate.")
        super().__init__(values, {"lr": lr})
        # Of its own: calls that draw, such as dropout, set torch's back at every step.
        self._seed = int(torch.randint(2**62, ()))
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Moves every value that has a gradient."""
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    noise = torch.empty_like(x).normal_(generator=self._generator(x.device))
                    x.add_(x.grad, alpha=-group["lr"]).add_(noise, alpha=(2 * group["lr"]) ** 0.5)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]
