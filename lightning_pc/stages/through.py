"""The evaluator of error coordinates, whose gradients go through the whole network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from typing_extensions import override

from lightning_pc.nodes.energies import Slopes
from lightning_pc.recording.calls import Environment, run
from lightning_pc.recording.sites import Passage
from lightning_pc.stages.evaluator import Asked, Evaluator


class ThroughErrors(Evaluator):
    """Values are x = mu + e, and the gradients they move by go through the whole network.

    All calls run in order, each node's value as soon as its prediction is there. One backward pass
    from the loss gives the gradients of all errors. Parameters learn from local errors all the
    same, in a pass that ends at the values. The first forward's own graph serves at t = 0, where
    all errors are zero.
    """

    @override
    def __call__(self, asked: Asked) -> Tensor:
        nodes, graph, watch = self.nodes, self.graph, self.batch.watch
        env: Environment = dict(watch.given)
        edges: list[tuple[Any, torch.dtype]] = []
        errors: dict[int, Slopes] = {}

        def meet(number: int, mu: Tensor) -> Tensor:
            edges.append((get_gradient_edge(mu) if mu.requires_grad else None, mu.dtype))
            node = nodes[number]
            if node.arrival <= asked.t:
                errors[number] = node.evaluate(mu, asked.scale)
            else:
                node.stand(mu)
            passed: Tensor = Passage.apply(node.x, mu, node)  # type: ignore[no-untyped-call]
            return passed

        sites = [self.batch.site(number) for number in range(len(nodes))]
        serves = not asked.t and self.batch.whole and len(self._fresh) == len(graph.pieces)
        if serves and all(site.edge is not None for site in sites):
            loss = self.batch.loss
        else:
            with torch.enable_grad():
                run(watch.calls, graph.whole, env, meet)
            loss = env[graph.loss]
        self.finish()
        self.loss = loss.detach()
        root = torch.full_like(loss, asked.root)
        learning = self.asked_parameters(graph.reached, asked)
        if asked.moves and nodes:
            self._pass_on(loss, root, keep=bool(learning))
        if learning:
            told = [(*edges[number], slopes.dmu) for number, slopes in errors.items()]
            told = [root for root in told if root[0] is not None]  # a cause has no prediction
            roots, wrong = [edge for edge, _, _ in told], [dmu.to(dtype) for _, dtype, dmu in told]
            self.differentiate([loss, *roots], [root, *wrong], learning)
        for number, node in enumerate(nodes):
            below, node.x.grad = node.x.grad, None
            if (slopes := errors.get(number)) is not None:
                node.gradient = slopes.own() if below is None else below.add_(slopes.own())
            elif asked.moves and node.arrival <= asked.t + 1:
                node.gradient = below
        return self.loss

    def _pass_on(self, loss: Tensor, root: Tensor, keep: bool) -> None:
        """Hands the loss's gradient on to all values."""
        for node in self.nodes:
            node.open = True
        try:
            self.differentiate([loss], [root], [node.x for node in self.nodes], keep)
        finally:
            for node in self.nodes:
                node.open = False
