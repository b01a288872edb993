"""One batch: record the forward, infer the values, learn the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_pc.choose import auto_of, compiler_of, mover_of, side_by_side
from lightning_pc.errors import DivergenceError
from lightning_pc.inference.movers import Mover
from lightning_pc.inference.relax import Inference
from lightning_pc.inference.schedules import Schedule, schedule
from lightning_pc.insight.alerts import Alerts
from lightning_pc.insight.explain import divergence, out_of_memory
from lightning_pc.insight.report import StepReport, make_report
from lightning_pc.nodes.learned import LearnedGaussian
from lightning_pc.nodes.model import Model
from lightning_pc.nodes.registry import energies_of
from lightning_pc.precisions import Wave, precisions
from lightning_pc.ranks import ALONE, Ranks
from lightning_pc.recording.draws import RandomStates
from lightning_pc.recording.losses import count_terms
from lightning_pc.scaling import UNSCALED, Scaling
from lightning_pc.settings import Settings
from lightning_pc.stages.batch import Batch, Waiting, counted_calls
from lightning_pc.stages.chain import require_chain
from lightning_pc.stages.checks import check_batch, checked_loss, shortcut, unreached
from lightning_pc.stages.evaluator import Evaluator
from lightning_pc.stages.in_place import PlainSGD
from lightning_pc.stages.local import LocalErrors
from lightning_pc.stages.recordings import Recordings
from lightning_pc.stages.side_by_side import SideBySide
from lightning_pc.stages.through import ThroughErrors

Output = TypeVar("Output")


class Learner:
    """Trains one module batch by batch; both doors, optimizer and strategy, stand before it.

    Args:
        model: The module, as its user wrote it.
        settings: The engine's arguments.
        optimizer: Who moves the parameters. The report speaks of those that it holds; the others
            keep the gradients that they had, and gain those of the last evaluation.
        ranks: The processes that train it together.
        scaling: Of gradients, which float16 asks for.

    Attributes:
        report: What the last step did.
        values: Node name -> value of the last batch, [B, *]; none of those that T never reaches.
        kind: Of evaluators.
        auto, alerts: Chooses gamma, None where it is given; tells the user.
        waiting: The batch between its forward and its inference, None where there is none.
        compiler: Compiles inference steps, None where they run as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        optimizer: Optimizer | None = None,
        ranks: Ranks = ALONE,
        scaling: Scaling = UNSCALED,
    ) -> None:
        self.ranks, self.scaling = ranks, scaling
        self.model, self.settings, self.optimizer = model, settings, optimizer
        self.schedule: Schedule = schedule(settings.algorithm)
        self.kind: type[Evaluator] = ThroughErrors if self.schedule.through else LocalErrors
        self.report: StepReport | None = None
        self.values: dict[str, Tensor] = {}
        self.auto = auto_of(settings)
        self._energies, self._met = energies_of(settings.energies), set[str]()
        self._precisions = Wave() if self.schedule.wave else precisions(settings.precisions)
        # One wave, and error coordinates, are exact for energies of x - mu alone.
        gaussian = self.schedule.wave or self.schedule.through
        softmax = "gaussian" if gaussian else settings.softmax_energy
        kinds = self.schedule.incremental, self.schedule.through, scaling.half
        nodes = Model(model, settings.value_nodes), softmax, self._energies
        self._recordings = Recordings(*nodes, settings.reset == "never", *kinds)
        self.waiting: Waiting | None = None
        self.alerts = Alerts(self.schedule, self.auto, self._precisions.varies)
        self.compiler = compiler_of(settings, partial(self.alerts.say, "compile"))
        self._age = 0  # inference steps that kept values have behind them
        self._kept: Mover | None = None  # who moves them

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside model and optimizer, often nothing."""
        state = LearnedGaussian.states(self._energies)
        if self.auto is not None:
            state["precisions"] = self._precisions.name
            state |= self.alerts.state_dict() | self.auto.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state of `state_dict`; what a given gamma makes needless is left out."""
        LearnedGaussian.load_states(self._energies, state)
        if self.auto is not None and state:
            self.auto.load_state_dict(state)
            another = state.get("precisions", self._precisions.name) != self._precisions.name
            self.auto.anew = self.auto.anew or another  # the curvature was that of another F
            self.alerts.load_state_dict(state)

    def check(self) -> None:
        """Refuses models and placements that can never work, before any batch.

        Raises:
            PCError: Naming the module and what to do.
        """
        self._recordings.model.look()

    def begin(
        self,
        forward: Callable[[], Output],
        loss_of: Callable[[Output], Tensor | None],
        given: Any = (),
        batch_size: Callable[[], float | None] = lambda: None,
        must: str = "",
    ) -> Output:
        """Runs the user's forward, once, and records it.

        Args:
            forward: The user's forward, which computes the loss.
            loss_of: The scalar loss in what ``forward`` returns, None to skip the batch.
            given: What ``forward`` is given, for ``loss_terms``.
            batch_size: Asked where no call of a loss function tells the number of terms.
            must: Whose closure it is, where one that runs the model must give a loss.

        Returns:
            What ``forward`` returned.

        Raises:
            PCError: The nodes cannot stand there; model and generators are as before.
        """
        self.waiting, self.report, self.values = None, None, {}  # a skipped batch leaves none
        with self._recordings.recording(self._held()) as watch:
            with watch.watching():
                output = forward()
                loss = loss_of(output)
            if loss is not None or (must and watch.calls):
                batch = self._recordings.prepare(watch, checked_loss(loss, must))
                self.waiting = self._prepare(batch, given, batch_size)
            else:
                self.ranks.agree([])
        return output

    def _prepare(self, batch: Batch, given: Any, batch_size: Callable[[], float | None]) -> Waiting:
        unfit, pushes = self.schedule.through or self.schedule.wave, min(self.settings.betas) < 0
        asked = self._energies, self._met, self._held()
        check_batch(batch, self.model, *asked, unfit=unfit, pushes=pushes)
        if self.schedule.wave:
            require_chain(batch)
        graph = batch.graph
        T = self.schedule.steps(graph.depth, self.settings.T, self._precisions.wave)
        T, longest, uneven = self.ranks.agree([T, graph.longest, not graph.even])
        if self.settings.reset == "batch":
            self.alerts.say("unreached", unreached(batch, T, self.model))
        if self._precisions.wave and not self.schedule.wave:
            self.alerts.say("shortcut", shortcut(batch))
        counted_calls(batch)
        groups = side_by_side(self.settings, batch, T)
        count = partial(self._terms, batch, given, batch_size)
        return Waiting(batch, T, longest, not uneven, count, groups)

    def infer(
        self, seed: float, update: Callable[[], None], sgd: PlainSGD | None = None
    ) -> Tensor | None:
        """Infers and learns: adds the parameter gradients of the last step to ``.grad``.

        Args:
            seed: Factor of the loss in parameter gradients (1 / accumulated batches).
            update: One optimizer step on the gradients so far, for every update but the last,
                which is the caller's.
            sgd: The optimizer, where ``update`` does no more than its step.

        Returns:
            The loss of the forward, None where the batch is skipped.

        Raises:
            DivergenceError: Loss or an energy is not finite; no weight has moved on it.
        """
        waiting, self.waiting = self.waiting, None
        if waiting is None:
            return None
        drawn = waiting.batch.drawn()
        given = waiting.batch, self._held(), self.schedule.wave, not self.schedule.incremental
        evaluator = self.kind(*given)
        if waiting.alike:
            evaluator = SideBySide(*given, waiting.alike, self.optimizer, sgd)
        if self.compiler is not None:
            self.compiler.take(evaluator)
        try:
            with torch.autocast(waiting.batch.loss.device.type, enabled=False):
                return self._infer(evaluator, waiting, seed, update)
        except BaseException as error:
            if self.auto is not None and isinstance(error, DivergenceError):
                self.auto.after_divergence()
            self._recordings.forget()
            self._age, self._kept = 0, None
            if told := out_of_memory(error, waiting.batch):
                raise told from error
            raise
        finally:
            evaluator.finish()
            for generator in drawn:
                generator.again()
            for node in evaluator.nodes:
                node.forget()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """What forwards inside have changed in model and generators is put back."""
        start, put_back = RandomStates(), self._recordings.model.save(self._held() or set())
        try:
            yield
        finally:
            self.waiting = None
            put_back()
            start.restore()

    def _infer(
        self, evaluator: Evaluator, waiting: Waiting, seed: float, update: Callable[[], None]
    ) -> Tensor:
        batch, T, betas = waiting.batch, waiting.T, self.settings.betas
        if self.auto is not None and self.auto.weighs:
            betas = (self.auto.beta,)
        held = evaluator.held or set()
        terms, kept = waiting.count() or math.nan, self.settings.reset == "never"
        self._recordings.keep_in_mind(batch)
        self.scaling.begin()
        if not kept:
            evaluator.let_go(T)
        self.values = {node.name: node.x for node in batch.nodes if node.x.numel()}
        if self.schedule.incremental:
            for parameter in evaluator.moving.values():
                parameter.grad = None
        begun = [n.coordinates.detach().clone() for n in evaluator.nodes] if betas[1:] else []
        phases: list[Inference] = []
        for beta in betas:
            if phases:
                evaluator.moved(batch.nodes)
                for node, start in zip(evaluator.nodes, begun, strict=True):
                    node.restart(start)
            inference = Inference(
                evaluator,
                self.schedule,
                self._kept or mover_of(self.settings, waiting.even),
                self._precisions,
                self.auto,
                self.alerts.look_due,
                self.settings.mover == "passing on",
                beta,
                seed / len(betas),
                terms,
                waiting.longest,
                T,
                self.settings.until,
                self._age if kept else None,
                update,
                self.ranks,
                self.scaling,
            )
            phases.append(inference)
            if not inference.relax():
                raise divergence(inference)
            inference.learn_energies()
        self.scaling.pass_on(evaluator.moving.values())
        learnable = {n: p for p, n in self._recordings.model.trained.items() if p in held}
        self.report = make_report(phases, learnable, str(self.compiler or ""))
        if not self.scaling.overflowed:  # else it has not inferred as it should
            self.alerts.after(inference, self.report)
        batch.keep_latents()
        if kept:
            self._recordings.kept = batch.sites  # the inside of nonlinearities is met no more
            self._age, self._kept = self._age + inference.T, inference.mover
        return phases[0].trace.losses[0]

    def _held(self) -> set[nn.Parameter] | None:
        """The parameters that the optimizer moves; None where it is not known."""
        if self.optimizer is None:
            return None
        return {p for group in self.optimizer.param_groups for p in group["params"]}

    def _terms(self, batch: Batch, given: Any, batch_size: Callable[[], float | None]) -> float:
        first = next((node.x.shape[0] for node in batch.nodes if node.x.dim()), 1)
        told, losses = self.settings.loss_terms, batch.losses
        terms, doubt = count_terms(told, losses, given, batch_size, otherwise=first)
        if not (self.auto and self.auto.weighs):  # whose beta the curvature sets right
            self.alerts.say("loss_terms", doubt)
        return terms
