"""Evaluators: one inference step's loss, energies and gradients, at the values and weights of now.

An evaluator runs the pieces of a recording. It leaves dF/dx and the energies in the nodes
(`Node.gradient`, `Node.total`) and adds dF/dtheta / M to ``.grad``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from lightning_pc.nodes.node import Node
from lightning_pc.recording.calls import Environment
from lightning_pc.recording.watch import Watch
from lightning_pc.stages.form import Form
from lightning_pc.stages.graph import Graph

_BACKWARD: Any = Variable._execution_engine.run_backward


@dataclass
class Batch:
    """One batch between its recorded forward and its inference.

    Attributes:
        watch: The recording.
        form: Its form.
        graph: Its nodes, made from that form.
        loss: The loss, with what autograd holds of its own stage.
        whole: That may be differentiated: autograd was cut nowhere but at the nodes.
    """

    watch: Watch
    form: Form
    graph: Graph
    loss: Tensor
    whole: bool


@dataclass(slots=True)
class Asked:
    """What an evaluation is asked for.

    Attributes:
        t: Inference step; nodes that errors reach later still equal their predictions.
        moves: Gradients of the values.
        learns: Gradients of the parameters.
        last: The parameters that no optimizer of ours moves gain theirs as well.
        root: Factor of the loss in parameter gradients, 0 for a loss that does not count.
        scale: Factor from an energy's gradient to the parameters'.
    """

    t: int
    moves: bool
    learns: bool
    last: bool
    root: float
    scale: float


@dataclass(eq=False)
class Evaluator:
    """Evaluates one batch.

    Args:
        batch: The batch.
        held: Parameters that the optimizer moves, None for all.
        once: Each stage counts once, with all of its parameters: none may wait for an error.
        steady: Weights stand while values move, so that what reads no value need not run again.
    """

    batch: Batch
    held: set[nn.Parameter] | None
    once: bool = False
    steady: bool = False

    def __post_init__(self) -> None:
        self.graph, self.form = self.batch.graph, self.batch.form
        self.loss = self.batch.loss.detach()
        dtype = torch.promote_types(self.loss.dtype, torch.float32)
        self._zero = self.loss.new_zeros((), dtype=dtype)

    @property
    def nodes(self) -> list[Node]:
        """The value nodes in call order."""
        return self.graph.nodes

    @cached_property
    def moving(self) -> list[nn.Parameter]:
        """Parameters of the loss that the optimizer moves."""
        return [p for p in self.graph.arrivals if self.held is None or p in self.held]

    def __call__(self, asked: Asked) -> Tensor:
        """Evaluates; returns the loss, [], as of the last time it counted."""
        raise NotImplementedError

    def learned(self, parameters: Iterable[nn.Parameter]) -> None:
        """Takes in that these parameters have moved."""

    def moved(self, nodes: Iterable[Node]) -> None:
        """Takes in that these values are about to move."""

    def disturbed(self) -> None:
        """Takes in that all values have moved, or will be moved and put back."""

    def finish(self) -> None:
        """Lets go of what the first forward left."""

    def energies(self) -> Tensor:
        """Each node's energy at the last evaluation, [n]; zero where no error stands."""
        zero = self._zero
        totals = [zero if node.total is None else node.total for node in self.nodes]
        return torch.stack([t if t.dtype is zero.dtype else t.to(zero.dtype) for t in totals])

    @staticmethod
    def differentiate(
        roots: Sequence[Any], errors: Sequence[Tensor], inputs: Sequence[Tensor], keep: bool = False
    ) -> None:
        """Adds the gradients of ``roots``, by ``errors``, to the ``.grad`` of ``inputs``.

        Each gains memory of its own: autograd may give several of them views of one error.
        """
        # What torch.autograd.backward does, without its checks, which take as long.
        flags = {"allow_unreachable": True, "accumulate_grad": True}
        _BACKWARD(tuple(roots), tuple(errors), keep, False, tuple(inputs), **flags)
        seen = {memory_of(error) for error in errors}
        for tensor in inputs:
            if tensor.grad is None:
                continue
            if (at := memory_of(tensor.grad)) in seen:
                tensor.grad = tensor.grad.clone()
            seen.add(at)

    def _environment(self, values: Iterable[int], given: Iterable[int]) -> Environment:
        watch = self.batch.watch
        env = {slot: watch.given[slot] for slot in given}
        for number in values:
            env[watch.sites[self.form.nodes[number]].slot] = self.nodes[number].x
        return env

    def asked_parameters(self, slots: Iterable[int], asked: Asked) -> list[nn.Parameter]:
        """Of the parameters in these slots, those that gain gradients now."""
        if not asked.learns:
            return []
        arrivals, parameters = self.graph.arrivals, self.batch.watch.parameters
        found = dict.fromkeys(parameters[slot] for slot in slots)
        if self.once:
            return list(found)
        return [
            p
            for p in found
            if arrivals.get(p, asked.t + 1) <= asked.t
            and (asked.last or self.held is None or p in self.held)
        ]


def memory_of(tensor: Tensor) -> int:
    """Tells tensors apart that have no memory in common."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, nested
        return id(tensor)


def counted_calls(batch: Batch) -> None:
    """Notes d loss / d call of the loss calls by which the number of terms is told."""
    calls = [c for c in batch.graph.losses if c.reduction in ("sum", "mean")]
    wanted = [c for c in calls if c.reduction == "sum" or len(batch.graph.losses) > 2]
    if not wanted:
        return
    edges = [c.edge for c in wanted]
    gradients = torch.autograd.grad(batch.loss, edges, retain_graph=True, allow_unused=True)
    for call, gradient in zip(wanted, gradients, strict=True):
        call.gradient = gradient
