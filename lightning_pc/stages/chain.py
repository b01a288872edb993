"""Z-IL needs nodes that form a chain: the error where they do not, and where they would."""

from __future__ import annotations

from collections import Counter

from lightning_pc.errors import ChainError
from lightning_pc.stages.analysis import Analysis
from lightning_pc.stages.batch import Batch


def require_chain(batch: Batch) -> None:
    """Z-IL equals backprop only where each node is read by exactly one stage.

    Raises:
        ChainError: Some node is read by several stages: a skip connection runs around a node.
    """
    stages, loss = batch.graph.stages, len(batch.nodes)
    for number, node in enumerate(batch.nodes):
        readers = [n for n, stage in enumerate(stages) if number in stage.parents]
        if len(readers) > 1:
            names = ["the loss" if n == loss else batch.nodes[n].name for n in readers]
            raise ChainError(
                f"Z-IL needs value nodes that form a chain, but '{node.name}' is read by "
                f"{' and '.join(names[:3])}: a connection runs around the node between them. "
                f"{advice(batch)}"
            )


def advice(batch: Batch) -> str:
    """Says at which modules' outputs nodes would form a chain."""
    names = _chain(batch)
    if not names:
        return "No placement at module outputs makes a chain here: use 'pc' or 'ipc'."
    return f"This placement works: value_nodes={names}."


def _chain(batch: Batch) -> list[str]:
    """The modules through whose outputs runs every path to what lies above these."""
    watch, loss = batch.watch, batch.graph.loss
    analysis, times = Analysis(watch, loss), Counter(name for name, _ in watch.outputs)
    # Where a module only hands on what another returns, the outer one has the later name.
    names = {
        slot: name
        for name, slot in watch.outputs
        if name and times[name] == 1 and slot in analysis.heavy
    }
    points = []
    for slot in sorted(names):
        above = names.keys() & analysis.above(slot, gradients=True) - {slot}
        if above.isdisjoint(analysis.above(loss, {slot}, gradients=True)):
            points.append(slot)
    # An output with no weight to the one above it may take that one's place.
    handed_on: set[int] = set()
    for slot in points:
        stage = analysis.above(slot, names.keys() - {slot}, gradients=True)
        if stage.isdisjoint(watch.parameters):
            handed_on |= stage - {slot}
    return [names[slot] for slot in points if slot not in handed_on]
