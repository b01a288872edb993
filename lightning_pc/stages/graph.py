"""The graph of the value nodes of one batch: who predicts whom, and how far from the loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_pc.nodes.node import Node
from lightning_pc.recording.losses import LossCall
from lightning_pc.recording.sites import Site


@dataclass
class Graph:
    """Nodes, stages and depths of one batch.

    Attributes:
        nodes: The value nodes in call order.
        sites: Every place that was met, those without a node (and why) included.
        loss_parents: The nodes that the loss reads.
        loss_parameters: Trainable parameters of the loss's own stage.
        losses: The calls of loss functions on which the loss depends.
        arrivals: Trainable parameter -> first inference step at which an error reaches it: the
            smallest arrival of a stage that holds it; the loss's own stage has 0.
        depth: The deepest node's depth.
    """

    nodes: list[Node]
    sites: list[Site]
    loss_parents: list[Node]
    loss_parameters: list[nn.Parameter]
    losses: list[LossCall]
    arrivals: dict[nn.Parameter, int]
    depth: int

    @property
    def even(self) -> bool:
        """Whether each node's error arrives all at once, one depth after the other.

        So it is where all paths from a node to the loss are as long. Not in error coordinates, nor
        in iPC where stages of different depth share a weight.
        """
        return all(
            node.arrival == node.depth and all(p.depth == node.depth + 1 for p in node.parents)
            for node in self.nodes
        )

    @property
    def longest(self) -> int:
        """Most stages in a row that no connection skips: the longest of the shortest ways down.

        Those from a node that has none above it, to any other; losses on the way do not shorten it.
        """
        most = self.depth
        for top in self.nodes:
            if top.parents:
                continue
            ways = {top: 1}  # fewest stages from it to each; nodes are in call order
            for node in self.nodes:
                above = [ways[parent] for parent in node.parents if parent in ways]
                if above:
                    ways[node] = 1 + min(above)
            most = max(most, *ways.values())
        return most

    @property
    def skips(self) -> bool:
        """Whether connections skip all stages, so that the loss reads every node.

        So it is in residual networks with nothing nonlinear behind the last block; not in a chain
        whose loss reads every layer, unless there are two of them alone.
        """
        return self.depth == 1 and self.longest == 2

    def readers(self, node: Node) -> list[str]:
        """Names of the stages that read ``node``."""
        names = [other.name for other in self.nodes if node in other.parents]
        return (["the loss"] if node in self.loss_parents else []) + names


def set_depths(parents: list[Node], parameters: list[nn.Parameter]) -> dict[nn.Parameter, int]:
    """Breadth first from the loss: sets ``Node.depth``, returns the parameters' depths.

    Args:
        parents: The nodes that the loss reads.
        parameters: Those of the loss's own stage.
    """
    depths = dict.fromkeys(parameters, 0)
    frontier, depth = parents, 0
    while frontier:
        depth += 1
        frontier = [node for node in frontier if node.depth == 0]
        for node in frontier:
            node.depth = node.arrival = depth
        for node in frontier:
            for parameter in node.parameters:
                depths.setdefault(parameter, depth)
        frontier = list(dict.fromkeys(p for node in frontier for p in node.parents))
    return depths


def set_arrivals(
    nodes: list[Node], depths: dict[nn.Parameter, int], incremental: bool, through: bool
) -> dict[nn.Parameter, int]:
    """Sets ``Node.arrival``, returns the first step at which an error reaches each parameter.

    On a chain these are the depths. Elsewhere an error comes sooner: a prediction moves as soon as
    the nearest of the values it is made from does (a connection that skips stages), and in iPC as
    soon as a weight that a lower stage shares does; from there errors spread in both directions.
    In error coordinates the loss's gradient moves all of them at once.

    Args:
        nodes: Those of which the loss depends.
        depths: Of the parameters.
        incremental: Weights move while values do.
        through: Gradients go through all nodes.
    """
    # First step at which its value moves.
    moves = {node: 0 if through else node.depth - 1 for node in nodes}
    arrivals = dict(depths)
    changed = True
    while changed:
        changed = False
        for node in nodes:
            causes = [moves[n] for n in (node, *node.parents)]
            causes += [arrivals[p] for p in node.parameters] if incremental else []
            arrival = 1 + min(causes)
            if arrival < node.arrival:
                node.arrival, changed = arrival, True
            for parameter in node.parameters:
                arrivals[parameter] = min(arrivals[parameter], node.arrival)
            for n in (node, *node.parents):
                moves[n] = min(moves[n], node.arrival)
    return arrivals
