"""An evaluation as a function of the tensors that it reads, which a compiler can take.

Pieces are pure, so an evaluation is such a function. To trace it, it runs once on tensors without
memory. That shows every operation, those of the backward passes as well. And it stops where a
number is looked at that may be another one in the next batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_pc.errors import RecordingError
from lightning_pc.stages.batch import memory_of
from lightning_pc.stages.evaluator import Asked
from lightning_pc.stages.local import Key, LocalErrors
from lightning_pc.stages.verify import check_same


class UnfitError(Exception):
    """Steps cannot be compiled, and why."""


@dataclass
class Program:
    """A compiled evaluation.

    Attributes:
        function: Of what it reads; gives what it leaves.
        reads: Which tensors of those that it may read.
        leaves: What its results are.
        shared: Results that have memory in common with others, or with what is read.
    """

    function: Callable[..., Any]
    reads: list[int]
    leaves: list[Key]
    shared: list[Key] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, tensors: list[Tensor]) -> dict[Key, Tensor]:
        """What the evaluation leaves."""
        results = self.function(*[tensors[index] for index in self.reads])
        left: dict[Key, Tensor] = dict(zip(self.leaves, results, strict=True))
        for key in self.shared:
            left[key] = left[key].clone()
        return left


def compiled(
    evaluator: LocalErrors, asked: Asked, tensors: list[Tensor], options: Mapping[str, Any]
) -> Program:
    """The program of a kind of step, which reads some of the tensors."""
    program = _trace(evaluator, asked, tensors)
    with evaluator.rehearsal():
        evaluator.evaluate(asked)
        expected = evaluator.left(asked)
    _check(program(tensors), expected, max(node.rounding for node in evaluator.batch.nodes))
    program.function = torch.compile(program.function, **options)
    found = program(tensors)
    memories = Counter(map(memory_of, {id(t): t for t in (*tensors, *found.values())}.values()))
    program.shared = [key for key, tensor in found.items() if memories[memory_of(tensor)] > 1]
    return program


def _check(found: Mapping[Key, Tensor], expected: Mapping[Key, Tensor], rounding: float) -> None:
    """Whether a trace is all of the evaluation: no number of one batch has stayed in it."""
    for key, tensor in expected.items():
        try:
            check_same(found[key], tensor, "", rounding)
        except RecordingError as error:
            raise UnfitError(f"A trace of a step leaves another {key[0]} than it does.") from error


def _trace(evaluator: LocalErrors, asked: Asked, tensors: list[Tensor]) -> Program:
    """A program that is not compiled yet."""
    leaves: list[Key] = []

    def evaluate() -> list[Tensor]:
        evaluator.evaluate(asked)
        left = evaluator.left(asked)
        leaves.extend(left)
        return [*left.values()]

    with evaluator.rehearsal():
        traced = make_fx(evaluate, tracing_mode="fake", _allow_non_fake_inputs=True)()
    reads = _take_arguments(traced, tensors)
    return Program(traced.forward, reads, leaves)


def _take_arguments(traced: GraphModule, tensors: list[Tensor]) -> list[int]:
    """Makes arguments of the tensors that a trace holds; returns which they are."""
    graph, known = traced.graph, {id(t): n for n, t in reversed([*enumerate(tensors)])}
    held: dict[int, list[torch.fx.Node]] = {}
    for node in graph.find_nodes(op="get_attr"):
        tensor = getattr(traced, str(node.target))
        if id(tensor) not in known:
            raise UnfitError(
                f"A call makes or reads a tensor of shape {tuple(tensor.shape)} by itself."
            )
        held.setdefault(known[id(tensor)], []).append(node)
    for number, nodes in reversed(held.items()):
        with graph.inserting_before():
            argument = graph.placeholder(f"read_{number}")
        for node in nodes:
            node.replace_all_uses_with(argument)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    traced.recompile()
    return [*held]
