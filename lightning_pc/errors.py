"""What can go wrong: every message names the module, says what was expected and what to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

FLOAT16 = (
    "{} does not train in float16 without a gradient scaler: prediction errors fall below its "
    "range. Use bfloat16 or float32 (precision='bf16-mixed', 'bf16-true' or '32-true'), or "
    "PCStrategy and the Trainer's precision='16-mixed', which has one."
)


class PCError(Exception):
    """Base of every error that lightning_pc raises on its own account."""


class ConfigError(PCError, ValueError):
    """An argument is out of its range, or two arguments contradict each other."""


class PlacementError(PCError, ValueError):
    """``value_nodes`` names a place where no value node can stand, or leaves no node at all."""


class ChainError(PCError, ValueError):
    """Z-IL was asked of a graph in which a value node is read by more than one stage."""


class RecordingError(PCError, RuntimeError):
    """A forward does something that its recording cannot see or repeat."""


class ClosureError(PCError, RuntimeError):
    """Someone else differentiated through the value nodes, or the closure gave no usable loss."""


class DivergenceError(PCError, FloatingPointError):
    """The loss or an energy is no longer finite."""


class UnsupportedError(PCError, RuntimeError):
    """Something in the model or the set-up cannot be trained with predictive coding (yet)."""


def shown(given: object) -> str:
    """What the user gave, on one line; of what would need more the type alone."""
    text = repr(given)
    short = isinstance(given, str) or (len(text) <= 80 and "\n" not in text)
    return text if short else f"<{type(given).__name__}>"


def refuse(told: Mapping[str, object]) -> None:
    """Raises the first message that holds, as a ConfigError: message -> whether it holds."""
    for message, holds in told.items():
        if holds:
            raise ConfigError(message)


def require(kind: type, given: object, expected: str) -> None:
    """Refuses what is not of a kind, in the words ``expected``."""
    if not isinstance(given, kind):
        raise ConfigError(f"{expected}, got {type(given).__name__}.")


@contextmanager
def from_extra(extra: str, *packages: str) -> Iterator[None]:
    """Where one of ``packages`` is missing inside, the error names the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in packages:
            raise
        message = f"No module named {error.name!r}: pip install 'lightning_pc[{extra}]'."
        raise ModuleNotFoundError(message, name=error.name) from error


def misfit(function: Callable[..., object], *arguments: object) -> str:
    """Why it cannot be called with so many arguments, "" where it can or (a builtin) hides it."""
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError) as error:
        return str(error) if isinstance(error, TypeError) else ""
    return ""
