"""Watching a forward: sees its nonlinearities and module calls, and puts stands there.

`Watch` is what the first forward of a batch and its replays share; which value stands at a place
is theirs to say (`lightning_pc.forwards`).
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torchmetrics import Metric, MetricCollection

from lightning_pc.energies import Energy, Gaussian, softmax_energy
from lightning_pc.errors import PlacementError
from lightning_pc.functions import (
    COMPOSITES,
    L1_LOSS,
    NONLINEAR,
    NONLINEARITIES,
    SDPA,
    attention,
    out_of_place,
    rectifies,
    softmax_dim,
    whole_call,
)
from lightning_pc.nodes import Gate, overwrite
from lightning_pc.placement import Placement

#: A module of the model; of one that the forward makes on the spot, its type.
Kind = nn.Module | type[nn.Module]


@dataclass
class Verdicts:
    """What has been learned about modules, kept from batch to batch.

    Attributes:
        nonlinearity: A module without parameters -> whether it is a nonlinearity.
        writes: Nonlinearities that write to their input.
    """

    nonlinearity: dict[Kind, bool] = field(default_factory=dict)
    writes: set[Kind] = field(default_factory=set)


@dataclass
class _Call:
    """A module call in progress."""

    module: nn.Module
    start: int = -1  # index of the tentative site at its input, -1 for none
    mu: Tensor | None = None
    handed: Tensor | None = None
    version: int = 0
    suppresses: bool = False
    nonlinear: bool = False


class Watch(TorchFunctionMode):
    """Sees the torch calls and module calls of one forward, and puts stands where nodes stand."""

    def __init__(
        self,
        placement: Placement,
        verdicts: Verdicts,
        gate: Gate,
        softmax: str,
        names: Mapping[nn.Module, str],
        needs_hooks: bool = True,
    ) -> None:
        super().__init__()
        self.placement, self.verdicts, self.gate, self.softmax = placement, verdicts, gate, softmax
        self.names = names
        self._calls: list[_Call] = []
        self._suppressed = 0
        self._thread = threading.get_ident()
        self._needs_hooks = needs_hooks

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Active inside; the two hooks are torch's global ones, so no module is touched."""
        handles = []
        if self._needs_hooks:
            hooks = nn.modules.module
            handles.append(hooks.register_module_forward_pre_hook(self._before))
            handles.append(hooks.register_module_forward_hook(self._after))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._calls.clear()

    @abstractmethod
    def place(
        self, key: object, name: Callable[[], str], mu: Tensor, energy: Callable[[], Energy]
    ) -> Tensor | None:
        """What stands at a place instead of ``mu``, None where no node does.

        Args:
            key: Tells the kind of place: a function's name, a module, or (module, output).
            name: Gives the place's dotted name.
            mu: The prediction, [B, *].
            energy: Makes the node's energy.
        """

    @abstractmethod
    def skip(self, key: object, name: Callable[[], str]) -> None:
        """Takes in a place at which no node can stand."""

    @abstractmethod
    def count(self) -> int:
        """How many places have been met."""

    @abstractmethod
    def module_name(self, module: nn.Module) -> str:
        """Dotted name of a module."""

    def saw(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Called after every torch call that made no node."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is L1_LOSS:
            kwargs = whole_call(kwargs)
        if self._calls and func in NONLINEAR and _bends(NONLINEAR[func], args, kwargs):
            for call in self._calls:
                call.nonlinear = True
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
        output = func(*args, **kwargs)
        self.saw(func, args, kwargs, output)
        return output

    def _nonlinearity(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        mu = args[0] if args else kwargs.pop("input", None)
        rest = args[1:]
        x = None
        if isinstance(mu, Tensor) and mu.is_floating_point() and rectifies(name, rest, kwargs):
            dim = softmax_dim(name, mu, args, kwargs)
            x = self.place(
                name,
                lambda: self._function_name(name),
                mu,
                lambda: Gaussian() if dim is None else softmax_energy(self.softmax, dim),
            )
        if x is None:
            output = func(mu, *rest, **kwargs)
            self.saw(func, (mu, *rest), kwargs, output)
            return output
        func, in_place = out_of_place(func, kwargs)
        output = func(x, *rest, **kwargs)
        self.saw(func, (x, *rest), kwargs, output)
        return overwrite(mu, output) if in_place and isinstance(mu, Tensor) else output

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def name() -> str:
            return self._function_name("softmax")

        def logits_node(mu: Tensor) -> Tensor:
            x = self.place("softmax", name, mu, lambda: softmax_energy(self.softmax, -1))
            return mu if x is None else x

        inputs = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False), **kwargs)
        movable = any(inputs[k].requires_grad for k in ("query", "key"))
        if movable and not self.skips_next():
            output = attention(logits_node, *args, **kwargs)
        else:  # no node can stand at these logits: torch's fused kernel does the work
            self.skip("softmax", name)
            output = SDPA(*args, **kwargs)
        self.saw(SDPA, args, kwargs, output)
        return output

    def skips_next(self) -> bool:
        """Whether the next place was skipped in the first forward."""
        return False

    @abstractmethod
    def _function_name(self, name: str) -> str: ...

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if threading.get_ident() != self._thread:
            return None
        call = _Call(module)
        self._calls.append(call)
        if isinstance(module, (Metric, MetricCollection)):  # replays do not run it
            call.suppresses = True
            self._suppressed += 1
            return None
        if self._suppressed or not self.placement.nonlinearities or not torch.is_grad_enabled():
            return None
        if not _may_be_nonlinearity(module, args):
            return None
        kind = self._kind(module)
        verdict = self.verdicts.nonlinearity.get(kind)
        if verdict is False:
            return None
        call.start = self.count()
        mu = args[0]
        with torch._C.DisableTorchFunction():
            x = self.place(kind, lambda: self.module_name(module), mu, Gaussian)
            if x is None:
                call.start = -1
                if verdict:
                    call.suppresses = True
                    self._suppressed += 1
                return None
            if verdict is None or kind in self.verdicts.writes:
                x = x.clone()
        call.mu, call.handed, call.version = mu, x, x._version
        if verdict:
            call.suppresses = True
            self._suppressed += 1
        return (x,)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != self._thread or not self._calls:
            return None
        while True:  # calls that raised have no end of their own
            call = self._calls.pop()
            self._suppressed -= call.suppresses
            if call.module is module:
                break
        changed = False
        if call.mu is not None and call.handed is not None:
            same = isinstance(output, Tensor) and output.shape == call.mu.shape
            kind = self._kind(module)
            verdict = self.verdicts.nonlinearity.setdefault(kind, same and call.nonlinear)
            self.settle(call.start, verdict)
            if call.handed._version != call.version:  # it wrote to its input: so do we
                self.verdicts.writes.add(kind)
                with torch._C.DisableTorchFunction():
                    overwrite(call.mu, call.handed)
                if output is call.handed:
                    output, changed = call.mu, True
        if module in self.placement.outputs and torch.is_grad_enabled():
            return self._output(module, output)
        return output if changed else None

    def _kind(self, module: nn.Module) -> Kind:
        return module if module in self.names else type(module)

    def settle(self, start: int, nonlinearity: bool) -> None:
        """Whether the module at whose input place ``start`` is turned out a nonlinearity."""

    def _output(self, module: nn.Module, output: Any) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        floating = [i for i, v in enumerate(leaves) if _is_activation(v)]
        if not floating and not self.placement.insists(module):
            return None
        if not floating:
            raise PlacementError(
                f"The output of '{self.module_name(module)}' ({type(output).__name__}) holds no "
                "floating-point tensor, so no value node can stand there: place it at a module "
                "that returns floating-point activations."
            )
        for i in floating:

            def name(i: int = i) -> str:
                base = self.module_name(module)
                return base if len(floating) == 1 else f"{base}[{floating.index(i)}]"

            with torch._C.DisableTorchFunction():
                x = self.place((module, i), name, leaves[i], Gaussian)
                if x is not None:
                    leaves[i] = x.clone()  # the user may write to it (residual +=)
        return pytree.tree_unflatten(leaves, spec)


def _is_activation(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _bends(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is nonlinear in an activation; of an autograd.Function's inside any may be."""
    tensor = args[0] if args else kwargs.get("input")
    moves = isinstance(tensor, Tensor) and (tensor.requires_grad or not torch.is_grad_enabled())
    return moves and rectifies(name, args[1:], kwargs)


_TRANSPARENT = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _may_be_nonlinearity(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Torch's own modules call the functional on their input, which serves as well."""
    if len(args) != 1 or not _is_activation(args[0]) or isinstance(module, _TRANSPARENT):
        return False
    if type(module).__module__.startswith("torch.nn.modules."):
        return False
    return next(module.parameters(), None) is None
