"""The modules of a forward as they run: nonlinearities among them, and outputs with nodes."""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pc.errors import PlacementError, UnsupportedError
from lightning_pc.nodes.energies import Gaussian
from lightning_pc.recording.cuts import Cuts
from lightning_pc.recording.sites import INSIDE, LINEAR
from lightning_pc.recording.task import Kind, Task


class _Running:
    """A module call in progress."""

    start = -1  # index of the tentative site at its input, -1 for none
    mu: Tensor | None = None
    handed: Tensor | None = None
    version = 0
    suppresses = False
    nonlinear = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class Modules(Cuts):
    """Records one forward and cuts it at modules.

    Attributes:
        outputs: Module name and slot of its output, of calls that return one tensor.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.placement, self.learned, self.names = task.placement, task.learned, task.names
        self.outputs: list[tuple[str, int]] = []
        self._running: list[_Running] = []
        self._suppressed = 0
        self._thread = threading.get_ident()

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if threading.get_ident() != self._thread:
            return None
        if module._backward_hooks or module._backward_pre_hooks:
            raise UnsupportedError(
                f"'{self.module_name(module)}' has a backward hook of a module, which belongs to "
                "one backward of the forward: put the hook on its output "
                "(tensor.register_hook in the forward) or on its parameters."
            )
        call = _Running(module)
        self._running.append(call)
        kind = self._kind(module)
        verdict = self.learned.nonlinearity.get(kind)
        if verdict is False:
            return None
        if _is_metric(module):
            call.suppresses = True
            self._suppressed += 1
            return None
        if self._suppressed or not self.placement.nonlinearities or not torch.is_grad_enabled():
            return None
        if verdict is None and not _may_be_nonlinearity(module):
            verdict = self.learned.nonlinearity[kind] = False
        if verdict is False or len(args) != 1 or not is_activation(args[0]):
            return None
        call.start, mu = len(self.sites), args[0]
        copy = verdict is None or kind in self.learned.writes
        with torch._C.DisableTorchFunction():
            writes = kind in self.learned.writes
            x = self.place(kind, partial(self.module_name, module), mu, Gaussian, copy, writes)
        if verdict:
            call.suppresses = True
            self._suppressed += 1
        if x is None:
            call.start = -1
            return None
        call.mu, call.handed, call.version = mu, x, x._version
        return (x,)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != self._thread or not self._running:
            return None
        while True:  # calls that raised have no end of their own
            call = self._running.pop()
            self._suppressed -= call.suppresses
            if call.module is module:
                break
        changed = False
        if call.mu is not None or module in self.placement.outputs:
            with torch._C.DisableTorchFunction():
                output, changed = self._finish(call, output)
        if isinstance(output, Tensor) and module in self.names:
            entry = self._entries.get(id(output))
            if entry is not None and entry.depends:
                self.outputs.append((self.names[module], entry.slot))
        return output if changed else None

    def _finish(self, call: _Running, output: Any) -> tuple[Any, bool]:
        """What a module with a place at its input or output returns, and whether it is new."""
        changed = False
        if call.mu is not None and call.handed is not None:
            same = isinstance(output, Tensor) and output.shape == call.mu.shape
            kind, inside = self._kind(call.module), self.calls[self.sites[call.start].at :]
            weighs = any(slot in self.parameters for call in inside for slot in call.reads)
            bends = same and call.nonlinear and not weighs
            verdict = self.learned.nonlinearity.setdefault(kind, bends)
            self._settle(call.start, verdict)
            if call.handed._version != call.version:  # it wrote to its input: so do we
                self.learned.writes.add(kind)
                self._overwrite(call.mu, call.handed)
                if output is call.handed:
                    output, changed = call.mu, True
        if call.module in self.placement.outputs and torch.is_grad_enabled():
            output, changed = self._output(call.module, output), True
        return output, changed

    def _settle(self, start: int, nonlinearity: bool) -> None:
        """Whether the module at whose input place ``start`` is turned out a nonlinearity."""
        dropped = self.sites[start + 1 :] if nonlinearity else [self.sites[start]]
        for site in dropped:
            site.why, site.reported = INSIDE if nonlinearity else LINEAR, False

    def _kind(self, module: nn.Module) -> Kind:
        return module if module in self.names else type(module)

    def _output(self, module: nn.Module, output: Any) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        floating = [i for i, v in enumerate(leaves) if is_activation(v)]
        if not floating and not self.placement.insists(module):
            return output
        if not floating:
            raise PlacementError(
                f"The output of '{self.module_name(module)}' ({type(output).__name__}) holds no "
                "floating-point tensor, so no value node can stand there: place it at a module "
                "that returns floating-point activations."
            )
        for i in floating:
            base = self.module_name(module)
            name = base if len(floating) == 1 else f"{base}[{floating.index(i)}]"
            x = self.place((module, i), partial(str, name), leaves[i], Gaussian, copy=True)
            if x is not None:
                leaves[i] = x  # a copy: the user may write to it (residual +=)
        return pytree.tree_unflatten(leaves, spec)

    def module_name(self, module: nn.Module) -> str:
        """Dotted name of a module; of one that is not the model's, that of the one around it."""
        if module in self.names:
            return self.names[module] or type(module).__name__
        outer = next((c.module for c in reversed(self._running) if c.module in self.names), None)
        place = "" if outer is None else self.names[outer]
        return f"{place}.{type(module).__name__}" if place else type(module).__name__

    def where(self) -> str:
        """Dotted name of the module that runs."""
        return self.module_name(self._running[-1].module) if self._running else "the closure"


def _is_metric(module: nn.Module) -> bool:
    """Whether it is a metric of torchmetrics, where that is loaded."""
    metrics: Any = sys.modules.get("torchmetrics")
    return metrics is not None and isinstance(module, (metrics.Metric, metrics.MetricCollection))


def is_activation(value: object) -> bool:
    """Whether it is a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


_TRANSPARENT = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _may_be_nonlinearity(module: nn.Module) -> bool:
    """Torch's own modules call the functional on their input, which serves as well."""
    kind = type(module)
    if kind.__module__.startswith("torch.nn.modules.") or isinstance(module, _TRANSPARENT):
        return False
    return next(module.parameters(), None) is None
