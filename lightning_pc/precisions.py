"""Precisions for users to name: weights of the node energies, by depth and step."""

from typing import Any

from lightning_pc.errors import ConfigError
from lightning_pc.inference.precisions import GONE
from lightning_pc.inference.precisions import Constant as Constant
from lightning_pc.inference.precisions import Precisions as Precisions
from lightning_pc.inference.precisions import Spiking as Spiking


def __getattr__(name: str) -> Any:
    if name in ("Depth", "Decaying"):
        written = GONE[name.lower()]
        raise ConfigError(f"{__name__}.{name} is gone: write precisions={written}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
