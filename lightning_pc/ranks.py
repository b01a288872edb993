"""The processes that train one model together, each on its own part of the batch.

Values and their energies belong to one process. What all must agree on goes through here: F, the
largest curvature, the number of inference steps, and the gradients that an optimizer step takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_pc.errors import ClosureError


class Ranks:
    """One process alone, which agrees with itself."""

    def sum(self, *numbers: Tensor, scale: float = 1.0) -> Sequence[Tensor]:
        """Each number's sum over all processes, in units of which a process has ``scale``."""
        return numbers

    def largest(self, number: float) -> float:
        """The largest of all processes' numbers that are finite, nan where none is."""
        return number

    def agree(self, numbers: Sequence[int]) -> Sequence[int]:
        """The largest of each number of all processes; none of a process that skips the batch.

        Raises:
            ClosureError: Some skip it, others do not.
        """
        return numbers

    def average(self) -> list[nn.Parameter]:
        """Gives each parameter the mean of all processes' gradients; returns those it has given.

        A process that has none counts as zero; where no process has one there is none.
        """
        return []


#: A process that shares its batches with no other.
ALONE = Ranks()


class Processes(Ranks):
    """Several processes, by `torch.distributed`'s default group.

    Args:
        device: Of tensors that are exchanged.
        parameters: Gives those that the optimizer moves, everywhere in the same order.
    """

    def __init__(
        self, device: torch.device, parameters: Callable[[], Sequence[nn.Parameter]]
    ) -> None:
        self._device, self._parameters = device, parameters
        self._count = dist.get_world_size()

    @override
    @torch.no_grad()
    def sum(self, *numbers: Tensor, scale: float = 1.0) -> Sequence[Tensor]:
        total = torch.stack(numbers) * scale
        dist.all_reduce(total)
        return total.unbind()

    @override
    def largest(self, number: float) -> float:
        (found,) = self._most([number if math.isfinite(number) else -math.inf])
        return found if math.isfinite(found) else math.nan

    @override
    def agree(self, numbers: Sequence[int]) -> Sequence[int]:
        skips, learns = self._most([not numbers, bool(numbers)])
        if skips and learns:
            raise ClosureError(
                "Some processes have no loss for this batch, others have one: give all a loss, or "
                "none."
            )
        return [int(number) for number in self._most(numbers)] if learns else []

    @override
    @torch.no_grad()
    def average(self) -> list[nn.Parameter]:
        parameters = self._parameters()
        somewhere = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        somewhere = somewhere.to(self._device)
        dist.all_reduce(somewhere, dist.ReduceOp.MAX)
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for parameter, has in zip(parameters, somewhere.tolist(), strict=True):
            if has:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                kinds.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in kinds.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(self._count)
            dist.all_reduce(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        return [p for p in parameters if p.grad is not None]

    def _most(self, numbers: Sequence[float]) -> list[float]:
        found = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [float(number) for number in found]
