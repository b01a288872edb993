"""Weights that processes share out: whole while a batch is inferred, else a shard in each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pc.errors import refuse
from lightning_pc.ranks import Processes

#: A shard's attribute that holds its whole parameter.
WHOLE = "_lightning_pc_whole"


class Shards(Processes):
    """Each parameter of a module in shards; whole while a batch is inferred.

    Args:
        module: Its parameters become shards, which `DTensor` calls ``Shard(0)``. Those of the first
            process count.
        mesh: The processes, one-dimensional.
        device: Of tensors that are exchanged.
    """

    def __init__(self, module: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
        super().__init__(device, lambda: [whole for whole, _, _ in self._all])
        self._mesh = mesh
        undo(module)
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    places.setdefault(parameter, []).append((part, name))
        self._all = [(whole, self._shard(whole), where) for whole, where in places.items()]
        for whole in places:  # whose memory was maybe another's as well
            whole.data = torch.empty_like(whole)
        self.release()
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)

    def _shard(self, whole: nn.Parameter) -> nn.Parameter:
        dealt = distribute_tensor(whole.detach(), self._mesh, [_placement(whole)])
        shard = nn.Parameter(dealt, requires_grad=whole.requires_grad)
        setattr(shard, WHOLE, whole)
        return shard

    def held(self, optimizer: Optimizer) -> Any:
        """What stands for an optimizer of the shards where the whole parameters learn."""
        whole_of = {shard: whole for whole, shard, _ in self._all}
        groups = optimizer.param_groups
        each = [{"params": [whole_of.get(p, p) for p in group["params"]]} for group in groups]
        return SimpleNamespace(param_groups=each)

    def check(self, optimizer: Optimizer) -> None:
        """Refuses an optimizer of parameters that are in no module, and so in no shards.

        Raises:
            ConfigError: Telling how many.
        """
        held = {p for group in optimizer.param_groups for p in group["params"]}
        strange = len(held - {shard for _, shard, _ in self._all})
        told = "weights that were shared out since, or never were the module's"
        refuse(
            {
                f"The optimizer holds {strange} parameters that are in no module ({told}): give it "
                "self.parameters(), asked for in configure_optimizers.": strange
            }
        )

    def gather(self) -> None:
        """All parameters are whole, with what their shards hold now."""
        for whole, shard, _ in self._all:
            whole.untyped_storage().resize_(whole.numel() * whole.element_size())
            whole.requires_grad_(shard.requires_grad)
            _fill(whole, shard)
        self._place(whole=True)

    def release(self) -> None:
        """All are in shards; the whole ones take no memory."""
        self._place(whole=False)
        for whole, _, _ in self._all:
            whole.grad = None
            whole.untyped_storage().resize_(0)

    def _place(self, whole: bool) -> None:
        self._are_whole = whole
        for each, shard, places in self._all:
            for part, name in places:
                part._parameters[name] = each if whole else shard

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All are whole inside; then as they were."""
        before = self._are_whole
        self.gather()
        try:
            yield
        finally:
            if not before:
                self.release()

    @contextmanager
    def dealt(self) -> Iterator[None]:
        """The module has its shards inside, for an optimizer or a checkpoint; then what it had."""
        before = self._are_whole
        self._place(whole=False)
        try:
            yield
        finally:
            self._place(before)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """The optimizer moves the shards inside; afterwards the whole parameters follow."""
        with self.dealt():
            yield
        for whole, shard, _ in self._all:
            shard.grad = None
            _fill(whole, shard)

    @override
    @torch.no_grad()
    def average(self) -> list[nn.Parameter]:
        """Adds the mean of all processes' gradients to the shards' own."""
        somewhere = self._most([float(whole.grad is not None) for whole, _, _ in self._all])
        given = [entry for entry, has in zip(self._all, somewhere, strict=True) if has]
        for whole, shard, _ in given:
            gradient = torch.zeros_like(whole) if whole.grad is None else whole.grad
            parts = DTensor.from_local(gradient / self._count, self._mesh, [Partial()])
            mine = parts.redistribute(placements=[_placement(whole)])
            shard.grad = mine if shard.grad is None else shard.grad + mine
        return [whole for whole, _, _ in given]


def undo(module: nn.Module) -> None:
    """Puts the whole parameters back, where a fit that failed has left shards of ours."""
    for part in module.modules():
        for name, shard in part._parameters.items():
            whole = getattr(shard, WHOLE, None)
            if whole is not None and shard is not None:
                whole.untyped_storage().resize_(whole.numel() * whole.element_size())
                _fill(whole, shard)
                part._parameters[name] = whole


@torch.no_grad()
def _fill(whole: nn.Parameter, shard: nn.Parameter) -> None:
    assert isinstance(shard.data, DTensor)
    now = shard.data.full_tensor()
    if not torch.equal(whole, now):  # writing to it counts as a move
        whole.copy_(now)


def _placement(whole: Tensor) -> Placement:
    return Shard(0) if whole.dim() else Replicate()
