"""Every knob of the engine, its range and its default."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from lightning_pc.energies import softmax_energy
from lightning_pc.errors import ConfigError
from lightning_pc.nodes import WholeErrorNode
from lightning_pc.placement import ValueNodes
from lightning_pc.precisions import Constant, Decaying, Precisions, precisions
from lightning_pc.schedules import SCHEDULES, schedule

#: Name -> the sign of beta in each phase of a batch.
NUDGINGS: dict[str, tuple[int, ...]] = {"positive": (1,), "negative": (-1,), "centered": (1, -1)}


@dataclass(frozen=True)
class Settings:
    """Every knob of the engine; the doors document them.

    Raises:
        ConfigError: A value is out of its range.
    """

    algorithm: str = "ipc"
    T: int | Literal["auto"] | None = None
    gamma: float | Literal["auto"] = "auto"
    gamma_decay: float = 0.9
    momentum: float | Literal["conjugate"] | None = None
    value_nodes: ValueNodes = "auto"
    reset: Literal["batch", "never"] = "batch"
    loss_terms: float | Callable[..., float] | None = None
    softmax_energy: Literal["categorical", "gaussian"] = "categorical"
    precisions: float | str | Precisions | Callable[[int, int], float] = "constant"
    nudging: Literal["positive", "negative", "centered"] = "positive"
    beta: float = 1.0

    def __post_init__(self) -> None:
        fixed = schedule(self.algorithm).fixed_gamma
        T, gamma = self.T, self.gamma
        named = T is None or (isinstance(T, str) and T == "auto")
        if not named and not (_is_whole(T) and T >= 1):  # type: ignore[operator]
            raise ConfigError(
                f"T={T!r}: expected a whole number of inference steps, >= 1, 'auto' or None."
            )
        schedule(self.algorithm).steps(1, T)
        automatic = isinstance(gamma, str) and gamma == "auto"
        if not automatic and not (_is_number(gamma) and gamma > 0):  # type: ignore[operator]
            raise ConfigError(f"gamma={gamma!r}: expected a positive inference rate or 'auto'.")
        if fixed is not None and gamma not in ("auto", fixed):
            raise ConfigError(
                f"gamma={gamma}: {self.algorithm} is exact at gamma = {fixed:g} alone, "
                "leave gamma at 'auto'."
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
        self._check_momentum()
        self._check_variants()

    def _check_momentum(self) -> None:
        momentum = self.momentum
        if momentum is None:
            return
        conjugate = isinstance(momentum, str) and momentum == "conjugate"
        if not conjugate and not (_is_number(momentum) and 0 <= momentum < 1):  # type: ignore[operator]
            raise ConfigError(
                f"momentum={momentum!r}: expected the share of their velocity that values keep "
                "from step to step, in [0, 1), 'conjugate' or None."
            )
        if momentum and self.algorithm == "zil":
            raise ConfigError(f"momentum={momentum!r}: zil is exact at 0 alone.")
        if conjugate and SCHEDULES[self.algorithm].node is WholeErrorNode:
            raise ConfigError(
                f"momentum={momentum!r} leads towards the minimum of F, but {self.algorithm} stays "
                "near its start on purpose: give a number, or use 'ipc'."
            )
        if conjugate and precisions(self.precisions).varies:
            raise ConfigError(
                f"momentum={momentum!r} tells from two gradients how F bends between them, but "
                "varying precisions change F itself: give a number."
            )

    def _check_whole(self) -> None:
        if self.T == "auto":
            raise ConfigError(
                f"T='auto' waits until F has converged, but {self.algorithm} stays near its start "
                "on purpose: give a number of steps."
            )
        if self.reset == "never":
            raise ConfigError(
                f"reset='never': {self.algorithm} would go on learning from gradients of calls "
                "long past, since its errors forget as slowly as they move. Use 'ipc' or 'pc'."
            )

    def _check_variants(self) -> None:
        if self.nudging not in tuple(NUDGINGS):
            known = ", ".join(map(repr, NUDGINGS))
            raise ConfigError(f"nudging={self.nudging!r}: expected one of {known}.")
        if not (_is_number(self.beta) and self.beta > 0):
            raise ConfigError(
                f"beta={self.beta!r}: expected a positive strength; nudging= gives the sign."
            )
        weights = precisions(self.precisions)
        if self.algorithm == "zil" and (self.betas != (1,) or weights != Constant()):
            raise ConfigError(
                "zil is exact for plain predictive coding alone: leave precisions, nudging and "
                "beta at their defaults."
            )
        if self.T == "auto" and weights.varies:
            raise ConfigError(
                "T='auto' stops where the energy does, but varying precisions move it by "
                "themselves: give a number of steps."
            )
        if weights.wave and self.reset == "never":
            raise ConfigError(
                f"precisions={weights.name!r} send one wave through a batch, but reset='never' "
                "keeps values for the next, in which it would only add up: use reset='batch'."
            )
        follows = weights.wave or isinstance(weights, Decaying)
        if SCHEDULES[self.algorithm].node.through and follows:
            raise ConfigError(
                f"precisions={weights.name!r} follows an error on its way up, stage by stage, but "
                f"{self.algorithm}'s errors start everywhere at once: use 'pc' or 'ipc'."
            )
        if SCHEDULES[self.algorithm].node is WholeErrorNode:
            self._check_whole()
        if self.nudging != "centered":
            return
        if SCHEDULES[self.algorithm].incremental:
            raise ConfigError(
                f"nudging='centered': {self.algorithm} moves the weights at every step, and the "
                "second phase would not start where the first did. Use 'pc' or 'epc', or "
                "'positive' or 'negative'."
            )
        if self.reset == "never":
            raise ConfigError(
                "nudging='centered' starts both phases from the forward pass, use reset='batch'."
            )
        if self.T == 1:
            raise ConfigError("nudging='centered': T=1 leaves the values no step, use T >= 2.")

    @property
    def betas(self) -> tuple[float, ...]:
        """The signed beta of each phase of a batch."""
        return tuple(sign * self.beta for sign in NUDGINGS[self.nudging])

    @property
    def fixed_gamma(self) -> float | None:
        """Gamma at the start of each batch, None where it is chosen automatically."""
        fixed = schedule(self.algorithm).fixed_gamma
        return fixed if self.gamma == "auto" else self.gamma

    @property
    def chosen_momentum(self) -> float | Literal["conjugate"]:
        """Of the values: the one given, else conjugate gradients where the algorithm has them.

        With a given gamma values descend as in the paper. Where they are kept from call to call
        they do, too: what they do must not depend on how many steps a call has. And where the loss
        is pushed up: F may have no minimum.
        """
        if self.momentum is not None:
            return self.momentum
        steady = self.reset == "batch" and not precisions(self.precisions).varies
        downhill = schedule(self.algorithm).conjugate and self.nudging == "positive"
        return "conjugate" if self.gamma == "auto" and steady and downhill else 0.0


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
