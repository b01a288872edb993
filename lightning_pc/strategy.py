"""Predictive coding for the Lightning Trainer: ``Trainer(strategy=PCStrategy("ipc"))``.

Two seams: `PCStrategy.training_step` runs the first forward with the nodes in place, and
`PCStrategy.backward` infers and learns. Accumulation, clipping, hooks and schedulers keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_pc.errors import ConfigError
from lightning_pc.hooks import HookWatch
from lightning_pc.precisions import Precisions
from lightning_pc.refusals import (
    at_the_door,
    refuse_accumulation,
    refuse_module,
    refuse_optimizers,
    refuse_precision,
)
from lightning_pc.replay import LOGGING, nothing
from lightning_pc.report import StepReport
from lightning_pc.schedules import SCHEDULES
from lightning_pc.settings import Settings
from lightning_pc.step import Learner
from lightning_pc.wrapping import once, with_state, without_state


class PCStrategy(SingleDeviceStrategy):
    """Trains a LightningModule with predictive coding on one device.

    Args:
        algorithm: ``"ipc"`` (values and weights move at every inference step), ``"pc"`` (values
            first, then weights once), ``"zil"`` (backprop's update by local errors), ``"epc"``
            (pc in error coordinates, for deep modules: Goemaere et al. 2025) or ``"iepc"`` (ipc in
            error coordinates, for pretrained modules with value nodes everywhere).
        T: Inference steps per batch, at least 1. Default: max(8, depth + 1); zil and spiking
            precisions: depth + 1; epc, iepc: 8. "auto" ends inference when F moves by less than
            1 % of what it has moved so far, after depth + 1 to max(32, 4 (depth + 1)) steps (epc: 2
            to 32; not for iepc).
        gamma: Inference rate, positive. "auto" takes it from the curvature of F in the values,
            which is looked at every 300 evaluations; zil: 1. With "auto", along conjugate
            gradients, values of ipc go along with predictions that are moved too far, with all
            where connections skip all stages.
        gamma_decay: Factor of gamma after an inference step at which the energy has not fallen,
            within a batch, in (0, 1]; 1 keeps gamma (Salvatori et al. 2024, D.3).
        momentum: Share of their velocity that values keep from step to step, in [0, 1): 0 is the
            paper's descent, more is heavy ball, at rest at the start of a batch; PCX (Pinchetti
            et al. 2024) takes 0.35 to 0.7 for iPC; zil: 0. "conjugate" (pc, ipc, epc) finds rate
            and momentum of each step, by conjugate gradients; gamma is then the length of the
            step that is tried, but along a chain of nodes a value's first step may be longer. None
            is "conjugate" for pc and ipc where gamma is automatic, precisions do not vary, nudging
            is positive and values are made anew for each batch, else 0.
        value_nodes: Where value nodes stand: "auto" (inputs of nonlinearities), "modules",
            "linear", "blocks", a module name or regular expression, or a list of these; in
            Python also a module type or a callable (name, module) -> bool.
        reset: "batch" makes values anew for each batch, "never" keeps them for full-batch
            training.
        loss_terms: Number of terms that the loss is a mean of, or in Python a callable of
            the batch. Default: read off the loss functions that are called.
        softmax_energy: Energy at softmax logits: "categorical" (F_KL, Pinchetti et al. 2022)
            or "gaussian"; zil, epc and iepc are Gaussian throughout.
        precisions: Weight of each node's energy in F: "constant" (1), a number, "depth",
            "spiking" or "decaying" (Qi et al. 2025), an object of lightning_pc.precisions, or in
            Python a callable (depth, t) -> weight.
        nudging: Sign of the loss in the F = E + beta * loss that values descend: "positive",
            "negative", or "centered", the mean of both (pc, epc; 2 T - 1 steps).
        beta: Strength of the nudging, positive; parameters learn from F / beta (Scellier &
            Bengio 2017). 1 with "positive" is plain predictive coding.
        device: Device to train on; the Trainer's accelerator and devices decide otherwise.
        accelerator: Filled in by the Trainer.
        checkpoint_io: How checkpoints are written.
        precision_plugin: Filled in by the Trainer.

    Raises:
        MisconfigurationException: An argument, or later the model or the Trainer, does not fit.
    """

    strategy_name = "pc"

    def __init__(
        self,
        algorithm: Literal["ipc", "pc", "zil", "epc", "iepc"] = "ipc",
        *,
        T: int | Literal["auto"] | None = None,
        gamma: float | Literal["auto"] = "auto",
        gamma_decay: float = 0.9,
        momentum: float | Literal["conjugate"] | None = None,
        # The list before the function: jsonargparse saves a value as the first that it may be.
        value_nodes: str
        | list[str | type[nn.Module] | Callable[[str, nn.Module], bool]]
        | type[nn.Module]
        | Callable[[str, nn.Module], bool] = "auto",
        reset: Literal["batch", "never"] = "batch",
        loss_terms: float | Callable[..., float] | None = None,
        softmax_energy: Literal["categorical", "gaussian"] = "categorical",
        precisions: float | str | Precisions | Callable[[int, int], float] = "constant",
        nudging: Literal["positive", "negative", "centered"] = "positive",
        beta: float = 1.0,
        device: str | torch.device = "cpu",
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            device=device,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        with at_the_door():
            self.settings = Settings(
                algorithm=algorithm,
                T=T,
                gamma=gamma,
                gamma_decay=gamma_decay,
                momentum=momentum,
                value_nodes=value_nodes,
                reset=reset,
                loss_terms=loss_terms,
                softmax_energy=softmax_energy,
                precisions=precisions,
                nudging=nudging,
                beta=beta,
            )
        self._learner: Learner | None = None

    @property
    def report(self) -> StepReport | None:
        """What the last step did; None before the first."""
        return None if self._learner is None else self._learner.report

    @property
    def values(self) -> dict[str, Tensor]:
        """Node name -> value of the last batch, [B, *]."""
        return {} if self._learner is None else self._learner.values

    @property
    def is_replay(self) -> bool:
        """Whether training_step runs once more for a batch that it has already seen."""
        return self._learner is not None and self._learner.is_replay

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """For the Trainer to set; None to read, since one that is set fits no second Trainer."""
        return None

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices and len(devices) > 1:
            raise MisconfigurationException(
                f"PCStrategy trains on one device, the Trainer was given {len(devices)}: set "
                "devices=1."
            )
        if devices:
            self._root_device = devices[0]

    def setup(self, trainer: pl.Trainer) -> None:
        """Checks what can be checked before the first batch, and makes ready to learn."""
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        refuse_precision(self.precision_plugin)
        refuse_module(self._module, trainer, self.settings.algorithm)
        super().setup(trainer)
        refuse_optimizers(self._module, self.optimizers)
        with at_the_door():
            self._learner = Learner(self._module, self.settings)
            self._learner.check()
        self._hooks = HookWatch(self.settings.algorithm)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's training_step, with the value nodes in place (t = 0)."""
        step = super().training_step

        def batch_size() -> float | None:
            try:
                return extract_batch_size(args[0])
            except (MisconfigurationException, IndexError):
                return None

        trainer = self._module.trainer
        silent: dict[tuple[Any, str], Any] = {(self._module, name): nothing for name in LOGGING}
        silent.update({(c.scheduler, "step"): nothing for c in self.lr_scheduler_configs})
        silent[trainer, "_loggers"] = [_SilentLogger(logger) for logger in trainer.loggers]
        learner = self._require_learner()
        learner.optimizer = self.optimizers[0]  # a callback may have replaced it
        output = learner.begin(lambda: step(*args, **kwargs), _loss_of, args, silent, batch_size)
        return _without_graph(output)

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Inference and learning, between the hooks that surround an ordinary backward."""
        trainer, precision = self._module.trainer, self.precision_plugin
        self.pre_backward(closure_loss)
        closure_loss = precision.pre_backward(closure_loss, self._module)
        accumulated = trainer.accumulate_grad_batches
        refuse_accumulation(self.settings.algorithm, accumulated)

        def update() -> None:
            assert optimizer is not None
            self._module.configure_gradient_clipping(
                optimizer,
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )
            optimizer.step(once(lambda: closure_loss, optimizer))

        self._require_learner().infer(1.0 / accumulated, update)
        self._hooks.begin(optimizer)
        closure_loss = precision.post_backward(closure_loss, self._module)
        self.post_backward(closure_loss)
        return closure_loss

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """The last optimizer step of the batch, around the closure that infers."""
        try:
            with self._hooks.watching(self._module.trainer, optimizer):
                result = super().optimizer_step(
                    optimizer, once(closure, optimizer), model, **kwargs
                )
        except ConfigError as error:
            raise MisconfigurationException(str(error)) from error
        torch.clear_autocast_cache()
        return result

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, as a checkpoint keeps it, with the automatic gamma beside it."""
        state = super().optimizer_state(optimizer)
        return state if self._learner is None else with_state(state, self._learner)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the optimizers' states, and the automatic gamma where the checkpoint has it."""
        states = [without_state(state) for state in checkpoint["optimizer_states"]]
        super().load_optimizer_state_dict(
            {**checkpoint, "optimizer_states": [rest for rest, _ in states]}
        )
        for _, ours in states:
            self._require_learner().load_state_dict(ours)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registers ``strategy="ipc"``, ``"pc"``, ``"zil"``, ``"epc"`` and ``"iepc"``."""
        for name, schedule in SCHEDULES.items():
            if name not in strategy_registry:
                strategy_registry.register(
                    name, cls, description=f"{name}: {schedule.paper}", algorithm=name
                )

    @property
    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _require_learner(self) -> Learner:
        assert self._learner is not None, "setup() has not run"
        return self._learner


def _loss_of(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        return output.get("loss")
    return output if isinstance(output, Tensor) else None


class _SilentLogger(DummyLogger):
    """Stands in place of a logger in replays: knows its folders, and logs nothing."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger
        for name in ("root_dir", "log_dir"):
            self.__dict__[name] = getattr(logger, name, None)

    @property
    def save_dir(self) -> str | None:
        """The logger's."""
        return self._logger.save_dir

    @property
    def name(self) -> str:
        """The logger's."""
        return self._logger.name or ""

    @property
    def version(self) -> str:
        """The logger's."""
        return str(self._logger.version)


def _without_graph(output: Any) -> Any:
    """The output for Lightning to hold while values move: the learner owns the loss's graph."""
    loss = _loss_of(output)
    if loss is None:
        return output
    leaf = loss.detach().requires_grad_()
    return {**output, "loss": leaf} if isinstance(output, Mapping) else leaf


PCStrategy.register_strategies(StrategyRegistry)
