"""One batch from its first forward on: infers the values, step by step, and learns from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pc.along import AXES, TOO_FAR, Along
from lightning_pc.curvature import LARGEST, AutoGamma, largest_curvature
from lightning_pc.diagnosis import divergence
from lightning_pc.errors import DivergenceError
from lightning_pc.graph import Graph
from lightning_pc.inference import Inference
from lightning_pc.losses import ask_for_gradients
from lightning_pc.nodes import Gate, Node
from lightning_pc.precisions import Precisions, checked_weight
from lightning_pc.schedules import Schedule


@dataclass
class Relaxation:
    """T inference steps of one batch, once for each beta.

    The values descend F = E + beta * (sum of the loss terms), the parameters learn from F / beta,
    which keeps backprop's scale; of several betas they learn from the mean. The phases start from
    the same values and share t = 0.

    Args:
        graph: The batch's graph.
        schedule: Who moves when.
        inference: How values move.
        gate: Opened while we differentiate.
        least: Evaluations before which inference does not end, be it converged.
        most: Evaluations at which it ends in any case.
        start: Inference steps that the values have behind them (``reset="never"``).
        seed: Factor of the loss in parameter gradients (1 / accumulated batches), of one phase.
        betas: The nudging of each phase, not 0; its sign is that of the loss in F.
        precisions: Each energy's weight in F.
        evaluate: ``evaluate(t, scale)`` gives the loss with the values where they are now, at
            first that of the first forward; ``scale`` leads from an energy's gradient to the
            parameters'.
        count_terms: Gives M, after the first backward.
        update: One optimizer step on the gradients so far, but for the last of the batch.
        auto: Chooses gamma, None where it is given.
        curious: Look at the curvature, whoever gave gamma.
        kept: Values are kept from call to call (``reset="never"``).
        held: Parameters that the optimizer moves, None for all. The others' gradients are those of
            the last evaluation that learns, on top of what they had.

    Attributes:
        T: Evaluations of this phase, as far as is known: ``most`` until inference has converged.
        terms: M, the number of terms that the loss is a mean of.
        beta: Of the phase that runs.
        pull: The loss's own weight at this step.
        losses: The loss at each evaluation, [] each.
        pulls: ``beta * pull`` at each evaluation: the factor of the loss terms' sum in F.
        energies: Each node's energy at each evaluation, [n] each.
        seen: What ``curious`` saw: the largest curvature and the node where it is largest.
        learned_at: Inference steps at which the optimizer stepped.
    """

    graph: Graph
    schedule: Schedule
    inference: Inference
    gate: Gate
    least: int
    most: int
    start: int
    seed: float
    betas: tuple[float, ...]
    precisions: Precisions
    evaluate: Callable[[int, float], Tensor]
    count_terms: Callable[[], float]
    update: Callable[[], None]
    auto: AutoGamma | None
    curious: bool = False
    kept: bool = False
    held: set[nn.Parameter] | None = None
    seen: tuple[float, Node] | None = None
    T: int = 0
    terms: float = math.nan
    beta: float = math.nan
    pull: float = 1.0
    losses: list[Tensor] = field(default_factory=list)
    pulls: list[float] = field(default_factory=list)
    energies: list[Tensor] = field(default_factory=list)
    learned_at: list[int] = field(default_factory=list)
    _phase: int = 0  # of the evaluations, the first of this phase
    _begun: list[tuple[Node, Tensor, Tensor | None]] = field(default_factory=list)

    @property
    def scale(self) -> float:
        """Factor from an energy's gradient to the parameters'."""
        return self.seed / (self.terms * self.beta)

    @property
    def _value_steps(self) -> int:
        """How many of the steps move values."""
        return self.T - (not self.schedule.moves(self.T - 1, self.T))

    @property
    def _moving(self) -> list[nn.Parameter]:
        """Parameters of the loss that the optimizer moves."""
        return [p for p in self.graph.arrivals if self.held is None or p in self.held]

    def run(self) -> None:
        """Infers and learns; the gradients of the last update are left in ``.grad``.

        Raises:
            DivergenceError: Loss or an energy is not finite; no weight has moved on it.
        """
        self.T = self.most
        self.weigh(0)
        ask_for_gradients(self.graph.losses, self.seed * self.pull)
        if self.schedule.incremental:  # an unreached one takes no step, not one of gradient zero
            _clear_gradients(self._moving)
        self.beta = self.betas[0]
        self._descend(0)
        for beta in self.betas[1:]:
            self.beta = beta
            self._begin_again()
            self.T = self.most
            self._descend(1)

    def weigh(self, step: int) -> None:
        """Sets the weights of this step's energies."""
        if step and not self.precisions.varies:
            return
        values = self._value_steps
        depths = {node.depth for node in self.graph.nodes}
        weights = {d: checked_weight(self.precisions, d, step, values) for d in (0, *depths)}
        self.pull = weights[0]
        for node in self.graph.nodes:
            node.weight = weights[node.depth]

    def _descend(self, step: int) -> None:
        while step < self.T:
            t = self.start + step
            self.weigh(step)
            loss = self.evaluate(t, self.scale)
            moves, learns = self.schedule.moves(step, self.T), self.schedule.learns(step, self.T)
            total = self._take_in(loss, t, check=learns or not step)
            self._backward(loss, t, moves, learns)
            del loss  # what the backward did not visit holds memory
            if not step:
                self.terms = self.count_terms()
                self.graph.losses.clear()
                if len(self.betas) > 1:
                    self._begun = [
                        (n, n.coordinates.detach().clone(), n.below) for n in self.graph.nodes
                    ]
                if moves:
                    self._choose_gamma()
                    self._let_go_along(self._free_energy(total, self.losses[-1]))
            if moves:
                self._move(total, self.losses[-1])
                if self.least <= step + 2 < self.T and self._has_converged(step):
                    self.T = step + 2
            else:
                self.inference.finish(self._free_energy(total, self.losses[-1]))
            if self.schedule.updates(step, self.T):
                self.learned_at.append(t)
                if step < self.T - 1:
                    self.update()
                    torch.clear_autocast_cache()
                    _clear_gradients(self._moving)
            for node in self.graph.nodes:
                node.forget()
            step += 1

    def _choose_gamma(self) -> None:
        """Before the first move, the gradients in the nodes: looks at the curvature where due."""
        if self.curious:
            self.seen = self._look(close=True)
        if self.auto is None:
            return
        if self.auto.due():
            curvature, _ = self._look(seed=self.auto.looks, close=self.auto.close)
            self.auto.take_in(curvature)
        share = self._share()
        if share < 1.0:
            for node in self.graph.nodes:
                node.whole = True
        self.inference.start_gamma = self.auto.gamma * share
        self.inference.chosen_for = self.auto.chosen_for
        self.inference.begin()

    def _let_go_along(self, free: Tensor) -> None:
        """Lets values go along: always, or with moves that are too far by F as the batch starts.

        Only where all of how values move is chosen for the user; momentum=0 is the paper's descent.
        """
        if self.auto is None or not self.inference.own_rates or not self.schedule.incremental:
            return
        bears, always = TOO_FAR * free.abs(), self.graph.skips
        for node in self.graph.nodes:
            if node.x.dim() > AXES:
                continue
            share = min(1.0, self.inference.start_gamma * node.weight / LARGEST)
            start = None if self.start else node.x.detach().clone()
            node.along = Along(bears, 1.0 if always else share, start, always)

    def _share(self) -> float:
        """Of the automatic gamma, what this batch's graph leaves.

        Values that are kept are there to come far: an error counts as what has come of it.
        """
        deep = None if self.kept else self.schedule.deep
        return 1.0 if deep is None else min(1.0, (deep / self.graph.longest) ** 2)

    def _look(self, seed: int = 0, close: bool = False) -> tuple[float, Node]:
        """The largest curvature of F at this moment and the node it is largest at."""
        nodes = self.graph.nodes
        t = self.start + max(node.arrival for node in nodes)  # all nodes' energies count
        before = [(node.weight, node.along) for node in nodes]
        for node in nodes:
            node.along = None
            if self.precisions.varies and not self.start:
                node.weight = self.precisions.lasting(node.depth, self._value_steps)

        def evaluate() -> None:
            self._backward(self.evaluate(t, self.scale), t, moves=True, learns=False)

        try:
            return largest_curvature(nodes, evaluate, 1.0 / self.scale, seed, close)
        finally:
            for node, (weight, along) in zip(nodes, before, strict=True):
                node.weight, node.along = weight, along

    def _has_converged(self, step: int) -> bool:
        """Whether inference may end; asked at every fourth step, since a device has to wait."""
        return step % 4 == 3 and bool(self.inference.converged)

    def _begin_again(self) -> None:
        """The next phase's t = 0: the first's values and gradients, down its own F."""
        self.learned_at.clear()
        self._phase = len(self.losses)
        self.inference.begin()
        self.weigh(0)
        for node, start, below in self._begun:
            node.coordinates.data.copy_(start)
            node.below = below
            node.rest()
        self._move(self.energies[0].sum(), self.losses[0])
        for node in self.graph.nodes:
            node.forget()

    def _move(self, energy: Tensor, loss: Tensor) -> None:
        self.inference.observe(self._free_energy(energy, loss))
        self.inference.move(self.graph.nodes, 1.0 / self.scale)

    def _free_energy(self, energy: Tensor, loss: Tensor) -> Tensor:
        return torch.add(energy, loss, alpha=self.terms * self.beta * self.pull)

    def _take_in(self, loss: Tensor, t: int, check: bool) -> Tensor:
        """Keeps the loss and the energies; returns all nodes' energy, []."""
        wide = torch.promote_types(loss.dtype, torch.float32)
        self.losses.append(loss.detach().to(wide).reshape(()))
        self.pulls.append(self.beta * self.pull)
        self.energies.append(_energies(self.graph, self.losses[0]))
        total = self.energies[-1].sum()
        if check and not math.isfinite(self.losses[-1] + total):
            raise self._divergence(t)
        return total

    def _divergence(self, t: int) -> DivergenceError:
        losses, energies = self.losses[self._phase :], self.energies[self._phase :]
        pairs = zip(losses, energies, self.pulls[self._phase :], strict=True)
        return divergence(
            [node.name for node in self.graph.nodes],
            losses,
            energies,
            [float(loss * self.terms * pull + energy.sum()) for loss, energy, pull in pairs],
            t + 1 - len(losses),
            self.inference.start_gamma,
            None if self.inference.own_rates else self.inference.momentum,
            self.auto is not None,
            self.schedule.incremental,
        )

    def _backward(self, loss: Tensor, t: int, moves: bool, learns: bool) -> None:
        """One backward: dF/dx into the nodes, seed * dF/dtheta / M into ``.grad``.

        Value steps ask for no weight gradient. Nodes and stages that no error has reached yet
        are not asked either, so their ``.grad`` stays None.
        """
        graph, gate, schedule = self.graph, self.gate, self.schedule
        values = [node.x for node in graph.nodes if node.arrival <= t + 1] if moves else []
        root = torch.full_like(loss, self.seed * self.pull)
        if not schedule.stagewise:
            mine = graph.arrivals if t + 1 == self.start + self.T else self._moving
            reached = [p for p in mine if graph.arrivals[p] <= t] if learns else []
            # Errors move by the gradient of all that is below, weights learn from their stage's.
            apart = schedule.node.through and bool(values and reached)
            if apart:
                with gate.opened(moving=True):
                    torch.autograd.backward(loss, root, inputs=values, retain_graph=True)
            inputs = reached if apart else [*values, *reached]
            if inputs:
                with gate.opened(moving=moves and not apart):
                    torch.autograd.backward(loss, root, inputs=inputs)
            return
        stage = [node for node in graph.nodes if node.slopes is not None and node.depth == t]
        roots: list[Any] = (
            [(n.edge, n.slopes.dmu) for n in stage if n.slopes] if t else [(loss, root)]
        )
        stages = [node.parameters for node in stage] if t else [graph.loss_parameters]
        parameters = list(dict.fromkeys(p for stage in stages for p in stage))
        if values:
            with gate.opened():
                torch.autograd.backward(loss, root, inputs=values, retain_graph=True)
        if parameters:
            with gate.opened(sealed=True):
                torch.autograd.backward(
                    [edge for edge, _ in roots], [error for _, error in roots], inputs=parameters
                )


def _clear_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _energies(graph: Graph, like: Tensor) -> Tensor:
    """Each node's energy of this evaluation, [n]; zero where no error has arrived."""
    if all(node.slopes is None for node in graph.nodes):
        return like.new_zeros(len(graph.nodes))
    zero = like.new_zeros(())
    totals = [zero if n.slopes is None else n.slopes.total for n in graph.nodes]
    return torch.stack([total.to(like.dtype) for total in totals])
