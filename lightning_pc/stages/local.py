"""The evaluator of values: gradients go no further than to the next node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from typing_extensions import override

from lightning_pc.nodes.energies import Slopes
from lightning_pc.recording.calls import run
from lightning_pc.stages.evaluator import Asked, Evaluator
from lightning_pc.stages.graph import Piece


class LocalErrors(Evaluator):
    """Gradients go no further than to the next node, so pieces run one by one, in call order.

    A piece runs where an error stands at one of its predictions. The first forward's own graph
    serves as the first run of a piece, while nothing that the piece reads has moved. So do
    predictions that read no value, as long as weights stand and no gradient is asked for.
    """

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
        self._run_all(asked)
        for node in self.batch.nodes:
            node.gradient, node.x.grad = node.x.grad, None
        return self.loss

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
