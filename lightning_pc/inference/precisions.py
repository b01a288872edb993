"""Precisions: the weight of each energy in F, by depth and step. One small class and a row each.

F(t) = sum over nodes of w(depth, t) E + w(0, t) * loss: depth 0 is the loss, which only the
schedules of `Spiking` and `Decaying` weigh. A weight multiplies all of an energy: its gradients to
values and to parameters, and what the report shows of it.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from typing_extensions import override

from lightning_pc.errors import ConfigError


class Precisions(ABC):
    """The weight of an energy in F; a variant is a subclass."""

    name: str
    #: Whether weights differ from step to step, so that F moves by itself.
    varies = True
    #: Whether all is done once the error has arrived everywhere: T is depth + 1 by default.
    wave = False

    @abstractmethod
    def weight(self, depth: int, t: int, steps: int) -> float:
        """The weight, >= 0.

        Args:
            depth: A node's depth, 1 for what the loss reads; 0 for the loss itself.
            t: Step within the batch, from 0 on.
            steps: How many of the batch's steps move values: t = ``steps`` is pc's learning step.
        """

    def lasting(self, depth: int, steps: int) -> float:
        """The weight that a stable gamma goes by: the largest of the steps that move values."""
        return max(checked_weight(self, depth, t, steps) for t in range(steps))


@dataclass(frozen=True)
class Constant(Precisions):
    """Every node energy weighs the same; 1 is plain predictive coding.

    Args:
        value: The weight, > 0.
    """

    value: float = 1.0
    name = "constant"
    varies = False

    def __post_init__(self) -> None:
        _require_number("precisions", self.value)

    @override
    def weight(self, depth: int, t: int, steps: int) -> float:
        return self.value if depth else 1.0


@dataclass(frozen=True)
class Depth(Precisions):
    """``ratio ** (depth - 1)``: the further from the loss, the more a value gives way.

    At equilibrium the weighted errors are what backprop propagates, so that the errors themselves
    grow by 1 / ratio per stage against the pile-up at the output. With a ratio of at most 1 the
    rates that are stable without are so with it.

    Args:
        ratio: Weight of a stage against the one below it, > 0.
    """

    ratio: float = 0.9
    name = "depth"
    varies = False

    def __post_init__(self) -> None:
        _require_number("Depth: ratio", self.ratio)

    @override
    def weight(self, depth: int, t: int, steps: int) -> float:
        return float(self.ratio ** (depth - 1)) if depth else 1.0


@dataclass(frozen=True)
class Spiking(Precisions):
    """Spiking precision (Qi et al. 2025, Eq. 4): 1 at the step the error arrives, else ``rest``.

    The error of depth d arrives at t = d, so that it travels on at the full rate while all that
    has passed is held back. As in the authors' code (DeepPCNs, T value steps and then the weights)
    the loss is weighed as the layer of depth 0, and pc learns from unweighted energies.

    ipc learns from the weighted ones: of its T - d steps a stage of depth d has one at full
    weight, the first (momentum and weight decay of the optimizer act at all of them). What plain
    iPC does after that, pulling predictions back to values that stay, is left out: in a convolution
    all positions pull the same few weights, which learn next to nothing else.

    On a chain of Gaussian nodes, with ``rest`` 0, weights that hardly move and values without
    momentum, a step of depth d is gamma^d times backprop's in ipc. pc learns after the wave, which
    leaves about (1 - gamma) gamma^d of it but at the top: there gamma is to stay well below 1.

    A value makes two steps at full weight, by the error below it and back by its own, which no
    gamma turns into a run-away within a batch: a stable one is limited by ``rest``, and by the loss
    itself.

    Args:
        rest: Weight before and after, >= 0; 0 lets each stage run once, theirs is 0.001.
    """

    rest: float = 0.0
    name = "spiking"
    wave = True

    def __post_init__(self) -> None:
        _require_number("Spiking: rest", self.rest, zero=True)

    @override
    def weight(self, depth: int, t: int, steps: int) -> float:
        return 1.0 if t >= steps or t == depth else self.rest

    @override
    def lasting(self, depth: int, steps: int) -> float:
        return self.rest


@dataclass(frozen=True)
class Wave(Precisions):
    """1 at t = depth and 0 else: Z-IL, in which each stage counts once."""

    name = "wave"
    wave = True

    @override
    def weight(self, depth: int, t: int, steps: int) -> float:
        return float(t == depth)


@dataclass(frozen=True)
class Decaying(Precisions):
    """Decaying precision (Qi et al. 2025): zero before the error arrives, exponential from then on.

    ``exp(-k (t - d))`` at t >= d, divided by its sum over the value steps that are left, so that
    every layer's weights sum to 1 (``get_sequences`` of the authors' first code, Deep_PCNs). The
    loss is the layer of depth 0, and pc learns from unweighted energies, as with `Spiking`.

    Args:
        k: Rate of the decay, > 0; theirs is 1.
    """

    k: float = 1.0
    name = "decaying"

    def __post_init__(self) -> None:
        _require_number("Decaying: k", self.k)

    @override
    def weight(self, depth: int, t: int, steps: int) -> float:
        if t >= steps:
            return 1.0
        if t < depth:
            return 0.0
        k = self.k
        return math.exp(-k * (t - depth)) * math.expm1(-k) / math.expm1(-k * (steps - depth))


@dataclass(frozen=True)
class Custom(Precisions):
    """A callable ``(depth, t) -> weight`` of the user's, which is asked for nodes alone.

    Args:
        function: Gives the weight, at every step of the batch.
    """

    function: Callable[[int, int], float]
    name = "custom"

    @override
    def weight(self, depth: int, t: int, steps: int) -> float:
        return self.function(depth, t) if depth else 1.0


#: Name -> class, made with its defaults.
PRECISIONS: dict[str, Callable[[], Precisions]] = {
    "constant": Constant,
    "depth": Depth,
    "spiking": Spiking,
    "decaying": Decaying,
}


def precisions(given: object) -> Precisions:
    """What the argument ``precisions=`` stands for.

    Args:
        given: A name of `PRECISIONS`, a positive number, a `Precisions`, or a callable
            ``(depth, t) -> weight``.

    Raises:
        ConfigError: It is none of these.
    """
    if isinstance(given, Precisions):
        return given
    if isinstance(given, str) and given in PRECISIONS:
        return PRECISIONS[given]()
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return Constant(float(given))
    if callable(given) and not isinstance(given, type):
        try:
            inspect.signature(given).bind(1, 0)
        except TypeError as error:
            raise ConfigError(
                f"precisions={given!r} cannot be called with (depth, t): {error}."
            ) from None
        except ValueError:  # a builtin does not tell
            pass
        return Custom(given)
    known = ", ".join(map(repr, PRECISIONS))
    raise ConfigError(
        f"precisions={given!r}: expected one of {known}, a positive number, an object of "
        "lightning_pc.precisions or a callable (depth, t) -> weight."
    )


def checked_weight(given: Precisions, depth: int, t: int, steps: int) -> float:
    """The weight as a float.

    Raises:
        ConfigError: It is no finite number >= 0; for the first loss, on which all depends, > 0.
    """
    weight = given.weight(depth, t, steps)
    try:
        value = float(weight)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or value < 0 or (not value and depth == t == 0):
        raise ConfigError(
            f"precisions gave {weight!r} at depth {depth}, step {t}: expected a weight >= 0."
        )
    return value


def _require_number(what: str, value: float, zero: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and (value > 0 or (zero and not value))):
        raise ConfigError(f"{what}={value!r}: expected a number {'>=' if zero else '>'} 0.")
