"""The recordings of a module, batch after batch: made, put back where they fail, made ready."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lightning_pc.errors import ClosureError, PCError, RecordingError
from lightning_pc.nodes.energies import Energy
from lightning_pc.nodes.model import Model
from lightning_pc.nodes.node import Node
from lightning_pc.recording.draws import RandomStates
from lightning_pc.recording.sites import Site, leaves_of
from lightning_pc.recording.task import Learned, Task
from lightning_pc.recording.watch import Watch
from lightning_pc.stages.analysis import Analysis
from lightning_pc.stages.batch import Batch
from lightning_pc.stages.checks import early_message
from lightning_pc.stages.graph import Graph
from lightning_pc.stages.verify import check

#: Most forms that are remembered.
MOST = 16


class Recordings:
    """The recordings of one module, and the forms that they have had.

    Args:
        model: The module.
        softmax: Energy at the logits of a softmax.
        energies: Name of a node, or of a module for all its calls -> energy.
        keeps: Values are kept from call to call (``reset="never"``), which draw the same each time.
        incremental: Weights move while values do.
        through: Values are held in error coordinates.
        half: Predictions may be of float16.

    Attributes:
        kept: Sites with values to stand again; None for fresh ones.
    """

    def __init__(
        self,
        model: Model,
        softmax: str,
        energies: Mapping[str, Energy],
        keeps: bool,
        incremental: bool,
        through: bool,
        half: bool = False,
    ) -> None:
        self.model = model
        self.kept: list[Site] | None = None
        self._softmax, self._energies, self._keeps = softmax, energies, keeps
        self._incremental, self._through, self._half = incremental, through, half
        self._graphs: list[Graph] = []  # of each form, the last one first
        self._learned = Learned()
        self._draws: RandomStates | None = None
        self._behind: dict[int, tuple[weakref.ref[Tensor], list[nn.Parameter]]] = {}

    @contextmanager
    def recording(self, held: set[nn.Parameter] | None) -> Iterator[Watch]:
        """One forward is recorded and made ready inside; if that fails, all is as before.

        Args:
            held: Parameters that the optimizer moves, None for all.
        """
        put_back = None if self._graphs else self.model.save(held or set())
        start = RandomStates(everywhere=self._keeps)
        if self._draws is not None:
            self._draws.restore()
        watch = Watch(
            Task(
                placement=self.model.look(),
                softmax=self._softmax,
                names=self.model.names,
                own=self.model.own,
                early=partial(self._early, held),
                forms=[graph.expected for graph in self._graphs],
                through=self._through,
                half=self._half,
                kept=self.kept,
                learned=self._learned,
            )
        )
        try:
            yield watch
        except PCError:
            watch.undo()
            if put_back is not None:
                put_back()
            start.restore()
            raise
        finally:
            if self._draws is not None:
                start.restore()
        if self._keeps and self._draws is None:
            self._draws = start

    def prepare(self, watch: Watch, loss: Tensor) -> Batch:
        """Makes the nodes, and checks a form that was never met.

        Raises:
            ClosureError: The loss was not computed by the forward.
            RecordingError: The recording is not all of the forward.
        """
        with torch._C.DisableTorchFunction():
            entry = watch.entry(loss)
        if entry is None or not entry.depends:
            raise ClosureError("The loss was not computed by the forward that was recorded.")
        if watch.task.kept is not None and len(watch.task.kept) != len(watch.sites):
            raise RecordingError(
                "reset='never' keeps the values of the first call, but the module takes another "
                "path now. Use reset='batch'."
            )
        slot, known = entry.slot, self._graphs
        graph = next((g for g in known if g.loss == slot and g.expected.keys == watch.keys), None)
        new = graph is None
        if graph is None:
            graph = Analysis(watch, slot).graph(self._incremental, self._through)
        batch = self._batch(watch, loss, graph)
        if new:
            check(batch)
        self._graphs = [graph, *(g for g in known if g is not graph)][:MOST]
        return batch

    def _batch(self, watch: Watch, loss: Tensor, graph: Graph) -> Batch:
        whole = not watch.elsewhere
        for site, why in zip(watch.sites, graph.expected.why, strict=True):
            site.why, whole = why, whole and not (why and site.node)
            if why:
                site.edge = site.first = None
        watch.number_calls()
        nodes: list[Node] = []
        for index, stage in zip(graph.sites, graph.stages, strict=False):  # the loss's is the last
            site = watch.sites[index]
            node = site.node
            assert node is not None
            node.name, node.depth, node.arrival = site.name, stage.depth, stage.arrival
            module, own = site.name.partition("#")[0], self._energies
            if energy := own.get(site.name) or own.get(module):
                node.energy = energy.instead_of(node.energy)
            if self._through and node.e is None:
                node.e = torch.zeros_like(node.x, requires_grad=False)
            nodes.append(node)
        return Batch(watch, graph, nodes, loss, whole)

    def keep_in_mind(self, batch: Batch) -> None:
        """The values of a batch stand for the weights that predicted them."""
        self._behind = {
            id(node.x): (weakref.ref(node.x), batch.parameters(stage))
            for node, stage in zip(batch.nodes, batch.graph.stages, strict=False)
        }

    def forget(self) -> None:
        """The next batch starts anew."""
        self.kept, self._draws = None, None

    def _early(self, held: set[nn.Parameter] | None, tensor: Tensor) -> str:
        """Says what is wrong with a tensor that was computed before the forward."""
        reached: set[Tensor] = set()
        for leaf in leaves_of(tensor):
            # A value of the batch before stands for the weights that predicted it.
            ref, weights = self._behind.get(id(leaf), (None, []))
            reached.update(weights if ref is not None and ref() is leaf else [leaf])
        trained = {leaf for leaf in reached if held is None or leaf in held}
        return early_message(trained, self.model.model) if trained else ""
