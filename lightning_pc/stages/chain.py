"""Z-IL needs nodes that form a chain: the error where they do not, and where they would."""

from __future__ import annotations

from collections import Counter

from torch import nn

from lightning_pc.errors import ChainError
from lightning_pc.nodes.placement import PRESETS
from lightning_pc.stages.analysis import Analysis
from lightning_pc.stages.evaluator import Batch


def require_chain(batch: Batch, model: nn.Module) -> None:
    """Z-IL equals backprop only where each node is read by exactly one stage.

    Args:
        batch: The recorded batch.
        model: For the names of its modules.

    Raises:
        ChainError: Some node is read by several stages: a skip connection runs around a node.
    """
    for node in batch.graph.nodes:
        readers = batch.graph.readers(node)
        if len(readers) > 1:
            raise ChainError(
                f"Z-IL needs value nodes that form a chain, but '{node.name}' is read by "
                f"{' and '.join(readers[:3])}: a connection runs around the node between them. "
                f"{advice(batch, model)}"
            )


def advice(batch: Batch, model: nn.Module) -> str:
    """Says at which modules' outputs nodes would form a chain."""
    names = list(_Outputs(batch).chain())
    if not names:
        return "No placement at module outputs makes a chain here: use 'pc' or 'ipc'."
    of = {module: name for name, module in model.named_modules()}
    blocks = {of[module] for module in PRESETS["blocks"](model)}
    if blocks and blocks <= set(names):
        return "This placement works: value_nodes='blocks'."
    return f"This placement works: value_nodes={names}."


class _Outputs:
    """The outputs of the model's modules in a recording, as if each were a node."""

    def __init__(self, batch: Batch) -> None:
        self.analysis = Analysis(batch.watch, batch.form.loss)
        self.batch = batch
        times = Counter(name for name, _ in batch.watch.outputs)
        # Where a module only hands on what another returns, the outer one has the later name.
        self.names = {
            slot: name
            for name, slot in batch.watch.outputs
            if name and times[name] == 1 and slot in self.analysis.heavy
        }
        self.above: dict[int, list[int]] = {}
        self.weights: dict[int, bool] = {}
        for slot in (*self.names, batch.form.loss):
            self.above[slot], self.weights[slot] = self._stage(slot)

    def _stage(self, slot: int) -> tuple[list[int], bool]:
        """The outputs that one is computed from, and whether a weight is in between."""
        found: list[int] = []
        weighs, pending, seen = False, [slot], {slot}
        while pending:
            place = pending.pop()
            if place != slot and place in self.names:
                found.append(place)
                continue
            weighs = weighs or place in self.batch.watch.parameters
            index = self.analysis.producer.get(place)
            reads = () if index is None else self.batch.watch.calls[index].reads
            for above in reads:
                if above not in seen and above not in self.batch.watch.inert:
                    seen.add(above)
                    pending.append(above)
        return found, weighs

    def chain(self) -> list[str]:
        """Names of the outputs through which every path to what lies above them runs."""
        lower_first = [self.batch.form.loss, *sorted(self.names, reverse=True)]
        paths = self._paths(lower_first, self.batch.form.loss)
        points = []
        for slot in sorted(self.names):
            through = self._paths(lower_first, slot, paths[slot])
            others = [s for s in self.names if s != slot and through[s]]
            if paths[slot] and all(through[s] == paths[s] for s in others):
                points.append(slot)
        # An output with no weight to the one above it may take that one's place.
        handed_on = {
            above for slot in points if not self.weights[slot] for above in self.above[slot]
        }
        return [self.names[slot] for slot in points if slot not in handed_on]

    def _paths(self, lower_first: list[int], start: int, ways: int = 1) -> dict[int, int]:
        """How many paths lead from ``start`` up to each output."""
        paths = dict.fromkeys(lower_first, 0)
        paths[start] = ways
        for slot in lower_first:
            if slot != start and start != self.batch.form.loss and slot > start:
                continue
            for above in self.above[slot]:
                paths[above] += paths[slot]
        return paths
