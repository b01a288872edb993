"""``python -m lightning_pc fit -c recipe.yaml``: LightningCLI with the package imported."""

from __future__ import annotations

from lightning.pytorch.cli import ArgsType, LightningCLI

import lightning_pc  # noqa: F401  (registers pc_auto, ipc, pc, zil, epc and iepc)
from lightning_pc.errors import from_extra

with from_extra("recipes", "jsonargparse"):
    import jsonargparse  # noqa: F401  (LightningCLI would ask for it alone)


def main(args: ArgsType = None) -> LightningCLI:
    """Runs LightningCLI on ``args`` (default ``sys.argv``): ``class_path`` names model and data."""
    return LightningCLI(args=args, save_config_kwargs={"overwrite": True})
