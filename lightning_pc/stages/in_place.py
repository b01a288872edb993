"""Plain SGD's steps of linear layers, made in place: no gradient of a weight is ever stored.

That gradient is a product of two matrices, the errors and what the layer has read. Adding it to the
weights at once spares two of six passes over them, which is most of the time of wide layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer, optimizer


class PlainSGD:
    """`torch.optim.SGD` where it does nothing but x <- x - lr * (gradient + weight_decay * x).

    Args:
        of: The optimizer.
    """

    def __init__(self, of: SGD) -> None:
        self._groups = {p: group for group in of.param_groups for p in group["params"]}

    @classmethod
    def of(cls, optimizer: Optimizer | None) -> PlainSGD | None:
        """That of an optimizer; None where it does more, or somebody watches its steps."""
        if type(optimizer) is not SGD or _watched(optimizer) or replaced(optimizer):
            return None
        momentum = any(group["momentum"] for group in optimizer.param_groups)
        return None if momentum else cls(optimizer)

    def settings(self, parameters: Iterable[nn.Parameter]) -> dict[str, Any] | None:
        """The settings that parameters have in common, None where there are none."""
        each = [self._groups.get(p) for p in parameters]
        return each[0] if all(group is each[0] for group in each) else None

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Takes a step of those that have gradients, and returns them."""
        stepped = [p for p in parameters if p.grad is not None]
        for p in stepped:
            assert p.grad is not None
            _descend(p, p.grad, self._groups[p])
        return stepped


def _factors(settings: dict[str, Any]) -> tuple[float, float]:
    """Of a weight and of its gradient."""
    rate, decay = float(settings["lr"]), float(settings["weight_decay"])
    return 1.0 - rate * decay, rate if settings["maximize"] else -rate


def _descend(weight: Tensor, gradient: Tensor, settings: dict[str, Any]) -> None:
    keep, rate = _factors(settings)
    if keep != 1.0:
        weight.mul_(keep)
    weight.add_(gradient, alpha=rate)


def known(optimizer: Optimizer | None) -> bool:
    """Whether it moves parameters where they are, as torch's own optimizers do."""
    if optimizer is None or replaced(optimizer):
        return False
    captured = any(group.get("capturable") for group in optimizer.param_groups)
    return type(optimizer).__module__.startswith("torch.optim.") and not captured


def replaced(of: Optimizer) -> bool:
    """Whether its ``step`` is not its class's, but for the counter of learning rate schedulers."""
    own = vars(of).get("step")
    return own is not None and getattr(own, "__wrapped__", None) is not type(of).step


def _watched(of: Optimizer) -> bool:
    hooks = (
        *(of._optimizer_step_pre_hooks, of._optimizer_step_post_hooks),
        *(optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks),
    )
    return any(hooks)


@dataclass(eq=False)
class Change:
    """What becomes of linear layers' weights by gradients that are not multiplied out.

    Attributes:
        settings: Of the optimizer.
        weight: [n, O, I].
        bias: [n, O], or none.
        errors: Gradient of what the layers give, [n, M, O].
        read: What they read, [n, M, I].
    """

    settings: dict[str, Any]
    weight: Tensor
    bias: Tensor | None
    errors: Tensor | None = None
    read: Tensor | None = None

    @cached_property
    def token(self) -> Tensor:
        """What autograd is asked for to have these found, []."""
        return torch.zeros((), requires_grad=True)

    @torch.no_grad()
    def make(self) -> None:
        """Takes the optimizer's step, where there is a gradient."""
        if self.errors is None or self.read is None:
            return
        keep, rate = _factors(self.settings)
        self.weight.baddbmm_(self.errors.mT, self.read, beta=keep, alpha=rate)
        if self.bias is not None:
            _descend(self.bias, self.errors.sum(1), self.settings)


class LinearRows(torch.autograd.Function):
    """`linear`, which leaves what its weights learn from in a `Change`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, change: Change) -> Tensor:
        """[n, M, I] -> [n, M, O]."""
        ctx.save_for_backward(x.clone())  # values move before the weights do
        ctx.change = change
        return linear(x, change.weight, change.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        """The gradient goes to what was read alone."""
        (errors,), change = gradients, ctx.change
        (change.read,), change.errors = ctx.saved_tensors, errors
        below = errors @ change.weight if ctx.needs_input_grad[0] else None
        return below, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` of n layers: [n, M, I], [n, O, I], [n, O] -> [n, M, O]."""
    if bias is None:
        return x @ weight.mT
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
