"""Z-IL needs nodes that form a chain: the error where they do not, and where they would."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_pc.errors import ChainError
from lightning_pc.forwards import Discovery
from lightning_pc.graph import Graph, discover
from lightning_pc.nodes import Gate, Node
from lightning_pc.placement import PRESETS, Placement
from lightning_pc.replay import Purity
from lightning_pc.view import View


def require_chain(graph: Graph, remedy: Callable[[], str]) -> None:
    """Z-IL equals backprop only where each node is read by exactly one stage.

    Args:
        graph: The batch's graph.
        remedy: Called for the placements that would work, for the message.

    Raises:
        ChainError: Some node is read by several stages: a skip connection runs around a node.
    """
    for node in graph.nodes:
        readers = graph.readers(node)
        if len(readers) > 1:
            raise ChainError(
                f"Z-IL needs value nodes that form a chain, but '{node.name}' is read by "
                f"{' and '.join(readers[:3])}: a connection runs around the node between them. "
                f"{remedy()}"
            )


def chain_advice(
    view: View, gate: Gate, purity: Purity, forward: Callable[[], Tensor | None]
) -> str:
    """Says on which placements Z-IL is exact, found by a node at the output of every module.

    Args:
        view: The module.
        gate: Of its nodes.
        purity: Of the batch, whose first forward has run.
        forward: Gives its loss once more.
    """
    placement = Placement(False, {module: name for module, name in view.names.items() if name})
    found = Discovery(placement, view.verdicts, gate, "gaussian", view.names)
    purity.undo()
    with purity.replay(), torch.enable_grad(), found.watching():
        loss = forward()
    found.number_calls()
    points = [] if loss is None else _chain_points(discover(loss, found))
    names = [node.name for node in points]
    if not names:
        return "No placement at module outputs makes a chain here: use 'pc' or 'ipc'."
    blocks = {view.names[module] for module in PRESETS["blocks"](view.model)}
    if blocks and blocks <= set(names):
        return "This placement works: value_nodes='blocks'."
    # An outer module may only hand on an inner one's output: one of the two will do.
    handed_on = {p.name for n in points if not n.parameters for p in n.parents[:1]}
    return f"This placement works: value_nodes={[n for n in names if n not in handed_on]}."


def _chain_points(graph: Graph) -> list[Node]:
    """The nodes that every path from the loss to what lies above them runs through.

    Meant for a graph with a node at the output of every module: Z-IL is exact on any subset of
    these points.
    """
    paths: dict[Node, int] = dict.fromkeys(graph.nodes, 0)  # from the loss
    for node in graph.loss_parents:
        paths[node] += 1
    lower_first = list(reversed(graph.nodes))
    for node in lower_first:
        for parent in node.parents:
            paths[parent] += paths[node]
    points: list[Node] = []
    for node in graph.nodes:
        through = dict.fromkeys(graph.nodes, 0)
        through[node] = paths[node]
        for lower in lower_first:
            for parent in lower.parents:
                if parent is not node:
                    through[parent] += through[lower]
        above = [n for n in graph.nodes if n is not node and through[n]]
        if all(through[n] == paths[n] for n in above):
            points.append(node)
    # A name stands for every call and every output of its module.
    spoilt = {_module_of(node) for node in graph.nodes if node not in points}
    return [n for n in points if n.name == _module_of(n) and n.name not in spoilt]


def _module_of(node: Node) -> str:
    return re.split(r"[#\[]", node.name)[0]
