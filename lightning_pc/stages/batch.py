"""A batch between its recorded forward and its inference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pc.nodes.node import Node
from lightning_pc.recording.calls import Environment
from lightning_pc.recording.draws import Draws
from lightning_pc.recording.losses import LossCall
from lightning_pc.recording.sites import Site
from lightning_pc.recording.watch import Watch
from lightning_pc.stages.graph import Graph, Piece, Stage


@dataclass
class Batch:
    """One batch between its recorded forward and its inference.

    Attributes:
        watch: The recording.
        graph: Of its form.
        nodes: The value nodes in call order.
        loss: The loss, with what autograd holds of its own stage (in error coordinates, of all).
        whole: That may be differentiated: autograd was cut nowhere but at the nodes.
    """

    watch: Watch
    graph: Graph
    nodes: list[Node]
    loss: Tensor
    whole: bool

    def let_loss_go(self) -> None:
        """Frees what autograd holds of the loss; inference has its own."""
        self.loss = self.loss.detach()
        for call in self.watch.losses:
            call.edge = None

    @property
    def sites(self) -> list[Site]:
        """Every place that was met, those without a node (and why) included."""
        return [site for site in self.watch.sites if site.reported]

    @property
    def losses(self) -> list[LossCall]:
        """The calls of loss functions on which the loss depends."""
        return [self.watch.losses[i] for i in self.graph.losses]

    @property
    def guess(self) -> float:
        """The loss of a guess among all classes, infinite where it is not known."""
        losses = self.losses
        alone = len(losses) == 1 and losses[0].slot == self.graph.loss
        return losses[0].guess if alone else math.inf

    @cached_property
    def arrivals(self) -> dict[nn.Parameter, int]:
        """Trainable parameter -> first inference step at which an error reaches it."""
        return {self.watch.parameters[slot]: t for slot, t in self.graph.reached.items()}

    def parameters(self, stage: Stage) -> list[nn.Parameter]:
        """The trainable parameters of a stage."""
        return [self.watch.parameters[slot] for slot in stage.parameters]

    def site(self, number: int) -> Site:
        """Where a node stands."""
        return self.watch.sites[self.graph.sites[number]]

    @property
    def latent(self) -> bool:
        """Whether some of its values have no prediction."""
        return any(site.stand is not None for site in self.sites)

    def keep_latents(self) -> None:
        """Where latent variables of numbered samples ended stays with their modules."""
        for site in self.sites:
            if site.stand is not None and site.stand.numbers is not None and site.node is not None:
                site.stand.of.keep(site.stand.numbers, site.node.x.detach())

    def drawn(self) -> list[Draws]:
        """The generators that calls draw from, as they stand: calls that draw again move them."""
        return [*map(Draws, {draw.generator for call in self.watch.calls for draw in call.draws})]

    def environment(self, piece: Piece) -> Environment:
        """What a piece reads: parameters, constants, and values."""
        env = {slot: self.watch.given[slot] for slot in piece.given}
        return env | {slot: self.nodes[number].x for slot, number in piece.values.items()}


@dataclass
class Waiting:
    """A batch in hand, before its inference.

    Attributes:
        batch: The batch.
        T: Inference steps.
        longest: Stages of the longest row without a skip, in any process.
        even: Errors arrive depth by depth, in each process.
        count: Counts the terms of its loss.
        alike: Groups of looks at pieces that run as one.
    """

    batch: Batch
    T: int
    longest: int
    even: bool
    count: Callable[[], float]
    alike: list[list[Any]]


def memory_of(tensor: Tensor) -> int:
    """Tells tensors apart that have no memory in common."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, nested
        return id(tensor)


def counted_calls(batch: Batch) -> None:
    """Notes d loss / d call of the loss calls by which the number of terms is told."""
    losses = batch.losses
    calls = [c for c in losses if c.reduction in ("sum", "mean")]
    wanted = [c for c in calls if c.reduction == "sum" or len(losses) > 2]
    if not wanted:
        return
    edges = [c.edge for c in wanted if c.edge is not None]
    gradients = torch.autograd.grad(batch.loss, edges, retain_graph=True, allow_unused=True)
    for call, gradient in zip(wanted, gradients, strict=True):
        call.gradient = gradient
