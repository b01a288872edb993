"""Random generators: where they stand, and back there."""

from __future__ import annotations

import random

import numpy as np
import torch


class RandomStates:
    """Where the random generators of torch, and of Python and numpy, stand now.

    Args:
        everywhere: Those of Python and numpy too.
    """

    def __init__(self, everywhere: bool = True) -> None:
        self._others = (random.getstate(), np.random.get_state()) if everywhere else None
        generators = [torch.default_generator]
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            generators += torch.cuda.default_generators
        self._torch = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        """Sets them back."""
        if self._others is not None:
            random.setstate(self._others[0])
            np.random.set_state(self._others[1])
        for generator, state in self._torch:
            generator.set_state(state)
