"""The recorder: a mode that sees every torch call of one forward and keeps those that matter.

A call matters where it depends on a value node or a trainable parameter. Everything else is a
constant of the batch. So are whole numbers and booleans (masks, routing, indices), and whatever
leaves torch (``.item()``, ``bool(tensor)``, ``.numpy()``): they stay as they were in the forward.
The forward is an ordinary one, with gradients on. So a tensor with a gradient that no recorded call
has made gives away a call that was not seen, which is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_pc.recording.applied import Applied
from lightning_pc.recording.calls import Call, current_context, tensors_in, with_refs
from lightning_pc.recording.draws import Draws
from lightning_pc.recording.functions import NORMS, TELLS, Function
from lightning_pc.recording.sites import saved_elsewhere
from lightning_pc.recording.slots import Entry, Slots, first, is_continuous, version_of
from lightning_pc.recording.task import Task


def _same(content: Tensor, tensor: Tensor) -> bool:
    if content.shape != tensor.shape:
        return False
    try:
        return torch.equal(content, tensor)
    except (NotImplementedError, RuntimeError):  # float8, nested: nothing to compare by
        return True


class Recorder(Slots, TorchFunctionMode):
    """Records the calls of one forward.

    Args:
        task: As of `Slots`. `undo` puts back what the forward has written to of the model's.

    Attributes:
        elsewhere: Hooks (gradient checkpoints) hold what autograd would save of some call.
    """

    def __init__(self, task: Task) -> None:
        Slots.__init__(self, task)
        TorchFunctionMode.__init__(self)
        self.known, self.elsewhere = task.learned.functions, False
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self.device = "cuda" if cuda else "cpu"
        self._undo: list[tuple[Tensor, Tensor]] = []
        self._generators: dict[torch.Generator, Draws] = {}  # of the user's, as they were

    def record(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Makes a call, and keeps it where it depends on a value or a trainable parameter."""
        tensors: list[Tensor] = []
        shown = with_refs(args, tensors)
        named = with_refs(kwargs, tensors) if kwargs else kwargs
        if kwargs and isinstance(generator := kwargs.get("generator"), torch.Generator):
            self._generators.setdefault(generator, Draws(generator))
        if not tensors:
            return self._keep_still(function(*args, **kwargs))
        entries, depends = [], False
        versions = [version_of(tensor) for tensor in tensors]
        for tensor, version in zip(tensors, versions, strict=True):
            entry = self._entries.get(id(tensor))
            if entry is None or entry.ref() is not tensor or entry.version != version:
                entry = self.entry(tensor)
            entries.append(entry)
            depends = depends or (entry is not None and entry.depends)
        traits = self.known[function]
        if not depends:
            return self._constantly(function, args, kwargs, tensors)
        draws = self._states(tensors, kwargs) if traits.draws or not traits.met else ()
        copies: dict[int, Tensor] = {}
        careful = traits.writes or not traits.met or "out" in kwargs
        if careful:
            constant = entries[0] is None or not entries[0].depends
            if constant and traits.writes and function not in NORMS:
                entries[0] = self._take_memory(tensors[0]) or entries[0]
            copies = self._copies(tensors, entries)
            # What the user wrote may draw or write now and then.
            traits.met = not isinstance(function, Applied)
        output = function(*args, **kwargs)
        rewritten: list[int] = []
        weights: list[int] = []
        if versions != [version_of(tensor) for tensor in tensors]:
            rewritten, weights = self._rewrites(tensors, entries, versions)
        if careful:  # it may have changed a list: when it runs again it gets what it has left
            left: list[Tensor] = []
            shown, named = with_refs(args, left), with_refs(kwargs, left)
        # Some write without a new version, as observers do. (An attribute is set once.)
        if careful and function not in NORMS and getattr(function, "__name__", "") != "__set__":
            told = (*rewritten, *weights)
            rewritten += [i for i in copies if i not in told and not _same(copies[i], tensors[i])]
        if type(output) in TELLS:
            traits.passive = True
            return output
        if weights and all(any(r is t for t in tensors) for r in tensors_in(output)):
            return output
        if draws:  # dropout of nothing does not
            draws = tuple(d for d in draws if not torch.equal(d.state, d.generator.get_state()))
            traits.draws = traits.draws or bool(draws)
        traits.writes = traits.writes or bool(rewritten)
        results = [output] if isinstance(output, Tensor) else tensors_in(output)
        if not rewritten and not [t for t in results if t.requires_grad or is_continuous(t)]:
            if function is Tensor.register_hook and entries[0] is not None:
                self._hook(entries[0], args[1], output)
            return output
        constants = [i for i, entry in enumerate(entries) if entry is None or not entry.depends]
        copied = [i for i in constants if i in rewritten or function in NORMS] + weights
        reads = [
            entry.slot
            if entry is not None and entry.depends
            else self._constant(tensors[i], copies.get(i) if i in copied else None)
            for i, entry in enumerate(entries)
        ]
        self.elsewhere = self.elsewhere or saved_elsewhere()
        call = Call(function, shown, named, tuple(reads), current_context(self.device))
        self._append(call, call.context, tuple(rewritten), len(results))
        if draws:
            call.draws = draws
        if copied:
            call.copies = tuple(copied)
        for i in rewritten:
            self._writes.append((tensors[i].untyped_storage()._cdata, self.slots))
            call.rewrites += ((i, self._bind(tensors[i], written=True)),)
        call.fills = tuple([self._bind(result) for result in results])
        return output

    def _constantly(
        self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], of: list[Tensor]
    ) -> Any:
        """Makes a call ``of`` tensors whose result is a constant of the batch."""
        traits = self.known[function]
        in_place = kwargs.get("inplace") or any(value is True for value in args)
        if traits.writes or in_place or "out" in kwargs:
            for tensor in of:
                self._before_write(tensor)
        output = function(*args, **kwargs)
        if any(made.requires_grad for made in tensors_in(output)):
            for tensor in of:
                self._refuse_early(tensor)
        if type(output) in TELLS:
            traits.passive = True
        elif all(map(self._is_still, of)):
            self._keep_still(output)
        return output

    def _copies(self, tensors: list[Tensor], entries: list[Entry | None]) -> dict[int, Tensor]:
        """Index -> content of what the call may write to and the recording does not make."""
        copies = {}
        for i, (tensor, entry) in enumerate(zip(tensors, entries, strict=True)):
            if (entry is None or not entry.depends) and not tensor.is_meta:
                copies[i] = tensor.detach().clone()
                if id(tensor) in self.task.own:
                    self._undo.append((tensor, copies[i]))
        return copies

    def _rewrites(
        self, tensors: list[Tensor], entries: list[Entry | None], versions: list[int]
    ) -> tuple[list[int], list[int]]:
        """Indices of the tensors that the call has written to, and of the weights among them.

        A write to a trainable parameter (clipping it within the forward) happens once: the
        parameter is given to a recording as it stands. What such a call makes beside (an embedding
        with ``max_norm``) it makes again from a copy of its own.
        """
        found: list[int] = []
        weights: list[int] = []
        for i, (tensor, entry) in enumerate(zip(tensors, entries, strict=True)):
            if version_of(tensor) == versions[i] or any(tensors[j] is tensor for j in found):
                continue
            memory = tensor.untyped_storage()._cdata
            if any(weight.untyped_storage()._cdata == memory for weight in self._weights):
                weights.append(i)
                if entry is not None:
                    entry.version = version_of(tensor)
            else:
                found.append(i)
        return found, weights

    def _states(self, tensors: list[Tensor], kwargs: Mapping[str, Any]) -> tuple[Draws, ...]:
        generators: list[torch.Generator] = [torch.default_generator]
        if self.device == "cuda":
            index = next((t.device.index for t in tensors if t.is_cuda), 0)
            generators.append(torch.cuda.default_generators[index or 0])
        own = kwargs.get("generator")
        if isinstance(own, torch.Generator):
            generators.append(own)
        return tuple(map(Draws, generators))

    def _before_write(self, tensor: Tensor) -> None:
        """A constant is about to be written to: the recording keeps what it was."""
        content = None
        if id(tensor) in self.task.own:
            content = tensor.detach().clone()
            self._undo.append((tensor, content))
        memory = None
        for other, entry in list(self._entries.items()):
            known = entry.ref()
            if entry.depends or known is None:
                continue
            memory = tensor.untyped_storage()._cdata if memory is None else memory
            if known.layout is torch.strided and known.untyped_storage()._cdata == memory:
                self.given[entry.slot] = known.detach().clone()
                del self._entries[other]

    def _hook(self, entry: Entry, hook: Any, handle: Any) -> None:
        tensor = entry.ref()
        if tensor is None or entry.slot in self.given:
            return
        if not any(entry.slot in call.fills for call in self.calls):  # it was written to
            entry = self._insert(tensor, first, entry.slot)
        call = next(call for call in reversed(self.calls) if entry.slot in call.fills)
        hooks = handle.hooks_dict_ref()  # held, or it would go with the tensor
        call.hooks += ((call.fills.index(entry.slot), hook, handle.id, hooks),)

    @torch.no_grad()
    def undo(self) -> None:
        """What the model holds is as it was before the forward, and so are its generators."""
        for draws in self._generators.values():
            draws.again()
        for tensor, content in reversed(self._undo):
            tensor.data = content if tensor.shape != content.shape else tensor.data.copy_(content)
