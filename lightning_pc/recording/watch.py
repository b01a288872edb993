"""Watches a forward: records its calls, and puts a value where a value node may stand.

`Site` is a place that was met: the input of a nonlinearity, or the output of a module that the user
named. There the recording is cut. What comes in is the prediction; what is handed on is the value,
which starts at the prediction. Whether a node really stands there is known once the forward is over
(`lightning_pc.stages.form`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction
from typing_extensions import override

from lightning_pc.errors import ClosureError, PlacementError, RecordingError, UnsupportedError
from lightning_pc.nodes.energies import Energy, Gaussian, softmax_energy
from lightning_pc.nodes.placement import Placement
from lightning_pc.recording.applied import Applied, active_modes, functions_met
from lightning_pc.recording.calls import Call
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
from lightning_pc.recording.losses import LossCall, is_loss, read_loss_call
from lightning_pc.recording.recorder import Recorder, first
from lightning_pc.recording.sites import (
    FROZEN,
    INSIDE,
    KNOWN_AT_ONCE,
    LINEAR,
    OVERWRITES,
    Expected,
    Site,
    hand,
    leaves_of,
    rounding_of,
    saved_elsewhere,
)
from lightning_pc.recording.traits import Traits

#: A module of the model; of one that the forward makes on the spot, its type.
Kind = nn.Module | type[nn.Module]
_DIFFERENTIATES = frozenset((torch.autograd.grad, torch.autograd.backward, Tensor.backward))


@dataclass
class Learned:
    """What has been learned about modules and functions, kept from batch to batch.

    Attributes:
        nonlinearity: A module without parameters -> whether it is a nonlinearity.
        writes: Nonlinearities that write to their input.
        functions: What is known of torch functions.
    """

    nonlinearity: dict[Kind, bool] = field(default_factory=dict)
    writes: set[Kind] = field(default_factory=set)
    functions: dict[Any, Traits] = field(default_factory=dict)


@dataclass
class _Running:
    """A module call in progress."""

    module: nn.Module
    start: int = -1  # index of the tentative site at its input, -1 for none
    mu: Tensor | None = None
    handed: Tensor | None = None
    version: int = 0
    suppresses: bool = False
    nonlinear: bool = False


class Watch(Recorder):
    """Records one forward and cuts it at sites.

    Args:
        placement: Where nodes are asked for.
        learned: What is known of modules and functions; it is added to.
        softmax: Energy at the logits of a softmax.
        names: Module -> dotted name.
        own: As of `Recorder`.
        forms: What this recording may turn out to be, the likeliest first.
        kept: Sites with values to stand again instead of fresh ones (``reset="never"``).
        early: As of `Recorder`.

    Attributes:
        sites: Every place in call order.
        losses: The calls of loss functions.
        outputs: Module name and slot of its output, of calls that return one tensor.
        form: What it has been so far, None for nothing that was expected.
    """

    def __init__(
        self,
        placement: Placement,
        learned: Learned,
        softmax: str,
        names: Mapping[nn.Module, str],
        own: frozenset[int] = frozenset(),
        forms: Sequence[Expected] = (),
        kept: list[Site] | None = None,
        early: Callable[[Tensor], str] = lambda tensor: "",
    ) -> None:
        super().__init__(learned.functions, own, early)
        self.placement, self.learned, self.softmax = placement, learned, softmax
        self.names, self.kept = names, kept
        self.sites: list[Site] = []
        self.losses: list[LossCall] = []
        self.outputs: list[tuple[str, int]] = []
        self._forms, self._checked = forms, 0
        self.form: Expected | None = next(iter(forms), None)
        self._running: list[_Running] = []
        self._suppressed = 0
        self._inside = 0  # of a call that is recorded as one
        self._thread = threading.get_ident()

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
            if "torch._dynamo" in sys.modules:  # compiled functions run as they are written
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            with self:
                yield

    def _apply(self, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A Function of the user's, whose own backward it keeps, is one call."""
        mine = threading.get_ident() == self._thread and not self._inside
        if not mine or self not in active_modes():
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
        traits = self.known.get(func)
        if traits is not None and traits.passive:
            return func(*args, **kwargs)
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
        if is_loss(func):
            loss = read_loss_call(func, args, kwargs, output)
            entry = None if loss is None else self.entry(loss.output)
            if loss is not None and entry is not None:
                loss.slot = entry.slot
                self.losses.append(loss)
        return output

    # Sites

    def place(
        self,
        key: object,
        name: Callable[[], str],
        mu: Tensor,
        energy: Callable[[], Energy],
        copy: bool = False,
        overwritten: bool = False,
    ) -> Tensor | None:
        """What stands at a place instead of ``mu``, None where no node can.

        Args:
            key: Tells the kind of place.
            name: Gives the place's dotted name.
            mu: The prediction, [B, *].
            energy: Makes the node's energy.
            copy: The module may write to what it is handed.
            overwritten: The prediction is about to be overwritten.
        """
        entry = self.entry(mu) if mu.requires_grad else None
        index = len(self.sites)
        self.keys.append((key, entry is None))
        form = self._expected()
        site = Site(key, name(), tuple(mu.shape), at=len(self.calls), overwritten=overwritten)
        self.sites.append(site)
        if entry is None:
            site.why = FROZEN
            return None
        call = self._append(Call(first, (mu,), {}, (entry.slot,)))
        site.mu, site.slot = entry.slot, self._new_slot()
        call.fills = (site.slot,)
        # Whether the loss reads a place is known at the end alone, whatever it was the last time.
        expected = "" if form is None else form.why[index]
        site.why = expected if expected in KNOWN_AT_ONCE else ""
        if self.kept is not None:
            self._stand_again(site, index, mu)
        if site.why:
            handed = mu.view_as(mu)
            self._know(handed, site.slot)
        else:
            if site.node is None:
                site.lent = form is not None and form.lends[index] and _is_whole(mu)
                dtype = torch.promote_types(mu.dtype, torch.float32)
                value = mu.data if site.lent else mu.detach().to(dtype, copy=True)
                site.value, site.energy = value.requires_grad_(), energy()
            assert site.value is not None
            site.cut, site.rounding = True, rounding_of(mu)
            site.first, site.version = mu.detach(), mu._version
            if form is None:
                site.leaves = leaves_of(mu)
            elif form.keeps[index] and not saved_elsewhere():
                site.edge = get_gradient_edge(mu)
                if overwritten:
                    site.first = site.first.clone()
                    site.version = site.first._version
            self._know(site.value, site.slot)
            handed = site.value
            if copy or site.value.dtype != mu.dtype:
                handed = hand(site.value, mu.dtype, copy)
                self._insert(handed, Call(hand, (site.value, mu.dtype, copy), {}, (site.slot,)))
        return handed

    def _stand_again(self, site: Site, index: int, mu: Tensor) -> None:
        """The node of an earlier call stands there again (``reset="never"``).

        Raises:
            RecordingError: There was another place.
        """
        assert self.kept is not None
        if index >= len(self.kept) or self.kept[index].key != site.key:
            raise RecordingError(
                f"reset='never' keeps the values of the first call, but '{site.name}' was not met "
                "there: the module takes another path now. Use reset='batch'."
            )
        before = self.kept[index]
        site.why, site.node = before.why, before.node
        if site.node is None:
            return
        if site.node.x.shape != mu.shape:
            raise RecordingError(
                f"reset='never' keeps values of shape {before.shape} at '{site.name}', but this "
                f"batch has {site.shape}: give the same full batch each time or use reset='batch'."
            )
        site.value, site.energy = site.node.stand(mu), site.node.energy

    def skip(self, key: object, name: Callable[[], str]) -> None:
        """Takes in a place at which no node can stand, known before its prediction was computed."""
        self.sites.append(Site(key, name(), (), FROZEN, at=len(self.calls)))
        self.keys.append((key, None))

    def _expected(self) -> Expected | None:
        """The form that the recording has had so far, if it is one that was expected."""
        done = len(self.keys)
        if self.form is not None and (
            self.keys[self._checked : done] != self.form.keys[self._checked : done]
        ):
            self.form = next((f for f in self._forms if f.keys[:done] == self.keys), None)
        self._checked = done
        return self.form

    def number_calls(self) -> None:
        """Tells the calls of one place apart: the second is ``name#2``."""
        used: dict[str, int] = {}
        for site in self.sites:
            if not site.reported:
                continue
            times = used[site.name] = used.get(site.name, 0) + 1
            if times > 1:
                site.name = f"{site.name}#{times}"

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
            lambda: Gaussian() if dim is None else softmax_energy(self.softmax, dim),
            overwritten=in_place,
        )
        if x is None:
            if in_place and plain is func:
                kwargs["inplace"] = True
            return self.record(func, (mu, *rest), kwargs)
        output = self.record(plain, (x, *rest), kwargs)
        return self._overwrite(mu, output) if in_place else output

    def _overwrite(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Writes ``value`` to all of ``tensor``, as an in-place activation does."""
        self.record(Tensor.copy_, (tensor, value), {})
        entry, base = self.entry(value), tensor._base
        if entry is not None and (base is None or base.numel() == tensor.numel()):
            self._know(tensor, entry.slot)  # it owes nothing to what it held
            if base is not None and base.grad_fn is not None:
                metadata: Any = base.grad_fn.metadata
                metadata[OVERWRITES] = True  # a view, but of everything
        return tensor

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = partial(self._function_name, "softmax")

        def logits_node(mu: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():
                x = self.place("softmax", name, mu, lambda: softmax_energy(self.softmax, -1))
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
            f"'{self.where()}' differentiates while its forward is recorded. A closure given to a "
            "predictive coding optimizer returns the loss and does not call .backward(). Under "
            "Lightning's Trainer, configure_optimizers gives a plain optimizer and "
            "Trainer(strategy=PCStrategy(...)) does the rest. Gradients inside of a training step "
            "(torch.autograd.grad: penalties, adversarial inputs) cannot be taken: make such "
            "inputs before it, e.g. in on_after_batch_transfer."
        )

    # Modules

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
        if _is_metric(module):
            call.suppresses = True
            self._suppressed += 1
            return None
        if self._suppressed or not self.placement.nonlinearities or not torch.is_grad_enabled():
            return None
        kind = self._kind(module)
        verdict = self.learned.nonlinearity.get(kind)
        if verdict is None and not _may_be_nonlinearity(module):
            verdict = self.learned.nonlinearity[kind] = False
        if verdict is False or len(args) != 1 or not _is_activation(args[0]):
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
        with torch._C.DisableTorchFunction():
            if call.mu is not None and call.handed is not None:
                same = isinstance(output, Tensor) and output.shape == call.mu.shape
                kind = self._kind(module)
                verdict = self.learned.nonlinearity.setdefault(kind, same and call.nonlinear)
                self._settle(call.start, verdict)
                if call.handed._version != call.version:  # it wrote to its input: so do we
                    self.learned.writes.add(kind)
                    self._overwrite(call.mu, call.handed)
                    if output is call.handed:
                        output, changed = call.mu, True
            if module in self.placement.outputs and torch.is_grad_enabled():
                output, changed = self._output(module, output), True
            if isinstance(output, Tensor) and module in self.names:
                entry = self._entries.get(id(output))
                if entry is not None and entry.depends:
                    self.outputs.append((self.names[module], entry.slot))
        return output if changed else None

    def _settle(self, start: int, nonlinearity: bool) -> None:
        """Whether the module at whose input place ``start`` is turned out a nonlinearity."""
        dropped = self.sites[start + 1 :] if nonlinearity else [self.sites[start]]
        for site in dropped:
            site.why, site.reported = INSIDE if nonlinearity else LINEAR, False

    def _kind(self, module: nn.Module) -> Kind:
        return module if module in self.names else type(module)

    def _output(self, module: nn.Module, output: Any) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        floating = [i for i, v in enumerate(leaves) if _is_activation(v)]
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

    @override
    def where(self) -> str:
        return self.module_name(self._running[-1].module) if self._running else "the closure"


def _is_metric(module: nn.Module) -> bool:
    """Whether it is a metric of torchmetrics, where that is loaded."""
    metrics: Any = sys.modules.get("torchmetrics")
    return metrics is not None and isinstance(module, (metrics.Metric, metrics.MetricCollection))


def _is_whole(tensor: Tensor) -> bool:
    """Whether it has its memory to itself and is wide enough for a value."""
    size = tensor.element_size()
    return size >= 4 and tensor.untyped_storage().nbytes() == tensor.numel() * size


def _is_activation(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _bends(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is nonlinear in an activation; of an autograd.Function's inside any may be."""
    tensor = args[0] if args else kwargs.get("input")
    moves = isinstance(tensor, Tensor) and (tensor.requires_grad or not torch.is_grad_enabled())
    return moves and rectifies(name, args[1:], kwargs)


_TRANSPARENT = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _may_be_nonlinearity(module: nn.Module) -> bool:
    """Torch's own modules call the functional on their input, which serves as well."""
    kind = type(module)
    if kind.__module__.startswith("torch.nn.modules.") or isinstance(module, _TRANSPARENT):
        return False
    return next(module.parameters(), None) is None
