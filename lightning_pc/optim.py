"""Predictive coding for plain PyTorch and Fabric: optimizers around the user's optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_pc.errors import ClosureError, ConfigError, PCError, misfit, refuse, require
from lightning_pc.hosts import fabric_agrees, met, refuse_accumulation
from lightning_pc.insight.report import StepReport
from lightning_pc.learner import Learner
from lightning_pc.ranks import ALONE
from lightning_pc.settings import Settings, refuse_unknown
from lightning_pc.stages.in_place import PlainSGD

#: Where an optimizer's state dict holds the learner's.
STATE = "lightning_pc"
_CLOSURE = (
    "Write optimizer.step(lambda: loss_fn(model(x), y)). Loops that call loss.backward() and "
    "step() themselves (gradient scalers, some Trainers) cannot train with predictive coding: "
    "write the loop, or use Lightning's Trainer with PCStrategy. In place of the Trainer of "
    "transformers use lightning_pc.hugging_face.PCTrainer."
)


def _wrapped(name: str) -> Any:
    """An attribute of the wrapped optimizer; what super().__init__ sets before it is dropped."""

    def put(self: PredictiveCoding, value: Any) -> None:
        if "optimizer" in vars(self):
            setattr(self.optimizer, name, value)

    return property(lambda self: getattr(self.optimizer, name), put)


class PredictiveCoding(Optimizer):
    """Predictive coding around an optimizer; `IPC`, `PC` and the others are its named cases.

    ``param_groups``, ``state`` and ``state_dict`` are the wrapped optimizer's own, so learning
    rate schedulers, checkpoints and Fabric work as with that optimizer alone.

    Args:
        optimizer: The user's optimizer over the parameters of ``model``.
        model: The module that is trained, as it is.
        settings: By name: ``T``, ``gamma`` and others, of `lightning_pc.settings.Settings`; of this
            class ``algorithm``, too, which is ``"auto"`` unless told otherwise.

    Raises:
        ConfigError: An argument is out of range, or the optimizer cannot be wrapped.
    """

    algorithm: Literal["auto", "ipc", "pc", "zil", "epc", "iepc"] = "auto"
    param_groups = _wrapped("param_groups")
    state = _wrapped("state")

    def __init__(self, optimizer: Optimizer, model: nn.Module, **settings: Any) -> None:
        door = type(self).__name__
        require(nn.Module, model, f"{door}(optimizer, model): expected the nn.Module to train")
        refuse_optimizer(optimizer, model)
        refuse_unknown(door, settings, algorithm=self.algorithm == "auto")
        self._wrap(optimizer, model, Settings(**{"algorithm": self.algorithm, **settings}))

    def _wrap(self, optimizer: Optimizer, model: nn.Module, settings: Settings) -> None:
        self.settings, self._learner = settings, Learner(model, settings, optimizer)
        self.algorithm = settings.algorithm
        self._left: list[tuple[ref[Tensor], int]] = []  # gradients of the last step
        self._learner.check()
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer

    def __getstate__(self) -> dict[str, Any]:
        model = self._learner.model
        whole = {"optimizer": self.optimizer, "model": model, "settings": self.settings}
        return with_state(whole, self._learner)

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
        """Node name -> value of the last batch, [B, *]; none of those that T never reaches."""
        return self._learner.values

    def step(self, closure: Callable[[], Tensor | None] | None = None) -> Tensor | None:  # type: ignore[override]
        """Trains on one batch.

        Args:
            closure: Computes and returns the scalar loss, from the forward on, without calling
                ``.backward()``. It runs once.

        Returns:
            The loss, detached; None where the closure skipped the batch, before the forward.

        Raises:
            PCError: ClosureError without a closure, or where it differentiated the loss itself;
                DivergenceError where the loss or an energy is not finite; others of the module.
        """
        door = type(self).__name__
        if not callable(closure):
            got = f"needs a closure that returns the loss, got {type(closure).__name__}"
            raise ClosureError(f"{door}.step {got}. {_CLOSURE}")
        refuse_accumulation()
        with torch.enable_grad():
            try:
                with met(self._learner, door):
                    loss = self._learner.begin(closure, lambda loss: loss, must=f"{door}.step")
            except PCError:
                self.zero_grad()  # a closure that ran backward itself has left gradients
                raise
            if loss is None:
                known = {(id(left()), version) for left, version in self._left}
                if any((id(g), g._version) not in known for g in self._gradients()):
                    told = f"{door}.step got no loss, and does not use what backward() made. "
                    self._learner.alerts.say("backward", told + _CLOSURE)
                return None
            first = loss.detach()
            del loss  # and what autograd holds of it
            self.zero_grad()

            def update() -> None:
                self.optimizer.step(once(lambda: first, self.optimizer))
                torch.clear_autocast_cache()  # or the next forward sees old weights' bf16 copies

            alone = self._learner.ranks is ALONE
            with fabric_agrees():
                self._learner.infer(1.0, update, PlainSGD.of(self.optimizer) if alone else None)
            self._learner.ranks.average()
            update()
            self._left = [(ref(gradient), gradient._version) for gradient in self._gradients()]
        return first

    def _gradients(self) -> list[Tensor]:
        groups = self.param_groups
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with what ``gamma="auto"`` knows under ``"lightning_pc"``.

        It loads into the wrapped optimizer alone as well.
        """
        return with_state(self.optimizer.state_dict(), self._learner)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the wrapped optimizer's; one of a plain optimizer leaves the automatic gamma alone."""
        rest, ours = without_state(state_dict)
        self.optimizer.load_state_dict(rest)
        self._learner.load_state_dict(ours)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the wrapped optimizer's."""
        if "optimizer" in vars(self):
            self.optimizer.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        """What else the wrapped optimizer has (``train()``, ``eval()`` of schedule-free ones)."""
        if name == "optimizer":  # not wrapped yet
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        named = f", algorithm={self.algorithm!r}" * (self.algorithm != type(self).algorithm)
        return f"{type(self).__name__}({self.optimizer!r}{named}{self.settings.changes})"


class IPC(PredictiveCoding):
    """Incremental predictive coding: values and weights move at every inference step (Alg. 1).

    ``step`` takes T steps of the wrapped optimizer; its learning rate, weight decay and clipping
    act at each.
    """

    algorithm = "ipc"


class PC(PredictiveCoding):
    """Predictive coding: values move first, then weights once (Alg. 2)."""

    algorithm = "pc"


class ZIL(PredictiveCoding):
    """Backprop's update, found by local errors (Alg. 3); the value nodes must form a chain."""

    algorithm = "zil"


class EPC(PredictiveCoding):
    """Predictive coding in error coordinates (ePC, Goemaere et al. 2025, arXiv 2505.20137).

    The equilibrium of `PC`, in far fewer inference steps on a deep module: values are x = mu + e,
    and e moves by the gradient of the whole network's loss, which no depth dampens. Weights learn
    from local errors, as in `PC`.
    """

    algorithm = "epc"


class IEPC(PredictiveCoding):
    """`IPC` in error coordinates: errors and weights move at every inference step.

    As in `EPC` the signal crosses any depth at once, and the values go along with the weights. For
    pretrained modules with value nodes everywhere. ``step`` takes T steps, as in `IPC`.
    """

    algorithm = "iepc"


def with_state(state_dict: dict[str, Any], learner: Learner) -> dict[str, Any]:
    """An optimizer's state with the learner's beside it, which torch's optimizers pass over."""
    ours = learner.state_dict()
    return {**state_dict, STATE: ours} if ours else state_dict


def without_state(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """An optimizer's state alone, and the learner's ({} where it has none)."""
    return {k: v for k, v in state_dict.items() if k != STATE}, state_dict.get(STATE, {})


def once(closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
    """``closure``, for an optimizer that reads its loss; it computes no gradient anew.

    Called once more, or at other weights, it is a ConfigError: it would need another gradient.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    learning = any(p.grad is not None for p in parameters)
    versions = [p._version for p in parameters]
    called = False

    def first() -> Any:
        nonlocal called
        moved = [p._version for p in parameters] != versions
        if called or moved or (learning and all(p.grad is None for p in parameters)):
            raise ConfigError(
                f"{type(optimizer).__name__} evaluates its closure more than once a step, or at "
                "other weights, each a whole inference: use an optimizer of one gradient a step."
            )
        called = True
        return closure()

    return first


def refuse_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuses what cannot take a predictive coding step of ``model``."""
    name, of = type(optimizer).__name__, type(model).__name__
    require(Optimizer, optimizer, f"Expected a torch optimizer of the parameters of {of}")
    met = "none was returned" if name == "_MockOptimizer" else name  # Lightning's, for None
    held = [p for group in optimizer.param_groups for p in group["params"]]
    others = [tuple(p.shape) for p in held if not isinstance(p, nn.Parameter)]
    no_closure = misfit(optimizer.step, None)
    refused = {
        f"{name} would do predictive coding twice: give the plain optimizer that it wraps.": (
            isinstance(optimizer, PredictiveCoding)
        ),
        "LBFGS evaluates its closure several times a step, each a whole inference: use SGD, Adam "
        "or another optimizer of one gradient a step.": isinstance(optimizer, LBFGS),
        f"{name}.step takes no closure: define step(self, closure=None).": no_closure,
        f"{name} holds a tensor of shape {others[:1] and others[0]} that is no "
        "nn.Parameter: predictive coding trains the parameters of a module.": others,
        f"The optimizer ({met}) holds no parameter of {of}, which would learn nothing: make it "
        "from model.parameters(), after anything that replaces them.": (
            set(held).isdisjoint(model.parameters())
        ),
    }
    refuse(refused)
