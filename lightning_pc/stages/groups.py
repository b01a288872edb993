"""Alike pieces made ready to run as one: what each has of its own stands in a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pc.nodes.node import Node, NodeRows
from lightning_pc.stages.alike import Look
from lightning_pc.stages.local import gain


class Weights:
    """Like parameters of alike pieces, in the rows of one tensor.

    Args:
        parameters: One of each piece.
        moving: Whether the optimizer moves it, of each.

    Attributes:
        rows: [n, *].
    """

    def __init__(self, parameters: list[nn.Parameter], moving: list[bool]) -> None:
        self.parameters, self.moving = parameters, moving
        self.rows = torch.stack([p.detach() for p in parameters])
        self._memories: list[Tensor] = []

    def stand(self) -> None:
        """The parameters are views of the rows, until `put_back`."""
        self._memories = [p.data for p in self.parameters]
        for parameter, row in zip(self.parameters, self.rows.unbind(), strict=True):
            parameter.data = row

    def follow(self) -> None:
        """Takes in what is not in the rows: they do not stand there, or were replaced."""
        start, size = self.rows.data_ptr(), self.rows.stride(0) * self.rows.element_size()
        for number, parameter in enumerate(self.parameters):
            if parameter.data_ptr() != start + number * size:
                row = self.rows[number].copy_(parameter.data)
                parameter.data = row if self._memories else parameter.data

    def put_back(self) -> None:
        """The parameters are in their own memory again."""
        for parameter, memory in zip(self.parameters, self._memories, strict=False):
            parameter.data = memory.copy_(parameter.data)
        self._memories = []

    def learn(self, part: slice, gradients: Tensor, last: bool) -> None:
        """Adds gradients [n, *] of some to theirs; in the ``last`` evaluation to all."""
        rows = zip(self.parameters[part], self.moving[part], gradients.unbind(), strict=True)
        for parameter, moves, gradient in rows:
            if moves or last:
                gain(parameter, gradient)


@dataclass(eq=False)
class Group:
    """Alike pieces of a batch, made ready to run as one. Slots are those of the first piece.

    Attributes:
        looks: Of the pieces, in call order.
        nodes: What they predict.
        read: Slot of a value -> the node of each piece.
        chained: Slot of values that stand in a row already -> these, [n, B, *].
        weights: Slot of a weight -> those of all.
        constants: Slot -> what each piece has of its own, [n, *].
        shared: Slot -> what is the same for all.
        linear: Slots of a linear layer's weight and bias -> the optimizer's settings of both, where
            its steps can be made in place.
    """

    looks: list[Look]
    nodes: NodeRows
    read: dict[int, list[Node]] = field(default_factory=dict)
    chained: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Weights] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    shared: dict[int, Tensor] = field(default_factory=dict)
    linear: dict[tuple[int, ...], dict[str, Any]] = field(default_factory=dict)

    def pass_on(self, slot: int, part: slice, gradients: Tensor) -> None:
        """Adds the gradients of values that some of the pieces read, [n, B, *], to theirs."""
        nodes, start = self.read[slot][part], part.start
        if slot not in self.chained:
            for node, gradient in zip(nodes, gradients.unbind(), strict=True):
                gain(node.x, gradient)
            return
        if not start:
            gain(nodes[0].x, gradients[0])
            start, gradients = 1, gradients[1:]
        self.nodes.slope()[start - 1 : part.stop - 1].add_(gradients)
