"""The same arithmetic as `lightning_pc`'s on a plain chain of layers, written out by hand.

What a batch costs here is what predictive coding itself costs in PyTorch; the rest of a batch of
`lightning_pc` is what it takes to do so on any module.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer


class ByHand:
    """Algorithm 1 (ipc) or 3 (zil) of Salvatori et al. 2024, with nodes at activations' inputs.

    Args:
        optimizer: Over the parameters of ``net``.
        net: Linear layers with an activation between each two.
        algorithm: ``"ipc"``, plain descent, or ``"zil"``.
        gamma: Inference rate.
        T: Inference steps; None for as many as there are layers.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        net: nn.Sequential,
        algorithm: Literal["ipc", "zil"],
        gamma: float,
        T: int | None = None,
    ) -> None:
        self.optimizer, self.wave, self.gamma = optimizer, algorithm == "zil", gamma
        self.stages = [net[:1], *(net[i : i + 2] for i in range(1, len(net), 2))]
        self.T = T or len(self.stages)

    def learn(self, x: Tensor, y: Tensor) -> None:
        """Learns a batch, x [B, features] and classes y [B]."""
        *stages, last = self.stages
        values, h = [], x
        with torch.no_grad():
            for stage in stages:
                h = stage(h)
                values.append(h)
        for value in values:
            value.requires_grad_()
        read = [x, *values]
        for t in range(self.T):
            own = []
            for number in range(max(0, len(stages) - t), len(stages)):
                if self.wave and len(stages) - number != t:
                    continue
                stage, value = stages[number], values[number]
                mu = stage(read[number])
                error = (mu.detach() - value.detach()).div_(len(x))
                inputs = [*stage.parameters(), *read[max(1, number) : number + 1]]
                torch.autograd.backward([mu], [error], inputs=inputs)
                own.append((value, error))
            if not self.wave or t == 0:
                loss = F.cross_entropy(last(values[-1]), y)
                loss.backward(inputs=[*last.parameters(), values[-1]])
            self._move(values, own, len(x))
            if not self.wave or t == self.T - 1:
                self.optimizer.step()
                self.optimizer.zero_grad()

    @torch.no_grad()
    def _move(self, values: list[Tensor], own: list[tuple[Tensor, Tensor]], terms: int) -> None:
        for value, error in own:
            value.grad = -error if value.grad is None else value.grad.sub_(error)
        moving = [value for value in values if value.grad is not None]
        gradients = [value.grad for value in moving]
        torch._foreach_add_([v.detach() for v in moving], gradients, alpha=-self.gamma * terms)
        for value in moving:
            value.grad = None
