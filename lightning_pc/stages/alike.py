"""Pieces that are alike: the same calls, in the same order, on other values and weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pc.nodes.learned import LearnedGaussian
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

    def own_slot(self, first: Look, slot: int) -> int:
        """The slot that it reads where another, which is alike, reads ``slot``."""
        return [*self.slots][first.slots[slot]]


def alike(batch: Batch, last: int) -> list[list[Look]]:
    """Groups of pieces that are alike and predict nodes in a row, each of two at least.

    Args:
        batch: The batch.
        last: Errors that arrive at a later inference step do not count.
    """
    memories = Counter(map(memory_of, batch.watch.given.values()))
    groups: list[list[Look]] = []
    open_groups: list[list[Look]] = []  # the last group of each kind
    for piece in batch.graph.pieces:
        plain = not piece.loss and piece.values and len(piece.nodes) == 1
        plain = plain and batch.nodes[piece.nodes[0]].arrival <= last
        look = _look(batch, piece, memories) if plain else None
        if look is None:
            continue
        group = next((g for g in open_groups if _same(g[0], look)), None)
        if group is not None and group[-1].piece.nodes[0] + 1 == piece.nodes[0]:
            group.append(look)
            continue
        open_groups = [g for g in open_groups if g is not group] + [[look]]
        groups.append(open_groups[-1])
    return [group for group in groups if len(group) > 1 and _apart(batch, group)]


def _same(one: Look, other: Look) -> bool:
    try:
        return bool(one.kinds == other.kinds)
    except (RuntimeError, TypeError, ValueError):  # arguments that do not compare, such as arrays
        return False


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
            if isinstance(node.energy, LearnedGaussian):
                return None
            energy = type(node.energy), vars(node.energy)
            look.kinds.append((*energy, node.x.shape, node.x.dtype, *map(look.number, call.fills)))
    for slot, number in look.slots.items():
        if slot in piece.values:
            x = batch.nodes[piece.values[slot]].x
            look.kinds.append((number, "value", x.shape, x.dtype))
        elif slot in piece.given:
            tensor = watch.given[slot]
            if tensor.layout is not torch.strided:
                return None
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
    return plain and tensor.is_contiguous() and not hooks and memories[memory_of(tensor)] == 1


def _apart(batch: Batch, group: list[Look]) -> bool:
    """Whether each thing that they read is one of their own, or the same of all."""
    given = batch.watch.given
    for slot in group[0].piece.given:
        each = {id(given[look.own_slot(group[0], slot)]) for look in group}
        if len(each) not in (1, len(group)):
            return False
    return True
