"""The evaluator that runs pieces that are alike as one: layers side by side.

Pieces share nothing within an inference step, so those of equal layers can be one batched piece.
For that their values and their weights stand in the rows of one tensor each. While a batch is
inferred the parameters are views of these rows, so that any optimizer moves them. Then each is in
its own memory again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pc.nodes.node import NodeRows
from lightning_pc.recording.calls import Environment
from lightning_pc.stages.alike import Look
from lightning_pc.stages.evaluator import Asked
from lightning_pc.stages.groups import Group, Weights
from lightning_pc.stages.in_place import Change, PlainSGD, known
from lightning_pc.stages.local import Key, LocalErrors
from lightning_pc.stages.rows import is_linear, run_rows


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
        self._changes: dict[Key, Change] = {}  # by (group, start, stop, slots)
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
        for (group, *part, slots), change in self._changes.items():
            change.make()
            rows = [self.groups[group].weights[slot] for slot in slots]
            stepped += [p for weights in rows for p in weights.parameters[slice(*part)]]
        self._changes = {}
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
    def layout(self) -> list[Any]:
        groups = [([look.piece.nodes for look in g.looks], [*g.linear]) for g in self.groups]
        return [*super().layout(), groups]

    @override
    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        changes, self._changes = self._changes, {}
        try:
            with super().rehearsal():
                yield
        finally:
            self._changes = changes

    @override
    def read(self) -> list[Tensor]:
        rows = [node.x for node in self.nodes] + [weights.rows for weights in self._weights]
        for group in self.groups:
            rows += [*group.chained.values(), *group.constants.values()]
        return [*super().read(), *rows]

    @override
    def constants(self) -> list[tuple[dict[int, Tensor], int]]:
        held = [of for group in self.groups for of in (group.shared, group.constants)]
        places = [(of, slot) for of in held for slot in of if not of[slot].requires_grad]
        return super().constants() + places

    @override
    def left(self, asked: Asked) -> dict[Key, Tensor]:
        found = super().left(asked)
        for at, change in self._changes.items():
            if change.errors is not None and change.read is not None:
                found |= {("errors", *at): change.errors, ("read", *at): change.read}
        return found

    @override
    def leave(self, key: Key, tensor: Tensor) -> None:
        what, *at = key
        if what in ("errors", "read"):
            change = self._changes.get(tuple(at)) or self._change(*at)
            setattr(change, what, tensor)
        else:
            super().leave(key, tensor)

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
        at = self.groups.index(group), part.start, part.stop
        return {slots: self._change(*at, slots) for slots in group.linear}

    def _change(self, group: int, start: int, stop: int, slots: tuple[int, ...]) -> Change:
        of = self.groups[group]
        weight, *bias = [of.weights[slot].rows[start:stop] for slot in slots]
        change = Change(of.linear[slots], weight, bias[0] if bias else None)
        self._changes[group, start, stop, slots] = change
        return change
