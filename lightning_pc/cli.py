"""``python -m lightning_pc fit -c recipe.yaml``: LightningCLI with the package imported."""

from __future__ import annotations

from lightning.pytorch.cli import ArgsType, LightningCLI

import lightning_pc  # noqa: F401  (registers the strategies ipc, pc, zil, epc and iepc)


def main(args: ArgsType = None) -> LightningCLI:
    """Runs LightningCLI; model and data are named in the YAML by ``class_path``.

    Args:
        args: Command-line arguments, default ``sys.argv``.
    """
    return LightningCLI(args=args, save_config_kwargs={"overwrite": True})
