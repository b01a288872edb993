"""Precisions: the weight of each energy in F, by depth and step. One small class and a row each.

F(t) = sum over nodes of w(depth, t) E + w(0, t) * loss: depth 0 is the loss, which `Spiking` alone
weighs. A weight multiplies all of an energy: its gradients, and what the report shows of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeGuard

from typing_extensions import override

from lightning_pc.errors import ConfigError, misfit, shown


class Precisions(ABC):
    """The weight of an energy in F; a variant is a subclass."""

    name = "custom"
    #: Whether weights differ from step to step, so that F moves by itself.
    varies = True
    #: Whether all is done once the error has arrived everywhere: T is depth + 1 by default.
    wave = False

    @abstractmethod
    def weight(self, depth: int, t: int, steps: int) -> float:
        """The weight, >= 0.

        Args:
            depth: A node's depth, 1 for what the loss reads; 0 for the loss itself.
            t: Step within the batch, from 0 on; with reset="never" all calls are one batch.
            steps: How many of the batch's steps move values: t = ``steps`` is pc's learning step.
        """

    def lasting(self, depth: int, steps: int) -> float:
        """The weight that a stable gamma goes by: the largest of the steps that move values."""
        return max(checked_weight(self, depth, t, steps) for t in range(steps))


@dataclass(frozen=True)
class Constant(Precisions):
    """Every node energy weighs ``value`` > 0; 1 is plain predictive coding."""

    value: float = 1.0
    name = "constant"
    varies = False

    def __post_init__(self) -> None:
        if not (is_number(self.value) and self.value > 0):
            raise ConfigError(f"precisions={shown(self.value)}: expected a Python number > 0.")

    @override
    def weight(self, depth: int, t: int, steps: int) -> float:
        return self.value if depth else 1.0


@dataclass(frozen=True)
class Spiking(Precisions):
    """Spiking precision (Qi et al. 2025, Eq. 4): 1 at the step the error arrives, else ``rest``.

    The error of depth d arrives at t = d and travels on at the full rate; all that it has passed is
    held back. As in the authors' code (DeepPCNs) the loss is weighed as depth 0, and pc learns from
    unweighted energies. ipc learns from the weighted ones: a stage has one step at full weight, the
    first of its T - d. So values that stay do not pull predictions back to where they were.

    On a chain of Gaussian nodes, with ``rest`` 0, weights that hardly move and values without
    momentum, a step of depth d is gamma^d times backprop's in ipc. pc learns after the wave, which
    leaves about (1 - gamma) gamma^d of it but at the top: there gamma is to stay well below 1.

    Args:
        rest: Weight before and after, >= 0; 0 lets each stage run once, theirs is 0.001.
    """

    rest: float = 0.0
    name = "spiking"
    wave = True

    def __post_init__(self) -> None:
        if not (is_number(self.rest) and self.rest >= 0):
            raise ConfigError(f"Spiking: rest={shown(self.rest)}: expected a Python number >= 0.")

    @override
    def weight(self, depth: int, t: int, steps: int) -> float:
        return 1.0 if t >= steps or t == depth else self.rest

    @override
    def lasting(self, depth: int, steps: int) -> float:
        # A value makes two steps at full weight, which no gamma turns into a run-away.
        return self.rest


class Wave(Precisions):
    """1 at t = depth and 0 else: Z-IL, in which each stage counts once."""

    name = "wave"
    wave = True

    @override
    def weight(self, depth: int, t: int, steps: int) -> float:
        return float(t == depth)


@dataclass(frozen=True)
class Custom(Precisions):
    """A callable ``(depth, t) -> weight`` of the user's, which is asked for nodes alone."""

    function: Callable[[int, int], float]

    @override
    def weight(self, depth: int, t: int, steps: int) -> float:
        return self.function(depth, t) if depth else 1.0


#: Name -> class, made with its defaults.
PRECISIONS: dict[str, Callable[[], Precisions]] = {"constant": Constant, "spiking": Spiking}
#: Names of earlier versions, and the callable that says the same.
GONE = {
    "depth": "lambda depth, t: 0.9 ** (depth - 1)",
    "decaying": "lambda depth, t: 0.0 if t < depth else math.exp(depth - t)",
}


def precisions(given: object) -> Precisions:
    """What the argument ``precisions=`` stands for; anything else is a ConfigError."""
    if isinstance(given, Precisions):
        return given
    if isinstance(given, str):
        if given in PRECISIONS:
            return PRECISIONS[given]()
        written = GONE.get(given.rpartition(".")[2].lower())  # in YAML by its class_path, too
        if written is not None:
            raise ConfigError(f"precisions={given!r} is gone: write precisions={written}.")
    if isinstance(given, Real) and not isinstance(given, bool):
        return Constant(float(given))
    if callable(given) and not isinstance(given, type):
        if why := misfit(given, 1, 0):
            raise ConfigError(f"precisions={shown(given)} cannot be called with (depth, t): {why}.")
        return Custom(given)
    known = ", ".join(map(repr, PRECISIONS))
    told = f"precisions={shown(given)}: expected one of {known}, a positive number, an object of"
    raise ConfigError(f"{told} lightning_pc.precisions or a callable (depth, t) -> weight.")


def checked_weight(given: Precisions, depth: int, t: int, steps: int) -> float:
    """The weight as a float >= 0, else a ConfigError; the first loss, which all needs, is > 0."""
    weight = given.weight(depth, t, steps)
    with suppress(TypeError, ValueError):
        value = float(weight)
        if 0 < value < math.inf or (value == 0 and (depth or t)):
            return value
    told = f"precisions gave {shown(weight)} at depth {depth}, step {t}"
    raise ConfigError(f"{told}: expected a weight >= 0.")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(float(value)) < math.inf


def plain(name: str, given: Any) -> Any:
    """A setting with Python's own numbers in place of numpy's; tensors and arrays are refused."""
    if isinstance(given, (tuple, list)):
        return type(given)(plain(name, one) for one in given)
    if hasattr(given, "__array__") and hasattr(given, "__len__") and not isinstance(given, str):
        raise ConfigError(f"{name}={shown(given)}: expected a Python number, as .item() gives.")
    if isinstance(given, Real) and not isinstance(given, bool):
        return int(given) if isinstance(given, Integral) else float(given)
    return given


def __getattr__(name: str) -> Any:
    if name in ("Depth", "Decaying"):
        written = GONE[name.lower()]
        raise ConfigError(f"{__name__}.{name} is gone: write precisions={written}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
