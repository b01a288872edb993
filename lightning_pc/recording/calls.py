"""A recorded torch call, and how it runs again.

Tensors of a recording live in *slots*, which are numbered in the order in which they appear. A
call reads slots and fills slots. A call that writes to a tensor in place fills a new slot with it,
so that whoever reads it later depends on the write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_pc.recording.draws import Draws

#: The tensors of a batch by slot.
Environment = dict[int, Tensor]


class Ref(int):
    """Stands among a call's arguments for the tensor that it reads there: index into `reads`."""

    def __eq__(self, other: object) -> bool:
        """Arguments are compared: a tensor is no number."""
        return type(other) is Ref and int(self) == int(other)

    __hash__ = int.__hash__


_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size))


class Context(NamedTuple):
    """Under which modes of torch a call ran.

    Attributes:
        grad: Gradients were on.
        autocast: (device type, enabled, dtype) of each device type asked for.
    """

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The same modes again."""
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled))
            yield


def current_context(device: str) -> Context | None:
    """The modes that are on, None for those of an ordinary forward."""
    grad = torch.is_grad_enabled()
    if not torch._C._is_any_autocast_enabled():
        return None if grad else Context(False, ())
    types = dict.fromkeys(("cpu", device))
    states = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in types]
    return Context(grad, tuple(states))


class Call:
    """One recorded call.

    Attributes:
        function: The torch function.
        args: Its arguments, a `Ref` in the place of each tensor.
        kwargs: Likewise.
        reads: The slots of these tensors, in the order of the `Ref` indices.
        fills: The slots of the tensors in its result.
        rewrites: (index into ``reads``, slot): what it wrote to in place, and the slot from then.
        context: Modes of torch, None for the ordinary ones.
        draws: What it drew from.
        copies: Indices into ``reads`` of tensors from before the forward that it writes to: when
            it runs again it writes to a copy of its own.
        hooks: Hooks on its results: (which of them, the hook, its id, all that the tensor has).
    """

    rewrites: tuple[tuple[int, int], ...] = ()
    draws: tuple[Draws, ...] = ()
    copies: tuple[int, ...] = ()
    hooks: tuple[tuple[int, Any, int, Any], ...] = ()

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        reads: tuple[int, ...],
        context: Context | None = None,
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.reads, self.context = reads, context
        self.fills: tuple[int, ...] = ()

    def apply(self, tensors: Sequence[Tensor]) -> Any:
        """Calls the function on what it reads."""
        args = _without_refs(self.args, tensors)
        return self.function(*args, **_without_refs(self.kwargs, tensors))

    def run(self, env: Environment) -> None:
        """Runs again on the tensors in ``env``, which gains the results."""
        tensors = [env[slot] for slot in self.reads]
        for index in self.copies:
            tensors[index] = tensors[index].clone()
        for draw in self.draws:
            draw.again()
        output, fills = self.apply(tensors), self.fills
        if len(fills) == 1 and isinstance(output, Tensor):
            env[fills[0]] = output
        elif fills:
            env.update(zip(fills, tensors_in(output), strict=True))
        for index, slot in self.rewrites:
            env[slot] = tensors[index]
        for which, hook, number, hooks in self.hooks:
            result = env[fills[which]]
            stays = number in hooks  # or the user has removed it
            if result.requires_grad and stays:
                result.register_hook(hook)  # type: ignore[no-untyped-call]


def with_refs(value: Any, tensors: list[Tensor]) -> Any:
    """A call's arguments with a `Ref` in the place of each tensor, which goes to ``tensors``."""
    kind, before = type(value), len(tensors)
    named, made = isinstance(value, tuple) and hasattr(value, "_fields"), value
    if isinstance(value, (tuple, list)) and not named:  # classes of somebody's own, too
        made = []
        for item in value:
            if type(item) in _PLAIN:
                made.append(item)
            elif isinstance(item, Tensor):
                made.append(Ref(len(tensors)))
                tensors.append(item)
            else:
                made.append(with_refs(item, tensors))
        made = tuple(made) if isinstance(value, tuple) else made
    elif isinstance(value, Tensor):
        tensors.append(value)
        return Ref(before)
    elif isinstance(value, dict):
        made = {k: v if type(v) in _PLAIN else with_refs(v, tensors) for k, v in value.items()}
    elif named:
        made = kind(*[with_refs(v, tensors) for v in value])
    return made if len(tensors) > before or kind in (tuple, list, dict) else value


def _without_refs(value: Any, tensors: Sequence[Tensor]) -> Any:
    kind = type(value)
    if kind is Ref:
        return tensors[value]
    if kind is tuple or kind is list:
        return kind(
            [
                v
                if (k := type(v)) in _PLAIN
                else tensors[v]
                if k is Ref
                else _without_refs(v, tensors)
                for v in value
            ]
        )
    if kind is dict:
        return {k: _without_refs(v, tensors) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*[_without_refs(v, tensors) for v in value])
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value and the containers in it, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    return []


#: Calls in order. Of each its index in the recording; where it stands for a node, that node's
#: number and its prediction's slot; and the slots that nobody needs any more after it.
Program = list[tuple[int, tuple[int, int] | None, tuple[int, ...]]]


def program(
    calls: Sequence[Call],
    chosen: Iterable[int],
    kept: Iterable[int],
    stops: Mapping[int, tuple[int, int]],
) -> Program:
    """The chosen calls in order.

    Args:
        calls: Of the recording.
        chosen: Indices of those that run.
        kept: Slots that stay to the end.
        stops: Index of a call that stands for a node -> (the node's number, its prediction's slot).
    """
    order = sorted({*chosen, *stops})
    stays, last = set(kept), dict[int, int]()
    drops: list[list[int]] = [[] for _ in order]
    for place, index in enumerate(order):
        call = calls[index]
        for slot in (*call.reads, *call.fills, *(slot for _, slot in call.rewrites)):
            last[slot] = place
    for slot, place in last.items():
        if slot not in stays:
            drops[place].append(slot)
    return [(i, stops.get(i), tuple(d)) for i, d in zip(order, drops, strict=True)]


def run(
    calls: Sequence[Call],
    program: Program,
    env: Environment,
    meet: Callable[[int, Tensor], Tensor],
) -> None:
    """Runs a program on the tensors in ``env``, which gains what it keeps.

    Args:
        calls: Of the recording.
        program: Which of them, and when to meet a node.
        env: Slot -> tensor; loses what nobody needs any more.
        meet: Called with a node's number and its prediction, as soon as that is there; gives the
            value that the calls below it read.
    """
    for index, stop, dropped in program:
        call = calls[index]
        if stop is not None:
            env[call.fills[0]] = meet(stop[0], env[stop[1]])
        elif call.context is None:
            call.run(env)
        else:
            with call.context.entered():
                call.run(env)
        for slot in dropped:
            if slot in env:
                del env[slot]
