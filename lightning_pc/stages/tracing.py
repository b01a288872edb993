"""An evaluation as a function of the tensors that it reads, which a compiler can take.

Pieces are pure, so an evaluation is such a function. To trace it, it runs once on tensors without
memory. That shows every operation, those of the backward passes as well. And it stops where a
number is looked at that may be another one in the next batch.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_pc.errors import RecordingError
from lightning_pc.stages.batch import memory_of
from lightning_pc.stages.evaluator import Asked
from lightning_pc.stages.local import Key, LocalErrors
from lightning_pc.stages.verify import check_same

#: Modes of `torch.compile` in which results of one call may be overwritten by the next.
_REUSE = ("reduce-overhead", "max-autotune")


class UnfitError(Exception):
    """Steps cannot be compiled, and why."""


@dataclass
class Program:
    """A traced evaluation, and what a compiler makes of it.

    Attributes:
        traced: Of what it reads; gives what it leaves. None once it has been proved.
        compiled: The same.
        reads: Which tensors of those that it may read.
        leaves: What its results are.
        copied: Results that must be copied, since their memory is not theirs alone.
    """

    traced: Callable[..., Any] | None
    compiled: Callable[..., Any]
    reads: list[int]
    leaves: list[Key]
    copied: list[Key]

    @torch.no_grad()
    def __call__(self, tensors: list[Tensor]) -> dict[Key, Tensor]:
        """What the evaluation leaves."""
        left = self._run(self.compiled, tensors)
        for key in self.copied:
            left[key] = left[key].clone()
        return left

    @torch.no_grad()
    def prove(self, evaluator: LocalErrors, asked: Asked, tensors: list[Tensor]) -> None:
        """Whether the trace leaves what the evaluation leaves.

        Raises:
            UnfitError: A number of the batch in which it was traced has stayed in it.
        """
        assert self.traced is not None
        with evaluator.rehearsal():
            evaluator.evaluate(asked)
            expected = evaluator.left(asked)
        rounding = max(node.rounding for node in evaluator.batch.nodes)
        found = self._run(self.traced, tensors)
        for key, tensor in expected.items():
            if tensor.layout is not torch.strided:
                raise UnfitError("A gradient is sparse.")
            try:
                check_same(found[key], tensor, "", rounding)
            except RecordingError as error:
                told = f"A trace of a step leaves another {key[0]} than the step does"
                raise UnfitError(f"{told}: a call looks at numbers outside of torch.") from error

    def _run(self, function: Callable[..., Any], tensors: list[Tensor]) -> dict[Key, Tensor]:
        results = function(*[tensors[index] for index in self.reads])
        return dict(zip(self.leaves, results, strict=True))


def compiled(
    evaluator: LocalErrors, asked: Asked, tensors: list[Tensor], options: Mapping[str, Any]
) -> Program:
    """The program of a kind of step, which reads some of the tensors."""
    program = _trace(evaluator, asked, tensors)
    program.prove(evaluator, asked, tensors)
    program.compiled = _compile(program, tensors, options)
    found = program(tensors)  # where most compilers begin
    memories = Counter(map(memory_of, {id(t): t for t in (*tensors, *found.values())}.values()))
    reuses = options.get("mode") in _REUSE
    program.copied = [key for key, t in found.items() if reuses or memories[memory_of(t)] > 1]
    return program


@torch.no_grad()
def _compile(
    program: Program, tensors: list[Tensor], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """What a compiler makes of a trace.

    `torch.compile` looks at each call whether its Python still means the same. A trace has no
    Python left, and what programs read has been checked. So the backend is called at once, by which
    a step of layers of width 64 takes a sixth less; unless there are other arguments than that.
    """
    if options.keys() - {"fullgraph", "dynamic", "backend"} or options.get("dynamic"):
        return torch.compile(program.compiled, **options)
    from torch._dynamo import lookup_backend  # takes a second to import

    graph: GraphModule = program.compiled.__self__  # type: ignore[attr-defined]
    backend = lookup_backend(options.get("backend", "inductor"))
    return backend(copy.deepcopy(graph), [tensors[index] for index in program.reads])


def _trace(evaluator: LocalErrors, asked: Asked, tensors: list[Tensor]) -> Program:
    """A program that is not compiled yet."""
    leaves: list[Key] = []
    places = evaluator.constants()
    before = [held[key] for held, key in places]
    each = {id(tensor): tensor for tensor in before}

    def evaluate(*without_memory: Tensor) -> list[Tensor]:
        stands_for = dict(zip(each, without_memory, strict=True))
        for (held, key), tensor in zip(places, before, strict=True):
            held[key] = stands_for[id(tensor)]
        evaluator.evaluate(asked)
        left = evaluator.left(asked)
        leaves.extend(left)
        return [*left.values()]

    log = logging.getLogger("torch._subclasses.fake_tensor")  # it shows where a trace stops
    with evaluator.rehearsal():
        log.addFilter(_no)
        try:
            record = make_fx(evaluate, tracing_mode="fake", _allow_non_fake_inputs=True)
            traced = record(*each.values())
        finally:
            log.removeFilter(_no)
            for (held, key), tensor in zip(places, before, strict=True):
                held[key] = tensor
    graph, reads = _as_function(traced, [*each.values()], tensors)
    function = GraphModule(torch.nn.Module(), graph).forward
    return Program(function, function, reads, leaves, [])


def _no(_: logging.LogRecord) -> bool:
    return False


def _as_function(
    traced: GraphModule, constants: list[Tensor], tensors: list[Tensor]
) -> tuple[Graph, list[int]]:
    """The graph of a trace without the tensors that it holds; which it takes in their place."""
    graph, number = traced.graph, dict[int, int]()
    for index, tensor in enumerate(tensors):
        number.setdefault(id(tensor), index)
    stands_for: dict[int, list[torch.fx.Node]] = {}
    arguments = graph.find_nodes(op="placeholder")
    for node, tensor in zip(arguments, constants, strict=True):
        stands_for.setdefault(number[id(tensor)], []).append(node)
    for node in graph.find_nodes(op="get_attr"):
        tensor = getattr(traced, str(node.target))
        if id(tensor) not in number:
            told = f"A call makes or reads a tensor of shape {tuple(tensor.shape)} by itself."
            raise UnfitError(told)
        stands_for.setdefault(number[id(tensor)], []).append(node)
    reads = [index for index, nodes in stands_for.items() if any(node.users for node in nodes)]
    first = next(iter(graph.nodes))
    for index in reads:
        with graph.inserting_before(first):
            argument = graph.placeholder(f"read_{index}")
        for node in stands_for[index]:
            node.replace_all_uses_with(argument)
    for node in (node for nodes in stands_for.values() for node in nodes):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        node.meta.clear()  # which holds tensors
    return graph, reads
