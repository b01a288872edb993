"""Compiled steps: each kind of step of each form of batches has a program of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import BuiltinFunctionType, EllipsisType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_pc.errors import ConfigError, PCError, refuse, shown
from lightning_pc.recording.applied import Applied
from lightning_pc.recording.calls import Call, Ref
from lightning_pc.stages.evaluator import Asked, Evaluator
from lightning_pc.stages.graph import Graph
from lightning_pc.stages.local import Key, LocalErrors
from lightning_pc.stages.tracing import Program, UnfitError, compiled

#: Most forms of batches whose steps are compiled, and most kinds of steps of each that are known.
FORMS, KINDS = 8, 1024
_DIFFER = "Their shapes, or numbers given to a call, differ."
#: What does not change by itself.
_STILL = (
    *(int, float, complex, bool, str, bytes, type(None), EllipsisType, np.generic, type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    BuiltinFunctionType,
)


def check_options(given: Any) -> None:
    """Refuses what `torch.compile` does not take."""
    message = f"compile={shown(given)}: expected True, False or a dict of torch.compile's arguments"
    refuse({f"{message}.": not isinstance(given, (bool, dict))})
    if given is not False:
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
        programs: Of each kind of step that was met; None of one that is not compiled.
    """

    graph: Graph
    looks: list[Any]
    fit: bool = True
    programs: dict[Key, Program | None] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many programs it has."""
        return sum(program is not None for program in self.programs.values())


class Compiler:
    """Compiles the steps of a module's batches.

    A kind of step (which errors stand, who moves) is compiled when it is met in a second batch. Its
    trace must give what the evaluation gives, there and in the next batch. Where steps cannot be
    compiled they run as they are, and the user is told.

    Args:
        options: Of `torch.compile`.
        tell: Takes what the user is told.

    Attributes:
        seconds: How long it took to compile.
    """

    def __init__(self, options: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        whole = {"fullgraph": True, "dynamic": False}
        self.options, self._tell = {**whole, **options}, tell
        self._forms: list[Form] = []  # the last one first
        self.seconds = 0.0

    @property
    def programs(self) -> int:
        """How many there are."""
        return sum(form.count for form in self._forms)

    def __str__(self) -> str:
        """What is compiled."""
        return f"{self.programs} kinds of inference steps are compiled, in {self.seconds:.1f} s."

    def take(self, evaluator: Evaluator) -> None:
        """Evaluates a batch in the evaluator's place, where its steps can be compiled."""
        assert isinstance(evaluator, LocalErrors)  # as the settings see to
        try:
            _check(evaluator)
            form = self._form(evaluator)
        except UnfitError as why:
            self.tell(why)
        else:
            evaluator.run = Steps(self, form) if form.fit else None

    def _form(self, evaluator: LocalErrors) -> Form:
        graph, looks = evaluator.graph, _looks(evaluator)
        form = next((f for f in self._forms if f.graph is graph and f.looks == looks), None)
        form = form or Form(graph, looks)
        self._forms = [form, *(other for other in self._forms if other is not form)]
        idle = [other for other in self._forms if not other.count]
        if len(idle) > FORMS:
            self._forms = [other for other in self._forms if other not in idle[FORMS:]]
            self.tell(
                UnfitError(f"More than {FORMS} batches on end were of another form. {_DIFFER}")
            )
        return form

    def tell(self, error: Exception) -> None:
        """Tells the user why steps are not compiled."""
        inner = getattr(error, "inner_exception", error)  # compilers wrap what they met
        why = f"{error}"
        if not isinstance(error, (UnfitError, PCError)):
            why = f"{type(inner).__name__}: {inner}".partition("\n")[0]
        self._tell(f"compile=: steps of some batches run as they are, not compiled. {why}")

    def room(self, form: Form) -> None:
        """Whether steps of this form may be compiled.

        Raises:
            UnfitError: Those of many others are.
        """
        if not form.count and sum(bool(other.count) for other in self._forms) >= FORMS:
            raise UnfitError(f"This is another form than {FORMS} that are compiled. {_DIFFER}")


class Steps:
    """Evaluates the steps of one batch.

    Args:
        compiler: Whose.
        form: Of the batch.
    """

    def __init__(self, compiler: Compiler, form: Form) -> None:
        self._compiler, self._form = compiler, form
        self._given: list[Tensor] | None = None  # what stays the same throughout
        self._scales = dict[float | Tensor, Tensor]()  # they are read as well
        self._new = set[Key]()  # kinds of steps that were met, or compiled, in this batch

    def __call__(self, evaluator: LocalErrors, asked: Asked) -> Tensor:
        """Evaluates, as `LocalErrors.evaluate` does."""
        if self._given is None:  # the forward has left its graph to the first evaluation
            self._given = evaluator.read()
            return evaluator.evaluate(asked)
        if not evaluator.prepare(asked):
            return evaluator.evaluate(asked)
        programs, kind = self._form.programs, evaluator.kind(asked)
        if kind not in programs:
            programs[kind] = None
            self._new.add(kind)
            if len(programs) > KINDS:
                why = "Factors of the loss or of energies are others in each batch."
                return self._give_up(UnfitError(why), evaluator, asked)
        if programs[kind] is None and kind in self._new:
            return evaluator.evaluate(asked)
        scale = self._scales.get(asked.scale)
        if scale is None:
            scale = self._scales[asked.scale] = torch.tensor(asked.scale, dtype=torch.float64)
        tensors = [*self._given, scale, *evaluator.standing()]
        try:
            program = programs[kind]
            if program is None or (program.traced is not None and kind not in self._new):
                program = self._due(kind, evaluator, replace(asked, scale=scale), tensors)
            left = program(tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler raises, when it compiles or later
            return self._give_up(error, evaluator, asked)
        for key, tensor in left.items():
            evaluator.leave(key, tensor)
        return evaluator.loss

    def _give_up(self, error: Exception, evaluator: LocalErrors, asked: Asked) -> Tensor:
        self._form.fit, evaluator.run = False, None
        self._form.programs.clear()
        self._compiler.tell(error)
        return evaluator.evaluate(asked)

    def _due(
        self, kind: Key, evaluator: LocalErrors, asked: Asked, tensors: list[Tensor]
    ) -> Program:
        """The program of a kind of step, which is compiled now, or proved in a second batch."""
        program = self._form.programs[kind]
        if program is None:
            begun = time.perf_counter()
            self._compiler.room(self._form)
            program = compiled(evaluator, asked, tensors, self._compiler.options)
            self._form.programs[kind] = program
            self._new.add(kind)
            self._compiler.seconds += time.perf_counter() - begun
        else:
            program.prove(evaluator, asked, tensors)
            program.traced = None
        return program


def _looks(evaluator: LocalErrors) -> list[Any]:
    """What evaluations do and what they read, but for the numbers."""
    batch, seen = evaluator.batch, dict[int, int]()
    calls = [batch.watch.calls[i] for p in batch.graph.pieces for i, _, _ in p.program]
    return [
        evaluator.layout(),
        [_plain((call.args, call.kwargs), _name(call)) for call in calls],
        [(call.context, call.copies, call.rewrites) for call in calls],
        [(type(e := node.energy), _plain(dict(vars(e)), e.name)) for node in batch.nodes],
        [
            (t.shape, t.stride(), t.dtype, t.device, seen.setdefault(id(t), n))
            for n, t in enumerate(evaluator.read())
        ],
    ]


def _plain(given: Any, name: str) -> Any:
    """What a call or an energy of this name is given, such that it can be compared and stays.

    Raises:
        UnfitError: They may change from batch to batch.
    """
    kind = type(given)
    if kind is Ref:
        return kind, int(given)
    if isinstance(given, (float, complex)):  # -0.0 is not 0.0 here, and nan is nan
        return kind, repr(given)
    if isinstance(given, _STILL):
        return kind, given
    if isinstance(given, (tuple, list)):
        return kind, [_plain(one, name) for one in given]
    if kind is dict:
        return kind, [(key, _plain(one, name)) for key, one in given.items()]
    if kind is slice:
        return kind, [_plain(one, name) for one in (given.start, given.stop, given.step)]
    raise UnfitError(f"'{name}' is given a {kind.__name__}, which may change.")


def _check(evaluator: LocalErrors) -> None:
    """Evaluations are the same function in each batch of a form.

    Raises:
        UnfitError: They are not.
    """
    batch = evaluator.batch
    for index, _, _ in (step for piece in batch.graph.pieces for step in piece.program):
        call = batch.watch.calls[index]
        if call.draws:
            told = f"'{_name(call)}' draws at random"
            raise UnfitError(f"{told}, and must draw the same at each step.")
        if call.hooks:
            raise UnfitError(f"There is a hook on what '{_name(call)}' gives.")
        if isinstance(call.function, Applied):
            raise UnfitError(f"'{_name(call)}' has a backward of its own.")
    for parameter in evaluator.parameters:
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UnfitError(f"There is a hook on a parameter of shape {tuple(parameter.shape)}.")
    for tensor in evaluator.read():
        if tensor.layout is not torch.strided:
            raise UnfitError(f"A call reads a tensor of layout {tensor.layout}.")
    for node in batch.nodes:
        if not node.x.dim():
            raise UnfitError(f"The value at '{node.name}' is a single number.")


def _name(call: Call) -> str:
    return getattr(call.function, "__name__", str(call.function))
