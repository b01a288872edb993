"""Works out the form of a recording: which sites are nodes, their stages and pieces."""

from __future__ import annotations

from enum import Enum

from torch import nn

from lightning_pc.recording.calls import Call, program
from lightning_pc.recording.sites import FROZEN, WEIGHT_ALONE, Expected, Site, hand
from lightning_pc.recording.watch import Watch
from lightning_pc.stages.form import Form, Piece, Stage

OUTPUT = "an output: no weight between it and the loss"
UNREAD = "not read by the loss"


class Origin(Enum):
    """What a tensor was computed from."""

    WEIGHT = "parameters alone"
    CONSTANT = "buffers and constants"
    MIXED = "parameters, buffers and constants: a masked or noisy weight"
    DATA = "the batch"


class Analysis:
    """Works out the form of a finished recording.

    Args:
        watch: The recording.
        loss: Slot of the loss.
    """

    def __init__(self, watch: Watch, loss: int) -> None:
        self.watch, self.loss, self.calls = watch, loss, watch.calls
        self.producer: dict[int, int] = {}
        for index, call in enumerate(self.calls):
            for slot in (*call.fills, *(slot for _, slot in call.rewrites)):
                self.producer[slot] = index
        self.site_at = {site.at: i for i, site in enumerate(watch.sites) if site.mu >= 0}
        self.why = [site.why for site in watch.sites]
        self.origins = self._origins()
        self.heavy, self.live = self._weights_below()

    def form(self) -> Form:
        """The form; sites at which no node stands are told why."""
        self._exclude()
        bits = self._reads()
        nodes = [i for i, why in enumerate(self.why) if not why]
        number = {site: n for n, site in enumerate(nodes)}
        sites = self.watch.sites

        def stage(slot: int) -> Stage:
            parents, parameters = self._split(bits.get(slot, 0), number)
            return Stage(slot, parents, parameters, self._stage_calls(slot))

        stages, last = [stage(sites[i].mu) for i in nodes], stage(self.loss)
        calls = self._live_calls()
        at = {sites[i].at: (n, sites[i].mu) for n, i in enumerate(nodes)}
        whole = program(self.calls, calls, [self.loss], at)
        losses = [i for i, loss in enumerate(self.watch.losses) if loss.slot in self.live]
        keeps = [False] * len(sites)
        expected = Expected(list(self.watch.keys), list(self.why), keeps)
        pieces = self._pieces(stages, last, nodes)
        penalised = self._penalised(last)
        return Form(expected, self.loss, nodes, stages, last, pieces, whole, losses, penalised)

    def _is_node(self, index: int) -> bool:
        """Whether the call stands for a site that is a node."""
        site = self.site_at.get(index)
        return site is not None and not self.why[site]

    def _origins(self) -> dict[int, Origin]:
        watch = self.watch
        origins: dict[int, Origin] = {}
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
            site = self.site_at.get(index)
            if site is not None and origin is Origin.WEIGHT and not self.why[site]:
                self.why[site] = WEIGHT_ALONE
            elif site is not None and not self.why[site]:
                origin = Origin.DATA
            for slot in (*call.fills, *(slot for _, slot in call.rewrites)):
                origins[slot] = origin
        return origins

    def _differentiable(self, call: Call) -> list[int]:
        return [slot for slot in call.reads if slot not in self.watch.inert]

    def _weights_below(self) -> tuple[set[int], set[int]]:
        """Slots with a weight between themselves and the loss, and all that gradients reach."""
        heavy: set[int] = set()
        live = {self.loss}
        mixing = {Origin.WEIGHT, Origin.MIXED}
        for call in reversed(self.calls):
            results = (*call.fills, *(slot for _, slot in call.rewrites))
            reaches = [s for s in results if s in live and s not in self.watch.inert]
            if not reaches:
                continue
            weighs = len(call.reads) > 1 and any(self.origins[s] in mixing for s in call.reads)
            reads = self._differentiable(call)
            live.update(reads)
            if weighs or any(slot in heavy for slot in reaches):
                heavy.update(reads)
        return heavy, live

    def _exclude(self) -> None:
        """Places with no weight between themselves and the loss are outputs, not nodes."""
        for i, site in enumerate(self.watch.sites):
            if self.why[i]:
                continue
            if site.slot not in self.live:
                self.why[i] = UNREAD
            elif site.slot not in self.heavy:
                self.why[i] = OUTPUT

    def _reads(self) -> dict[int, int]:
        """Slot -> the sites of nodes (even bits) and parameters (odd bits) it depends on."""
        bits = {slot: 2 << (2 * slot) for slot in self.watch.parameters}
        for index, call in enumerate(self.calls):
            read = 0
            for slot in self._differentiable(call):
                read |= bits.get(slot, 0)
            site = self.site_at.get(index)
            if site is not None and not self.why[site]:
                if read:
                    read = 1 << (2 * site)
                else:
                    self.why[site] = FROZEN
            for slot in (*call.fills, *(slot for _, slot in call.rewrites)):
                bits[slot] = 0 if slot in self.watch.inert else read
        return bits

    def _split(self, read: int, number: dict[int, int]) -> tuple[list[int], list[int]]:
        parents, parameters = [], []
        while read:
            low = read & -read
            read ^= low
            place, is_parameter = divmod(low.bit_length() - 1, 2)
            if is_parameter:
                parameters.append(place)
            else:
                parents.append(number[place])
        return parents, parameters

    def _stage_calls(self, slot: int) -> set[int]:
        """All calls above a prediction, up to the nodes."""
        found: set[int] = set()
        pending = [slot]
        while pending:
            index = self.producer.get(pending.pop())
            if index is None or index in found or self._is_node(index):
                continue
            found.add(index)
            pending += self.calls[index].reads
        return found

    def _live_calls(self) -> set[int]:
        """The calls and sites on which the loss depends."""
        found: set[int] = set()
        pending = [self.loss]
        while pending:
            index = self.producer.get(pending.pop())
            if index is not None and index not in found:
                found.add(index)
                pending += self.calls[index].reads
        return found

    def _pieces(self, stages: list[Stage], last: Stage, nodes: list[int]) -> list[Piece]:
        """Joins the stages that share calls; a value that is handed on is no call to share."""
        everything = [*stages, last]
        group = list(range(len(everything)))

        def root(n: int) -> int:
            while group[n] != n:
                group[n] = group[group[n]]
                n = group[n]
            return n

        owner: dict[int, int] = {}
        for n, stage in enumerate(everything):
            for index in stage.calls:
                if self.calls[index].function is not hand:
                    group[root(n)] = root(owner.setdefault(index, n))
        members: dict[int, list[int]] = {}
        for n in range(len(everything)):
            members.setdefault(root(n), []).append(n)
        sites = [self.watch.sites[site] for site in nodes]
        return [
            self._piece([everything[n] for n in group], group, len(stages), sites)
            for group in members.values()
        ]

    def _piece(
        self, stages: list[Stage], numbers: list[int], loss: int, sites: list[Site]
    ) -> Piece:
        calls = set().union(*(stage.calls for stage in stages))
        read = {slot for index in calls for slot in self.calls[index].reads}
        read.update(stage.slot for stage in stages)
        nodes, of = [n for n in numbers if n != loss], {s.slot: n for n, s in enumerate(sites)}
        return Piece(
            program(
                self.calls,
                calls,
                [self.loss] if loss in numbers else [],
                {sites[n].at: (n, sites[n].mu) for n in nodes},
            ),
            nodes,
            loss in numbers,
            sorted(of[slot] for slot in read if slot in of),
            list(dict.fromkeys(n for stage in stages for n in stage.parents)),
            list(dict.fromkeys(slot for stage in stages for slot in stage.parameters)),
            [slot for slot in read if slot in self.watch.given],
        )

    def _penalised(self, last: Stage) -> set[int]:
        """Those of the loss's parameters that only penalties of weights read there.

        A penalty is a number that owes nothing to data. Errors reach a penalised weight when they
        reach its stage, not at once. Else a T at which they never do would go unnoticed, and iPC
        would take steps along the penalty's gradient alone.
        """
        scalars, read = self.watch.scalars, set()
        pending, seen = [self.loss], {self.loss}
        while pending:
            slot = pending.pop()
            if slot in self.watch.parameters:
                read.add(slot)
            index = self.producer.get(slot)
            penalty = slot in scalars and self.origins[slot] is not Origin.DATA
            if index is None or penalty or self._is_node(index):
                continue
            for above in self._differentiable(self.calls[index]):
                if above not in seen:
                    seen.add(above)
                    pending.append(above)
        parameters = self.watch.parameters
        return {s for s in last.parameters if s not in read and parameters[s].numel() > 1}
