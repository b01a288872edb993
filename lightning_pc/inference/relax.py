"""THE LOOP: T inference steps of one batch, values and weights as the schedule says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from lightning_pc.inference.curvature import REACH, AutoGamma, diagonal, largest_curvature
from lightning_pc.inference.movers import Mover
from lightning_pc.inference.schedules import Schedule
from lightning_pc.nodes.learned import LearnedGaussian
from lightning_pc.nodes.node import Node
from lightning_pc.precisions import Precisions, checked_weight
from lightning_pc.ranks import ALONE, Ranks
from lightning_pc.scaling import UNSCALED, Scaling
from lightning_pc.stages.evaluator import Asked, Evaluator

#: Stages in a row down to which values follow all that their predictions move by.
FOLLOWING = 2


@dataclass
class Trace:
    """What a relaxation went through.

    Attributes:
        losses: The loss at each evaluation, [] each.
        energies: Each node's energy at each evaluation, [n] each.
        pulls: Factor of the sum of the loss terms in F at each evaluation.
        free: F of all processes at each evaluation, [] each.
    """

    losses: list[Tensor] = field(default_factory=list)
    energies: list[Tensor] = field(default_factory=list)
    pulls: list[float] = field(default_factory=list)
    free: list[Tensor] = field(default_factory=list)

    def take_in(
        self, loss: Tensor, energies: Tensor, pull: float, terms: float, ranks: Ranks = ALONE
    ) -> Tensor:
        """Keeps an evaluation; returns its F, [], of all processes."""
        if loss.dim() or loss.element_size() < 4:
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32)).reshape(())
        self.losses.append(loss)
        self.energies.append(energies)
        self.pulls.append(pull)
        (free,) = ranks.sum(torch.add(energies.sum(), loss, alpha=terms * pull))
        self.free.append(free)
        return free


@dataclass
class Inference:
    """Infers the values of one batch, which descend F = E + beta * loss, and learns its weights.

    Args:
        evaluator: Gives predictions, energies and gradients at the values and weights of now.
        schedule: Who moves when.
        mover: How values move.
        precisions: Each energy's weight in F.
        auto: Chooses gamma, None where it is given.
        look_due: Look at the curvature, whoever gave gamma.
        follow: Values follow their predictions.
        beta: Factor of the loss in F, not 0; weights learn from F / beta.
        share: Factor of the loss in parameter gradients, before they are scaled.
        terms: M, the number of terms that the loss is a mean of.
        longest: Stages of the longest row without a skip, in any process.
        T: Inference steps, the most where ``until`` is given.
        until: The next step is the last where F has changed by no more than this share of itself at
            each of two steps on end; where weights rest, where the squared slope of F is below this
            share of it. None for T steps.
        age: Inference steps that kept values have behind them; None where values are made anew.
        update: One optimizer step on the gradients so far, but for the last of the batch.
        ranks: The processes that share the batch.
        scaling: Of gradients.

    Attributes:
        trace: What it went through.
        seen: What ``look_due`` saw: the largest curvature and the node where it is largest.
        updates: By id of each parameter, the updates within the batch that it took part in.
    """

    evaluator: Evaluator
    schedule: Schedule
    mover: Mover
    precisions: Precisions
    auto: AutoGamma | None
    look_due: bool
    follow: bool
    beta: float
    share: float
    terms: float
    longest: int
    T: int
    until: float | None
    age: int | None
    update: Callable[[], None]
    ranks: Ranks = ALONE
    scaling: Scaling = UNSCALED
    trace: Trace = field(default_factory=Trace)
    seen: tuple[float, Node] | None = None
    updates: Counter[int] = field(default_factory=Counter)
    _pull: float = 1.0
    _slope: Tensor | float = 0.0
    _early: bool = False  # errors stand at all nodes, before any has come from the loss

    def relax(self) -> bool:
        """Runs; the gradients of the last update are left in ``.grad``.

        Returns:
            False where the loss or an energy is not finite; no weight has moved on it.
        """
        nodes, schedule, t = self.evaluator.nodes, self.schedule, 0
        self.mover.ranks = self.ranks
        while t < self.T:
            self._weigh(t)
            moves, learns = schedule.moves(t, self.T), schedule.learns(t, self.T)
            loss = self._evaluate(t, moves, learns)
            energies = self.evaluator.energies()
            free = self.trace.take_in(loss, energies, self._pull, self.terms, self.ranks)
            last = t == self.T - 1
            if (learns or last or not t) and not math.isfinite(free):  # waits for a device
                return False
            if self.schedule.rests:
                self._slope = self._squared_slope()
            if moves:
                if not t:
                    self._begin()
                self.mover.observe(free)
                if self.scaling.fit(node.gradient for node in nodes):
                    self.mover.move(nodes, self._scale)
            if schedule.updates(t, self.T) and t < self.T - 1:
                self._step(t)
            for node in nodes:
                node.forget()
            t += 1
            if self.until is not None and t < self.T - 1 and self._settled(t):
                self.T = t + 1
        return True

    def _settled(self, t: int) -> bool:
        """Whether F hardly changes any more, though errors have reached all nodes."""
        arrivals = [node.arrival for node in self.evaluator.batch.nodes]
        if t < 3:
            return False
        free, until = torch.stack(self.trace.free[-3:]), self.until or 0.0
        # Of weights that rest, where F bends by 1 or more it can fall by no more than its slope.
        left = self._slope if self.schedule.rests else free.diff().abs().max()
        early = (self.age or 0) + t <= max(arrivals, default=0)
        return not self.ranks.largest(float(early or not left <= until * free[-1].abs()))

    def _squared_slope(self) -> Tensor:
        """The squared norm of dF/dx, []."""
        gradients = [node.gradient for node in self.evaluator.nodes if node.gradient is not None]
        if not gradients:  # none has arrived
            return torch.tensor(math.inf)
        return torch.stack([g.square().sum() for g in gradients]).sum() * self._scale**2

    @property
    def _scale(self) -> float:
        """Factor from the nodes' gradients to those of F."""
        return self.terms * self.beta / (self.share * self.scaling.factor)

    @property
    def _value_steps(self) -> int:
        """How many of the steps move values."""
        return self.T - (not self.schedule.moves(self.T - 1, self.T))

    def _weigh(self, t: int) -> None:
        """Sets the weights of the energies, and that of the sum of the loss terms."""
        nodes, age = self.evaluator.batch.nodes, self.age or 0
        if t and not self.precisions.varies:
            return
        end, depths = age + self._value_steps, {0, *[node.depth for node in nodes]}
        weights = {d: checked_weight(self.precisions, d, age + t, end) for d in depths}
        for node in nodes:
            node.weight = weights[node.depth]
        self._pull = self.beta * weights[0]

    def _asked(self, t: int, moves: bool, learns: bool) -> Asked:
        root = self.share * self.scaling.factor / self.beta
        last = learns and t == self.T - 1
        asked = Asked(
            (self.age or 0) + t, moves, learns, last, root * self._pull, root / self.terms
        )
        if self._early:  # then errors stand at all nodes, also at those that T would not reach
            asked.t = (self.age or 0) + len(self.evaluator.batch.nodes)
        return asked

    def _evaluate(self, t: int, moves: bool, learns: bool) -> Tensor:
        asked = self._asked(t, moves, learns)
        loss = self.evaluator(asked)
        if moves:
            nodes = self.evaluator.batch.nodes
            self.evaluator.moved(node for node in nodes if node.arrival <= asked.t + 1)
        return loss

    def _begin(self) -> None:
        """Chooses the rate; the gradients of the first evaluation stand in the nodes throughout."""
        nodes, auto, longest = self.evaluator.nodes, self.auto, self.longest
        asked, mover = self._asked(0, True, False), self.mover
        deep = 1.0
        if auto is not None and self.schedule.deep is not None and self.age is None:
            deep = min(1.0, (self.schedule.deep / longest) ** 2)
        for node in nodes:
            node.whole = self.schedule.whole or deep < 1.0
        if self.schedule.rests:
            mover.slack = self.until or 0.0
        if self.look_due:
            self.seen = self._look(asked, 0, True)
        if auto is None:
            return
        if auto.due():
            curvature, _ = self._look(asked, auto.looks, auto.fine)
            auto.take_in(self.ranks.largest(curvature))
        if mover.start_gamma != (rate := auto.gamma * deep):  # one that is kept goes on
            mover.start_gamma = mover.gamma = rate
        for node in nodes if self.follow else ():
            node.follow(min(1.0, FOLLOWING / longest))

    def _look(self, asked: Asked, seed: int, fine: bool) -> tuple[float, Node]:
        """The largest curvature of F at this moment and the node it is largest at."""
        nodes, reach = self.evaluator.nodes, self.auto.reach if self.auto else REACH
        each = self.evaluator.batch.nodes
        everything = self._everything(asked)
        weights = [node.weight for node in each]
        for node in each:
            if self.precisions.varies and not asked.t:
                node.weight = self.precisions.lasting(node.depth, self._value_steps)
        self.evaluator.moved(each)
        try:
            evaluate = partial(self.evaluator, everything)
            apart = self.auto is not None and self.auto.weighs
            return largest_curvature(nodes, evaluate, self._scale, seed, fine, reach, apart)
        finally:
            for node, weight in zip(each, weights, strict=True):
                node.weight = weight

    def learn_energies(self) -> None:
        """Energies that learn do so, at the values that the batch has left."""
        each, moved = self.evaluator.batch.nodes, (self.age or 0) + self._value_steps
        learned = [
            (node, node.energy)
            for node in self.evaluator.nodes
            if isinstance(node.energy, LearnedGaussian) and node.arrival <= moved
        ]
        if self.schedule.rests or not learned:
            return
        everything = self._everything(self._asked(0, True, False))
        shares = [(node, node.followed) for node in self.evaluator.nodes]
        for node, _ in shares:
            node.follow(0.0)

        def evaluate() -> None:
            self.evaluator.moved(each)
            self.evaluator(everything)

        evaluate()
        squares = [energy.squares for _, energy in learned]
        curvatures: list[Tensor | None] = [None for _ in learned]
        if not self.mover.samples:
            own, seed = [node for node, _ in learned], learned[0][1].batches
            curvatures = [*diagonal(own, evaluate, self._scale, seed)]
        for (_, energy), square, curvature in zip(learned, squares, curvatures, strict=True):
            energy.learn(square, curvature)
        self.evaluator.moved(each)
        for node, share in shares:
            node.followed = share
            node.forget()

    def _everything(self, asked: Asked) -> Asked:
        """As asked, of all nodes that errors ever reach; those of kept values reach all."""
        reached = self.T if self.age is None else len(self.evaluator.batch.nodes)
        return replace(asked, t=(self.age or 0) + reached)

    def _step(self, t: int) -> None:
        self.scaling.pass_on(self.evaluator.moving.values())
        averaged = self.ranks.average()  # some of them may be other processes' alone
        factor = self.scaling.factor
        stepped = self.evaluator.step(self.update)
        self._early = self._early or self.evaluator.early(stepped, (self.age or 0) + t)
        if self.scaling.factor >= factor:  # one that falls has left the step out
            self.updates.update(map(id, stepped))
        torch.clear_autocast_cache()
        self.evaluator.learned(stepped)
        for parameter in (*stepped, *averaged):
            parameter.grad = None  # one that is not reached takes no step, not one of zero
