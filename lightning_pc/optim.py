"""Predictive coding for plain PyTorch and Fabric: optimizers around the user's optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_pc.errors import ClosureError, ConfigError, PCError
from lightning_pc.placement import ValueNodes
from lightning_pc.precisions import Precisions
from lightning_pc.replay import nothing
from lightning_pc.report import StepReport
from lightning_pc.settings import Settings
from lightning_pc.step import Learner
from lightning_pc.wrapping import STATE, once, with_state, without_state


class PredictiveCodingOptimizer(Optimizer):
    """Base of `PC`, `IPC` and the others: a real optimizer that owns nothing but the schedule.

    ``param_groups``, ``state`` and ``state_dict`` are the wrapped optimizer's own, so learning
    rate schedulers, checkpoints and Fabric work as with that optimizer alone.

    Args:
        optimizer: The user's optimizer over the parameters of ``model``.
        model: The module that is trained, as it is.
        T: Inference steps per batch, >= 1; None for ``max(8, depth + 1)`` (zil and spiking
            precisions: depth + 1, epc, iepc: 8); ``"auto"`` ends inference when F moves by less
            than 1 % of what it has moved so far, after depth + 1 to max(32, 4 (depth + 1)) steps
            (epc: 2 to 32; not for iepc).
        gamma: Inference rate, > 0; ``"auto"`` takes it from the curvature of F in the values,
            which is looked at every 300 evaluations (`lightning_pc.curvature`); zil: 1. With
            ``"auto"``, along conjugate gradients, values of ipc go along with predictions that are
            moved too far, with all where connections skip all stages (`lightning_pc.along`).
        gamma_decay: gamma is multiplied by it after a step at which the energy has not fallen,
            within a batch; in (0, 1], default 0.9 (the paper, D.3); 1 keeps gamma.
        momentum: Share of their velocity that values keep from step to step, in [0, 1): 0 is the
            paper's descent, more is heavy ball, at rest at the start of a batch; PCX (Pinchetti
            et al. 2024, arXiv 2407.01163) takes 0.35 to 0.7 for iPC; zil: 0. ``"conjugate"`` (pc,
            ipc, epc) finds rate and momentum of each step, by conjugate gradients; gamma is then
            the length of the step that is tried, but along a chain of nodes a value's first
            step may be longer (`lightning_pc.conjugate`). None, the default, is ``"conjugate"`` for
            pc and ipc where gamma is automatic, precisions do not vary, nudging is positive and
            values are made anew for each call, else 0.
        value_nodes: Where value nodes stand: ``"auto"`` (the inputs of nonlinearities),
            ``"modules"``, ``"linear"``, ``"blocks"``, a module name or regular expression, a
            module type, a callable ``(name, module) -> bool``, or a list of these.
        reset: ``"batch"`` makes values anew for each call; ``"never"`` keeps them from call to
            call, for full-batch training.
        loss_terms: The number of terms M that the loss is a mean of, or a callable that gives it;
            None to read it off the loss functions that the closure calls.
        softmax_energy: Energy at the logits of a softmax: ``"categorical"`` (F_KL) or
            ``"gaussian"``; zil, epc and iepc are Gaussian throughout.
        precisions: Weight of each node's energy in F: ``"constant"`` (1), a number, ``"depth"``,
            ``"spiking"`` or ``"decaying"`` (Qi et al. 2025), an object of
            `lightning_pc.precisions`, or a callable ``(depth, t) -> weight``.
        nudging: Sign of the loss in the F = E + beta * loss that values descend: ``"positive"``,
            ``"negative"``, or ``"centered"``, the mean of both (pc, epc; 2 T - 1 steps).
        beta: Strength of the nudging, > 0; parameters learn from F / beta (Scellier & Bengio
            2017). 1 with ``"positive"`` is plain predictive coding.

    Raises:
        ConfigError: An argument is out of range, or the optimizer cannot be wrapped.
    """

    algorithm: str

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        T: int | Literal["auto"] | None = None,
        gamma: float | Literal["auto"] = "auto",
        gamma_decay: float = 0.9,
        momentum: float | Literal["conjugate"] | None = None,
        value_nodes: ValueNodes = "auto",
        reset: Literal["batch", "never"] = "batch",
        loss_terms: float | Callable[[], float] | None = None,
        softmax_energy: Literal["categorical", "gaussian"] = "categorical",
        precisions: float | str | Precisions | Callable[[int, int], float] = "constant",
        nudging: Literal["positive", "negative", "centered"] = "positive",
        beta: float = 1.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"{type(self).__name__}(optimizer, model): expected the nn.Module that is trained, "
                f"got {type(model).__name__}."
            )
        refuse_optimizer(optimizer, model)
        settings = Settings(
            algorithm=self.algorithm,
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
        self._wrap(optimizer, model, settings)

    def _wrap(self, optimizer: Optimizer, model: nn.Module, settings: Settings) -> None:
        self._learner = Learner(model, settings, optimizer)
        self._learner.check()
        self.optimizer = optimizer
        self._adopting = True  # super() sets param_groups and state, which the wrapped one owns
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._adopting = False

    def __getstate__(self) -> dict[str, Any]:
        learner = self._learner
        return {
            "optimizer": self.optimizer,
            "model": learner.model,
            "settings": learner.settings,
            STATE: learner.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        rest, ours = without_state(state)
        self._wrap(**rest)
        self._learner.load_state_dict(ours)

    @property
    def report(self) -> StepReport | None:
        """What the last step did; None before the first."""
        return self._learner.report

    @property
    def values(self) -> dict[str, Tensor]:
        """Node name -> value of the last batch, [B, *]."""
        return self._learner.values

    @property
    def is_replay(self) -> bool:
        """Whether the closure runs once more for a batch that it has already seen."""
        return self._learner.is_replay

    def step(self, closure: Callable[[], Tensor | None] | None = None) -> Tensor | None:  # type: ignore[override]
        """Trains on one batch.

        Args:
            closure: Computes the scalar loss, from the forward on; it neither calls
                ``.backward()`` nor ``zero_grad()``. It runs once per inference step,
                and in looks at the curvature.

        Returns:
            The loss of the first, ordinary forward, detached; None where the closure gave None.

        Raises:
            ClosureError: No closure, or it differentiated the loss itself.
            DivergenceError: Loss or an energy is not finite.
            PCError: The module or its nodes cannot be trained.
        """
        if closure is None:
            raise ClosureError(
                f"{type(self).__name__}.step needs a closure that returns the loss: "
                "optimizer.step(lambda: loss_fn(model(x), y)). (Precision plugins with a gradient "
                "scaler call step without one: use bf16 instead.)"
            )
        model = self._learner.model
        with torch.enable_grad():
            try:
                silent = {(o, "zero_grad"): nothing for o in (self, self.optimizer, model)}
                self._learner.begin(closure, lambda loss: loss, shadows=silent)
            except PCError:
                self.zero_grad()  # a closure that ran backward itself has left gradients
                raise
            self.zero_grad()
            with _fabric_agrees():
                loss = self._learner.infer(1.0, self._update)
        if loss is not None:
            self._update()
        return loss

    def _update(self) -> None:
        self.optimizer.step(once(lambda: None, self.optimizer))
        torch.clear_autocast_cache()  # or the next forward sees the old weights' bf16 copies

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, which loads into that optimizer alone as well.

        With ``gamma="auto"`` the rate stands beside it, under ``"lightning_pc"``.
        """
        return with_state(self.optimizer.state_dict(), self._learner)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the wrapped optimizer's; one of a plain optimizer leaves the automatic gamma alone."""
        rest, ours = without_state(state_dict)
        self.optimizer.load_state_dict(rest)
        self._learner.load_state_dict(ours)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the wrapped optimizer's."""
        if not self._adopting:
            self.optimizer.add_param_group(param_group)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if not self._adopting:
            self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        if not self._adopting:
            self.optimizer.state = state

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"


class IPC(PredictiveCodingOptimizer):
    """Incremental predictive coding: values and weights move at every inference step (Alg. 1).

    ``step`` takes T steps of the wrapped optimizer; its learning rate, weight decay and clipping
    act at each. Arguments as in `PredictiveCodingOptimizer`.
    """

    algorithm = "ipc"


class PC(PredictiveCodingOptimizer):
    """Predictive coding: values move first, then weights once (Alg. 2).

    Arguments as in `PredictiveCodingOptimizer`.
    """

    algorithm = "pc"


class ZIL(PredictiveCodingOptimizer):
    """Zero-divergence inference learning: backprop's update, found by local errors (Alg. 3).

    The value nodes must form a chain. Arguments as in `PredictiveCodingOptimizer`.
    """

    algorithm = "zil"


class EPC(PredictiveCodingOptimizer):
    """Predictive coding in error coordinates (ePC, Goemaere et al. 2025, arXiv 2505.20137).

    The equilibrium of `PC`, in far fewer inference steps on a deep module: values are x = mu + e,
    and e moves by the gradient of the whole network's loss, which no depth dampens. Weights learn
    from local errors, as in `PC`. Arguments as in `PredictiveCodingOptimizer`.
    """

    algorithm = "epc"


class IEPC(PredictiveCodingOptimizer):
    """`IPC` in error coordinates: errors and weights move at every inference step.

    As in `EPC` the signal crosses any depth at once, and the values go along with the weights. For
    pretrained modules with value nodes everywhere. ``step`` takes T steps of the wrapped optimizer,
    as in `IPC`. Arguments as in `PredictiveCodingOptimizer`.
    """

    algorithm = "iepc"


@contextmanager
def _fabric_agrees() -> Iterator[None]:
    """Fabric's mixed precision raises on a backward that is not its own, where it is loaded."""
    names = ("lightning.fabric.wrappers", "lightning_fabric.wrappers")
    loaded: list[Any] = [sys.modules[name] for name in names if name in sys.modules]
    before = [getattr(wrappers, "_in_fabric_backward", False) for wrappers in loaded]
    for wrappers in loaded:
        wrappers._in_fabric_backward = True
    try:
        yield
    finally:
        for wrappers, flag in zip(loaded, before, strict=True):
            wrappers._in_fabric_backward = flag


def refuse_optimizer(optimizer: object, model: nn.Module) -> None:
    """Refuses what cannot take a predictive coding step of ``model``.

    Raises:
        ConfigError: Naming the optimizer and what to do.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, PredictiveCodingOptimizer):
        raise ConfigError(
            f"{name} would do predictive coding twice: give the plain optimizer that it wraps."
        )
    if isinstance(optimizer, LBFGS):
        raise ConfigError(
            "LBFGS evaluates its closure several times a step, each of which would be a whole "
            "inference: use SGD, Adam(W) or another optimizer of one gradient a step."
        )
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"Expected a torch optimizer, got {name}.")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not isinstance(parameter, nn.Parameter):
                raise ConfigError(
                    f"{name} holds a tensor of shape {tuple(parameter.shape)} that is no "
                    "nn.Parameter: predictive coding trains the parameters of a module."
                )
    theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if theirs.isdisjoint(map(id, model.parameters())):
        raise ConfigError(
            f"The optimizer ({name}) holds no parameter of {type(model).__name__}, which would "
            "learn nothing: make it from model.parameters(), after anything that replaces them."
        )
