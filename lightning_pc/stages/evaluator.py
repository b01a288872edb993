"""Evaluators: one inference step's loss, energies and gradients, at the values and weights of now.

An evaluator runs the pieces of a recording. It leaves dF/dx and the energies in the nodes
(`Node.gradient`, `Node.total`) and adds dF/dtheta / M to ``.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from lightning_pc.errors import ConfigError
from lightning_pc.nodes.node import Node
from lightning_pc.stages.batch import Batch, memory_of
from lightning_pc.stages.graph import Piece

_BACKWARD: Any = Variable._execution_engine.run_backward


@dataclass(slots=True)
class Asked:
    """What an evaluation is asked for.

    Attributes:
        t: Inference step; nodes that errors reach later still equal their predictions.
        moves: Gradients of the values.
        learns: Gradients of the parameters.
        last: The parameters that no optimizer of ours moves gain theirs as well.
        root: Factor of the loss in parameter gradients, 0 for a loss that does not count.
        scale: Factor from an energy's gradient to the parameters', maybe a tensor [].
    """

    t: int
    moves: bool
    learns: bool
    last: bool
    root: float
    scale: float | Tensor


@dataclass(eq=False)
class Evaluator:
    """Evaluates one batch; knows for which pieces what the first forward left still serves.

    Args:
        batch: The batch.
        held: Parameters that the optimizer moves, None for all.
        once: Each stage counts once, with all of its parameters: none may wait for an error.
        steady: Weights stand while values move, so that what reads no value need not run again.
    """

    batch: Batch
    held: set[nn.Parameter] | None
    once: bool = False
    steady: bool = False

    def __post_init__(self) -> None:
        self.nodes, self.graph = self.batch.nodes, self.batch.graph
        self.loss = self.batch.loss.detach()
        dtype = torch.promote_types(self.loss.dtype, torch.float32)
        self._zero = self.loss.new_zeros((), dtype=dtype)
        self._fresh = set(self.graph.pieces)  # what is left of the first forward serves them

    @cached_property
    def moving(self) -> dict[int, nn.Parameter]:
        """Slot -> parameter of the loss that the optimizer moves."""
        parameters = ((slot, self.batch.watch.parameters[slot]) for slot in self.graph.reached)
        return {slot: p for slot, p in parameters if self.held is None or p in self.held}

    def __call__(self, asked: Asked) -> Tensor:
        """Evaluates; returns the loss, [], as of the last time it counted."""
        raise NotImplementedError

    def learned(self, parameters: Iterable[nn.Parameter]) -> None:
        """Takes in that these parameters have moved."""
        if self._fresh:
            moved, weights = set(parameters), self.batch.watch.parameters
            for piece in [*self._fresh]:
                if any(weights.get(slot) in moved for slot in piece.given):
                    self._spend(piece)

    def let_go(self, T: int) -> None:
        """Lets go of values that are neither moved nor read by step ``T``, where there are any."""

    def step(self, update: Callable[[], None]) -> list[nn.Parameter]:
        """Has the optimizer take a step; returns the parameters that take part."""
        before = [(p, p.grad is not None, p._version) for p in self.moving.values()]
        update()
        # A hook may give a gradient to one that had none, or move it.
        return [p for p, had, v in before if had or p.grad is not None or p._version != v]

    def early(self, stepped: Iterable[nn.Parameter], t: int) -> bool:
        """Whether one of these has moved before step ``t`` has brought it an error.

        Raises:
            ConfigError: Values that its predictions have left are no longer at hand.
        """
        if t >= self._deepest:
            return False
        moved, reached = set(stepped), self.graph.reached
        if not any(reached[slot] > t and p in moved for slot, p in self.moving.items()):
            return False
        if any(not node.x.numel() for node in self.nodes):
            least = max(node.arrival for node in self.nodes) - 1
            told = "A hook moves weights that no error has reached, which makes an error of its own"
            raise ConfigError(f"{told}: give T={least} or more, for every value to be at hand.")
        return True

    @cached_property
    def _deepest(self) -> int:
        return max(self.graph.reached.values(), default=0)

    def moved(self, nodes: Iterable[Node]) -> None:
        """Takes in that these values are about to move."""
        if self._fresh:
            moving = set(nodes)
            for piece in [*self._fresh]:
                if any(self.batch.nodes[number] in moving for number in piece.values.values()):
                    self._spend(piece)

    def finish(self) -> None:
        """Lets go of what the first forward left."""
        for piece in [*self._fresh]:
            self._spend(piece)

    def _spend(self, piece: Piece) -> None:
        """What the first forward left of a piece has served, or no longer may."""
        if piece in self._fresh:
            self._fresh.remove(piece)
            if piece.loss:
                self.batch.let_loss_go()
            for number in piece.nodes:
                site = self.batch.site(number)
                site.edge = site.first = None

    def energies(self) -> Tensor:
        """Each node's energy at the last evaluation, [n]; zero where no error stands."""
        zero = self._zero
        totals = [zero if node.total is None else node.total for node in self.nodes]
        return torch.stack([t if t.dtype is zero.dtype else t.to(zero.dtype) for t in totals])

    @staticmethod
    def differentiate(
        roots: Sequence[Any], errors: Sequence[Tensor], inputs: Sequence[Tensor], keep: bool = False
    ) -> None:
        """Adds the gradients of ``roots``, by ``errors``, to the ``.grad`` of ``inputs``.

        Each gains memory of its own: autograd may give several of them views of one error.
        """
        # What torch.autograd.backward does, without its checks, which take as long.
        flags = {"allow_unreachable": True, "accumulate_grad": True}
        _BACKWARD(tuple(roots), tuple(errors), keep, False, tuple(inputs), **flags)
        seen = {memory_of(error) for error in errors}
        for tensor in inputs:
            if tensor.grad is None:
                continue
            if (at := memory_of(tensor.grad)) in seen:
                tensor.grad = tensor.grad.clone()
            seen.add(at)

    def asked_parameters(self, slots: Iterable[int], asked: Asked) -> list[nn.Parameter]:
        """Of the parameters in these slots, those that gain gradients now."""
        if not asked.learns:
            return []
        parameters, reached, moving = self.batch.watch.parameters, self.graph.reached, self.moving
        return [
            parameters[slot]
            for slot in slots
            if self.once or (reached[slot] <= asked.t and (asked.last or slot in moving))
        ]
