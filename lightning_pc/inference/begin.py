"""What happens before the first move of a batch's values: the rate, and which values follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from lightning_pc.inference.curvature import REACH, AutoGamma, largest_curvature
from lightning_pc.inference.movers import Mover
from lightning_pc.inference.precisions import Precisions
from lightning_pc.inference.schedules import Schedule
from lightning_pc.nodes.node import ErrorNode, Node
from lightning_pc.stages.evaluator import Asked, Evaluator

#: Stages in a row down to which values follow all that their predictions move by.
FOLLOWING = 2


@dataclass
class Beginning:
    """Looks at the curvature where due, and chooses by it.

    Args:
        schedule: Who moves when.
        auto: Chooses gamma, None where it is given.
        precisions: Each energy's weight in F.
        look_due: Look at the curvature, whoever gave gamma.
        follow: Values follow their predictions.

    Attributes:
        seen: What ``look_due`` saw: the largest curvature and the node where it is largest.
    """

    schedule: Schedule
    auto: AutoGamma | None
    precisions: Precisions
    look_due: bool
    follow: bool
    seen: tuple[float, Node] | None = None

    def begin(
        self,
        evaluator: Evaluator,
        mover: Mover,
        asked: Asked,
        steps: int,
        kept: bool,
    ) -> None:
        """The gradients of the first evaluation stand in the nodes; they do so after.

        Args:
            evaluator: Of the batch.
            mover: Gets the rate.
            asked: The first evaluation, for values alone.
            steps: How many of the coming steps move values.
            kept: Values are kept from call to call.
        """
        nodes, auto, look = evaluator.nodes, self.auto, partial(self._look, evaluator, asked, steps)
        for node in nodes:
            if isinstance(node, ErrorNode):
                node.whole = self.schedule.whole
        if self.look_due:
            self.seen = look(0, True)
        if auto is None:
            return
        if auto.due():
            curvature, _ = look(auto.looks, auto.fine)
            auto.take_in(curvature)
        share = 1.0
        if self.schedule.deep is not None and not kept:
            share = min(1.0, (self.schedule.deep / evaluator.graph.longest) ** 2)
        for node in nodes:
            if isinstance(node, ErrorNode) and share < 1.0:
                node.whole = True
        mover.choose(auto.gamma * share)
        if self.follow:
            share = min(1.0, FOLLOWING / evaluator.graph.longest)
            for node in nodes:
                node.follow(share)

    def _look(
        self, evaluator: Evaluator, asked: Asked, steps: int, seed: int, fine: bool
    ) -> tuple[float, Node]:
        """The largest curvature of F at this moment and the node it is largest at."""
        nodes, age = evaluator.nodes, asked.t
        reach = self.auto.reach if self.auto else REACH
        # All nodes' energies count.
        everything = replace(asked, t=age + max(node.arrival for node in nodes))
        weights = [node.weight for node in nodes]
        for node in nodes:
            if self.precisions.varies and not age:
                node.weight = self.precisions.lasting(node.depth, steps)
        evaluator.disturbed()
        try:
            return largest_curvature(
                nodes, partial(evaluator, everything), 1.0 / asked.scale, seed, fine, reach
            )
        finally:
            for node, weight in zip(nodes, weights, strict=True):
                node.weight = weight
