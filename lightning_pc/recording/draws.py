"""Random generators: where they stand, and back there."""

from __future__ import annotations

import random

import numpy as np
import torch


class Draws:
    """The state of a random generator before a call drew from it."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.state = generator, generator.get_state()

    def again(self) -> None:
        """The next draw is that one."""
        self.generator.set_state(self.state)


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
        self._torch = [Draws(generator) for generator in generators]

    def restore(self) -> None:
        """Sets them back."""
        if self._others is not None:
            random.setstate(self._others[0])
            np.random.set_state(self._others[1])
        for draws in self._torch:
            draws.again()
