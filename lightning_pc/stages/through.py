"""The evaluator of error coordinates, whose gradients go through the whole network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from typing_extensions import override

from lightning_pc.nodes.energies import Slopes
from lightning_pc.recording.calls import Environment, run
from lightning_pc.stages.evaluator import Asked, Evaluator
from lightning_pc.stages.graph import Stage


class ThroughErrors(Evaluator):
    """Values are x = mu + e, and the gradients they move by go through the whole network.

    All calls run in order, each node's value as soon as its prediction is there. Then the loss's
    gradient goes back from node to node. Parameters learn from local errors all the same. The
    first forward's own graph serves at t = 0, where all errors are zero.
    """

    @override
    def __call__(self, asked: Asked) -> Tensor:
        nodes, graph, watch = self.nodes, self.graph, self.batch.watch
        env: Environment = dict(watch.given)
        edges: list[tuple[Any, torch.dtype]] = []
        errors: dict[int, Slopes] = {}

        def meet(number: int, mu: Tensor) -> Tensor:
            edges.append((get_gradient_edge(mu), mu.dtype))
            if nodes[number].arrival <= asked.t:
                errors[number] = nodes[number].evaluate(mu, asked.scale)
                return nodes[number].x
            return nodes[number].stand(mu)

        sites = [self.batch.site(number) for number in range(len(nodes))]
        serves = not asked.t and self.batch.whole and len(self._fresh) == len(graph.pieces)
        if serves and all(site.edge is not None for site in sites):
            edges = [(site.edge, site.first.dtype) for site in sites if site.first is not None]
            loss = self.batch.loss
        else:
            with torch.enable_grad():
                run(watch.calls, graph.whole, env, meet)
            loss = env[graph.loss]
        self.finish()
        self.loss = loss.detach()
        root = torch.full_like(loss, asked.root)
        self._backward(loss, root, root, graph.stages[-1], asked)
        for number in reversed(range(len(nodes))):
            node, (edge, dtype) = nodes[number], edges[number]
            below, node.x.grad = node.x.grad, None
            through = None if below is None else below.to(dtype)
            slopes = errors.get(number)
            error = None if slopes is None else slopes.dmu.to(dtype)
            self._backward(edge, through, error, graph.stages[number], asked)
            if slopes is not None:
                node.gradient = slopes.own() if below is None else below.add_(slopes.own())
            elif asked.moves and node.arrival <= asked.t + 1:
                node.gradient = below
        return self.loss

    def _backward(
        self,
        of: Any,
        through: Tensor | None,
        error: Tensor | None,
        stage: Stage,
        asked: Asked,
    ) -> None:
        """Hands the gradient on to the values above, and the error to the parameters."""
        values = [self.nodes[n].x for n in stage.parents]
        if asked.moves and values and through is not None:
            self.differentiate([of], [through], values, keep=True)
        learning = self.asked_parameters(stage.parameters, asked)
        if learning and error is not None:
            self.differentiate([of], [error], learning, keep=True)
