"""The evaluator of values: gradients go no further than to the next node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from typing_extensions import override

from lightning_pc.nodes.energies import Slopes
from lightning_pc.recording.calls import run
from lightning_pc.stages.evaluator import Asked, Evaluator
from lightning_pc.stages.graph import Piece

#: What a tensor is that an evaluation leaves.
Key = tuple[Any, ...]


def gain(tensor: Tensor, gradient: Tensor) -> None:
    """Adds to a tensor's ``.grad``; the gradient's memory may become its own."""
    tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)


@dataclass(eq=False)
class LocalErrors(Evaluator):
    """Gradients go no further than to the next node, so pieces run one by one, in call order.

    A piece runs where an error stands at one of its predictions. The first forward's own graph
    serves as the first run of a piece, while nothing that the piece reads has moved. So do
    predictions that read no value, as long as weights stand and no gradient is asked for.

    Attributes:
        run: What evaluates in its place, None for itself.
    """

    run: Callable[[LocalErrors, Asked], Tensor] | None = field(default=None, init=False)

    @override
    def let_go(self, T: int) -> None:
        kept = set[int]()
        for piece in self.graph.pieces:
            if piece.loss or any(self.batch.nodes[n].arrival <= T for n in piece.nodes):
                kept.update(piece.nodes, piece.values.values())
        nodes = self.batch.nodes
        for number in {*range(len(nodes))} - kept:
            nodes[number].x = nodes[number].x.new_empty(0)

    @override
    def __call__(self, asked: Asked) -> Tensor:
        return self.evaluate(asked) if self.run is None else self.run(self, asked)

    def evaluate(self, asked: Asked) -> Tensor:
        """Evaluates; returns the loss, [], as of the last time it counted."""
        self._run_all(asked)
        for node in self.batch.nodes:
            node.gradient, node.x.grad = node.x.grad, None
        return self.loss

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Those that may gain gradients."""
        return [self.batch.watch.parameters[slot] for slot in self.graph.reached]

    def layout(self) -> list[Any]:
        """Tells evaluations of another kind apart, which the batch does not."""
        return [type(self), [*self.moving]]

    def kind(self, asked: Asked) -> Key:
        """Tells steps apart that run other calls, or with other factors."""
        batch, graph = self.batch, self.graph
        fresh = self._fresh and [n for n, piece in enumerate(graph.pieces) if piece in self._fresh]
        who = asked.moves, asked.learns, asked.last, asked.root
        return (min(asked.t, self._reached), *who, *fresh, *[node.weight for node in batch.nodes])

    @cached_property
    def _reached(self) -> int:
        """First inference step at which errors have reached all that they ever reach."""
        arrivals = [node.arrival for node in self.batch.nodes]
        return max(*arrivals, *self.graph.reached.values(), 0)

    def prepare(self, asked: Asked) -> bool:
        """Lets go of the first forward's graph; whether predictions that stand are at hand."""
        for piece in [*self._fresh]:
            if piece.values or asked.learns:
                self._spend(piece)
        read = [n for piece in self._fresh for n in piece.nodes]
        sites = [self.batch.site(n) for n in read if self.batch.nodes[n].arrival <= asked.t]
        return all(s.first is not None and s.first._version == s.version for s in sites)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """What evaluations leave inside is gone afterwards."""
        sites = [self.batch.site(number) for number in range(len(self.batch.nodes))]
        before = [(site, site.first, site.version, site.edge) for site in sites]
        loss, fresh, parameters = self.loss, {*self._fresh}, self.parameters
        gradients = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            yield
        finally:
            self.loss, self._fresh = loss, fresh
            for site, first, version, edge in before:
                site.first, site.version, site.edge = first, version, edge
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            for node in (*self.nodes, *self.batch.nodes):
                node.forget()
                node.x.grad = None

    def read(self) -> list[Tensor]:
        """The tensors that an evaluation may read, in the same order for batches of one form."""
        batch = self.batch
        given = [batch.watch.given[slot] for piece in self.graph.pieces for slot in piece.given]
        return [*(node.x for node in batch.nodes), *given]

    def constants(self) -> list[tuple[dict[int, Tensor], int]]:
        """Where those of them are held that nothing moves and no gradient reaches."""
        given = self.batch.watch.given
        slots = [slot for piece in self.graph.pieces for slot in piece.given]
        return [(given, slot) for slot in slots if not given[slot].requires_grad]

    def standing(self) -> list[Tensor]:
        """The first forward's predictions, where some may serve; zero where there is none."""
        if not self._fresh:
            return []
        firsts = [self.batch.site(number).first for number in range(len(self.batch.nodes))]
        return [self._zero if first is None else first for first in firsts]

    def left(self, asked: Asked) -> dict[Key, Tensor]:
        """What an evaluation has left, by what it is."""
        found: dict[Key, Tensor | None] = {("loss", 0): self.loss if asked.root else None}
        for number, node in enumerate(self.nodes):
            found["gradient", number], found["total", number] = node.gradient, node.total
        for number, parameter in enumerate(self.parameters):
            found["parameter", number] = parameter.grad
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    def leave(self, key: Key, tensor: Tensor) -> None:
        """Leaves what `left` tells of; a parameter's gradient is added to what it has."""
        what, number = key
        if what == "loss":
            self.loss = tensor
        elif what == "parameter":
            gain(self.parameters[number], tensor)
        else:
            setattr(self.nodes[number], what, tensor)

    def _run_all(self, asked: Asked) -> None:
        # In call order: a value that follows has moved before it is read.
        for piece in self.graph.pieces:
            self._run(piece, asked)

    def _run(self, piece: Piece, asked: Asked) -> None:
        nodes = self.batch.nodes
        standing = [n for n in piece.nodes if nodes[n].arrival <= asked.t and nodes[n].weight]
        if not standing and not (piece.loss and asked.root):
            return
        counts = piece.loss and bool(asked.root)
        values = [n for n in piece.parents if nodes[n].arrival <= asked.t + 1]
        inputs: list[Tensor] = [nodes[n].x for n in values] if asked.moves else []
        inputs += self.asked_parameters(piece.parameters, asked)
        roots: list[Any] = []
        errors: list[Tensor] = []
        own: list[tuple[Tensor, Slopes]] = []

        def meet(number: int, mu: Tensor, edge: Any = None) -> Tensor:
            node = nodes[number]
            if number in standing:
                slopes = node.evaluate(mu, asked.scale)
                own.append((node.x, slopes))
                if node.followed:
                    self.moved([node])
                if inputs and (edge is not None or mu.requires_grad):
                    roots.append(get_gradient_edge(mu) if edge is None else edge)
                    errors.append(slopes.dmu.to(mu.dtype))
            if self.steady and not piece.values:  # it stays
                site = self.batch.site(number)
                site.first, site.version = mu.detach(), mu._version
            return node.x

        loss = self._forward(piece, standing, counts, bool(inputs), meet)
        if loss is not None:
            roots.append(loss)
            errors.append(torch.full_like(loss, asked.root))
            self.loss = loss.detach()
        if inputs and roots:
            self.differentiate(roots, errors, inputs)
        for x, slopes in own if asked.moves else ():
            x.grad = slopes.own() if x.grad is None else x.grad.add_(slopes.own())

    def _forward(
        self,
        piece: Piece,
        standing: list[int],
        counts: bool,
        differentiated: bool,
        meet: Callable[..., Tensor],
    ) -> Tensor | None:
        """Meets each node with its prediction; returns the loss where it counts."""
        sites, loss = [(number, self.batch.site(number)) for number in standing], self.batch.loss
        left = [(number, site.first, site.edge) for number, site in sites]
        serves = piece in self._fresh and (self.batch.whole or not counts)
        for _, site in sites:
            first = site.first  # the module may have written to it since
            serves = serves and first is not None and first._version == site.version
            serves = serves and (site.edge is not None or not differentiated)
        if differentiated or not serves:
            self._spend(piece)
        if self.steady and not piece.values:
            self._fresh.add(piece)
        if serves:
            for prediction in left:
                meet(*prediction)
            return loss if counts else None
        env = self.batch.environment(piece)
        with torch.set_grad_enabled(differentiated):
            run(self.batch.watch.calls, piece.program, env, meet)
        return env[self.graph.loss] if counts else None
