"""The recorder: a mode that sees every torch call of one forward and keeps those that matter.

A call matters where it depends on a value node or a trainable parameter. Everything else is a
constant of the batch. So are whole numbers and booleans (masks, routing, indices), and whatever
leaves torch (``.item()``, ``bool(tensor)``, ``.numpy()``): they stay as they were in the forward.
The forward is an ordinary one, with gradients on. So a tensor with a gradient that no recorded call
has made gives away a call that was not seen, which is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_pc.errors import ClosureError, RecordingError
from lightning_pc.recording.applied import Applied
from lightning_pc.recording.calls import Call, Draws, arguments, current_context, tensors_in
from lightning_pc.recording.traits import NORMS, TELLS, Function, Traits, guess


class Entry:
    """What is known of a tensor that was met.

    Attributes:
        ref: To the tensor, whose id may be another's later.
        slot: Where the recording holds it.
        version: Of the tensor, when it came there.
        depends: On a value or a trainable parameter.
    """

    __slots__ = ("depends", "ref", "slot", "version")

    def __init__(self, tensor: Tensor, slot: int, depends: bool) -> None:
        self.ref, self.slot, self.depends = weakref.ref(tensor), slot, depends
        self.version = _version(tensor)


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # tensors of inference mode have none
        return -1


def _same(content: Tensor, tensor: Tensor) -> bool:
    if content.shape != tensor.shape:
        return False
    try:
        return torch.equal(content, tensor)
    except (NotImplementedError, RuntimeError):  # float8, nested: nothing to compare by
        return True


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def first(tensor: Tensor, *_: Tensor) -> Tensor:
    """The first of its arguments: a tensor, seen after writes to its memory by other names."""
    return tensor


def view_of(tensor: Tensor, *rest: Any) -> Tensor:
    """A place in a tensor's memory, after the writes among ``rest``."""
    return torch.as_strided(tensor, *rest[-1])


class Recorder(TorchFunctionMode):
    """Records the calls of one forward.

    Args:
        known: What is known of functions; it is added to.
        own: Ids of the tensors that the model holds, which are put back if the batch is undone.
        early: What is wrong with a tensor that was computed before the forward, "" for nothing.

    Attributes:
        calls: What was recorded, in order.
        keys: Tells recordings of another form apart: calls, wiring, kinds of what was given.
        given: Slot -> parameter or constant from before the forward or beside it.
        parameters: Slot of a trainable parameter, or of a view of one -> the parameter.
        slots: How many there are.
        inert: Slots of what depends on something and has no gradient.
        scalars: Slots of single numbers.
        still: Slots of constants that are the same for any batch.
    """

    def __init__(
        self, known: dict[Any, Traits], own: frozenset[int], early: Callable[[Tensor], str]
    ) -> None:
        super().__init__()
        self.known, self._own, self._early = known, own, early
        self.calls: list[Call] = []
        self.keys: list[Any] = []
        self.given: dict[int, Tensor] = {}
        self.parameters: dict[int, nn.Parameter] = {}
        self.slots = 0
        self.inert: set[int] = set()
        self.scalars: set[int] = set()
        self.still: set[int] = set()
        self._still: dict[int, weakref.ref[Tensor]] = {}
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self.device = "cuda" if cuda else "cpu"
        self._entries: dict[int, Entry] = {}
        self._producers: dict[int, Call] = {}  # of each slot
        self._writes: list[tuple[int, int]] = []  # (memory, slot since)
        self._weights: list[Tensor] = []  # what is trained
        self._slot_of: dict[int, int] = {}  # id of a parameter -> its first slot
        self._bases: list[Tensor] = []
        self._memories: dict[int, int] = {}  # of constants that are written to -> slot
        self._undo: list[tuple[Tensor, Tensor]] = []
        self._generators: dict[torch.Generator, Tensor] = {}  # of the user's, as they were
        self._begun: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]

    # What the tensors are

    def entry(self, tensor: Tensor) -> Entry | None:
        """What is known of a tensor that may depend on something; None of a constant.

        Raises:
            RecordingError: It comes from a call that was not seen.
        """
        entry = self._entries.get(id(tensor))
        if entry is not None and entry.ref() is tensor:
            if entry.depends and _version(tensor) != entry.version:
                return self._rewritten(tensor, entry)
            return entry
        if self._memories:
            memory = tensor.untyped_storage()._cdata
            if memory in self._memories:
                return self._seen_in(tensor, memory)
        return self._from_outside(tensor) if tensor.requires_grad else None

    def _from_outside(self, tensor: Tensor) -> Entry:
        root = tensor if tensor.grad_fn is None else tensor._base
        if root is None or root.grad_fn is not None:
            function: Any = tensor.grad_fn
            wrong = self._early(tensor) if function._sequence_nr() < self._begun else ""
            if wrong:
                raise ClosureError(wrong)
            if function._sequence_nr() >= self._begun:
                self._unseen(tensor)
        slot = self._new_slot()
        self.given[slot] = tensor
        self._weights.append(tensor)
        if isinstance(root, nn.Parameter):
            self.parameters[slot] = root
        same = self._slot_of.setdefault(id(tensor if root is None else root), slot)
        self.keys.append(("trainable", tensor is root, same))
        entry = self._entries[id(tensor)] = Entry(tensor, slot, True)
        return entry

    def _unseen(self, tensor: Tensor) -> None:
        function: Any = tensor.grad_fn
        raise RecordingError(
            f"A tensor of shape {tuple(tensor.shape)} that '{self.where()}' reads was made by a "
            f"call that a recording cannot see ({function.name()}): a TorchScript function, a C++ "
            "extension or a function transform. What stands above it would not learn. Use the "
            "plain PyTorch version of that call while training."
        )

    def _constant(self, tensor: Tensor, content: Tensor | None) -> int:
        """The slot of a constant, or of its ``content`` before it was written to."""
        entry = self._entries.get(id(tensor))
        if entry is not None and entry.ref() is tensor:
            if content is not None:
                self.given[entry.slot] = content
            return entry.slot
        slot = self._new_slot()
        self.given[slot] = tensor if content is None else content
        if not tensor.requires_grad:
            self.inert.add(slot)
        if self._is_still(tensor):
            self.still.add(slot)
        self.keys.append("still" if slot in self.still else "constant")
        self._entries[id(tensor)] = Entry(tensor, slot, False)
        return slot

    def _rewritten(self, tensor: Tensor, entry: Entry) -> Entry:
        """It shares memory with something that was written to since."""
        if entry.slot in self.given:  # a weight, which stands as it is
            entry.version = _version(tensor)
            return entry
        memory = tensor.untyped_storage()._cdata
        since = [slot for at, slot in self._writes if at == memory and slot > entry.slot]
        if not since:
            raise RecordingError(
                f"A tensor of shape {tuple(tensor.shape)} that '{self.where()}' reads was written "
                "to by a call that a recording cannot see (a C++ extension?). Use the plain "
                "PyTorch version of that call while training."
            )
        call = Call(first, (tensor, *(tensor for _ in since)), {}, (entry.slot, *since))
        return self._insert(tensor, call)

    def _take_memory(self, target: Tensor) -> Entry | None:
        """A view of a constant is about to be written to: its memory becomes part of the recording.

        Else other views of it would not see the write.
        """
        base = target._base
        if base is None or isinstance(base, nn.Parameter) or id(base) in self._own:
            return None
        memory = base.untyped_storage()._cdata
        call = Call(torch.clone, (base,), {}, (self._constant(base, base.detach().clone()),))
        self._entries.pop(id(base), None)
        self._memories[memory] = self._insert(base, call).slot
        self._bases.append(base)  # or its memory may become another tensor's
        return self._seen_in(target, memory)

    def _seen_in(self, tensor: Tensor, memory: int) -> Entry:
        """A tensor in memory that the recording writes to, after all writes so far."""
        place = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        since = [slot for at, slot in self._writes if at == memory]
        tensors = [tensor for _ in since]
        reads = (self._memories[memory], *since)
        call = Call(view_of, (tensor, *tensors, place), {}, reads)
        return self._insert(tensor, call)

    def _new_slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    def _bind(self, tensor: Tensor, call: Call, written: bool = False) -> int:
        """Gives a tensor that a call has made, or ``written`` to, a new slot."""
        slot = self.slots
        self.slots = slot + 1
        if tensor.requires_grad:
            self._producers[slot] = call
        elif written or _is_continuous(tensor):
            self.inert.add(slot)
        else:
            return slot  # whole numbers are constants
        if tensor.numel() == 1:
            self.scalars.add(slot)
        self._entries[id(tensor)] = Entry(tensor, slot, True)
        return slot

    def _insert(self, tensor: Tensor, call: Call) -> Entry:
        """Keeps a call of ours that stands for the tensor from now on."""
        call.fills = (self._bind(tensor, self._append(call)),)
        return self._entries[id(tensor)]

    def _know(self, tensor: Tensor, slot: int) -> None:
        """The tensor is what a slot holds."""
        self._entries[id(tensor)] = Entry(tensor, slot, True)

    def _append(self, call: Call, *key: Any) -> Call:
        self.calls.append(call)
        self.keys.append((call.function, call.reads, *key))
        return call

    def _is_still(self, tensor: Tensor) -> bool:
        """Whether a constant owes nothing to the batch: a buffer, a mask, fresh noise."""
        if id(tensor) in self._own:
            return True
        ref = self._still.get(id(tensor))
        return ref is not None and ref() is tensor

    def _keep_still(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            self._still[id(output)] = weakref.ref(output)
        return output

    # Calls

    def record(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Makes a call, and keeps it where it depends on a value or a trainable parameter."""
        if kwargs and isinstance(kwargs.get("generator"), torch.Generator):
            generator = kwargs["generator"]
            self._generators.setdefault(generator, generator.get_state())
        tensors = arguments(args, kwargs)
        if not tensors:
            return self._keep_still(function(*args, **kwargs))
        entries = [self.entry(tensor) for tensor in tensors]
        traits = self.known.get(function)
        if traits is None:
            traits = self.known[function] = guess(function)
        for entry in entries:
            if entry is not None and entry.depends:
                break
        else:
            return self._constantly(function, args, kwargs, tensors, traits)
        draws: tuple[Draws, ...] = ()
        if traits.draws or not traits.met:
            draws = self._states(tensors, kwargs)
        if traits.met and not traits.writes and "out" not in kwargs:
            copies, output = {}, function(*args, **kwargs)
            rewritten, weights = self._rewrites(tensors, entries, None)
        else:
            first_entry = entries[0]
            if traits.writes and (first_entry is None or not first_entry.depends):
                entries[0] = self._take_memory(tensors[0]) or first_entry
            copies, versions = self._copies(tensors, entries), [*map(_version, tensors)]
            # What the user wrote may draw or write now and then.
            traits.met = not isinstance(function, Applied)
            output = function(*args, **kwargs)
            rewritten, weights = self._rewrites(tensors, entries, versions)
            # Some write without a new version, as observers do. (An attribute is set once.)
            if function not in NORMS and getattr(function, "__name__", "") != "__set__":
                told = (*rewritten, *weights)
                rewritten += [
                    i for i in copies if i not in told and not _same(copies[i], tensors[i])
                ]
        if type(output) in TELLS:
            traits.passive = True
            return output
        if weights and all(any(r is t for t in tensors) for r in tensors_in(output)):
            return output
        if draws and not traits.draws:
            draws = tuple(d for d in draws if not torch.equal(d.state, d.generator.get_state()))
            traits.draws = bool(draws)
        traits.writes = traits.writes or bool(rewritten)
        results = [output] if isinstance(output, Tensor) else tensors_in(output)
        if not rewritten and not any(map(_is_continuous, results)):
            if function is Tensor.register_hook:
                self._hook(entries[0], args[1], output)
            return output
        copied = [i for i in copies if i in rewritten or function in NORMS] + weights
        reads = []
        for i, entry in enumerate(entries):
            if entry is None or not entry.depends:
                reads.append(self._constant(tensors[i], copies[i] if i in copied else None))
            else:
                reads.append(entry.slot)
        context = current_context(self.device)
        call = Call(function, args, kwargs, tuple(reads), context)
        call.draws, call.copies = draws, tuple(copied)
        self._append(call, context, tuple(rewritten), len(results))
        for i in rewritten:
            self._writes.append((tensors[i].untyped_storage()._cdata, self.slots))
            call.rewrites += ((i, self._bind(tensors[i], call, written=True)),)
        call.fills = tuple([self._bind(result, call) for result in results])
        return output

    def _constantly(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tensors: list[Tensor],
        traits: Traits,
    ) -> Any:
        """Makes a call whose result is a constant of the batch."""
        in_place = kwargs.get("inplace") or any(value is True for value in args)
        if traits.writes or in_place or "out" in kwargs:
            for tensor in tensors:
                self._before_write(tensor)
        output = function(*args, **kwargs)
        if type(output) in TELLS:
            traits.passive = True
        elif all(map(self._is_still, tensors)):
            self._keep_still(output)
        return output

    def _copies(self, tensors: list[Tensor], entries: list[Entry | None]) -> dict[int, Tensor]:
        """Index -> content of what the call may write to and the recording does not make."""
        copies = {}
        for i, (tensor, entry) in enumerate(zip(tensors, entries, strict=True)):
            if (entry is None or not entry.depends) and not tensor.is_meta:
                copies[i] = tensor.detach().clone()
                if id(tensor) in self._own:
                    self._undo.append((tensor, copies[i]))
        return copies

    def _rewrites(
        self, tensors: list[Tensor], entries: list[Entry | None], versions: list[int] | None
    ) -> tuple[list[int], list[int]]:
        """Indices of the tensors that the call has written to, and of the weights among them.

        A write to a trainable parameter (clipping it within the forward) happens once: the
        parameter is given to a recording as it stands. What such a call makes beside (an embedding
        with ``max_norm``) it makes again from a copy of its own.
        """
        found: list[int] = []
        weights: list[int] = []
        for i, (tensor, entry) in enumerate(zip(tensors, entries, strict=True)):
            if versions is not None:
                before = versions[i]
            elif entry is not None and entry.depends:
                before = entry.version
            else:
                continue
            if _version(tensor) == before or any(tensors[j] is tensor for j in found):
                continue
            memory = tensor.untyped_storage()._cdata
            if any(weight.untyped_storage()._cdata == memory for weight in self._weights):
                weights.append(i)
                if entry is not None:
                    entry.version = _version(tensor)
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
        return tuple(Draws(generator, generator.get_state()) for generator in generators)

    def _before_write(self, tensor: Tensor) -> None:
        """A constant is about to be written to: the recording keeps what it was."""
        content = None
        if id(tensor) in self._own:
            content = tensor.detach().clone()
            self._undo.append((tensor, content))
        memory = None
        for other, entry in list(self._entries.items()):
            known = entry.ref()
            if entry.depends or known is None:
                continue
            memory = tensor.untyped_storage()._cdata if memory is None else memory
            if known.untyped_storage()._cdata == memory:
                self.given[entry.slot] = known.detach().clone()
                del self._entries[other]

    def _hook(self, entry: Entry | None, hook: Any, handle: Any) -> None:
        call = None if entry is None else self._producers.get(entry.slot)
        if entry is not None and call is not None and entry.slot in call.fills:
            hooks = handle.hooks_dict_ref()  # held, or it would go with the tensor
            call.hooks.append((call.fills.index(entry.slot), hook, handle.id, hooks))

    @torch.no_grad()
    def undo(self) -> None:
        """What the model holds is as it was before the forward, and so are its generators."""
        for generator, state in self._generators.items():
            generator.set_state(state)
        for tensor, content in reversed(self._undo):
            tensor.data = content if tensor.shape != content.shape else tensor.data.copy_(content)

    # What subclasses know

    def where(self) -> str:
        """Dotted name of the module that runs."""
        return "the model"
