"""The two kinds of forward: `Discovery`, the first of a batch, and `Replay`, every later one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_pc.energies import Energy
from lightning_pc.errors import ReplayError, UnsupportedError
from lightning_pc.losses import LossCall, read_loss_call
from lightning_pc.nodes import FROZEN, Gate, Node, Site, stand
from lightning_pc.placement import Placement
from lightning_pc.watch import Verdicts, Watch


class Origin(Enum):
    """What a tensor was computed from."""

    WEIGHT = "parameters alone"
    CONSTANT = "buffers and constants"
    MIXED = "parameters, buffers and constants: a masked or noisy weight"
    DATA = "the batch"


class Discovery(Watch):
    """The first forward of a batch: every place is met, values start at their predictions.

    Args:
        names: Module -> dotted name.
        kind: What stands there.
        kept: Values to stand again instead of fresh ones (``reset="never"``), in call order.
        scale: For kept values, the factor from an energy's gradient to the parameters'.

    Attributes:
        sites: Every place in call order.
        losses: The calls of loss functions.
        weighted: Autograd functions that mix a weight, trainable or frozen, into an activation.
        dataless: Autograd functions of parameters, buffers and constants alone.
        begun: Number of this thread's next autograd function when the forward began.
    """

    def __init__(
        self,
        placement: Placement,
        verdicts: Verdicts,
        gate: Gate,
        softmax: str,
        names: Mapping[nn.Module, str],
        kind: type[Node] = Node,
        kept: list[Site] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(placement, verdicts, gate, softmax, names)
        self.kind, self.kept, self.scale = kind, kept, scale
        self.sites: list[Site] = []
        self.losses: list[LossCall] = []
        self.weighted: set[object] = set()
        self.dataless: set[object] = set()
        self.begun: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        buffers = [b for module in names for b in module._buffers.values() if b is not None]
        self._origins = {id(b): (b, Origin.CONSTANT) for b in buffers}  # of the rest: data

    @override
    def place(
        self, key: object, name: Callable[[], str], mu: Tensor, energy: Callable[[], Energy]
    ) -> Tensor | None:
        site = Site(key, name(), tuple(mu.shape))
        index = len(self.sites)
        self.sites.append(site)
        if not mu.requires_grad:
            site.why = FROZEN
            return None
        if self._origin(mu) is Origin.WEIGHT:
            site.why = "computed from parameters alone"
            return None
        self._refuse_checkpointing(site)
        if self.kept is not None:
            site.node = _kept_node(self.kept, index, site)
            if site.node is None:
                return None
            site.node.evaluate(mu, self.scale)
        else:
            dtype = torch.promote_types(mu.dtype, torch.float32)
            value = mu.detach().to(dtype, copy=True).requires_grad_()
            site.node = self.kind(site.name, value, energy(), rounding=_rounding(mu))
        return stand(mu, site.node, self.gate)

    @override
    def skip(self, key: object, name: Callable[[], str]) -> None:
        self.sites.append(Site(key, name(), (), None, FROZEN, skipped=True))

    @override
    def count(self) -> int:
        return len(self.sites)

    @override
    def settle(self, start: int, nonlinearity: bool) -> None:
        dropped = self.sites[start + 1 :] if nonlinearity else [self.sites[start]]
        for site in dropped:
            if site.node is not None:
                site.node.passes = "part of another place"
        if nonlinearity:
            del self.sites[start + 1 :]
        else:
            del self.sites[start]

    @override
    def module_name(self, module: nn.Module) -> str:
        if module in self.names:
            return self.names[module] or type(module).__name__
        outer = next((c.module for c in reversed(self._calls) if c.module in self.names), None)
        place = "" if outer is None else self.names[outer]
        return f"{place}.{type(module).__name__}" if place else type(module).__name__

    @override
    def _function_name(self, name: str) -> str:
        module = self._calls[-1].module if self._calls else None
        if module is None:
            return name
        place = self.names.get(module, "")
        if type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
            module, nn.MultiheadAttention
        ):
            return place or name
        return f"{place}.{name}" if place else name

    def number_calls(self) -> None:
        """Tells the calls of one place apart: the second is ``name#2``."""
        used: dict[str, int] = {}
        for site in self.sites:
            times = used[site.name] = used.get(site.name, 0) + 1
            if times > 1:
                site.name = f"{site.name}#{times}"
            if site.node is not None:
                site.node.name = site.name

    @override
    def saw(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        loss = read_loss_call(func, args, kwargs, output)
        if loss is not None:
            self.losses.append(loss)
        operands = [
            tensor
            for value in (*args, *kwargs.values())
            for tensor in (value if isinstance(value, (tuple, list)) else (value,))
            if isinstance(tensor, Tensor)
        ]
        origins = {self._origin(tensor) for tensor in operands}
        mixes = len(operands) > 1 and not origins.isdisjoint({Origin.WEIGHT, Origin.MIXED})
        if Origin.DATA in origins:
            origin = Origin.DATA
        elif len(origins) > 1:
            origin = Origin.MIXED
        else:
            origin = next(iter(origins), Origin.CONSTANT)
        written = args[0] if getattr(func, "__name__", "") == "__setitem__" else output
        for tensor in written if isinstance(written, (tuple, list)) else (written,):
            if not isinstance(tensor, Tensor):
                continue
            if origin is Origin.DATA:
                self._origins.pop(id(tensor), None)
            else:
                self._origins[id(tensor)] = (tensor, origin)
            if mixes and tensor.grad_fn is not None:
                self.weighted.add(tensor.grad_fn)
            if origin is not Origin.DATA and tensor.grad_fn is not None:
                self.dataless.add(tensor.grad_fn)

    def _origin(self, tensor: Tensor) -> Origin:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return Origin.WEIGHT
        return self._origins.get(id(tensor), (tensor, Origin.DATA))[1]

    def _refuse_checkpointing(self, site: Site) -> None:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", ""):
            raise UnsupportedError(
                f"Value node '{site.name}' stands inside a gradient checkpoint, which would run "
                "its forward once more without the node: switch gradient checkpointing off, or "
                "place nodes outside of the checkpointed modules (value_nodes=...)."
            )


def _rounding(mu: Tensor) -> float:
    """Relative, of what computes ``mu``: its own dtype, or a shorter one behind it."""
    kinds, device = [torch.finfo(mu.dtype).eps], mu.device.type
    if torch.is_autocast_enabled(device):
        kinds.append(torch.finfo(torch.get_autocast_dtype(device)).eps)
    backends = torch.backends
    if device == "cuda" and (backends.cuda.matmul.allow_tf32 or backends.cudnn.allow_tf32):
        kinds.append(2.0**-10)
    return max(kinds)


def _kept_node(kept: list[Site], index: int, site: Site) -> Node | None:
    if index >= len(kept) or kept[index].key != site.key:
        raise ReplayError(
            f"reset='never' keeps the values of the first call, but '{site.name}' was not met "
            "there: the module takes another path now. Use reset='batch'."
        )
    node = kept[index].node
    if node is not None and node.x.shape != site.shape:
        raise ReplayError(
            f"reset='never' keeps values of shape {tuple(node.x.shape)} at '{site.name}', but "
            f"this batch has {site.shape}: give the same full batch each time or use reset='batch'."
        )
    return node


class Replay(Watch):
    """A later forward of a batch: the same values at the same places.

    Args:
        sites: The places of the `Discovery`.
        t: Inference step; nodes that arrive later still equal their predictions.
        scale: Factor from an energy's gradient to the parameters'.
    """

    def __init__(
        self,
        placement: Placement,
        verdicts: Verdicts,
        gate: Gate,
        softmax: str,
        names: Mapping[nn.Module, str],
        sites: list[Site],
        t: int,
        scale: float,
    ) -> None:
        hooked = any(not isinstance(site.key, str) for site in sites)
        super().__init__(placement, verdicts, gate, softmax, names, needs_hooks=hooked)
        self.sites, self.t, self.scale = sites, t, scale
        self.index = 0

    @override
    def place(
        self, key: object, name: Callable[[], str], mu: Tensor, energy: Callable[[], Energy]
    ) -> Tensor | None:
        site = self._next(key)
        node = site.node
        if node is None:
            return None
        if mu.shape != node.x.shape:
            raise self._moved(site, f"has shape {tuple(mu.shape)} now and {site.shape} at t = 0")
        if node.arrival <= self.t:
            node.evaluate(mu, self.scale)
        return stand(mu, node, self.gate)

    @override
    def skip(self, key: object, name: Callable[[], str]) -> None:
        self._next(key)

    @override
    def skips_next(self) -> bool:
        return self.index < len(self.sites) and self.sites[self.index].skipped

    @override
    def count(self) -> int:
        return self.index

    @override
    def module_name(self, module: nn.Module) -> str:
        return self.names.get(module) or type(module).__name__

    @override
    def _function_name(self, name: str) -> str:
        return name

    def finished(self) -> None:
        """Every place must have been met again."""
        if self.index < len(self.sites):
            raise self._moved(self.sites[self.index], "was not reached again")

    def _next(self, key: object) -> Site:
        if self.index >= len(self.sites):
            raise self._moved(None, f"a place of kind {key!r} appeared")
        site = self.sites[self.index]
        if site.key != key:
            raise self._moved(site, f"was expected, a place of kind {key!r} came")
        self.index += 1
        return site

    def _moved(self, site: Site | None, what: str) -> ReplayError:
        where = "" if site is None else f"Value node '{site.name}' "
        outside = "" if site is None else self._outside(site.name)
        return ReplayError(
            f"{where}{what} (inference step t = {self.t}): the module's control flow or its "
            "indexing depends on the values (routing, boolean masks, counters that training_step "
            "cannot undo). Place nodes outside of it, "
            f"e.g. value_nodes=['{outside or 'a.module.outside'}'] for the output of that module."
        )

    def _outside(self, name: str) -> str:
        """The module around a place; where that is one of a list (of experts), the list's owner."""
        around = [name[:i] for i, letter in enumerate(name) if letter == "."]
        modules = {n: module for module, n in self.names.items()}
        lists = (nn.ModuleList, nn.ModuleDict)
        owners = [a.rpartition(".")[0] for a in around if isinstance(modules.get(a), lists)]
        return (owners or around or [""])[-1]
