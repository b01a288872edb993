"""One batch: find the nodes, infer their values, learn the parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_pc.advisor import Advisor
from lightning_pc.chain import chain_advice, require_chain
from lightning_pc.checks import (
    check_held,
    check_nodes,
    check_whole,
    checked_loss,
    shortcut,
    unreached,
)
from lightning_pc.conjugate import conjugate
from lightning_pc.curvature import START, AutoGamma
from lightning_pc.errors import ClosureError, DivergenceError, PCError
from lightning_pc.forwards import Discovery, Replay
from lightning_pc.graph import Graph, discover
from lightning_pc.inference import Inference
from lightning_pc.losses import count_terms
from lightning_pc.nodes import Gate, Site
from lightning_pc.placement import Placement
from lightning_pc.precisions import precisions
from lightning_pc.relaxation import Relaxation
from lightning_pc.replay import Purity, Shadows
from lightning_pc.report import StepReport
from lightning_pc.schedules import Schedule, schedule
from lightning_pc.settings import Settings
from lightning_pc.view import View

Output = TypeVar("Output")


@dataclass
class _Batch:
    """The batch in hand, between its first forward and its inference."""

    forward: Callable[[], Tensor | None]
    purity: Purity
    loss: Tensor | None
    graph: Graph
    placement: Placement
    steps: tuple[int, int]  # least and most
    terms: Callable[[], float]
    held: set[nn.Parameter] | None  # what the optimizer moves, where it is known


class Learner:
    """Trains one module batch by batch; both doors, optimizer and strategy, stand before it.

    Args:
        model: The module, as its user wrote it.
        settings: The engine's knobs.
        optimizer: Who moves the parameters. The report speaks of those that it holds; the others
            keep the gradients that they had, and gain those of the last evaluation.

    Attributes:
        report: What the last step did.
        values: Node name -> value of the last batch, [B, *].
        auto: Chooses gamma, None where it is given.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, optimizer: Optimizer | None = None
    ) -> None:
        self.model, self.settings, self.optimizer = model, settings, optimizer
        self.schedule: Schedule = schedule(settings.algorithm)
        self.report: StepReport | None = None
        self.values: dict[str, Tensor] = {}
        self.auto: AutoGamma | None = None
        if settings.fixed_gamma is None:
            self.auto = AutoGamma(self.schedule.aim, *self.schedule.band)
        self._precisions = precisions(settings.precisions)
        self._softmax = "gaussian" if self.schedule.gaussian else settings.softmax_energy
        self._gate, self._view = Gate(), View(model, settings.value_nodes)
        self._written: set[Any] | None = None
        self._batch: _Batch | None = None
        self._advisor = Advisor(self.schedule, self.auto, self._precisions.varies)
        # reset="never": the places with their values, steps taken, and whose draws they saw.
        self._kept: list[Site] | None = None
        self._age, self._kept_scale = 0, 1.0
        self._draws: Purity | None = None

    @property
    def is_replay(self) -> bool:
        """Whether the forward that runs now is a re-run of a batch."""
        return self._batch is not None and self._batch.purity.replaying

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside model and optimizer: numbers and a name, often none."""
        if self.auto is None:
            return {}
        return {"precisions": self._precisions.name, **self.auto.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state of `state_dict`; with a gamma that is given nothing is taken."""
        if self.auto is not None and state:
            self.auto.load_state_dict(state)
            if state.get("precisions", self._precisions.name) != self._precisions.name:
                self.auto.anew = True  # the curvature was that of another F

    def check(self) -> None:
        """Refuses models and placements that can never work, before any batch.

        Raises:
            PCError: Naming the module and what to do.
        """
        self._view.look()

    def begin(
        self,
        forward: Callable[[], Output],
        loss_of: Callable[[Output], Tensor | None],
        batch: Any = (),
        shadows: Shadows | None = None,
        batch_size: Callable[[], float | None] = lambda: None,
    ) -> Output:
        """Runs the first forward (t = 0): the user's own, with the nodes in place.

        Args:
            forward: The user's forward, which computes the loss anew at each call.
            loss_of: The scalar loss in what ``forward`` returns, None to skip the batch.
            batch: What ``forward`` is given, for ``loss_terms`` and to undo changes to it.
            shadows: Methods that must do something else in replays.
            batch_size: Asked where no call of a loss function tells the number of terms.

        Returns:
            What ``forward`` returned.

        Raises:
            PCError: The nodes cannot stand there; model and generators are as before.
        """
        # The last batch makes room; a skipped one leaves neither values nor report.
        self._batch, self.report, self.values = None, None, {}
        settings, view = self.settings, self._view
        placement = view.look()
        held = self._held()
        purity = Purity(view.modules, batch, self._written, shadows or {}, self._draws, held)
        kept = (self._kept, self._kept_scale)
        kind, softmax = self.schedule.node, self._softmax
        found = Discovery(placement, view.verdicts, self._gate, softmax, view.names, kind, *kept)

        def again() -> Tensor | None:
            return loss_of(forward())

        try:
            with purity.first(), found.watching():
                output = forward()
            loss = loss_of(output)
            if loss is None:
                return output
            found.number_calls()
            graph = discover(checked_loss(loss), found, self.schedule.incremental)
            check_whole(graph, self.model, held)
            check_nodes(placement, graph, self.model)
            if held is not None:
                check_held(graph, held)
            if self.schedule.stagewise:
                require_chain(graph, lambda: chain_advice(view, self._gate, purity, again))
        except PCError:
            purity.undo()
            raise

        def terms() -> float:
            return self._terms(graph, batch, batch_size)

        steps = self.schedule.steps(graph.depth, settings.T, self._precisions.wave)
        self._batch = _Batch(again, purity, loss, graph, placement, steps, terms, held)
        if settings.reset == "batch":
            self._advisor.say("unreached", unreached(graph, steps[0], self.model))
        if self._precisions.wave:
            self._advisor.say("shortcut", shortcut(graph))
        return output

    def infer(self, seed: float, update: Callable[[], None]) -> Tensor | None:
        """Infers and learns: adds the parameter gradients of the last step to ``.grad``.

        Args:
            seed: Factor of the loss in parameter gradients (1 / accumulated batches).
            update: One optimizer step on the gradients so far, for every update but the last,
                which is the caller's.

        Returns:
            The loss of the first forward, None where the batch is skipped.

        Raises:
            DivergenceError: Loss or an energy is not finite; no weight has moved on it.
        """
        batch = self._batch
        if batch is None:
            return None
        try:
            batch.purity.ready()
            return self._infer(batch, seed, update)
        except BaseException as error:
            if self.auto is not None and isinstance(error, DivergenceError):
                self.auto.after_divergence()
            self._kept, self._age, self._draws = None, 0, None
            raise
        finally:
            batch.purity.finish()
            self._written = batch.purity.written
            self._batch = None
            for node in batch.graph.nodes:
                node.forget()
                node.along = None

    def describe(
        self, forward: Callable[[], Output], loss_of: Callable[[Output], Tensor | None]
    ) -> tuple[Graph, int]:
        """The graph that a batch gives and the T it would get; everything is put back after."""
        self.begin(forward, loss_of)
        if self._batch is None:
            raise ClosureError("The forward returned no loss, so there is no graph to describe.")
        graph, T = self._batch.graph, self._batch.steps[1]
        self._batch.purity.undo()
        self._batch = None
        return graph, T

    def _infer(self, batch: _Batch, seed: float, update: Callable[[], None]) -> Tensor:
        graph = batch.graph
        gamma = self.settings.fixed_gamma or START
        decay, momentum = self.settings.gamma_decay, self.settings.chosen_momentum
        incremental = self.schedule.incremental
        arrive = graph.even and not self._age  # kept values have their errors
        inference = (
            conjugate(gamma, decay, incremental, arrive, batch.steps[1])
            if momentum == "conjugate"
            else Inference(gamma, decay, momentum)
        )
        if self.schedule.fixed_gamma or self._precisions.varies:
            inference.gamma_decay = 1.0  # F moves by itself where its weights do
        self.values = {node.name: node.x for node in graph.nodes}
        relaxation = Relaxation(
            graph,
            self.schedule,
            inference,
            self._gate,
            least=batch.steps[0],
            most=batch.steps[1],
            start=self._age,
            seed=seed / len(self.settings.betas),
            betas=self.settings.betas,
            precisions=self._precisions,
            evaluate=lambda t, scale: self._evaluate(batch, t, scale),
            count_terms=batch.terms,
            update=update,
            auto=self.auto,
            curious=self._advisor.curious,
            kept=self.settings.reset == "never",
            held=batch.held,
        )
        relaxation.run()
        if self.settings.reset == "never":
            self._kept, self._age = graph.sites, self._age + len(relaxation.losses)
            self._kept_scale, self._draws = relaxation.scale, self._draws or batch.purity
            relaxation.weigh(0)  # the next first forward is evaluated before its relaxation
        self.report = self._report(relaxation)
        self._advisor.after(relaxation, self.report)
        return relaxation.losses[0]

    def _report(self, relaxation: Relaxation) -> StepReport:
        graph, held = relaxation.graph, relaxation.held or set()
        return StepReport(
            algorithm=self.settings.algorithm,
            steps=len(relaxation.losses),
            depth=graph.depth,
            nodes=[node.name for node in graph.nodes],
            depths=[node.depth for node in graph.nodes],
            loss=torch.stack(relaxation.losses),
            loss_terms=relaxation.terms,
            gamma=float(relaxation.inference.gamma),
            momentum=self.settings.chosen_momentum,
            curvature=None if self.auto is None else self.auto.curvature,
            energies=torch.stack(relaxation.energies),
            pulls=tuple(relaxation.pulls),
            _depths={
                name: graph.arrivals.get(parameter)
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad and parameter in held
            },
            _learned_at=tuple(relaxation.learned_at),
            _along=tuple(0 if node.along is None else node.along.times for node in graph.nodes),
        )

    def _held(self) -> set[nn.Parameter] | None:
        """The parameters that the optimizer moves; None where it is not known."""
        if self.optimizer is None:
            return None
        return {p for group in self.optimizer.param_groups for p in group["params"]}

    def _evaluate(self, batch: _Batch, t: int, scale: float) -> Tensor:
        """The loss with the values where they are now: the first forward's, then replays'."""
        loss, batch.loss = batch.loss, None
        if loss is not None:
            return loss
        sites, softmax, view = batch.graph.sites, self._softmax, self._view
        forward = Replay(
            batch.placement, view.verdicts, self._gate, softmax, view.names, sites, t, scale
        )
        with batch.purity.replay(), torch.enable_grad(), forward.watching():
            loss = batch.forward()
        forward.finished()
        if loss is None:
            raise ClosureError(
                f"The forward returned no loss at inference step t = {t}, though it did at t = 0."
            )
        return loss

    def _terms(self, graph: Graph, batch: Any, batch_size: Callable[[], float | None]) -> float:
        first = next((node.x.shape[0] for node in graph.nodes if node.x.dim()), 1)
        terms, doubt = count_terms(
            self.settings.loss_terms, graph.losses, batch, batch_size, otherwise=first
        )
        self._advisor.say("loss_terms", doubt)
        return terms
