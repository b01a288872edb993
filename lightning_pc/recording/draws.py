"""Random generators: where they stand, and back there."""

from __future__ import annotations

import random

import numpy as np
import torch


class RandomStates:
    """Where the random generators of Python, numpy and torch stand now."""

    def __init__(self) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()
        generators = [torch.default_generator]
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            generators += torch.cuda.default_generators
        self._torch = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        """Sets them back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        for generator, state in self._torch:
            generator.set_state(state)
