"""Values that go along with predictions that weights have moved.

In iPC weights learn at every step and values stay. A step of the weights that moves a prediction
farther than the error it learns from leaves an error of its own, which the next step takes back:
the weights learn little else. So it goes with Adam, whose steps are as long where inputs are large
or errors small. There a value goes along.

And where connections skip all stages, so that the loss reads every node (`Graph.skips`), values go
along with every move. There the weights of each stage move the predictions of all nodes below,
whose values, if they stayed, would hold all of them back: the more the deeper the network is. No
error needs a value that stays to find its way up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pc.nodes.energies import Energy, Gaussian

#: Share of F at the start of a batch by which a move of its prediction may raise a node's energy.
#: On digits and MNIST few exceed it, where inputs are 30 times as large nearly all do. A smaller
#: share does as well there, but errors fade in deep plain networks where values go along that need
#: not: with 16 ReLU layers iPC comes to 55 % with 0.03, to 39 % with 0 (by hand, see RESULTS.md).
TOO_FAR = 0.03
#: Square of a move's length against that of the value, above which the value stays. Where weights
#: are large, values that go along pass a move on, larger at each stage: staying is what keeps F
#: from growing without end.
RUNAWAY = 0.1
#: Most axes of a value that may go along: predictions of images would take too much memory to keep.
AXES = 3


@dataclass(eq=False)
class Following:
    """Takes a node's value along with its prediction, where that has gone too far or always.

    The prediction's move counts whole, whether weights made it or the values above. Of a Gaussian
    node's the value does not follow what brings a row of the prediction (along the last axis)
    nearer, up to all of the error: if it followed what weights have just learned, they would learn
    it again. An error that goes along is left to inference, which takes 1 / gamma steps. In a chain
    of stages, where these are many, it is values that stay which keep weights from running on, so
    that the share falls with gamma.

    Attributes:
        bears: By how much a move of the prediction may raise the node's energy, [].
        share: Of a move that it goes along with, what the value follows, in [0, 1].
        mu: The prediction as of the last evaluation, [B, *]; None where there was none.
        always: It goes along whatever a move does to the energy.
        waits: Numbers are looked at, which on a device would wait for it.
        times: Evaluations at which it went along, an int or [] on the device.
    """

    bears: Tensor
    share: float
    mu: Tensor | None = None
    always: bool = False
    waits: bool = True
    times: Tensor | int = 0
    # That prediction as the module has it, its version then, and whether the module writes to it.
    _source: Tensor | None = None
    _version: int = 0
    _overwritten: bool = False

    def follow(self, x: Tensor, mu: Tensor, energy: Energy) -> None:
        """Moves the value with its prediction.

        Args:
            x: The value, [B, *]; in place.
            mu: Its prediction, [B, *].
            energy: The node's.
        """
        before = self._exchange(mu)
        if before is not None:
            self._go(x, mu, before, energy)

    def moved(self, x: Tensor, mu: Tensor, energy: Energy, weight: float, total: Tensor) -> bool:
        """Moves the value with its prediction, where that has gone too far for it to stay.

        Args:
            x: The value, [B, *]; in place.
            mu: Its prediction, [B, *].
            energy: The node's.
            weight: Of the energy in F.
            total: The energy of the two, with its weight, [].

        Returns:
            Whether the value has moved; on a device, which is not waited for, it may have.
        """
        before = self._exchange(mu)
        if before is None or (self.waits and not total > self.bears):
            return False
        was = energy.evaluate(x, before, 1.0, weight).total
        return self._go(x, mu, before, energy, total - was > self.bears)

    def _go(
        self, x: Tensor, mu: Tensor, before: Tensor, energy: Energy, far: Tensor | None = None
    ) -> bool:
        """Unless the move is too long, or not ``far``; whether the value may have moved."""
        move, error, size = mu - before, x - before, x
        if energy.masks:  # masked logits stay where they are
            finite = move.isfinite()
            move = torch.where(finite, move, 0.0)
            error = torch.where(finite & x.isfinite(), error, 0.0)
            size = torch.where(x > torch.finfo(x.dtype).min / 2, x, 0.0)
        length = torch.linalg.vector_norm
        goes = length(move) <= math.sqrt(RUNAWAY) * length(size)
        if far is not None:
            goes = goes & far
        if self.waits and not goes:
            return False
        if isinstance(energy, Gaussian):
            move = _aside(move, error)
        x.addcmul_(move, goes.to(x.dtype), value=self.share)
        self.times = self.times + goes
        return True

    def _exchange(self, mu: Tensor) -> Tensor | None:
        """Remembers a prediction for the one before: a copy where the module may write over it."""
        before, source = self.mu, self._source
        if source is not None and source._version != self._version:
            self._overwritten = True
        # Of the first it isn't known yet; a view would keep all that it is a view of.
        copied = source is None or self._overwritten or mu._base is not None
        self.mu = mu.clone() if copied else mu
        self._source, self._version = None if self._overwritten else mu, mu._version
        return before


def _aside(move: Tensor, error: Tensor) -> Tensor:
    """Of a move what brings no row's prediction nearer, and what overshoots; all [*, D]."""
    dot, size = ((of * error).sum(-1, keepdim=True) for of in (move, error))
    nearer = (dot / size).nan_to_num(0.0).clamp_(0.0, 1.0)
    return torch.addcmul(move, nearer, error, value=-1.0)
