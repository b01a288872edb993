"""From a recorded forward to a batch that can be inferred; a new form is checked, once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_pc.errors import ClosureError, PCError, RecordingError
from lightning_pc.nodes.node import ErrorNode, Node
from lightning_pc.recording.calls import Draws, run
from lightning_pc.recording.sites import Expected, leaves_of, saved_elsewhere
from lightning_pc.recording.watch import Watch
from lightning_pc.stages.analysis import Analysis
from lightning_pc.stages.batch import Batch, memory_of
from lightning_pc.stages.graph import Graph, Stage

#: A stage's graph of the first forward is kept where it holds at most so many times the bytes of
#: the values that it reads (or predicts, where it reads none).
KEPT = 2.0
#: Most forms that are remembered.
MOST = 16


class Forms:
    """The forms that recordings of one module have had.

    Args:
        incremental: Weights move while values do.
        through: Values are held in error coordinates.
    """

    def __init__(self, incremental: bool, through: bool) -> None:
        self.incremental, self.through = incremental, through
        self._graphs: list[Graph] = []  # of each form, the last one first

    @property
    def expected(self) -> list[Expected]:
        """What the next recording may look like, the likeliest first."""
        return [graph.expected for graph in self._graphs]

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
        if watch.kept is not None and len(watch.kept) != len(watch.sites):
            raise RecordingError(
                "reset='never' keeps the values of the first call, but the module takes another "
                "path now. Use reset='batch'."
            )
        slot, known = entry.slot, self._graphs
        graph = next((g for g in known if g.loss == slot and g.expected.keys == watch.keys), None)
        new = graph is None
        if graph is None:
            graph = Analysis(watch, slot).graph(self.incremental, self.through)
        batch = self._batch(watch, loss, graph)
        if new:
            check(batch)
        self._graphs = [graph, *(g for g in known if g is not graph)][:MOST]
        return batch

    def _batch(self, watch: Watch, loss: Tensor, graph: Graph) -> Batch:
        whole = not saved_elsewhere()
        for site, why in zip(watch.sites, graph.expected.why, strict=True):
            site.why, whole = why, whole and not (why and site.cut)
            if why or (site.first is not None and site.first._version != site.version):
                site.edge = site.first = None
        watch.number_calls()
        kind, nodes = ErrorNode if self.through else Node, []
        for index, stage in zip(graph.sites, graph.stages, strict=False):  # the loss's is the last
            site = watch.sites[index]
            if site.node is None:
                assert site.value is not None
                assert site.energy is not None
                site.node = kind(site.name, site.value, site.energy, rounding=site.rounding)
            site.node.depth, site.node.arrival = stage.depth, stage.arrival
            nodes.append(site.node)
        return Batch(watch, graph, nodes, loss, whole)


def check(batch: Batch) -> None:
    """Whether the recording is all of the forward; and how much autograd holds of each piece.

    The parameters and values that autograd reaches must be known to the recording. And the pieces,
    run on the values that they start with, must give the predictions and the loss that the forward
    gave.

    Raises:
        RecordingError: Naming the module.
    """
    watch, graph = batch.watch, batch.graph
    drawn = {draw.generator for call in watch.calls for draw in call.draws}
    states = [Draws(generator, generator.get_state()) for generator in drawn]
    for number, stage in enumerate(graph.stages[:-1]):
        site = batch.site(number)
        _check_leaves(batch, site.leaves, stage, site.name)
    _check_leaves(batch, leaves_of(batch.loss), graph.stages[-1], "the loss")

    def meet(number: int, mu: Tensor) -> Tensor:
        site = batch.site(number)
        assert site.value is not None
        if watch.kept is None:  # kept values have moved
            _check_same(mu, site.value, f"'{site.name}'", site.rounding)
        return batch.nodes[number].x

    for piece in graph.pieces:
        env = batch.environment(piece)
        read = [batch.nodes[n].x for n in piece.values.values() or piece.nodes]
        holds = _Held([*env.values(), *read])
        before = torch.get_rng_state()
        with torch.enable_grad(), saved_tensors_hooks(holds.pack, lambda _: None):  # type: ignore[arg-type,return-value]
            try:
                run(watch.calls, piece.program, env, meet)
            except (PCError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise RecordingError(
                    f"A call of the forward does not run a second time ({error}): it keeps "
                    "something from one call to the next, such as the cache of an "
                    "autograd.Function (transformers: use_cache=False)."
                ) from error
        draws = any(watch.calls[i].draws for i, *_ in piece.program.steps)
        if not draws and not torch.equal(before, torch.get_rng_state()):
            raise RecordingError(
                "A call of the forward drew from a random generator now and then only, so that it "
                "cannot be repeated: draw before the forward."
            )
        torch.set_rng_state(before)
        for state in states:
            state.again()
        keeps = holds.bytes <= KEPT * sum(x.numel() * x.element_size() for x in read)
        for number in piece.nodes:
            graph.expected.keeps[graph.sites[number]] = keeps
        if piece.loss:
            eps = torch.finfo(batch.loss.dtype).eps
            rounding = max([eps, *(site.rounding for site in watch.sites)])
            _check_same(env[graph.loss], batch.loss, "the loss", rounding)


def _check_leaves(batch: Batch, leaves: list[Tensor] | None, stage: Stage, name: str) -> None:
    """Autograd reaches nothing from a prediction, or the loss, that its stage does not know."""
    known = {id(parameter) for parameter in batch.parameters(stage)}
    known |= {id(batch.nodes[n].x) for n in stage.parents}
    ours = {id(node.x) for node in batch.nodes}
    for given in batch.watch.given.values():  # what another network made before belongs to it
        if given.grad_fn is not None:
            known.update(map(id, leaves_of(given)))
    cut = {id(s.value): s for s in batch.watch.sites if s.value is not None and s.why}
    pending, seen = list(leaves or []), set[int]()
    while pending:
        leaf = pending.pop()
        if id(leaf) in seen or id(leaf) in known:
            continue
        seen.add(id(leaf))
        if id(leaf) in cut:
            pending += cut[id(leaf)].leaves or []
        elif isinstance(leaf, nn.Parameter) or id(leaf) in ours:
            what = "a parameter" if isinstance(leaf, nn.Parameter) else "the value of another node"
            raise RecordingError(
                f"{name!r} depends on {what} of shape {tuple(leaf.shape)} by a call that the "
                "recording has missed: a C++ extension, TorchScript or a function transform."
            )


def _check_same(again: Tensor, before: Tensor, what: str, rounding: float) -> None:
    again, before = again.detach().to(before.dtype), before.detach()
    if torch.equal(again, before):
        return
    finite = before[before.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 1.0
    far = math.sqrt(rounding) * size
    close = torch.isclose(again, before, rtol=0.0, atol=far, equal_nan=True)
    if not bool(close.all()):
        raise RecordingError(
            f"The recorded calls give {what} another value than the forward did: something wrote "
            "to a tensor behind torch's back (through .numpy() or a C++ extension), or a call "
            "does not give the same result twice. Use plain PyTorch calls while training."
        )


class _Held:
    """Counts what autograd would hold, beside ``known`` tensors."""

    def __init__(self, known: list[Tensor]) -> None:
        self.bytes = 0
        self._seen = {memory_of(tensor) for tensor in known}

    def pack(self, tensor: Tensor) -> None:
        """Takes one in; nobody will ask for it."""
        at = memory_of(tensor)
        if at not in self._seen:
            self._seen.add(at)
            self.bytes += tensor.numel() * tensor.element_size()
