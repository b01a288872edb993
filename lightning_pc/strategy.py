"""Predictive coding for the Lightning Trainer: ``Trainer(strategy=PCStrategy())``.

Two seams: `PCStrategy.training_step` runs the first forward with the nodes in place, and
`PCStrategy.backward` infers and learns. Accumulation, clipping, hooks and schedulers keep theirs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.tuner.lr_finder import _LRCallback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.optim import Optimizer

from lightning_pc.errors import ConfigError, DivergenceError, shown
from lightning_pc.inference.schedules import SCHEDULES
from lightning_pc.insight.explain import choice
from lightning_pc.insight.report import StepReport
from lightning_pc.learner import Learner
from lightning_pc.optim import once, refuse_optimizer, with_state, without_state
from lightning_pc.ranks import ALONE, Ranks
from lightning_pc.refusals import at_the_door, refuse_accumulation, refuse_set_up
from lightning_pc.scaling import UNSCALED, Scaled, Scaling
from lightning_pc.settings import Settings, refuse_unknown


class Learning(Strategy):
    """What the strategies of predictive coding have in common."""

    settings: Settings
    _learner: Learner | None = None
    _says_choice = True
    _averages = True  # gradients, after each batch

    @property
    def _ranks(self) -> Ranks:
        """The processes that train together."""
        return ALONE

    @property
    def _scaling(self) -> Scaling:
        scaler = getattr(self.precision_plugin, "scaler", None)
        return UNSCALED if scaler is None else Scaled(scaler, self._ranks)

    def _held(self, optimizer: Optimizer) -> Any:
        """What has the parameters that learn in its ``param_groups``."""
        return optimizer

    def _stepping(self) -> AbstractContextManager[None]:
        """Around each update of a batch but the last."""
        return nullcontext()

    def __repr__(self) -> str:
        # Stands in the error of a Trainer that is of the package pytorch_lightning.
        other = "pytorch_lightning" in sys.modules
        hint = ", for lightning.pytorch: write 'import lightning.pytorch as pl'" if other else ""
        name = type(self).__name__
        return f"{name}({self.settings.algorithm!r}{self.settings.changes}){hint}"

    @property
    def report(self) -> StepReport | None:
        """What the last step did; None before the first."""
        return None if self._learner is None else self._learner.report

    @property
    def told(self) -> list[str]:
        """The warnings that this fit has met."""
        return [] if self._learner is None else [*self._learner.alerts.told.values()]

    @property
    def values(self) -> dict[str, Tensor]:
        """Node name -> value of the last batch, [B, *]; none of those that T never reaches."""
        return {} if self._learner is None else self._learner.values

    def setup(self, trainer: pl.Trainer) -> None:
        """Checks what can be checked before the first batch, and makes ready to learn."""
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        self._says_choice = True  # once a fit
        refuse_set_up(self._module, trainer, self.settings.algorithm)
        super().setup(trainer)
        with at_the_door():  # Lightning lets no two optimizers through
            refuse_optimizer(next(iter(self.optimizers), None), self._module)
            given = self._module, self.settings
            self._learner = Learner(*given, ranks=self._ranks, scaling=self._scaling)
            self._learner.check()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's training_step, with the value nodes in place (t = 0)."""
        step = super().training_step

        def batch_size() -> float | None:
            with suppress(MisconfigurationException, IndexError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it advises is for self.log
                return extract_batch_size(args[0])
            return None

        learner = self._require_learner()
        learner.optimizer = self._held(self.optimizers[0])  # a callback may have replaced it
        learner.alerts.follows_trend = not self._tries_rates
        output = learner.begin(lambda: step(*args, **kwargs), _loss_of, args, batch_size)
        loss = _loss_of(output)
        if loss is None:
            return output
        leaf = loss.detach().requires_grad_()  # the learner owns the loss's graph
        return {**output, "loss": leaf} if isinstance(output, Mapping) else leaf

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Inference and learning, between the hooks that surround an ordinary backward."""
        trainer, precision = self._module.trainer, self.precision_plugin
        accumulated = trainer.accumulate_grad_batches
        self.pre_backward(closure_loss)
        closure_loss = precision.pre_backward(closure_loss, self._module)
        refuse_accumulation(self.settings.algorithm, accumulated)
        learner = self._require_learner()

        def update() -> None:
            assert optimizer is not None
            with self._stepping():
                learner.scaling.unscale(optimizer)
                self._module.configure_gradient_clipping(
                    optimizer,
                    gradient_clip_val=trainer.gradient_clip_val,
                    gradient_clip_algorithm=trainer.gradient_clip_algorithm,
                )
                learner.scaling.step(optimizer, once(lambda: closure_loss, optimizer))

        try:
            learner.infer(1.0 / accumulated, update)
            if self._averages:
                learner.ranks.average()
        except DivergenceError:
            if not self._tries_rates:
                raise
            trainer.should_stop = True  # the curve of a learning rate finder ends here
            self._module.zero_grad()
        self._say_choice(learner)
        closure_loss = precision.post_backward(closure_loss, self._module)
        self.post_backward(closure_loss)
        return closure_loss

    def _say_choice(self, learner: Learner) -> None:
        chosen = learner.auto is not None and learner.auto.looks > 1  # beta is by the first look
        if self._says_choice and chosen and learner.report is not None:
            self._says_choice = False
            if told := choice(learner.report):
                rank_zero_info(told)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """The last optimizer step of the batch, around the closure that infers."""
        try:
            result = super().optimizer_step(optimizer, once(closure, optimizer), model, **kwargs)
        except ConfigError as error:
            raise MisconfigurationException(str(error)) from error
        torch.clear_autocast_cache()
        return result

    def teardown(self) -> None:
        """Lets go of a forward that no inference followed (errors, passes for BatchNorm alone)."""
        if self._learner is not None:
            self._learner.waiting = None
        super().teardown()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, as a checkpoint keeps it, with the automatic gamma beside it."""
        state = super().optimizer_state(optimizer)
        return state if self._learner is None else with_state(state, self._learner)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the optimizers' states, and the automatic gamma where the checkpoint has it."""
        states = [without_state(state) for state in checkpoint["optimizer_states"]]
        plain = [rest for rest, _ in states]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": plain})
        for _, ours in states:
            self._require_learner().load_state_dict(ours)

    @property
    def _tries_rates(self) -> bool:
        """Whether a learning rate finder is at work."""
        callbacks: list[pl.Callback] = self._module.trainer.callbacks  # type: ignore[attr-defined]
        return any(isinstance(callback, _LRCallback) for callback in callbacks)

    @property
    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _require_learner(self) -> Learner:
        assert self._learner is not None, "setup() has not run"
        return self._learner


class PCStrategy(Learning, SingleDeviceStrategy):
    """Trains a LightningModule with predictive coding on one device.

    Args:
        algorithm: ``"auto"``, ``"ipc"``, ``"pc"``, ``"zil"``, ``"epc"`` or ``"iepc"``; what they
            are and what follows by name stands in `lightning_pc.settings.Settings`.
        device: Device to train on; the Trainer's accelerator and devices decide otherwise.
        accelerator: Filled in by the Trainer.
        checkpoint_io: How checkpoints are written.
        precision_plugin: Filled in by the Trainer.
        settings: By name: ``T``, ``gamma``, ``value_nodes`` and the others.

    Raises:
        MisconfigurationException: An argument, or later the model or the Trainer, does not fit.
    """

    strategy_name = "pc"

    def __init__(
        self,
        algorithm: Literal["auto", "ipc", "pc", "zil", "epc", "iepc"] = "auto",
        *,
        device: str | torch.device = "cpu",
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        **settings: Any,
    ) -> None:
        try:
            root = torch.device(device)
        except (RuntimeError, TypeError) as error:
            told = f"PCStrategy(device={shown(device)}): expected a torch.device. Leave it out, and"
            raise MisconfigurationException(f"{told} give the Trainer accelerator=.") from error
        super().__init__(root, accelerator, checkpoint_io, precision_plugin)
        with at_the_door():
            refuse_unknown("PCStrategy", settings)
            self.settings = Settings(algorithm=algorithm, **settings)

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """For the Trainer to set; None to read, since one that is set fits no second Trainer."""
        return None

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices and len(devices) > 1:
            told = f"PCStrategy trains on one device, the Trainer was given {len(devices)}"
            raise MisconfigurationException(f"{told}: use PCDDPStrategy, or set devices=1.")
        if devices:
            self._root_device = devices[0]

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registers ``strategy="ipc"`` and the others, for several devices with an ending.

        Of ``auto`` it is ``"pc_auto"``, since Lightning has an ``"auto"`` of its own.
        """
        for algorithm, schedule in SCHEDULES.items():
            for make, ending in ((cls, ""), (_ddp, "_ddp"), (_sharded, "_sharded")):
                name = ("pc_auto" if algorithm == "auto" else algorithm) + ending
                if name not in strategy_registry:
                    told = f"{name}: {schedule.paper}"
                    strategy_registry.register(name, make, told, algorithm=algorithm)


# Both build on this module, which may be half imported when names are registered.


def _ddp(**settings: Any) -> Any:
    return import_module("lightning_pc.distributed").PCDDPStrategy(**settings)


def _sharded(**settings: Any) -> Any:
    return import_module("lightning_pc.sharded").PCShardedStrategy(**settings)


def _loss_of(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        return output.get("loss")
    return output if isinstance(output, Tensor) else None


PCStrategy.register_strategies(StrategyRegistry)
