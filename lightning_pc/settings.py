"""Every knob of the engine, its range and its default."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from lightning_pc.energies import softmax_energy
from lightning_pc.errors import ConfigError
from lightning_pc.placement import ValueNodes
from lightning_pc.schedules import schedule


@dataclass(frozen=True)
class Settings:
    """Every knob of the engine; the doors document them.

    Raises:
        ConfigError: A value is out of its range.
    """

    algorithm: str = "ipc"
    T: int | None = None
    gamma: float | None = None
    gamma_decay: float = 0.9
    value_nodes: ValueNodes = "auto"
    reset: Literal["batch", "never"] = "batch"
    loss_terms: float | Callable[..., float] | None = None
    softmax_energy: Literal["categorical", "gaussian"] = "categorical"

    def __post_init__(self) -> None:
        fixed = schedule(self.algorithm).fixed_gamma
        if self.T is not None and not (_is_whole(self.T) and self.T >= 1):
            raise ConfigError(f"T={self.T!r}: expected a whole number of inference steps, >= 1.")
        schedule(self.algorithm).steps(1, self.T)
        if self.gamma is not None and not (_is_number(self.gamma) and self.gamma > 0):
            raise ConfigError(f"gamma={self.gamma!r}: expected a positive inference rate.")
        if fixed is not None and self.gamma not in (None, fixed):
            raise ConfigError(
                f"gamma={self.gamma}: {self.algorithm} is exact at gamma = {fixed:g} alone, "
                "leave gamma at None."
            )
        if not (_is_number(self.gamma_decay) and 0 < self.gamma_decay <= 1):
            raise ConfigError(
                f"gamma_decay={self.gamma_decay!r}: expected a factor in (0, 1]; 1 keeps gamma."
            )
        if self.reset not in ("batch", "never"):
            raise ConfigError(f"reset={self.reset!r}: expected 'batch' or 'never'.")
        if self.reset == "never" and self.algorithm == "zil":
            raise ConfigError("reset='never': zil starts from the forward pass, use reset='batch'.")
        terms = self.loss_terms
        if terms is not None and not callable(terms) and not (_is_number(terms) and terms > 0):
            raise ConfigError(
                f"loss_terms={terms!r}: expected the number of terms that the loss is a mean of, "
                "or a callable of the batch."
            )
        softmax_energy(self.softmax_energy, -1)

    @property
    def start_gamma(self) -> float:
        """Gamma at the start of each batch; 0.1 unless given or fixed by the algorithm."""
        fixed = schedule(self.algorithm).fixed_gamma
        return fixed or (0.1 if self.gamma is None else self.gamma)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
