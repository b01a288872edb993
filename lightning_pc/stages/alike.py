"""Pieces that are alike: the same calls, in the same order, on other values and weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pc.recording.applied import Applied
from lightning_pc.stages.batch import Batch, memory_of
from lightning_pc.stages.graph import Piece


@dataclass(eq=False)
class Look:
    """What a piece looks like.

    Attributes:
        piece: The piece.
        kinds: What it does, and the kinds of what it reads and predicts, in order. Pieces are alike
            where these are equal.
        slots: Slot of what it reads -> number, in order.
        weights: How many numbers its weights are.
    """

    piece: Piece
    kinds: list[Any] = field(default_factory=list)
    slots: dict[int, int] = field(default_factory=dict)
    weights: int = 0

    def number(self, slot: int) -> int:
        """Numbers slots as they appear."""
        return self.slots.setdefault(slot, len(self.slots))

    def like(self, first: Look, slot: int) -> int:
        """What it reads where another, which is alike, reads ``slot``."""
        return [*self.slots][first.slots[slot]]


def alike(batch: Batch) -> list[list[Look]]:
    """Groups of pieces that are alike, in call order, each of two at least."""
    memories = Counter(map(memory_of, batch.watch.given.values()))
    groups: list[list[Look]] = []
    for piece in batch.graph.pieces:
        look = None if piece.loss or not piece.values else _look(batch, piece, memories)
        if look is None:
            continue
        group = next((g for g in groups if g[0].kinds == look.kinds), None)
        if group is None:
            groups.append([look])
        else:
            group.append(look)
    return [group for group in groups if len(group) > 1 and _fits(batch, group)]


def _look(batch: Batch, piece: Piece, memories: Counter[int]) -> Look | None:
    """None where a piece does what cannot be done for several at once."""
    look, watch = Look(piece), batch.watch
    for index, stop, _ in piece.program:
        call = watch.calls[index]
        if call.rewrites or call.copies or call.hooks or isinstance(call.function, Applied):
            return None
        reads = [*map(look.number, call.reads)]
        if stop is None:
            look.kinds.append((call.function, call.args, call.kwargs, call.context, reads))
            look.kinds.append([bool(call.draws), *map(look.number, call.fills)])
        else:
            node = batch.nodes[stop[0]]
            energy = type(node.energy), vars(node.energy)
            look.kinds.append((*energy, node.x.shape, node.x.dtype, *map(look.number, call.fills)))
    for slot, number in look.slots.items():
        if slot in piece.values:
            x = batch.nodes[piece.values[slot]].x
            look.kinds.append((number, "value", x.shape, x.dtype))
        elif slot in piece.given:
            tensor = watch.given[slot]
            if slot in watch.parameters:
                look.weights += tensor.numel()
                if not _movable(tensor, memories):
                    return None
            kind = slot in watch.parameters, tensor.requires_grad
            look.kinds.append((number, *kind, tensor.shape, tensor.dtype, tensor.device))
    return look


def _movable(tensor: Tensor, memories: Counter[int]) -> bool:
    """Whether nobody would miss it if its memory were elsewhere for a while."""
    hooks = tensor._backward_hooks or tensor._post_accumulate_grad_hooks
    plain = type(tensor) is nn.Parameter and tensor.layout is torch.strided
    return plain and not hooks and memories[memory_of(tensor)] == 1


def _fits(batch: Batch, group: list[Look]) -> bool:
    """Whether they predict nodes in a row, and read each thing of their own or all the same."""
    given, nodes = batch.watch.given, [number for look in group for number in look.piece.nodes]
    if nodes != [*range(nodes[0], nodes[0] + len(group))]:
        return False
    for slot in group[0].piece.given:
        each = {id(given[look.like(group[0], slot)]) for look in group}
        if len(each) not in (1, len(group)):
            return False
    return True
