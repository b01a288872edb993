"""Predictive coding with sharded weights: ``Trainer(devices=2, strategy=PCShardedStrategy())``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.tuner.lr_finder import _LRCallback
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pc.errors import FLOAT16, refuse
from lightning_pc.hosts import refuse_to_share
from lightning_pc.optim import STATE, without_state
from lightning_pc.refusals import at_the_door, refuse_group
from lightning_pc.settings import Settings, refuse_unknown
from lightning_pc.shards import WHOLE, Shards
from lightning_pc.strategy import Learning

#: Callbacks that compute with a module's weights where these are shards.
_CALLBACKS = tuple(
    getattr(callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging", "ModelPruning")
    if hasattr(callbacks, name)
)


class _Sharding(ModelParallelStrategy):
    """Shards a module as it is; nobody has to write ``configure_model``."""

    shards: Shards

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.model is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.shards = Shards(self.model, self.device_mesh["data_parallel"], self.root_device)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            with at_the_door():
                self.shards.check(self.optimizers[0])
        self.setup_precision_plugin()


class PCShardedStrategy(Learning, _Sharding):
    """Trains with predictive coding in several processes that share the weights out.

    Weights, gradients and the optimizer's state are in shards, `torch.distributed.tensor.DTensor`,
    one for each process. While a batch runs its process has all weights whole. A gradient is
    averaged and dealt out once for each optimizer step, after which the weights are gathered.
    Values stay in their process. What processes agree on is as of `PCDDPStrategy`. The module needs
    no ``configure_model`` and no ``fully_shard``. Between batches its parameters are shards, with
    which it does not run: use ``with trainer.strategy.whole():`` there. After a fit they are whole.

    Args:
        algorithm: As of `PCStrategy`.
        save_distributed_checkpoint: A checkpoint is a folder, to which each process writes its
            shards; False for one file, as a single device writes it, which `PCStrategy` and
            `PCDDPStrategy` load as well.
        process_group_backend: ``"gloo"`` or ``"nccl"``; by default the one that fits the devices.
        timeout: How long a process waits for the others.
        settings: By name: ``T``, ``gamma``, ``value_nodes`` and the others, as of `PCStrategy`.

    Raises:
        MisconfigurationException: An argument, or later the model or the Trainer, does not fit.
    """

    strategy_name = "pc_sharded"

    def __init__(
        self,
        algorithm: Literal["auto", "ipc", "pc", "zil", "epc", "iepc"] = "auto",
        *,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        **settings: Any,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        sizes = [name for name in settings if name.endswith("_parallel_size")]
        with at_the_door():
            refuse(
                {
                    f"PCShardedStrategy has no {', '.join(sizes)}: all processes share all "
                    "weights out.": sizes,
                }
            )
            refuse_group(process_group_backend, timeout)
            refuse_unknown("PCShardedStrategy", settings)
            self.settings = Settings(algorithm=algorithm, **settings)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        module, parameters = self._module, [*self._module.named_parameters()]
        cut = [n for n, p in parameters if isinstance(p, DTensor) and not hasattr(p, WHOLE)]
        met: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        unfit = [type(c).__name__ for c in met if isinstance(c, (*_CALLBACKS, _LRCallback))]
        lazy = [n for n, p in parameters if is_lazy(p)]
        with at_the_door():
            refuse_to_share(module, self.settings)
            refuse(
                {
                    f"{cut[:1]} is sharded already: PCShardedStrategy does that itself, so leave "
                    "fully_shard and distribute_tensor out.": cut,
                    f"{unfit[:1]} computes with whole weights, and these are shared out: use "
                    "PCDDPStrategy.": unfit,
                    FLOAT16.format("PCShardedStrategy"): (
                        str(trainer.precision_plugin.precision).startswith("16")
                    ),
                    f"{lazy[:1]} has no size yet: run the module once on a batch, and make the "
                    "Trainer then.": lazy,
                }
            )
        super().setup(trainer)

    @property
    @override
    def _ranks(self) -> Shards:
        return self.shards

    @override
    def _held(self, optimizer: Optimizer) -> Any:
        return self.shards.held(optimizer)

    @override
    def _stepping(self) -> AbstractContextManager[None]:
        return self.shards.stepping()

    def whole(self) -> AbstractContextManager[None]:
        """Whole weights inside, for callbacks and hooks that run the module between batches.

        All processes must enter it. After ``fit``, ``validate``, ``test`` and ``predict`` the
        weights are whole anyway.
        """
        return self.shards.whole()

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.shards.gather()
        for buffer in self._module.buffers():
            dist.broadcast(buffer, 0)
        try:
            return super().training_step(*args, **kwargs)
        finally:
            if self._require_learner().waiting is None:  # no backward comes
                self.shards.release()

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().backward(closure_loss, *args, **kwargs)
        finally:
            self.shards.release()

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.shards.whole():
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.shards.whole():
            return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.shards.whole():
            return super().predict_step(*args, **kwargs)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self.shards.gather()

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        if self._module.trainer.state.fn == TrainerFn.VALIDATING:
            self.shards.gather()

    @override
    def on_test_end(self) -> None:
        super().on_test_end()
        self.shards.gather()

    @override
    def on_predict_end(self) -> None:
        super().on_predict_end()
        self.shards.gather()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        with self.shards.dealt():
            return super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        with self.shards.dealt():
            return super().optimizer_state(optimizer)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        split = [without_state(state) for state in checkpoint.get("optimizer_states", [])]
        if split and self._save_distributed_checkpoint:  # a folder takes tensors alone
            checkpoint = {**checkpoint, "optimizer_states": [rest for rest, _ in split]}
            checkpoint[STATE] = split[0][1]
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        found = super().load_checkpoint(checkpoint_path, weights_only)
        if self._learner is not None:
            (state,) = found.get("optimizer_states", [found])
            self._learner.load_state_dict(state.get(STATE, {}))
        return found

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """`load_checkpoint` has done so."""
