"""Sites of a forward: where its recording is cut, and what is handed on there.

`Site` is a place that was met: the input of a nonlinearity, or the output of a module that the user
named. What comes in is the prediction; what is handed on is the value, which starts at the
prediction. Whether a node really stands there is known once the forward is over
(`lightning_pc.stages.analysis`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_pc.errors import FLOAT16, RecordingError, UnsupportedError
from lightning_pc.nodes.energies import Energy, Free, Gaussian
from lightning_pc.nodes.latent import Stand
from lightning_pc.nodes.node import Node
from lightning_pc.recording.applied import Applied
from lightning_pc.recording.calls import Call, Ref
from lightning_pc.recording.recorder import Recorder
from lightning_pc.recording.sites import (
    FROZEN,
    KNOWN_AT_ONCE,
    OVERWRITES,
    Expected,
    Passage,
    Site,
    hand,
    leaves_of,
    rounding_of,
)
from lightning_pc.recording.slots import first
from lightning_pc.recording.task import Task


class Cuts(Recorder):
    """Records one forward and cuts it at sites.

    Attributes:
        sites: Every place in call order.
        form: What it has been so far, None for nothing that was expected.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.sites: list[Site] = []
        self._checked = 0
        self.form: Expected | None = next(iter(task.forms), None)

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
        site = Site(key, name(), tuple(mu.shape), at=len(self.calls))
        self.sites.append(site)
        if entry is None:
            site.why = FROZEN
            return None
        if mu.dtype is torch.float16 and not self.task.half:
            raise UnsupportedError(FLOAT16.format(f"'{site.name}'"))
        call = self._append(Call(first, (Ref(0),), {}, (entry.slot,)))
        site.mu, site.slot = entry.slot, self._new_slot()
        call.fills = (site.slot,)
        # Whether the loss reads a place is known at the end alone, whatever it was the last time.
        expected = "" if form is None else form.why[index]
        site.why = expected if expected in KNOWN_AT_ONCE else ""
        if self.task.kept is not None:
            self._stand_again(site, index, mu)
        if site.why:
            handed = mu.view_as(mu)
            self._know(handed, site.slot)
        else:
            if site.node is None:
                dtype = torch.promote_types(mu.dtype, torch.float32)
                value = mu.detach().to(dtype, copy=True).requires_grad_()
                site.node = Node(site.name, value, energy())
            site.node.rounding = rounding_of(mu)
            if form is None:
                site.leaves = leaves_of(mu)
            elif form.keeps[index] and not self.elsewhere:
                prediction = mu.detach()
                site.edge = get_gradient_edge(mu)
                site.first = prediction.clone() if overwritten else prediction
                site.version = site.first._version
            handed = site.node.x
            if self.task.through and site.edge is not None:
                handed = Applied.of(Passage)(handed, mu, site.node)
            self._know(handed, site.slot)
            if copy or handed.dtype != mu.dtype:
                handed = hand(handed, mu.dtype, copy)
                self._insert(handed, hand, site.slot, further=(mu.dtype, copy))
        return handed

    def latent(self, name: str, stand: Stand) -> Tensor:
        """What stands for a latent variable: a value that starts there."""
        if not torch.is_grad_enabled():
            raise RecordingError(
                f"'{name}' is a Latent that is called within torch.no_grad(), where the loss does "
                "not pull at it: call it with gradients on."
            )
        of, start = stand.of, stand.start
        if of not in self.task.names:
            raise RecordingError("A Latent is called that is no part of the model: make it one.")
        if start.dtype is torch.float16 and not self.task.half:
            raise UnsupportedError(FLOAT16.format(f"'{name}'"))
        self.keys.append((of, of.prior, of.at_mean))
        self._expected()
        site = Site(of, name, tuple(start.shape), at=len(self.calls), stand=stand)
        self.sites.append(site)
        mean = torch.zeros_like(start)
        site.mu = self._constant(mean, None)
        site.slot = self._new_slot()
        self._append(Call(first, (Ref(0),), {}, (site.mu,))).fills = (site.slot,)
        if self.task.kept is not None:
            self._stand_again(site, len(self.sites) - 1, mean)
        if site.node is None:
            dtype = torch.promote_types(start.dtype, torch.float32)
            value = start.detach().to(dtype, copy=True).requires_grad_()
            site.node = Node(name, value, Gaussian() if of.prior else Free())
            site.node.rounding = rounding_of(mean)
        self._know(site.node.x, site.slot)
        handed = hand(site.node.x, start.dtype, True)  # the module may write to it
        self._insert(handed, hand, site.slot, further=(start.dtype, True))
        return handed

    def _stand_again(self, site: Site, index: int, mu: Tensor) -> None:
        """The node of an earlier call stands there again (``reset="never"``).

        Raises:
            RecordingError: There was another place.
        """
        assert self.task.kept is not None
        if index >= len(self.task.kept) or self.task.kept[index].key != site.key:
            raise RecordingError(
                f"reset='never' keeps the values of the first call, but '{site.name}' was not met "
                "there: the module takes another path now. Use reset='batch'."
            )
        before = self.task.kept[index]
        site.why = before.why
        if before.why or before.node is None:
            return
        if before.node.x.shape != mu.shape:
            raise RecordingError(
                f"reset='never' keeps values of shape {before.shape} at '{site.name}', but this "
                f"batch has {site.shape}: give the same full batch each time or use reset='batch'."
            )
        if site.stand and before.stand and not _same(site.stand.numbers, before.stand.numbers):
            raise RecordingError(
                f"reset='never' keeps the values of the first call's samples at '{site.name}', but "
                "this batch has others: give the same full batch each time or use reset='batch'."
            )
        site.node = before.node
        site.node.stand(mu)

    def _overwrite(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Writes ``value`` to all of ``tensor``, as an in-place activation does."""
        entry, base = self.entry(value), tensor._base
        if entry is not None and base is None and value.requires_grad:
            # Or a gradient of zero would go on to what it held, through the graphs of other pieces.
            tensor.detach_()
        self.record(Tensor.copy_, (tensor, value), {})
        if entry is not None and (base is None or base.numel() == tensor.numel()):
            self._know(tensor, entry.slot)  # it owes nothing to what it held
            if base is not None and base.grad_fn is not None:
                metadata: Any = base.grad_fn.metadata
                metadata[OVERWRITES] = True  # a view, but of everything
        return tensor

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
            self.form = next((f for f in self.task.forms if f.keys[:done] == self.keys), None)
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


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
