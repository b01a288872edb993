"""The evaluator of values: gradients go no further than to the next node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from typing_extensions import override

from lightning_pc.nodes.energies import Slopes
from lightning_pc.nodes.node import Node
from lightning_pc.recording.calls import run
from lightning_pc.stages.evaluator import Asked, Evaluator
from lightning_pc.stages.form import Piece


class LocalErrors(Evaluator):
    """Gradients go no further than to the next node, so pieces run one by one, in call order.

    A piece runs where an error stands at one of its predictions. The first forward's own graph
    serves as the first run of a piece, while nothing that the piece reads has moved.
    """

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._fresh = set(range(len(self.form.pieces)))
        self._fixed: dict[int, Tensor] = {}  # predictions that read no value

    @override
    def __call__(self, asked: Asked) -> Tensor:
        nodes = self.nodes
        # In call order: a value that follows has moved before it is read.
        for which, piece in enumerate(self.form.pieces):
            standing = [n for n in piece.nodes if nodes[n].arrival <= asked.t and nodes[n].weight]
            if standing or (piece.loss and asked.root):
                self._run(which, piece, standing, asked)
        for node in nodes:
            node.gradient, node.x.grad = node.x.grad, None
        return self.loss

    def _run(self, which: int, piece: Piece, standing: list[int], asked: Asked) -> None:
        nodes = self.nodes
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
            if self.steady and not piece.values:
                self._fixed[number] = mu.detach()
            return node.x

        loss = self._forward(which, piece, standing, counts, bool(inputs), meet)
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
        which: int,
        piece: Piece,
        standing: list[int],
        counts: bool,
        differentiated: bool,
        meet: Callable[..., Tensor],
    ) -> Tensor | None:
        """Meets each node with its prediction; returns the loss where it counts."""
        if which in self._fresh and (self.batch.whole or not counts):
            sites = [self.batch.watch.sites[self.form.nodes[n]] for n in standing]
            firsts = [(site.first, site.edge) for site in sites]
            if all(edge is not None for _, edge in firsts):
                if differentiated:
                    self._spend(which)
                for number, (first, edge) in zip(standing, firsts, strict=True):
                    meet(number, first, edge)
                return self.batch.loss if counts else None
        if not piece.values and not differentiated and all(n in self._fixed for n in standing):
            for number in standing:
                meet(number, self._fixed[number])
            return None
        self._spend(which)
        env = self._environment(piece.values, piece.given)
        with torch.set_grad_enabled(differentiated):
            run(self.batch.watch.calls, piece.program, env, meet)
        return env[self.form.loss] if counts else None

    def _spend(self, which: int) -> None:
        """The first forward's graph of a piece has served, or no longer may."""
        if which not in self._fresh:
            return
        self._fresh.remove(which)
        for number in self.form.pieces[which].nodes:
            site = self.batch.watch.sites[self.form.nodes[number]]
            site.edge = site.first = None

    @override
    def learned(self, parameters: Iterable[nn.Parameter]) -> None:
        if not self._fresh and not self._fixed:
            return
        moved, watch = set(parameters), self.batch.watch
        for which, piece in enumerate(self.form.pieces):
            if any(watch.parameters.get(slot) in moved for slot in piece.given):
                self._spend(which)
                for number in piece.nodes:
                    self._fixed.pop(number, None)

    @override
    def moved(self, nodes: Iterable[Node]) -> None:
        if self._fresh:
            numbers = {self.nodes.index(node) for node in nodes}
            for which in list(self._fresh):
                if not numbers.isdisjoint(self.form.pieces[which].values):
                    self._spend(which)

    @override
    def disturbed(self) -> None:
        for which in list(self._fresh):
            self._spend(which)

    @override
    def finish(self) -> None:
        self.disturbed()
        self._fixed.clear()
