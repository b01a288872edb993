"""The evaluator that runs pieces that are alike as one: layers side by side.

Pieces share nothing within an inference step, so those of equal layers can be one batched piece.
For that their values and their weights stand in the rows of one tensor each. While a batch is
inferred the parameters are views of these rows, so that any optimizer moves them. Then each is in
its own memory again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pc.nodes.node import Node, NodeRows
from lightning_pc.recording.calls import Environment
from lightning_pc.stages.alike import Look
from lightning_pc.stages.evaluator import Asked
from lightning_pc.stages.in_place import Change, PlainSGD, known
from lightning_pc.stages.local import LocalErrors
from lightning_pc.stages.rows import is_linear, run_rows


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
                _add(parameter, gradient)


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
                _add(node.x, gradient)
            return
        if not start:
            _add(nodes[0].x, gradients[0])
            start, gradients = 1, gradients[1:]
        self.nodes.slope()[start - 1 : part.stop - 1].add_(gradients)


def _add(tensor: Tensor, gradient: Tensor) -> None:
    tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)


@dataclass(eq=False)
class SideBySide(LocalErrors):
    """`LocalErrors`, where pieces that are alike run as one.

    Args:
        alike: Groups of these.
        optimizer: Who moves the parameters.
        sgd: The same, where its steps may be made in place.
    """

    alike: list[list[Look]] = field(default_factory=list)
    optimizer: Optimizer | None = None
    sgd: PlainSGD | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        nodes = self.batch.nodes
        self._moved = {nodes[n] for looks in self.alike for look in looks for n in look.piece.nodes}
        self.groups = [self._group(looks) for looks in self.alike]
        of = {member: group.nodes for group in self.groups for member in group.nodes.members}
        self.nodes = [*dict.fromkeys(of.get(node, node) for node in self.batch.nodes)]
        self._grouped = {look.piece for group in self.groups for look in group.looks}
        self._weights = [w for group in self.groups for w in group.weights.values()]
        self._changes: list[tuple[Change, list[nn.Parameter]]] = []
        # Others may hold on to the memory that a parameter had.
        if not self.steady and known(self.optimizer):
            for weights in self._weights:
                weights.stand()

    def _group(self, looks: list[Look]) -> Group:
        watch, nodes, first = self.batch.watch, self.batch.nodes, looks[0].piece
        predicted = [nodes[look.piece.nodes[0]] for look in looks]
        rows = predicted[0].x.new_empty(len(looks) + 1, *predicted[0].x.shape, requires_grad=False)
        group = Group(looks, NodeRows.of(predicted, rows[1:]))
        for slot in (*first.values, *first.given):
            likes = [look.own_slot(looks[0], slot) for look in looks]
            if slot in first.values:
                each = zip(looks, likes, strict=True)
                read = group.read[slot] = [nodes[look.piece.values[like]] for look, like in each]
                if read[1:] == predicted[:-1] and read[0] not in self._moved:
                    self._moved.add(read[0])
                    read[0].x.data = rows[0].copy_(read[0].x.detach())
                    group.chained[slot] = rows[:-1]
            elif watch.given[likes[0]] is watch.given[likes[1]]:
                group.shared[slot] = watch.given[slot]
            elif slot in watch.parameters:
                parameters = [watch.parameters[like] for like in likes]
                moving = [self.held is None or p in self.held for p in parameters]
                group.weights[slot] = Weights(parameters, moving)
            else:
                group.constants[slot] = torch.stack([watch.given[like] for like in likes])
        self._find_linear(group)
        return group

    def _find_linear(self, group: Group) -> None:
        if self.sgd is None or self.steady:
            return
        watch = self.batch.watch
        calls = [watch.calls[index] for index, *_ in group.looks[0].piece.program]
        read = Counter(slot for call in calls for slot in call.reads)
        rows = {*group.read, *group.constants, *group.weights}
        pieces = Counter(watch.parameters[s] for p in self.graph.pieces for s in p.parameters)
        for call in calls:
            slots, given = call.reads[1:], watch.given
            own = all(slot in group.weights and read[slot] == 1 for slot in slots)
            own = own and bool(slots) and call.reads[0] in rows and call.context is None
            if not rows.isdisjoint(call.reads):
                rows.update(call.fills)
            if own and is_linear(call, [given[slot].shape for slot in slots]):
                parameters = [p for slot in slots for p in group.weights[slot].parameters]
                settings = self.sgd.settings(parameters)
                if settings is not None and all(pieces[p] == 1 for p in parameters):
                    group.linear[slots] = settings

    @override
    def step(self, update: Callable[[], None]) -> list[nn.Parameter]:
        if self.sgd is None:
            stepped = super().step(update)
            for weights in self._weights:
                weights.follow()
            return stepped
        stepped = self.sgd.step(self.moving.values())
        for change, parameters in self._changes:
            change.make()
            stepped += parameters
        self._changes = []
        return stepped

    @override
    def finish(self) -> None:
        super().finish()
        for weights in self._weights:
            weights.put_back()
        for group in self.groups:
            group.nodes.leave()

    @override
    def energies(self) -> Tensor:
        each: list[Tensor] = []
        for node in self.nodes:
            members = len(node.members) if isinstance(node, NodeRows) else 1
            total = self._zero if node.total is None else node.total.to(self._zero.dtype)
            each.append(total.expand(members))
        return torch.cat(each)

    @override
    def _run_all(self, asked: Asked) -> None:
        for piece in self.graph.pieces:
            if piece not in self._grouped:
                self._run(piece, asked)
        for group in self.groups:
            members = group.nodes.members
            ready = [node.arrival <= asked.t and bool(node.weight) for node in members]
            end = 0
            for is_ready, neighbours in groupby(ready):
                start, end = end, end + len([*neighbours])
                pieces = [look.piece for look in group.looks[start:end]] if is_ready else []
                if len(pieces) == 1:
                    self._run(pieces[0], asked)
                elif pieces:
                    for piece in pieces:
                        self._spend(piece)
                    self._run_rows(group, slice(start, end), asked)
        for group in self.groups:  # which may read each other's values
            group.nodes.gather()

    def _run_rows(self, group: Group, part: slice, asked: Asked) -> None:
        env: Environment = {**group.shared}
        env |= {slot: rows[part] for slot, rows in group.constants.items()}
        changes = self._changes_of(group, part) if asked.learns and not asked.last else {}
        changed = {slot for slots in changes for slot in slots}
        values: list[tuple[Tensor, int]] = []
        weights: list[tuple[Tensor, Weights]] = []
        for slot, nodes in group.read.items():
            x = group.chained.get(slot)
            env[slot] = torch.stack([n.x.detach() for n in nodes[part]]) if x is None else x[part]
            if asked.moves:
                values.append((env[slot].requires_grad_(), slot))
        for slot, stacked in group.weights.items():
            env[slot] = stacked.rows[part]
            if slot not in changed and asked.learns and (asked.last or any(stacked.moving[part])):
                weights.append((env[slot].requires_grad_(), stacked))
        inputs: list[Tensor] = [leaf for leaf, _ in (*values, *weights)]
        inputs += [change.token for change in changes.values()]
        shared = {id(tensor) for tensor in group.shared.values()}
        first = self.asked_parameters(group.looks[0].piece.parameters, asked)
        inputs += [p for p in first if id(p) in shared]
        rows = {*group.read, *group.constants, *group.weights}
        with torch.set_grad_enabled(bool(inputs)):
            by_weight = {slots[0]: change for slots, change in changes.items()}
            calls = self.batch.watch.calls
            mu = run_rows(calls, group.looks, part, env, rows, by_weight)
        dmu = group.nodes.evaluate_some(part, mu, asked.scale, asked.moves)
        if inputs and mu.requires_grad:
            self.differentiate([mu], [dmu.to(mu.dtype)], inputs)
        for leaf, slot in values:
            if leaf.grad is not None:
                group.pass_on(slot, part, leaf.grad)
        for leaf, stacked in weights:
            if leaf.grad is not None:
                stacked.learn(part, leaf.grad, asked.last)

    def _changes_of(self, group: Group, part: slice) -> dict[tuple[int, ...], Change]:
        """Steps to be made in place."""
        made = {}
        for slots, settings in group.linear.items():
            weight, *bias = [group.weights[slot].rows[part] for slot in slots]
            made[slots] = change = Change(settings, weight, bias[0] if bias else None)
            parameters = [p for s in slots for p in group.weights[s].parameters[part]]
            self._changes.append((change, parameters))
        return made
