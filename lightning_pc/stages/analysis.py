"""Works out the graph of a recording: which sites are nodes, their stages and pieces."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import Enum

from torch import nn

from lightning_pc.recording.calls import Call, program
from lightning_pc.recording.sites import FROZEN, WEIGHT_ALONE, Expected, hand
from lightning_pc.recording.watch import Watch
from lightning_pc.stages.graph import Graph, Piece, Stage, set_arrivals, set_depths

OUTPUT = "an output: no weight between it and the loss"
UNREAD = "not read by the loss"


class Origin(Enum):
    """What a tensor was computed from."""

    WEIGHT = "parameters alone"
    CONSTANT = "buffers and constants"
    MIXED = "parameters, buffers and constants: a masked or noisy weight"
    DATA = "the batch"


class Analysis:
    """Works out the graph of a finished recording.

    Args:
        watch: The recording.
        loss: Slot of the loss.

    Attributes:
        heavy: Slots that gradients reach, with a weight between themselves and the loss.
    """

    def __init__(self, watch: Watch, loss: int) -> None:
        self.watch, self.loss, self.calls = watch, loss, watch.calls
        self._producer = {s: i for i, call in enumerate(self.calls) for s in _results(call)}
        first: dict[nn.Parameter, int] = {}
        self._first = {slot: first.setdefault(p, slot) for slot, p in watch.parameters.items()}
        self._why = [site.why for site in watch.sites]
        self._origins = self._find_origins()
        self._live = self.above(loss, gradients=True)
        self.heavy = self._weights_below()
        self._nodes: dict[int, int] = {}  # what is handed on -> number of the node

    def above(self, slot: int, stop: Collection[int] = (), gradients: bool = False) -> set[int]:
        """The slots that one is computed from, itself among them.

        Args:
            slot: The one.
            stop: Slots whose own calls do not count.
            gradients: Only those that gradients reach.
        """
        found, pending = {slot}, [slot]
        while pending:
            at = pending.pop()
            if at in self._producer and at not in stop:
                reads = set(self.calls[self._producer[at]].reads) - found
                new = reads - self.watch.inert if gradients else reads
                found |= new
                pending += new
        return found

    def graph(self, incremental: bool, through: bool) -> Graph:
        """The graph.

        Args:
            incremental: Weights move while values do.
            through: Gradients go through all nodes.
        """
        places, stages = list[int](), list[Stage]()
        for i, site in enumerate(self.watch.sites):
            if self._why[i]:
                continue
            stage = self._stage(site.mu)
            if site.slot not in self._live:
                self._why[i] = UNREAD
            elif site.slot not in self.heavy:
                self._why[i] = OUTPUT
            elif not (stage.parents or stage.parameters):
                self._why[i] = FROZEN
            else:
                self._nodes[site.slot] = len(places)
                places.append(i)
                stages.append(stage)
        stages.append(self._stage(self.loss))
        set_depths(stages)
        return Graph(
            Expected(list(self.watch.keys), self._why, [False] * len(self._why)),
            self.loss,
            places,
            stages,
            self._pieces(places, stages),
            program(
                self.calls,
                self._calls(self.above(self.loss)),
                [self.loss],
                self._stops(places, range(len(places))),
            ),
            [i for i, loss in enumerate(self.watch.losses) if loss.slot in self._live],
            set_arrivals(stages, self._at_once(stages), incremental, through),
        )

    def _find_origins(self) -> dict[int, Origin]:
        watch = self.watch
        origins: dict[int, Origin] = {}
        site_at = {site.at: i for i, site in enumerate(watch.sites) if site.mu >= 0}
        for slot, tensor in watch.given.items():
            if slot in watch.parameters or isinstance(tensor, nn.Parameter):
                origins[slot] = Origin.WEIGHT
            else:
                origins[slot] = Origin.CONSTANT if slot in watch.still else Origin.DATA
        for index, call in enumerate(self.calls):
            kinds = {origins[slot] for slot in call.reads}
            if Origin.DATA in kinds:
                origin = Origin.DATA
            else:
                origin = next(iter(kinds)) if len(kinds) == 1 else Origin.MIXED
            site = site_at.get(index)
            if site is not None and origin is Origin.WEIGHT and not self._why[site]:
                self._why[site] = WEIGHT_ALONE
            elif site is not None and not self._why[site]:
                origin = Origin.DATA
            origins |= dict.fromkeys(_results(call), origin)
        return origins

    def _weights_below(self) -> set[int]:
        heavy: set[int] = set()
        mixing = {Origin.WEIGHT, Origin.MIXED}
        for call in reversed(self.calls):
            reaches = self._live.intersection(_results(call))
            weighs = len(call.reads) > 1 and any(self._origins[s] in mixing for s in call.reads)
            if reaches and (weighs or not reaches.isdisjoint(heavy)):
                heavy.update(self._live.intersection(call.reads))
        return heavy

    def _stage(self, slot: int) -> Stage:
        """That of a prediction, or of the loss."""
        found = self.above(slot, self._nodes, gradients=True)
        parents = sorted(self._nodes[s] for s in found if s in self._nodes)
        return Stage(parents, sorted({self._first[s] for s in found if s in self._first}))

    def _calls(self, slots: Iterable[int]) -> set[int]:
        """Indices of the calls that make them."""
        return {self._producer[slot] for slot in slots if slot in self._producer}

    def _stops(self, places: list[int], nodes: Iterable[int]) -> dict[int, tuple[int, int]]:
        """As of `program`."""
        sites = self.watch.sites
        return {sites[places[n]].at: (n, sites[places[n]].mu) for n in nodes}

    def _pieces(self, places: list[int], stages: list[Stage]) -> list[Piece]:
        """Joins the stages that share calls; a value that is handed on is no call to share."""
        slots = [*(self.watch.sites[i].mu for i in places), self.loss]
        groups: list[tuple[list[int], set[int], set[int]]] = []  # numbers, slots read, calls
        for number, slot in enumerate(slots):
            read = self.above(slot, self._nodes)
            numbers, calls = [number], self._calls(read - self._nodes.keys())
            shared = {i for i in calls if self.calls[i].function is not hand}
            apart = []
            for group in groups:
                if shared.isdisjoint(group[2]):
                    apart.append(group)
                else:
                    numbers, read, calls = group[0] + numbers, read | group[1], calls | group[2]
            groups = [*apart, (numbers, read, calls)]
        groups.sort(key=lambda group: min(group[0]))
        return [self._piece(places, stages, sorted(n), read, calls) for n, read, calls in groups]

    def _piece(
        self,
        places: list[int],
        stages: list[Stage],
        numbers: list[int],
        read: set[int],
        calls: set[int],
    ) -> Piece:
        nodes = [n for n in numbers if n < len(places)]
        loss = nodes != numbers
        return Piece(
            program(self.calls, calls, [self.loss] if loss else [], self._stops(places, nodes)),
            nodes,
            loss,
            sorted(self._nodes[slot] for slot in read if slot in self._nodes),
            list(dict.fromkeys(n for i in numbers for n in stages[i].parents)),
            list(dict.fromkeys(slot for i in numbers for slot in stages[i].parameters)),
            [slot for slot in read if slot in self.watch.given],
        )

    def _at_once(self, stages: list[Stage]) -> list[int]:
        """The loss's parameters, but for those that only penalties of weights read there.

        A penalty is a number that owes nothing to data. Errors reach a penalised weight when they
        reach its stage, not at once. Else a T at which they never do would go unnoticed, and iPC
        would take steps along the penalty's gradient alone.
        """
        *others, loss = stages
        penalties = {s for s in self.watch.scalars if self._origins.get(s) is not Origin.DATA}
        found = self.above(self.loss, penalties | self._nodes.keys(), gradients=True)
        read = {self._first[s] for s in found if s in self._first}
        read |= {s for s in loss.parameters if self.watch.parameters[s].numel() == 1}
        elsewhere = {s for stage in others for s in stage.parameters}
        return [s for s in loss.parameters if s in read or s not in elsewhere]


def _results(call: Call) -> tuple[int, ...]:
    """The slots that a call fills or writes to."""
    return (*call.fills, *(slot for _, slot in call.rewrites))
