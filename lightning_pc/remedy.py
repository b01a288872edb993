"""Where Z-IL would be exact, for the error that refuses a placement where it is not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_pc.forwards import Discovery
from lightning_pc.graph import chain_points, discover
from lightning_pc.nodes import Gate
from lightning_pc.placement import PRESETS, Placement
from lightning_pc.replay import Purity
from lightning_pc.view import View


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
    points = [] if loss is None else chain_points(discover(loss, found))
    names = [node.name for node in points]
    if not names:
        return "No placement at module outputs makes a chain here: use 'pc' or 'ipc'."
    blocks = {view.names[module] for module in PRESETS["blocks"](view.model)}
    if blocks and blocks <= set(names):
        return "This placement works: value_nodes='blocks'."
    # An outer module may only hand on an inner one's output: one of the two will do.
    handed_on = {p.name for n in points if not n.parameters for p in n.parents[:1]}
    return f"This placement works: value_nodes={[n for n in names if n not in handed_on]}."
