"""The graph of a recording's value nodes: who predicts whom, how far from the loss, what is run.

It depends on the calls and their wiring alone, not on the tensors. So it is worked out once for
each form, by number, and serves every batch whose recording looks the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from lightning_pc.recording.calls import Program
from lightning_pc.recording.sites import Expected


@dataclass
class Stage:
    """The calls between the nodes that a prediction (or the loss) reads and that prediction.

    Attributes:
        parents: The nodes through which gradients reach it, by number.
        parameters: The first slots of its trainable parameters.
        depth: Of the node that it predicts: fewest stages on any path to the loss; 0 of the loss.
        arrival: First inference step at which an error may stand at that node.
    """

    parents: list[int]
    parameters: list[int]
    depth: int = 0
    arrival: int = 0


@dataclass(eq=False)
class Piece:
    """Stages that share calls, run together.

    Attributes:
        program: Their calls.
        nodes: The nodes that they predict, by number.
        loss: Whether the loss's stage is one of them.
        values: Slot of a value that they read -> its node.
        parents: The nodes through which gradients reach them.
        parameters: The first slots of their trainable parameters.
        given: Slots of the parameters and constants that they read.
    """

    program: Program
    nodes: list[int]
    loss: bool
    values: dict[int, int]
    parents: list[int]
    parameters: list[int]
    given: list[int]


@dataclass
class Graph:
    """What is known of all recordings of one form.

    Attributes:
        expected: What a further recording of this form looks like.
        loss: Slot of the loss.
        sites: Index of each node's site; nodes are numbered in call order.
        stages: Of each node, and that of the loss.
        pieces: All that is run.
        whole: All calls and sites of the loss, in order, for error coordinates.
        losses: Indices of the loss calls on which the loss depends.
        reached: First slot of a parameter -> first inference step at which an error reaches it: the
            smallest arrival of a stage that holds it; the loss's own stage has 0.
        tried: Numbers of nodes whose pieces were run together -> why that gives something else, "".
    """

    expected: Expected
    loss: int
    sites: list[int]
    stages: list[Stage]
    pieces: list[Piece]
    whole: Program
    losses: list[int]
    reached: dict[int, int]
    tried: dict[tuple[int, ...], str] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """The deepest node's depth."""
        return max(stage.depth for stage in self.stages)

    @property
    def even(self) -> bool:
        """Whether each node's error arrives all at once, one depth after the other.

        So it is where all paths from a node to the loss are as long. Not in error coordinates, nor
        in iPC where stages of different depth share a weight.
        """
        return all(
            stage.arrival == stage.depth
            and all(self.stages[n].depth == stage.depth + 1 for n in stage.parents)
            for stage in self.stages[:-1]
        )

    @cached_property
    def longest(self) -> int:
        """Most stages in a row that no connection skips: the longest of the shortest ways down.

        Those from a node that has none above it, to any other; losses on the way do not shorten it.
        """
        most = self.depth
        for top, stage in enumerate(self.stages[:-1]):
            if stage.parents:
                continue
            ways = {top: 1}  # fewest stages from it to each; nodes are in call order
            for number, other in enumerate(self.stages[:-1]):
                above = [ways[parent] for parent in other.parents if parent in ways]
                if above:
                    ways[number] = 1 + min(above)
            most = max(most, *ways.values())
        return most


def set_depths(stages: list[Stage]) -> None:
    """Sets `Stage.depth`, breadth first from the loss, whose stage is the last."""
    found, frontier, depth = set[int](), set(stages[-1].parents), 0
    while frontier:
        depth += 1
        for number in frontier:
            stages[number].depth = depth
        found |= frontier
        frontier = {n for number in frontier for n in stages[number].parents} - found


def set_arrivals(
    stages: list[Stage],
    at_once: Iterable[int],
    away: Iterable[int],
    incremental: bool,
    through: bool,
) -> dict[int, int]:
    """Sets `Stage.arrival`, returns the first step at which an error reaches each parameter.

    On a chain these are the depths. Elsewhere an error comes sooner: a prediction moves as soon as
    the nearest of the values it is made from does (a connection that skips stages), and in iPC as
    soon as a weight that a lower stage shares does; from there errors spread in both directions.
    In error coordinates the loss's gradient moves all of them at once.

    Args:
        stages: Of the nodes, and that of the loss.
        at_once: Those of the loss's parameters that its gradient reaches at once.
        away: Nodes that do not start at their predictions.
        incremental: Weights move while values do.
        through: Gradients go through all nodes.
    """
    *stages, loss = stages
    never = len(stages) + 1
    reached = dict.fromkeys((p for stage in stages for p in stage.parameters), never)
    reached |= dict.fromkeys(at_once, 0)
    moves = [0 if through else never] * len(stages)  # first step at which a value moves
    for number in loss.parents:
        moves[number] = 0
    for stage in stages:
        stage.arrival = never
    for number in away:
        stages[number].arrival = moves[number] = 0
    changed = True
    while changed:
        changed = False
        for number, stage in reversed([*enumerate(stages)]):
            values = (number, *stage.parents)
            causes = [moves[n] for n in values]
            causes += [reached[p] for p in stage.parameters] if incremental else []
            if 1 + min(causes) < stage.arrival:
                stage.arrival, changed = 1 + min(causes), True
                for parameter in stage.parameters:
                    reached[parameter] = min(reached[parameter], stage.arrival)
                for n in values:
                    moves[n] = min(moves[n], stage.arrival)
    return reached
