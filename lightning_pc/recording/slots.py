"""Slots: which tensor of a forward is which, and what each depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_pc.errors import ClosureError, RecordingError
from lightning_pc.recording.calls import Call, Ref
from lightning_pc.recording.task import Task


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
        self.ref, self.slot, self.depends = ref(tensor), slot, depends
        self.version = version_of(tensor)


def version_of(tensor: Tensor) -> int:
    """By which writes to it are told."""
    try:
        return tensor._version
    except RuntimeError:  # tensors of inference mode have none
        return -1


def is_continuous(tensor: Tensor) -> bool:
    """Whether it holds no whole numbers or booleans."""
    return tensor.is_floating_point() or tensor.is_complex()


def first(tensor: Tensor, *_: Tensor) -> Tensor:
    """The first of its arguments: a tensor, seen after writes to its memory by other names."""
    return tensor


def view_of(tensor: Tensor, *rest: Any) -> Tensor:
    """A place in a tensor's memory, after the writes among ``rest``."""
    return torch.as_strided(tensor, *rest[-1])


class Slots:
    """What is known of the tensors of one forward.

    Args:
        task: What the recording goes by.

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

    where: Callable[[], str]

    def __init__(self, task: Task) -> None:
        self.task = task
        self.calls: list[Call] = []
        self.keys: list[Any] = []
        self.given: dict[int, Tensor] = {}
        self.parameters: dict[int, nn.Parameter] = {}
        self.slots = 0
        self.inert: set[int] = set()
        self.scalars: set[int] = set()
        self.still: set[int] = set()
        self._still: dict[int, ref[Tensor]] = {}
        self._entries: dict[int, Entry] = {}
        self._writes: list[tuple[int, int]] = []  # (memory, slot since)
        self._weights: list[Tensor] = []  # what is trained
        self._slot_of: dict[int, int] = {}  # id of a parameter -> its first slot
        self._bases: list[Tensor] = []
        self._early: dict[int, tuple[Tensor, str]] = {}  # from before the forward
        self._memories: dict[int, int] = {}  # of constants that are written to -> slot
        self._begun: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]

    def entry(self, tensor: Tensor) -> Entry | None:
        """What is known of a tensor that may depend on something; None of a constant.

        Raises:
            RecordingError: It comes from a call that was not seen.
        """
        entry = self._entries.get(id(tensor))
        if entry is not None and entry.ref() is tensor:
            if entry.depends and version_of(tensor) != entry.version:
                return self._rewritten(tensor, entry)
            return entry
        if self._memories and tensor.layout is torch.strided:
            memory = tensor.untyped_storage()._cdata
            if memory in self._memories:
                return self._seen_in(tensor, memory)
        return self._from_outside(tensor) if tensor.requires_grad else None

    def _refuse_early(self, tensor: Tensor) -> None:
        """A gradient would go to what was computed before the forward."""
        if tensor.requires_grad and id(tensor) in self._early:
            raise ClosureError(self._early[id(tensor)][1])

    def _from_outside(self, tensor: Tensor) -> Entry | None:
        root = tensor if tensor.grad_fn is None else tensor._base
        if root is None or root.grad_fn is not None:
            function: Any = tensor.grad_fn
            if function._sequence_nr() >= self._begun:
                raise RecordingError(
                    f"A tensor of shape {tuple(tensor.shape)} that '{self.where()}' reads was made "
                    f"by a call that a recording cannot see ({function.name()}): a TorchScript "
                    "function, a C++ extension or a function transform. What stands above it would "
                    "not learn. Use the plain PyTorch version of that call while training."
                )
            if wrong := self.task.early(tensor):
                self._early[id(tensor)] = tensor, wrong
                return None  # a constant, as long as no gradient goes there
        slot = self._new_slot()
        self.given[slot] = tensor
        self._weights.append(tensor)
        if isinstance(root, nn.Parameter):
            self.parameters[slot] = root
        same = self._slot_of.setdefault(id(tensor if root is None else root), slot)
        self.keys.append(("trainable", tensor is root, slot in self.parameters, same))
        entry = self._entries[id(tensor)] = Entry(tensor, slot, True)
        return entry

    def _constant(self, tensor: Tensor, content: Tensor | None) -> int:
        """The slot of a constant, or of its ``content`` before it was written to."""
        if torch.is_grad_enabled():
            self._refuse_early(tensor)
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
            entry.version = version_of(tensor)
            return entry
        memory = tensor.untyped_storage()._cdata
        since = [slot for at, slot in self._writes if at == memory and slot > entry.slot]
        if not since:
            raise RecordingError(
                f"A tensor of shape {tuple(tensor.shape)} that '{self.where()}' reads was written "
                "to by a call that a recording cannot see (a C++ extension?). Use the plain "
                "PyTorch version of that call while training."
            )
        return self._insert(tensor, first, entry.slot, *since)

    def _take_memory(self, target: Tensor) -> Entry | None:
        """A view of a constant is about to be written to: its memory becomes part of the recording.

        Else other views of it would not see the write.
        """
        base = target._base
        if base is None or isinstance(base, nn.Parameter) or id(base) in self.task.own:
            return None
        memory = base.untyped_storage()._cdata
        constant = self._constant(base, base.detach().clone())
        self._entries.pop(id(base), None)
        self._memories[memory] = self._insert(base, torch.clone, constant).slot
        self._bases.append(base)  # or its memory may become another tensor's
        return self._seen_in(target, memory)

    def _seen_in(self, tensor: Tensor, memory: int) -> Entry:
        """A tensor in memory that the recording writes to, after all writes so far."""
        place = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        start = self._memories[memory]  # before that another tensor may have been there
        since = [slot for at, slot in self._writes if at == memory and slot > start]
        return self._insert(tensor, view_of, start, *since, further=(place,))

    def _new_slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    def _bind(self, tensor: Tensor, written: bool = False) -> int:
        """Gives a tensor that a call has made, or ``written`` to, a new slot."""
        slot = self._new_slot()
        if not tensor.requires_grad:
            if not written and not is_continuous(tensor):
                return slot  # whole numbers are constants
            self.inert.add(slot)
        if tensor.numel() == 1:
            self.scalars.add(slot)
        self._entries[id(tensor)] = Entry(tensor, slot, True)
        return slot

    def _insert(
        self, tensor: Tensor, function: Callable[..., Tensor], *reads: int, further: Any = ()
    ) -> Entry:
        """Keeps a call of ours, of what slots hold and ``further``, that gives the tensor."""
        call = self._append(Call(function, (*map(Ref, range(len(reads))), *further), {}, reads))
        call.fills = (self._bind(tensor),)
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
        if id(tensor) in self.task.own:
            return True
        known = self._still.get(id(tensor))
        return known is not None and known() is tensor

    def _keep_still(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            self._still[id(output)] = ref(output)
        return output
