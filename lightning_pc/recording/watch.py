"""Watches a forward: finds the places where a value node may stand, in its calls and modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction
from typing_extensions import override

from lightning_pc.errors import ClosureError
from lightning_pc.nodes.energies import Gaussian, softmax_energy
from lightning_pc.nodes.latent import Stand, latents_met
from lightning_pc.recording.applied import Applied, functions_met
from lightning_pc.recording.functions import (
    COMPOSITES,
    COND,
    L1_LOSS,
    NONLINEAR,
    NONLINEARITIES,
    SDPA,
    attention,
    branch,
    out_of_place,
    rectifies,
    softmax_dim,
    whole_call,
)
from lightning_pc.recording.losses import LOSSES, LossCall, read_loss_call
from lightning_pc.recording.modules import Modules
from lightning_pc.recording.task import Task

_DIFFERENTIATES = frozenset((torch.autograd.grad, torch.autograd.backward, Tensor.backward))
#: Functions that are more to us than calls to record.
_MEANT = frozenset(
    (*NONLINEAR, *NONLINEARITIES, *COMPOSITES, *LOSSES, *_DIFFERENTIATES, COND, SDPA)
)


class Watch(Modules):
    """Records one forward and cuts it where nodes are asked for.

    Attributes:
        losses: The calls of loss functions.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.losses: list[LossCall] = []
        self._inside = 0  # of a call that is recorded as one

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Active inside. The hooks are torch's global ones, so no module is touched."""
        hooks = nn.modules.module
        with ExitStack() as stack:
            for handle in (
                hooks.register_module_forward_pre_hook(self._before),
                hooks.register_module_forward_hook(self._after),
            ):
                stack.callback(handle.remove)
            stack.enter_context(functions_met(self._apply))
            stack.enter_context(latents_met(self._latent))
            with self:
                yield

    def _latent(self, stand: Stand) -> Tensor:
        with torch._C.DisableTorchFunction():
            return self.latent(self.module_name(stand.of), stand)

    def _apply(self, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A Function of the user's, whose own backward it keeps, is one call."""
        modes: list[Any] = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if self._inside or self not in modes:
            return Applied.of(kind)(*args, **kwargs)
        if kind is CheckpointFunction:
            return args[0](*args[2:])  # pieces hold no activations that it could save
        self._inside += 1
        try:
            return self.record(Applied.of(kind), args, kwargs)
        finally:
            self._inside -= 1

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        traits = self.known[func]
        if traits.passive:
            return func(*args, **kwargs)
        if not self._inside and func not in _MEANT:
            return self.record(func, args, kwargs)
        if func is L1_LOSS:
            kwargs = whole_call(kwargs)
        if self._running and func in NONLINEAR and _bends(NONLINEAR[func], args, kwargs):
            for call in self._running:
                call.nonlinear = True
        if self._inside:
            return func(*args, **kwargs)
        if func is COND:
            with self:
                return branch(*args, **kwargs)
        if self.placement.nonlinearities and not self._suppressed and torch.is_grad_enabled():
            name = NONLINEARITIES.get(func)
            if name is not None:
                return self._nonlinearity(func, name, args, dict(kwargs))
            if func is SDPA:
                return self._attention(args, kwargs)
            opened = COMPOSITES.get(func)
            if opened is not None:
                with self:
                    return opened(*args, **kwargs)
        if func in _DIFFERENTIATES:
            self._refuse_gradients(args)
        output = self.record(func, args, kwargs)
        loss = read_loss_call(func, args, kwargs, output)
        if loss is not None:
            entry = self.entry(output)
            if entry is not None:
                loss.slot = entry.slot
                self.losses.append(loss)
        return output

    # Functions

    def _nonlinearity(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        mu = args[0] if args else kwargs.pop("input", None)
        rest = args[1:]
        if not (
            isinstance(mu, Tensor) and mu.is_floating_point() and rectifies(name, rest, kwargs)
        ):
            return self.record(func, (mu, *rest), kwargs)
        dim = softmax_dim(name, mu, args, kwargs)
        plain, in_place = out_of_place(func, kwargs)
        x = self.place(
            name,
            partial(self._function_name, name),
            mu,
            lambda: Gaussian() if dim is None else softmax_energy(self.task.softmax, dim),
            overwritten=in_place,
        )
        if x is None:
            if in_place and plain is func:
                kwargs["inplace"] = True
            return self.record(func, (mu, *rest), kwargs)
        output = self.record(plain, (x, *rest), kwargs)
        return self._overwrite(mu, output) if in_place else output

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = partial(self._function_name, "softmax")

        def logits_node(mu: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():
                x = self.place("softmax", name, mu, lambda: softmax_energy(self.task.softmax, -1))
            return mu if x is None else x

        inputs = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False), **kwargs)
        if not any(inputs[k].requires_grad for k in ("query", "key")):
            self.skip("softmax", name)  # torch's fused kernel does the work
            return self.record(SDPA, args, kwargs)
        self._suppressed += 1
        try:
            with self:
                return attention(logits_node, *args, **kwargs)
        finally:
            self._suppressed -= 1

    def _function_name(self, name: str) -> str:
        module = self._running[-1].module if self._running else None
        if module is None:
            return name
        place = self.names.get(module, "")
        if type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
            module, nn.MultiheadAttention
        ):
            return place or name
        return f"{place}.{name}" if place else name

    def _refuse_gradients(self, args: tuple[Any, ...]) -> None:
        tensors = [a for a in pytree.tree_leaves(args) if isinstance(a, Tensor)]
        if all(self.entry(tensor) is None for tensor in tensors):
            return
        raise ClosureError(
            f"A backward() or torch.autograd.grad ran in {self.where()}, which differentiates "
            "while the forward is recorded. A closure given to a predictive coding optimizer "
            "returns the loss and does not call .backward(). Lightning's Trainer does that itself: "
            "there configure_optimizers gives a plain optimizer, and "
            "Trainer(strategy=PCStrategy(...)) does the rest. Gradients inside of a training step "
            "(torch.autograd.grad: penalties, adversarial inputs) cannot be taken: make such "
            "inputs before it, e.g. in on_after_batch_transfer."
        )


def _bends(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is nonlinear in an activation; of an autograd.Function's inside any may be."""
    tensor = args[0] if args else kwargs.get("input")
    moves = isinstance(tensor, Tensor) and (tensor.requires_grad or not torch.is_grad_enabled())
    return moves and rectifies(name, args[1:], kwargs)
