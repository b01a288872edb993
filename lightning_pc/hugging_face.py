"""Predictive coding for the Trainer of transformers: ``PCTrainer(model, args, ...)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from inspect import Parameter, signature
from typing import Any

from accelerate.utils import find_batch_size
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

from lightning_pc.errors import FLOAT16, refuse
from lightning_pc.hosts import met
from lightning_pc.inference.schedules import SCHEDULES
from lightning_pc.insight.report import StepReport
from lightning_pc.learner import Learner
from lightning_pc.optim import refuse_optimizer, with_state, without_state
from lightning_pc.settings import Settings, refuse_unknown


class PCMixin:
    """Makes any Trainer of transformers train with predictive coding; stands before it.

    ``class PCSFTTrainer(PCMixin, SFTTrainer)`` does so with another one. Gradients are clipped, by
    ``args.max_grad_norm``, before each step of the optimizer, of which ``"ipc"`` takes T a batch.
    Schedulers and ``global_step`` count batches. Checkpoints hold what ``gamma="auto"`` knows.

    Args:
        args: As of the Trainer.
        kwargs: As of the Trainer; and by name ``algorithm``, ``T``, ``gamma`` and the others, of
            `lightning_pc.settings.Settings`.

    Attributes:
        settings: Those of predictive coding.

    Raises:
        ConfigError: An argument is out of range, or the Trainer is set up for what predictive
            coding cannot do.
    """

    model: Any
    optimizer: Any
    args: Any
    accelerator: Any
    compute_loss: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ours = {f.name for f in fields(Settings)} & kwargs.keys()
        self.settings = Settings(**{name: kwargs.pop(name) for name in ours})
        self._learner: Learner | None = None
        takes = signature(super().__init__).parameters
        if not any(p.kind is Parameter.VAR_KEYWORD for p in takes.values()):
            refuse_unknown(type(self).__name__, kwargs.keys() - takes.keys())
        super().__init__(*args, **kwargs)
        self._refuse_set_up()

    def _refuse_set_up(self) -> None:
        name, given, algorithm = type(self).__name__, self.args, self.settings.algorithm
        accumulated = given.gradient_accumulation_steps
        sharded = getattr(self, "is_deepspeed_enabled", False) or getattr(
            self, "is_fsdp_enabled", False
        )
        refuse(
            {
                f"{name} found {given.n_gpu} devices for one process: start a process for each (by "
                "torchrun), or make one visible (CUDA_VISIBLE_DEVICES=0).": given.n_gpu > 1,
                f"{name} cannot train with DeepSpeed or FSDP: leave them out.": sharded,
                FLOAT16.format(name): given.fp16,
                f"{name} needs the module itself, which torch_compile hides: leave it out, and give"
                f" {name} compile=True.": given.torch_compile,
                f"gradient_accumulation_steps={accumulated}: {algorithm} moves the weights at each "
                "inference step and accumulates nothing. Use a larger batch, or 'pc'.": (
                    accumulated > 1 and SCHEDULES[algorithm].incremental
                ),
            }
        )

    @property
    def report(self) -> StepReport | None:
        """What the last step did; None before the first."""
        return None if self._learner is None else self._learner.report

    @property
    def values(self) -> dict[str, Tensor]:
        """Node name -> value of the last batch, [B, *]; none of those that T never reaches."""
        return {} if self._learner is None else self._learner.values

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; predictive coding learns with it."""
        made = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        inner = getattr(self.optimizer, "optimizer", self.optimizer)  # of one that is prepared
        if self._learner is None or self._learner.optimizer is not inner:
            refuse_optimizer(inner, self.model)
            self._learner = learner = Learner(self.model, self.settings, inner)
            learner.check()

            def load(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
                rest, known = without_state(state)
                learner.load_state_dict(known)
                return rest

            inner.register_state_dict_post_hook(lambda _, state: with_state(state, learner))
            inner.register_load_state_dict_pre_hook(load)
        return made

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, with inference in place of the backward pass.

        Raises:
            PCError: DivergenceError where the loss or an energy is not finite; others of the
                module.
        """
        learner, compute = self._learner, self.compute_loss
        assert learner is not None, "create_optimizer() has not run"
        leaves: list[Tensor] = []

        def record(*given: Any, **named: Any) -> Any:
            output = learner.begin(
                lambda: compute(*given, **named),
                _loss_of,
                (inputs,),
                lambda: find_batch_size(inputs),
                f"{type(self).__name__}.compute_loss",
            )
            loss = _loss_of(output)
            assert loss is not None  # or `begin` had refused it
            leaves.append(loss.detach().requires_grad_())  # the learner owns the loss's graph
            return (leaves[0], *output[1:]) if isinstance(output, tuple) else leaves[0]

        self.compute_loss = record
        try:
            with met(learner):
                told: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            del self.compute_loss
        (leaf,) = leaves
        assert leaf.grad is not None
        learner.infer(float(leaf.grad), lambda: self._update(model))
        if self.accelerator.sync_gradients:
            learner.ranks.average()
        return told

    def _update(self, model: nn.Module) -> None:
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds ``pc/energy``, of all nodes per loss term, and ``pc/gamma`` to the training loss."""
        report = self.report
        if report is not None and "loss" in logs:
            energy = float(report.energies[-1].sum()) / report.loss_terms
            logs = {**logs, "pc/energy": energy, "pc/gamma": report.gamma}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class PCTrainer(PCMixin, Trainer):
    """The Trainer of transformers, with predictive coding in place of backprop.

    Args:
        args: As of ``transformers.Trainer``.
        kwargs: As of ``transformers.Trainer``, and as of `PCMixin`.
    """


def _loss_of(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, Mapping):
        first = first.get("loss")
    return first if isinstance(first, Tensor) else None
