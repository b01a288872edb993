"""What happens before the first move of a batch's values: the rate, and which values follow."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from lightning_pc.inference.curvature import LARGEST, REACH, AutoGamma, largest_curvature
from lightning_pc.inference.movers import Mover
from lightning_pc.inference.schedules import Schedule
from lightning_pc.nodes.following import AXES, Following
from lightning_pc.nodes.node import ErrorNode, Node
from lightning_pc.precisions import Precisions
from lightning_pc.stages.evaluator import Asked, Evaluator


@dataclass
class Beginning:
    """Looks at the curvature where due, and chooses by it.

    Args:
        schedule: Who moves when.
        auto: Chooses gamma, None where it is given.
        precisions: Each energy's weight in F.
        look_due: Look at the curvature, whoever gave gamma.

    Attributes:
        seen: What ``look_due`` saw: the largest curvature and the node where it is largest.
    """

    schedule: Schedule
    auto: AutoGamma | None
    precisions: Precisions
    look_due: bool
    seen: tuple[float, Node] | None = None

    def begin(
        self,
        evaluator: Evaluator,
        mover: Mover,
        asked: Asked,
        free: Tensor,
        steps: int,
        kept: bool,
    ) -> None:
        """The gradients of the first evaluation stand in the nodes; they do so after.

        Args:
            evaluator: Of the batch.
            mover: Gets the rate.
            asked: The first evaluation, for values alone.
            free: F, [].
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
        mover.choose(auto.gamma * share, auto.chosen_for)
        if mover.own_rates and self.schedule.incremental and auto.too_far < math.inf:
            self._follow(evaluator, mover, auto.too_far * free.abs(), asked.t)

    def _follow(self, evaluator: Evaluator, mover: Mover, bears: Tensor, age: int) -> None:
        """Lets values go along: always, or with moves that are too far by F as the batch starts."""
        always = evaluator.graph.skips
        for node in evaluator.nodes:
            if node.x.dim() > AXES:
                continue
            share = min(1.0, mover.start_gamma * node.weight / LARGEST)
            start = None if age else node.x.detach().clone()
            waits = node.x.device.type == "cpu"  # to look at numbers costs nothing there
            node.followed = Following(bears, 1.0 if always else share, start, always, waits)

    def _look(
        self, evaluator: Evaluator, asked: Asked, steps: int, seed: int, fine: bool
    ) -> tuple[float, Node]:
        """The largest curvature of F at this moment and the node it is largest at."""
        nodes, age = evaluator.nodes, asked.t
        reach = self.auto.reach if self.auto else REACH
        # All nodes' energies count.
        everything = replace(asked, t=age + max(node.arrival for node in nodes))
        before = [(node.weight, node.followed) for node in nodes]
        for node in nodes:
            node.followed = None
            if self.precisions.varies and not age:
                node.weight = self.precisions.lasting(node.depth, steps)
        evaluator.disturbed()
        try:
            return largest_curvature(
                nodes, partial(evaluator, everything), 1.0 / asked.scale, seed, fine, reach
            )
        finally:
            for node, (weight, followed) in zip(nodes, before, strict=True):
                node.weight, node.followed = weight, followed
