"""Predictive coding on several devices: ``Trainer(devices=2, strategy=PCDDPStrategy())``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from lightning_pc.errors import refuse
from lightning_pc.hosts import refuse_to_share
from lightning_pc.ranks import Processes, Ranks
from lightning_pc.refusals import at_the_door, refuse_group
from lightning_pc.settings import Settings, refuse_unknown
from lightning_pc.strategy import Learning


class PCDDPStrategy(Learning, DDPStrategy):
    """Trains a LightningModule with predictive coding in several processes, each on its data.

    Values stay in their process. Gradients are averaged once for each optimizer step, as DDP does:
    the mean of the processes' means. The rate, its decay, the number of inference steps and whether
    F is finite are agreed on, so that no process waits for another one that has stopped. In
    training buffers are those of the first process. There is no DistributedDataParallel: it would
    average after the first of several backward passes alone.

    Args:
        algorithm: As of `PCStrategy`.
        accelerator: Filled in by the Trainer.
        parallel_devices: Filled in by the Trainer.
        cluster_environment: How processes find each other; the Trainer's choice by default.
        checkpoint_io: How checkpoints are written.
        precision_plugin: Filled in by the Trainer.
        process_group_backend: ``"gloo"`` or ``"nccl"``; by default the one that fits the devices.
        timeout: How long a process waits for the others.
        start_method: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        settings: By name: ``T``, ``gamma``, ``value_nodes`` and the others, as of `PCStrategy`.

    Raises:
        MisconfigurationException: An argument, or later the model or the Trainer, does not fit.
    """

    strategy_name = "pc_ddp"

    def __init__(
        self,
        algorithm: Literal["auto", "ipc", "pc", "zil", "epc", "iepc"] = "auto",
        *,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **settings: Any,
    ) -> None:
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        unused = "find_unused_parameters" in settings
        with at_the_door():
            refuse(
                {
                    "find_unused_parameters= is not needed: leave it out.": unused,
                }
            )
            refuse_group(process_group_backend, timeout)
            refuse_unknown("PCDDPStrategy", settings)
            self.settings = Settings(algorithm=algorithm, **settings)

    @override
    def configure_ddp(self) -> None:
        assert self.model is not None
        if self.world_size > 1:
            with at_the_door():
                refuse_to_share(self.model, self.settings)
        _sync_module_states(self.model)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        for buffer in self._module.buffers():
            dist.broadcast(buffer, 0)
        return super().training_step(*args, **kwargs)

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients of a batch that is accumulated wait for the last one."""
        self._averages = False
        try:
            yield
        finally:
            self._averages = True

    @property
    @override
    def _ranks(self) -> Ranks:
        def parameters() -> list[nn.Parameter]:
            return [p for group in self.optimizers[0].param_groups for p in group["params"]]

        return Processes(self.root_device, parameters)
