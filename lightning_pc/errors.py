"""What can go wrong: every message names the module, says what was expected and what to do."""

from __future__ import annotations

#: Of whom it is said stands first.
FLOAT16 = (
    "{} does not train in float16: prediction errors fall below its range, and a gradient scaler "
    "would skip single updates within a batch. Use bfloat16 or float32 (precision='bf16-mixed', "
    "'bf16-true' or '32-true')."
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
