"""What one step did: the record that lets anybody check that inference really ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_pc.inference.conjugate import Conjugate
from lightning_pc.inference.relax import Inference
from lightning_pc.insight.trend import Trend
from lightning_pc.nodes.energies import Free
from lightning_pc.nodes.node import NodeRows


@dataclass(eq=False)
class StepReport:
    """What ran in one predictive coding step.

    Axis legend: t inference steps, n nodes in call order.

    Attributes:
        algorithm: ``"ipc"``, ``"pc"``, ``"zil"``, ``"epc"``, ``"iepc"`` or ``"auto"``.
        steps: Evaluations run: T, of a pair of betas 2 T.
        depth: Depth of the module: its deepest node's.
        nodes: Node names, in call order.
        depths: Their depths: 1 for a node that the loss reads.
        loss: The user's loss at each evaluation, [t].
        loss_terms: M, the number of terms that the loss is a mean of.
        gamma: Inference rate at the end of the batch.
        momentum: Share of their velocity that values kept from step to step; ``"conjugate"``
            where they moved along conjugate gradients.
        curvature: Largest curvature of F in the values as of the last look, by which gamma="auto"
            goes (with varying precisions of the F that `Precisions.lasting` weighs); None where
            gamma is given. gamma * curvature must stay below 2 (1 + momentum), along conjugate
            gradients below 2.
        trend: Of the training loss, from batch to batch.
        rounding: Relative, of what computes F.
        sampled: Values were sampled, which raises F (`lightning_pc.langevin.Langevin`).
        pulls: Factor of the sum of the loss terms in F at each evaluation (beta and its weight).
        energies: Each node's energy in F (with its weight), summed over the batch, [t, n], on the
            device.
        followed: Node name -> share of its prediction's moves by which its value moved along, in
            (0, 1]; values that stayed are left out. Only in ipc with gamma="auto".
        free: Node names that no prediction holds, so that they have no energy.
        side_by_side: Node names of each group of stages that run as one (``parallel=``), as soon as
            errors stand at them.
        compiled: What is compiled (``compile=``), and how long that took; "" of nothing.
        learned: Parameter name -> number of updates it took part in.
    """

    algorithm: str
    steps: int
    depth: int
    nodes: list[str]
    depths: list[int]
    loss: Tensor
    loss_terms: float
    gamma: float
    curvature: float | None
    energies: Tensor
    momentum: float | Literal["conjugate"] = 0.0
    followed: dict[str, float] = field(default_factory=dict)
    free: list[str] = field(default_factory=list)
    side_by_side: list[list[str]] = field(default_factory=list)
    compiled: str = field(repr=False, default="")
    learned: dict[str, int] = field(repr=False, default_factory=dict)
    trend: Trend = field(repr=False, default_factory=Trend)
    rounding: float = field(repr=False, default=0.0)
    sampled: bool = field(repr=False, default=False)
    pulls: tuple[float, ...] = field(repr=False, default=(1.0,))

    @cached_property
    def energy(self) -> Tensor:
        """Each node's energy, summed over the batch, [t, n], on the CPU."""
        return self.energies.detach().cpu()

    @cached_property
    def peak_energy(self) -> dict[str, float]:
        """Node name -> the largest energy it had; zero means that it never inferred anything."""
        # Rounding may make a divergence negative that is next to nothing.
        return dict(zip(self.nodes, self.energy.abs().amax(0).tolist(), strict=True))

    @cached_property
    def energy_by_depth(self) -> dict[int, float]:
        """Depth -> its nodes' share of all energy at the last evaluation, in [0, 1]; {} of none.

        Energy piles up next to the loss (depth 1), and little of it reaches the top. Energies count
        with their weights: where these vary, most of it is that of the last step's node.
        """
        shares = dict.fromkeys(sorted(self.depths), 0.0)
        total = float(self.energy[-1].sum())
        if not total:
            return {}
        for depth, energy in zip(self.depths, self.energy[-1].tolist(), strict=True):
            shares[depth] += energy / total
        return shares

    @cached_property
    def free_energy(self) -> Tensor:
        """F at each evaluation: beta times the sum of loss terms, and all energies, [t]."""
        loss = self.loss.detach().cpu() * self.loss_terms
        return loss * torch.tensor(self.pulls, dtype=loss.dtype) + self.energy.sum(1)


def make_report(
    phases: Sequence[Inference], learnable: Mapping[str, nn.Parameter], compiled: str = ""
) -> StepReport:
    """Of a batch that was inferred in ``phases``; the optimizer's parameters by name."""
    inference, traces = phases[-1], [phase.trace for phase in phases]
    batch, auto, mover = inference.evaluator.batch, inference.auto, inference.mover
    losses = [loss for trace in traces for loss in trace.losses]
    return StepReport(
        algorithm=inference.schedule.name,
        steps=len(losses),
        depth=batch.graph.depth,
        nodes=[node.name for node in batch.nodes],
        depths=[node.depth for node in batch.nodes],
        loss=torch.stack(losses),
        loss_terms=inference.terms,
        gamma=float(mover.gamma),
        momentum="conjugate" if isinstance(mover, Conjugate) else mover.momentum,
        curvature=None if auto is None else auto.curvature,
        energies=torch.stack([energy for trace in traces for energy in trace.energies]),
        pulls=tuple(pull for trace in traces for pull in trace.pulls),
        rounding=max(node.rounding for node in batch.nodes),
        sampled=mover.samples,
        followed={node.name: node.followed for node in batch.nodes if node.followed},
        free=[node.name for node in batch.nodes if isinstance(node.energy, Free)],
        side_by_side=[
            [member.name for member in node.members]
            for node in inference.evaluator.nodes
            if isinstance(node, NodeRows)
        ],
        compiled=compiled,
        learned={  # the last update is still to come
            name: inference.updates[id(p)] + (p.grad is not None) for name, p in learnable.items()
        },
    )
