"""Predictive coding for the Trainer of transformers: ``PCTrainer(model, args, ...)``."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_pc.errors import ClosureError, ConfigError, from_extra, refuse
from lightning_pc.hosts import met
from lightning_pc.inference.schedules import SCHEDULES
from lightning_pc.insight.report import StepReport
from lightning_pc.learner import Learner
from lightning_pc.optim import refuse_optimizer, with_state, without_state
from lightning_pc.ranks import ALONE
from lightning_pc.settings import Settings

with from_extra("transformers", "accelerate", "transformers"):
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import find_batch_size
    from transformers import Trainer


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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        late = Trainer in order and order.index(Trainer) < order.index(PCMixin)
        refuse(
            {
                f"class {cls.__name__}: PCMixin must stand before the Trainer, or backprop would "
                f"train. Write class {cls.__name__}(PCMixin, ...).": late
            }
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ours, name = {f.name for f in fields(Settings)}, type(self).__name__
        self.settings = Settings(**{n: kwargs.pop(n) for n in ours & kwargs.keys()})
        self._learner: Learner | None = None
        self._hooks: list[RemovableHandle] = []
        self._inferring = False
        takes = signature(super().__init__).parameters
        if not any(p.kind is Parameter.VAR_KEYWORD for p in takes.values()):
            for unknown in kwargs.keys() - takes.keys():
                close = get_close_matches(unknown, [*takes, *ours], n=1)
                meant = f" Did you mean {close[0]}=?" if close else ""
                told = f"{name} has no argument {unknown}=.{meant} It takes the Trainer's, and"
                raise ConfigError(f"{told} {', '.join(sorted(ours))}.")
        super().__init__(*args, **kwargs)
        self._refuse_set_up()

    def _refuse_set_up(self) -> None:
        name, given, algorithm = type(self).__name__, self.args, self.settings.algorithm
        accumulated = given.gradient_accumulation_steps
        hosts = ("is_deepspeed_enabled", "is_fsdp_enabled")
        refuse(
            {
                f"{name} found {given.n_gpu} devices for one process: start a process for each (by "
                "torchrun), or make one visible (CUDA_VISIBLE_DEVICES=0).": given.n_gpu > 1,
                f"{name} cannot train with DeepSpeed or FSDP: leave them out.": any(
                    getattr(self, host, False) for host in hosts
                ),
                f"{name} does not train in float16: prediction errors fall below its range. Use "
                "bf16=True.": given.fp16,
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
        self._refuse_set_up()  # arguments may have changed since
        made = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        self._attach()
        return made

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's."""
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._let_go()

    def _attach(self) -> Learner:
        """The learner of the optimizer of now."""
        prepared = isinstance(self.optimizer, AcceleratedOptimizer)
        inner = self.optimizer.optimizer if prepared else self.optimizer
        if self._learner is None or self._learner.optimizer is not inner:
            refuse_optimizer(inner, self.model)
            self._learner = Learner(self.model, self.settings, inner)
            self._learner.check()
            self._let_go()
        if not self._hooks:
            learner = self._learner

            def load(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
                rest, known = without_state(state)
                learner.load_state_dict(known)
                return rest

            def step(*_: Any) -> None:
                if not self._inferring and learner.report is None:
                    name = type(self).__name__
                    told = f"{name}.training_step has run backprop in place of PCMixin's"
                    raise ClosureError(f"{told}: call super().training_step(...) in it.")

            self._hooks = [
                inner.register_state_dict_post_hook(lambda _, state: with_state(state, learner)),
                inner.register_load_state_dict_pre_hook(load),
                inner.register_step_pre_hook(step),
            ]
        return self._learner

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, with inference in place of the backward pass.

        Raises:
            PCError: DivergenceError where the loss or an energy is not finite; others of the
                module.
        """
        learner, name, compute = self._attach(), type(self).__name__, self.compute_loss
        own = vars(self).get("compute_loss")
        leaves: list[Tensor] = []

        def batch_size() -> float | None:
            with suppress(TypeError):
                return find_batch_size(inputs)  # type: ignore[no-any-return]
            return None

        def record(*given: Any, **named: Any) -> Any:
            must = f"{name}.compute_loss"
            output = learner.begin(
                lambda: compute(*given, **named), _loss_of, (inputs,), batch_size, must
            )
            loss = _loss_of(output)
            if loss is None:
                raise ClosureError(f"{must} gave no loss: return a tensor, or it and the outputs.")
            leaves.append(loss.detach().requires_grad_())  # the learner owns the loss's graph
            return (leaves[0], *output[1:]) if isinstance(output, tuple) else leaves[0]

        self.compute_loss = record
        try:
            with met(learner, name):
                told: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            del self.compute_loss
            if own is not None:
                self.compute_loss = own
        alone = learner.ranks is ALONE and self.accelerator.num_processes > 1
        refuse({f"{name}.compute_loss must run the model that it is given, not self.model.": alone})
        (leaf,) = leaves
        assert leaf.grad is not None
        self._inferring = True
        try:
            learner.infer(float(leaf.grad), lambda: self._update(model))
        finally:
            self._inferring = False
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
    return first if isinstance(first, Tensor) else None
