"""Works out the graph of a recording: which sites are nodes, their stages and pieces."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import Enum

from torch import nn

from lightning_pc.recording.calls import Call, Program, program
from lightning_pc.recording.sites import CAUSE, FROZEN, WEIGHT_ALONE, Expected, hand
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
        self._sites: list[int] = []  # of the nodes
        self._nodes: dict[int, int] = {}  # slot of a value -> number of the node
        self._stages: list[Stage] = []

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
        for i, site in enumerate(self.watch.sites):
            if self._why[i]:
                continue
            stage = self._stage(site.mu)
            if site.slot not in self._live:
                self._why[i] = UNREAD
            elif site.stand is not None:
                self._take(i, stage)
            elif not stage.parameters and stage.parents and self._are_latent(stage.parents):
                self._why[i] = CAUSE  # it moves with them
            elif site.slot not in self.heavy:
                self._why[i] = OUTPUT
            elif not (stage.parents or stage.parameters):
                self._why[i] = FROZEN
            else:
                self._take(i, stage)
        self._stages.append(self._stage(self.loss))
        set_depths(self._stages)
        return Graph(
            Expected(list(self.watch.keys), self._why, [False] * len(self._why)),
            self.loss,
            self._sites,
            self._stages,
            self._pieces(),
            self._program(range(len(self._stages)), self._calls(self.above(self.loss))),
            [i for i, loss in enumerate(self.watch.losses) if loss.slot in self._live],
            set_arrivals(self._stages, self._at_once(), self._away(), incremental, through),
        )

    def _are_latent(self, numbers: Iterable[int]) -> bool:
        return all(self.watch.sites[self._sites[n]].stand is not None for n in numbers)

    def _take(self, site: int, stage: Stage) -> None:
        """A node stands there."""
        self._nodes[self.watch.sites[site].slot] = len(self._sites)
        self._sites.append(site)
        self._stages.append(stage)

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

    def _program(self, stages: Iterable[int], calls: set[int]) -> Program:
        """Calls that give the predictions of these stages."""
        nodes = [(n, self.watch.sites[self._sites[n]]) for n in stages if n < len(self._sites)]
        kept = [self.loss] if len(self._sites) in stages else []
        return program(self.calls, calls, kept, {site.at: (n, site.mu) for n, site in nodes})

    def _pieces(self) -> list[Piece]:
        """Joins the stages that share calls; a value that is handed on is no call to share."""
        slots = [*(self.watch.sites[i].mu for i in self._sites), self.loss]
        groups: list[tuple[list[int], set[int], set[int]]] = []  # stages, slots read, calls
        for number, slot in enumerate(slots):
            read = self.above(slot, self._nodes)
            stages, calls = [number], self._calls(read - self._nodes.keys())
            shared, apart = {i for i in calls if self.calls[i].function is not hand}, []
            for group in groups:
                if shared.isdisjoint(group[2]):
                    apart.append(group)
                else:
                    stages, read, calls = group[0] + stages, group[1] | read, group[2] | calls
            groups = [*apart, (stages, read, calls)]
        groups.sort(key=lambda group: min(group[0]))
        return [self._piece(sorted(stages), read, calls) for stages, read, calls in groups]

    def _piece(self, numbers: list[int], read: set[int], calls: set[int]) -> Piece:
        nodes = [n for n in numbers if n < len(self._sites)]
        stages = [self._stages[n] for n in numbers]
        return Piece(
            self._program(numbers, calls),
            nodes,
            nodes != numbers,
            {slot: n for slot, n in self._nodes.items() if slot in read},
            list(dict.fromkeys(n for stage in stages for n in stage.parents)),
            list(dict.fromkeys(slot for stage in stages for slot in stage.parameters)),
            [slot for slot in read if slot in self.watch.given],
        )

    def _away(self) -> list[int]:
        """The nodes that may not start at their predictions."""
        return [number for number, i in enumerate(self._sites) if self.watch.sites[i].away]

    def _at_once(self) -> list[int]:
        """The loss's parameters, but for those that only penalties of weights read there.

        A penalty is a number that owes nothing to data. Errors reach a penalised weight when they
        reach its stage, not at once. Else a T at which they never do would go unnoticed, and iPC
        would take steps along the penalty's gradient alone.
        """
        *others, loss = self._stages
        penalties = {s for s in self.watch.scalars if self._origins.get(s) is not Origin.DATA}
        found = self.above(self.loss, penalties | self._nodes.keys(), gradients=True)
        read = {self._first[s] for s in found if s in self._first}
        read |= {s for s in loss.parameters if self.watch.parameters[s].numel() == 1}
        elsewhere = {s for stage in others for s in stage.parameters}
        return [s for s in loss.parameters if s in read or s not in elsewhere]


def _results(call: Call) -> tuple[int, ...]:
    """The slots that a call fills or writes to."""
    return (*call.fills, *(slot for _, slot in call.rewrites))
