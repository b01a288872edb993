"""Compiled steps: each kind of step of each form of batches has a program of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_pc.errors import ConfigError, PCError, refuse, shown
from lightning_pc.recording.applied import Applied
from lightning_pc.stages.evaluator import Asked, Evaluator
from lightning_pc.stages.graph import Graph
from lightning_pc.stages.local import Key, LocalErrors
from lightning_pc.stages.tracing import Program, UnfitError, compiled

#: Most forms of batches whose steps are compiled.
MOST = 8


def check_options(given: Any) -> None:
    """Refuses what `torch.compile` does not take."""
    message = f"compile={shown(given)}: expected True, False or a dict of torch.compile's arguments"
    refuse({f"{message}.": not isinstance(given, (bool, dict))})
    if given:
        try:
            torch.compile(lambda: None, **({} if given is True else given))
        except Exception as error:  # of each argument another kind
            told = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ConfigError(f"{message}. {told}") from error


@dataclass
class Form:
    """Batches whose evaluations look the same.

    Attributes:
        graph: Of the recordings.
        looks: What they do and what they read, but for the numbers.
        fit: Its steps may be compiled.
        programs: Of each kind of step; None of one that was met once.
    """

    graph: Graph
    looks: list[Any]
    fit: bool = True
    programs: dict[Key, Program | None] = field(default_factory=dict)


class Compiler:
    """Compiles the steps of a module's batches.

    A kind of step (which errors stand, who moves) is compiled when it is met for the second time.
    Its program must give what the evaluation gives. Where steps cannot be compiled they run as they
    are, and the user is told.

    Args:
        options: Of `torch.compile`.
        tell: Takes what the user is told.

    Attributes:
        programs: How many there are.
        seconds: How long it took to make them.
    """

    def __init__(self, options: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        whole = {"fullgraph": True, "dynamic": False}
        self.options, self._tell = {**whole, **options}, tell
        self._forms: list[Form] = []
        self.programs, self.seconds = 0, 0.0

    def take(self, evaluator: Evaluator) -> None:
        """Evaluates a batch in the evaluator's place, where its steps can be compiled."""
        assert isinstance(evaluator, LocalErrors)  # as the settings see to
        try:
            form = self._form(evaluator)
        except UnfitError as why:
            self.give_up(why)
        else:
            evaluator.run = Steps(self, form) if form.fit else None

    def __str__(self) -> str:
        """What is compiled."""
        return f"{self.programs} kinds of inference steps are compiled, in {self.seconds:.1f} s."

    def give_up(self, error: Exception) -> None:
        """Tells that steps run as they are."""
        inner = getattr(error, "inner_exception", error)  # compilers wrap what they met
        why = f"{error}"
        if not isinstance(error, (UnfitError, PCError)):
            why = f"{type(inner).__name__}: {inner}".partition("\n")[0]
        self._tell(f"compile=: inference steps run as they are, not compiled. {why}")

    def _form(self, evaluator: LocalErrors) -> Form:
        graph, looks = evaluator.graph, _looks(evaluator)
        for form in self._forms:
            if form.graph is graph and _equal(form.looks, looks):
                return form
        if len(self._forms) == MOST:
            raise UnfitError(
                f"Batches of {MOST} forms have been compiled, and this is another one: their "
                "shapes, or numbers given to a call, differ."
            )
        self._forms.append(Form(graph, looks))
        if why := _obstacle(evaluator):
            self._forms[-1].fit = False
            raise UnfitError(why)
        return self._forms[-1]


class Steps:
    """Evaluates the steps of one batch.

    Args:
        compiler: Whose.
        form: Of the batch.
    """

    def __init__(self, compiler: Compiler, form: Form) -> None:
        self._compiler, self._form = compiler, form
        self._begun = False
        self._given: list[Tensor] = []  # what stays the same throughout

    def __call__(self, evaluator: LocalErrors, asked: Asked) -> Tensor:
        """Evaluates, as `LocalErrors.evaluate` does."""
        if not self._begun:  # the forward has left its graph to the first evaluation
            self._begun, self._given = True, evaluator.read()
            return evaluator.evaluate(asked)
        if not evaluator.prepare(asked):
            return evaluator.evaluate(asked)
        programs, kind = self._form.programs, evaluator.kind(asked)
        if kind not in programs or not self._form.fit:
            programs[kind] = None
            return evaluator.evaluate(asked)
        scale = torch.tensor(asked.scale, dtype=torch.float64)
        tensors = [*self._given, scale, *evaluator.standing()]
        if (program := programs[kind]) is None:
            self._try(kind, evaluator, replace(asked, scale=scale), tensors)
            return evaluator.evaluate(asked)
        for key, tensor in program(tensors).items():
            evaluator.leave(key, tensor)
        return evaluator.loss

    def _try(self, kind: Key, evaluator: LocalErrors, asked: Asked, tensors: list[Tensor]) -> None:
        compiler, begun = self._compiler, time.perf_counter()
        try:
            self._form.programs[kind] = compiled(evaluator, asked, tensors, compiler.options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler raises; steps run without it
            self._form.fit = False
            compiler.give_up(error)
        else:
            compiler.programs += 1
            compiler.seconds += time.perf_counter() - begun


def _looks(evaluator: LocalErrors) -> list[Any]:
    """What evaluations do and what they read, but for the numbers."""
    batch, seen = evaluator.batch, dict[int, int]()
    calls = [batch.watch.calls[i] for p in batch.graph.pieces for i, _, _ in p.program]
    return [
        evaluator.layout(),
        [(call.args, call.kwargs, call.context, call.copies, call.rewrites) for call in calls],
        [(type(node.energy), vars(node.energy)) for node in batch.nodes],
        [
            (t.shape, t.stride(), t.dtype, t.device, seen.setdefault(id(t), n))
            if t.layout is torch.strided
            else t.layout
            for n, t in enumerate(evaluator.read())
        ],
    ]


def _equal(one: list[Any], other: list[Any]) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, TypeError, ValueError):  # arguments that do not compare, such as arrays
        return False


def _obstacle(evaluator: LocalErrors) -> str:
    """Why evaluations are not the same function each time, "" where they are."""
    batch = evaluator.batch
    for index, _, _ in (step for piece in batch.graph.pieces for step in piece.program):
        call = batch.watch.calls[index]
        name = getattr(call.function, "__name__", str(call.function))
        if call.draws:
            return f"'{name}' draws at random, and must draw the same at each step."
        if call.hooks:
            return f"There is a hook on what '{name}' gives."
        if isinstance(call.function, Applied):
            return f"'{name}' has a backward of its own."
    for parameter in evaluator.parameters:
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"There is a hook on a parameter of shape {tuple(parameter.shape)}."
    return ""
