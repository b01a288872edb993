"""The graph of nodes, read off the autograd graph of the first forward.

A stage is the piece of the module between the nodes it reads and the node (or the loss) it
predicts. Nothing is asked of the user and nothing is kept: the graph is read anew for each batch,
in a few passes over the autograd functions, so that a changed control flow or an unfrozen layer is
seen at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from lightning_pc.errors import UnsupportedError
from lightning_pc.forwards import Discovery
from lightning_pc.losses import LossCall
from lightning_pc.nodes import FROZEN, Node, Site, overwrites, stand_of

OUTPUT = "an output: no weight between it and the loss"
UNREAD = "not read by the loss"


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
        early: Parameters that the loss depends on by what was computed before the forward.
    """

    nodes: list[Node]
    sites: list[Site]
    loss_parents: list[Node]
    loss_parameters: list[nn.Parameter]
    losses: list[LossCall]
    arrivals: dict[nn.Parameter, int]
    depth: int
    early: list[nn.Parameter]

    @property
    def even(self) -> bool:
        """Whether each node's error arrives all at once, one depth after the other.

        So it is where all paths from a node to the loss are as long. Not where gradients go
        through, nor in iPC where stages of different depth share a weight.
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


def _upstream(root: Any) -> list[Any]:
    """Autograd functions from ``root`` upwards, each before all that it was computed from."""
    order: list[Any] = []
    seen = {root}
    stack: list[tuple[Any, Iterator[Any]]] = [(root, iter(_above(root)))]
    while stack:
        function, rest = stack[-1]
        for following in rest:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(_above(following))))
                break
        else:
            order.append(function)
            stack.pop()
    order.reverse()
    return order


def _above(function: Any) -> list[Any]:
    """What ``function`` was computed from; of a stand, its prediction alone.

    A tensor that was overwritten whole (an in-place activation at a node) owes nothing to what
    it held before.
    """
    following = function.next_functions
    if stand_of(function) is not None:
        following = following[:1]
    elif overwrites(function):
        following = following[1:]
    return [f for f, _ in following if f is not None]


def discover(loss: Tensor, found: Discovery, incremental: bool = False) -> Graph:
    """Reads nodes, parents, stages and depths off the graph of ``loss``.

    Args:
        loss: The scalar that the first forward returned.
        found: What that forward met.
        incremental: Weights move while values do.
    """
    order = _upstream(loss.grad_fn)
    _drop_outputs(order, found.weighted)
    bits: dict[Any, int] = {}  # one bit per node and parameter that a function reads
    node_bits: list[Node] = []
    parameter_bits: list[nn.Parameter] = []
    index: dict[object, int] = {}

    def bit(thing: Any, things: list[Any]) -> int:
        if thing not in index:
            index[thing] = len(things)
            things.append(thing)
        return 1 << (2 * index[thing] + (things is parameter_bits))

    reads: dict[Node, int] = {}
    early = 0
    for function in reversed(order):
        read = 0
        for above in _above(function):
            read |= bits[above]
        # A view of a weight that was made once and for all is as good as the weight.
        if len(function.next_functions) > 1 and function._sequence_nr() < found.begun:
            early |= read
        node = stand_of(function)
        variable = getattr(function, "variable", None)
        if node is not None and not node.passes:
            reads[node] = read
            if read:
                read = bit(node, node_bits)
            else:
                node.passes = FROZEN
        elif isinstance(variable, nn.Parameter):
            read |= bit(variable, parameter_bits)
        elif "CheckpointFunction" in type(function).__name__:
            raise UnsupportedError(
                "A reentrant gradient checkpoint hides its value nodes: switch gradient "
                "checkpointing off, or use use_reentrant=False and place nodes outside of the "
                "checkpointed modules (value_nodes=...)."
            )
        bits[function] = read

    def split(read: int) -> tuple[list[Node], list[nn.Parameter]]:
        nodes, parameters = [], []
        while read:
            low = read & -read
            read ^= low
            place, is_parameter = divmod(low.bit_length() - 1, 2)
            if is_parameter:
                parameters.append(parameter_bits[place])
            else:
                nodes.append(node_bits[place])
        return nodes, parameters

    for site in found.sites:
        if site.node is not None:
            site.node.depth = 0
    for node, read in reads.items():
        node.parents, node.parameters = split(read)
    loss_parents, loss_parameters = split(bits[order[0]])
    penalised = _penalised(order[0], loss_parameters, found.dataless)
    depths = _depths(loss_parents, [p for p in loss_parameters if p not in penalised])
    depths = dict.fromkeys(loss_parameters, 0) | depths
    arrivals = _set_arrivals([node for node in reads if node.depth], depths, incremental)
    for site in found.sites:
        if site.node is None:
            continue
        site.why = site.node.passes or ("" if site.node.depth else UNREAD)
        if site.why:
            site.node = None
    nodes = [site.node for site in found.sites if site.node is not None]
    depth = max((node.depth for node in nodes), default=0)
    losses = [call for call in found.losses if call.function in bits]
    outside = split(early)[1]
    return Graph(
        nodes, found.sites, loss_parents, loss_parameters, losses, arrivals, depth, outside
    )


def _drop_outputs(order: list[Any], weighted: set[object]) -> None:
    """A place with no weight between itself and the loss is an output, not a node."""
    below: set[Any] = set()  # functions with a weight between themselves and the loss
    for function in order:
        node = stand_of(function)
        has_weight = function in below
        if node is not None and not has_weight:
            node.passes = OUTPUT
        if has_weight or function in weighted or _is_fused_layer(function):
            below.update(_above(function))


def _penalised(
    loss: Any, parameters: list[nn.Parameter], dataless: set[object]
) -> set[nn.Parameter]:
    """Those of the loss's parameters that only penalties of weights read there.

    A penalty is a number that owes nothing to data. Errors reach a penalised weight when they reach
    its stage, not at once. Else a T at which they never do would go unnoticed, and iPC would take
    steps along the penalty's gradient alone.
    """
    if not any(map(_is_number, dataless)):
        return set()
    read: set[nn.Parameter] = set()
    pending, seen = [loss], {loss}
    while pending:
        function = pending.pop()
        node, variable = stand_of(function), getattr(function, "variable", None)
        penalty = function in dataless and _is_number(function)
        if penalty or (node is not None and not node.passes):
            continue
        if isinstance(variable, nn.Parameter):
            read.add(variable)
        following = [f for f in _above(function) if f not in seen]
        seen.update(following)
        pending += following
    return {p for p in parameters if p not in read and p.numel() > 1}


def _is_number(function: Any) -> bool:
    outputs: Any = getattr(function, "_input_metadata", ())  # of its forward
    return len(outputs) == 1 and math.prod(outputs[0].shape) == 1


def _is_fused_layer(function: Any) -> bool:
    """Whether an ``autograd.Function`` of the user's mixes a weight in, which no mode sees."""
    if not isinstance(function, BackwardCFunction):
        return False
    weights = [isinstance(getattr(f, "variable", None), nn.Parameter) for f in _above(function)]
    return any(weights) and not all(weights)


def _depths(parents: list[Node], parameters: list[nn.Parameter]) -> dict[nn.Parameter, int]:
    """Breadth first from the loss: sets ``Node.depth``, returns the parameters' depths."""
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


def _set_arrivals(
    nodes: list[Node], depths: dict[nn.Parameter, int], incremental: bool
) -> dict[nn.Parameter, int]:
    """Sets ``Node.arrival``, returns the first step at which an error reaches each parameter.

    On a chain these are the depths. Elsewhere an error comes sooner: a prediction moves as soon as
    the nearest of the values it is made from does (a connection that skips stages), and in iPC as
    soon as a weight that a lower stage shares does; from there errors spread in both directions.
    A loss whose gradient goes through all nodes moves them all at once.
    """
    # First step at which its value moves.
    moves = {node: 0 if node.through else node.depth - 1 for node in nodes}
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
