"""What `PCStrategy` refuses at the Trainer's door, each with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_pc.errors import FLOAT16, ConfigError, PCError, refuse, shown
from lightning_pc.inference.schedules import SCHEDULES


@contextmanager
def at_the_door() -> Iterator[None]:
    """What is wrong with the set-up is Lightning's MisconfigurationException here."""
    try:
        yield
    except PCError as error:
        raise MisconfigurationException(str(error)) from error


@at_the_door()
def refuse_set_up(module: pl.LightningModule, trainer: pl.Trainer, algorithm: str) -> None:
    """Refuses float16 and what is for several devices, by the Trainer's precision plugin.

    Also modules that run their own backward, steps or batches or are compiled, and for algorithms
    that step within a batch planned accumulation.
    """
    name, plugin = type(module).__name__, trainer.precision_plugin
    overrides = partial(is_overridden, instance=module, parent=pl.LightningModule)
    refused = {
        f"PCStrategy trains on one device and cannot use {type(plugin).__name__}.": (
            isinstance(plugin, (precision.FSDPPrecision, precision.DeepSpeedPrecision))
        ),
        FLOAT16.format("PCStrategy"): (
            str(plugin.precision).startswith("16") and getattr(plugin, "scaler", None) is None
        ),
        f"{name} uses manual optimization, but PCStrategy decides when values and weights "
        "move: remove automatic_optimization = False; or keep it, leave the Trainer its "
        "default strategy, return lightning_pc.optim wrappers from configure_optimizers and "
        "call optimizer.step(closure).": not module.automatic_optimization,
        f"{name} overrides `backward`, which PCStrategy replaces: remove the override.": (
            overrides("backward")
        ),
        f"{name}.training_step takes a `dataloader_iter` and draws its batches itself, but "
        "PCStrategy asks the batch how many terms its loss is a mean of: take (batch, "
        "batch_idx).": (
            is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True)
        ),
        f"{name} is compiled by torch.compile, which hides its nonlinearities from value "
        "nodes: give the Trainer the module itself.": getattr(module, "_compiler_ctx", None),
        f"{name} overrides `optimizer_step`, but {algorithm} steps T times a batch and only "
        "the last of these would go through it: remove the override, or use 'pc'.": (
            SCHEDULES[algorithm].incremental and overrides("optimizer_step")
        ),
    }
    refuse(refused)
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    plans = [c.scheduling for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    planned = [batches for plan in plans for batches in plan.values()]
    refuse_accumulation(algorithm, max([trainer.accumulate_grad_batches, *planned]))


def refuse_group(backend: str | None, timeout: timedelta | None) -> None:
    """Refuses what no group of processes can be made with."""
    known = (None, *dist.Backend.backend_list)
    refuse(
        {
            f"process_group_backend={shown(backend)}: expected None or one of "
            f"{dist.Backend.backend_list}.": backend not in known,
            f"timeout={shown(timeout)}: expected a datetime.timedelta.": (
                not isinstance(timeout, timedelta | None)
            ),
        }
    )


@at_the_door()
def refuse_accumulation(algorithm: str, batches: int) -> None:
    """Refuses several batches an optimizer step, for algorithms that step within a batch."""
    if SCHEDULES[algorithm].incremental and batches > 1:
        told = f"accumulate_grad_batches={batches}: {algorithm} moves the weights at each inference"
        raise ConfigError(f"{told} step and accumulates nothing. Use a larger batch, or 'pc'.")
