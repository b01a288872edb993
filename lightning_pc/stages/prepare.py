"""From a recorded forward to a batch that can be inferred; a new form is checked, once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_pc.errors import ClosureError, PCError, RecordingError
from lightning_pc.nodes.node import ErrorNode, Node
from lightning_pc.recording.calls import Environment, run
from lightning_pc.recording.draws import Draws
from lightning_pc.recording.sites import Expected, leaves_of, saved_elsewhere
from lightning_pc.recording.watch import Watch
from lightning_pc.stages.analysis import Analysis
from lightning_pc.stages.evaluator import Batch, memory_of
from lightning_pc.stages.form import Form, Stage
from lightning_pc.stages.graph import Graph, set_arrivals, set_depths

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
        self._forms: list[Form] = []  # the last one first

    @property
    def expected(self) -> list[Expected]:
        """What the next recording may look like, the likeliest first."""
        return [form.expected for form in self._forms]

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
        form = self._find(watch.keys)
        if form is None or form.loss != entry.slot:
            form = Analysis(watch, entry.slot).form()
            batch = self._batch(watch, loss, form)
            check(batch)
            self._forms = [form, *self._forms[: MOST - 1]]
            return batch
        self._forms.remove(form)
        self._forms.insert(0, form)
        return self._batch(watch, loss, form)

    def _find(self, keys: list[object]) -> Form | None:
        return next((form for form in self._forms if form.expected.keys == keys), None)

    def _batch(self, watch: Watch, loss: Tensor, form: Form) -> Batch:
        sites, parameters = watch.sites, watch.parameters
        cut_elsewhere = False
        for site, why in zip(sites, form.expected.why, strict=True):
            site.why = why
            cut_elsewhere = cut_elsewhere or bool(why and site.cut)
            if why or (site.first is not None and site.first._version != site.version):
                site.edge = site.first = None
        watch.number_calls()
        kind = ErrorNode if self.through else Node
        nodes = []
        for index in form.nodes:
            site = sites[index]
            if site.node is None:
                assert site.value is not None
                assert site.energy is not None
                site.node = kind(site.name, site.value, site.energy, rounding=site.rounding)
            nodes.append(site.node)
        for node, stage in zip(nodes, form.stages, strict=True):
            node.parents = [nodes[n] for n in stage.parents]
            node.parameters = list(dict.fromkeys(parameters[slot] for slot in stage.parameters))
        loss_parents = [nodes[n] for n in form.loss_stage.parents]
        own = list(dict.fromkeys(parameters[slot] for slot in form.loss_stage.parameters))
        if not form.depths:
            self._measure(form, nodes, loss_parents, own, watch)
        for node, depth, arrival in zip(nodes, form.depths, form.arrivals, strict=True):
            node.depth, node.arrival = depth, arrival
        graph = Graph(
            nodes,
            [site for site in sites if site.reported],
            loss_parents,
            own,
            [watch.losses[i] for i in form.losses],
            {parameters[slot]: arrival for slot, arrival in form.reached.items()},
            max(form.depths, default=0),
        )
        return Batch(watch, form, graph, loss, not cut_elsewhere and not saved_elsewhere())

    def _measure(
        self,
        form: Form,
        nodes: list[Node],
        loss_parents: list[Node],
        own: list[nn.Parameter],
        watch: Watch,
    ) -> None:
        for node in nodes:
            node.depth = node.arrival = 0
        penalised = {watch.parameters[slot] for slot in form.penalised}
        depths = set_depths(loss_parents, [p for p in own if p not in penalised])
        depths = dict.fromkeys(own, 0) | depths
        arrivals = set_arrivals(nodes, depths, self.incremental, self.through)
        form.depths = [node.depth for node in nodes]
        form.arrivals = [node.arrival for node in nodes]
        slots = {parameter: slot for slot, parameter in reversed(watch.parameters.items())}
        form.reached = {slots[parameter]: arrival for parameter, arrival in arrivals.items()}


def check(batch: Batch) -> None:
    """Whether the recording is all of the forward; and how much autograd holds of each piece.

    The parameters and values that autograd reaches must be known to the recording. And the pieces,
    run on the values that they start with, must give the predictions and the loss that the forward
    gave.

    Raises:
        RecordingError: Naming the module.
    """
    watch, form = batch.watch, batch.form
    drawn = {draw.generator for call in watch.calls for draw in call.draws}
    states = [*map(Draws, drawn)]
    for number, index in enumerate(form.nodes):
        _check_leaves(
            batch, watch.sites[index].leaves, form.stages[number], watch.sites[index].name
        )
    _check_leaves(batch, leaves_of(batch.loss), form.loss_stage, "the loss")
    for piece in form.pieces:
        env: Environment = {slot: watch.given[slot] for slot in piece.given}
        for number in piece.values:
            env[watch.sites[form.nodes[number]].slot] = batch.graph.nodes[number].x
        read = [batch.graph.nodes[n].x for n in piece.values or piece.nodes]
        holds = _Held([*env.values(), *read])
        before = torch.get_rng_state()

        def meet(number: int, mu: Tensor) -> Tensor:
            site = watch.sites[form.nodes[number]]
            assert site.value is not None
            if watch.task.kept is None:  # kept values have moved
                _check_same(mu, site.value, f"'{site.name}'", site.rounding)
            return batch.graph.nodes[number].x

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
            form.expected.keeps[form.nodes[number]] = keeps
        if piece.loss:
            eps = torch.finfo(batch.loss.dtype).eps
            rounding = max([eps, *(site.rounding for site in watch.sites)])
            _check_same(env[form.loss], batch.loss, "the loss", rounding)


def _check_leaves(batch: Batch, leaves: list[Tensor] | None, stage: Stage, name: str) -> None:
    """Autograd reaches nothing from a prediction, or the loss, that its stage does not know."""
    watch, nodes = batch.watch, batch.graph.nodes
    known = {id(watch.parameters[slot]) for slot in stage.parameters}
    known |= {id(nodes[n].x) for n in stage.parents}
    ours = {id(node.x) for node in nodes}
    for given in watch.given.values():  # what another network made before belongs to it
        if given.grad_fn is not None:
            known.update(map(id, leaves_of(given)))
    cut = {id(s.value): s for s in watch.sites if s.value is not None and s.why}
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
