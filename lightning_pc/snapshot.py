"""What modules, a batch and the random generators held at one moment, and how to bring it back."""

from __future__ import annotations

import random
import sys
import sysconfig
from argparse import Namespace
from collections import UserDict, UserList, deque
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_pc.containers import Container, Slots

# Of a module's __dict__: parameters move by the optimizer alone, the rest is torch's bookkeeping.
_SKIPPED = frozenset(vars(nn.Module())) - {"_buffers", "training"} | {"_current_fx_name"}
_PLAIN = {bool, int, float, str}
_CONTAINERS = (dict, list, set, deque)
_NAMESPACES = (SimpleNamespace, Namespace)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Larger arrays [bytes] hold data, not counts, and are left alone; larger weights are copied only
# once they have been written to.
_LARGE = 1 << 20

Generators = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def _state(generator: Generators) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state()


def _set_state(generator: Generators, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _global_states() -> list[Any]:
    states: list[Any] = [torch.get_rng_state(), np.random.get_state(), random.getstate()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.append(torch.cuda.get_rng_state_all())
    elif torch.backends.mps.is_available():
        states.append(torch.mps.get_rng_state())
    return states


def _set_global_state(index: int, state: Any) -> None:
    if index == 3 and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.set_rng_state_all(state)
    else:
        setters: list[Callable[[Any], Any]] = [torch.set_rng_state, np.random.set_state]
        setters += [random.setstate, torch.mps.set_rng_state]
        setters[index](state)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and not isinstance(a[-1], int):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _bits(tensor: Tensor) -> Tensor:
    """The sum of its bits as integers, []: any change shows, but for one of the order."""
    ends = tensor.storage_offset() * tensor.itemsize, tensor.nbytes
    if tensor.is_contiguous() and not any(end % 8 for end in ends):  # by far the fastest
        return tensor.view(-1).view(torch.int64).sum()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if tensor.is_floating_point():
        tensor = tensor.view(_INTEGERS[tensor.itemsize])
    return tensor.sum(dtype=torch.int64)


@cache
def _own(package: str) -> bool:
    """Whether a module is the user's own code; objects of installed packages are left alone."""
    if package == "__main__" or package.startswith("lightning_pc"):
        return package == "__main__"
    file = getattr(sys.modules.get(package), "__file__", None)
    installed = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    return file is not None and not any(file.startswith(path) for path in installed)


class Snapshot:
    """What modules and a batch held at one moment.

    Args:
        modules: Their attributes, buffers and the containers in them are taken.
        batch: The arguments of the forward.
        copied: Says of a tensor's path whether its data is taken as well, or None for all.
        held: What the optimizer moves, of what wants a gradient; None for all of that.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        batch: Any,
        copied: set[Any] | None,
        held: set[nn.Parameter] | None = None,
    ) -> None:
        self.held = held
        self.still: dict[Any, Tensor] = {}  # parameters that no optimizer moves
        self.containers: list[Container] = []
        self.tensors: dict[Any, tuple[Tensor, int, Tensor | None]] = {}
        self.compares = copied is None
        self.unversioned: set[Any] = set()
        self.generators: list[tuple[Generators, Any]] = []
        self.arrays: list[tuple[np.ndarray[Any, Any], Any]] = []
        self.random = _global_states()
        seen: set[int] = set()
        pending: list[tuple[Any, Container]] = [(("batch",), Container([batch]))]
        for module in modules:
            self._take_attributes((id(module),), module, seen, pending, copied)
        while pending:
            path, container = pending.pop()
            for key, value in container.children():
                self._take((*path, key), value, seen, pending, copied)

    def _take(
        self, path: Any, value: Any, seen: set[int], pending: list[Any], copied: set[Any] | None
    ) -> None:
        if value is None or type(value) in _PLAIN:  # most of them
            return
        if isinstance(value, Tensor):
            bare = value.is_nested or value.is_meta  # nothing to copy or compare
            if not (isinstance(value, nn.Parameter) or value.is_inference() or bare):
                copies = copied is None or path[0] == "batch" or path in copied
                copies = copies or path in self.unversioned
                data = value.detach().clone() if copies else None
                self.tensors[path] = (value, value._version, data)
        elif isinstance(value, (UserDict, UserList)):
            self._take(path, value.data, seen, pending, copied)
        elif isinstance(value, _CONTAINERS):
            if id(value) not in seen:
                seen.add(id(value))
                container = Container(value)
                self.containers.append(container)
                pending.append((path, container))
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                self._take((*path, i), item, seen, pending, copied)
        elif isinstance(value, Generators):
            self.generators.append((value, _state(value)))
        elif isinstance(value, np.ndarray):
            if value.nbytes <= _LARGE and value.flags.writeable:
                self.arrays.append((value, value.copy()))
        elif isinstance(value, nn.Module):  # one that is no submodule
            for module in value.modules():
                self._take_attributes((id(module),), module, seen, pending, copied)
        elif isinstance(value, _NAMESPACES) or path[0] == "batch" or _own(type(value).__module__):
            if hasattr(value, "__dict__"):
                self._take_attributes(path, value, seen, pending, copied)
            slotted = hasattr(value, "__slots__") and not isinstance(value, type)
            if slotted and id(value) not in seen:
                seen.add(id(value))
                container = Slots(value)
                self.containers.append(container)
                pending.append((path, container))

    def _take_attributes(
        self, path: Any, value: Any, seen: set[int], pending: list[Any], copied: set[Any] | None
    ) -> None:
        attributes = vars(value)
        if id(attributes) in seen or isinstance(value, type):
            return
        seen.add(id(attributes))
        is_module = isinstance(value, nn.Module)
        container = Container(attributes, _SKIPPED if is_module else frozenset())
        self.containers.append(container)
        pending.append((path, container))
        if isinstance(value, _NormBase) and value.training:
            self.unversioned |= {(*path, "_buffers", name) for name in value._buffers}
        # What no optimizer holds moves too: a teacher, averaged within training_step.
        for name, parameter in value._parameters.items() if is_module else ():
            if parameter is not None and not self._moves(parameter):
                key = (*path, name)
                plain = type(parameter) is nn.Parameter and parameter.layout == torch.strided
                if plain and not parameter.is_meta:
                    self.still[key] = parameter
                small = key in self.still and parameter.nbytes <= _LARGE
                copies = small if copied is None else key in copied
                data = parameter.detach().clone() if copies else None
                self.tensors[key] = (parameter, parameter._version, data)

    def _moves(self, parameter: nn.Parameter) -> bool:
        held = self.held is None or parameter in self.held
        return held and parameter.requires_grad

    @torch.no_grad()
    def bits(self) -> Tensor | None:
        """A sum of the bits of each parameter that no optimizer moves, [n]; None without any.

        Writing to a parameter's ``.data`` makes no new version of it.
        """
        if not self.still:
            return None
        sums = [_bits(parameter) for parameter in self.still.values()]
        return torch.stack([each.to(sums[0].device) for each in sums])

    def written(self, bits: Tensor | None = None) -> set[Any]:
        """Paths of the tensors that were written to since.

        Args:
            bits: `bits` of then, to find what was written to behind its version.

        `torch.batch_norm` moves its statistics without a new version: what norm modules hold
        counts as written, and the first batch of all compares everything.
        """
        written = {p for p, (x, version, _) in self.tensors.items() if x._version != version}
        if self.compares:
            written |= {
                path
                for path, (x, _, data) in self.tensors.items()
                if not (data is None or path in self.still or x.layout != torch.strided)
                and not torch.equal(x, data)
            }
        now = None if bits is None else self.bits()
        if bits is not None and now is not None:
            changed = (bits != now).tolist()
            written |= {path for path, one in zip(self.still, changed, strict=True) if one}
        return written | (self.unversioned & self.tensors.keys())

    @torch.no_grad()
    def restore_tensors(self, paths: set[Any]) -> None:
        """Puts back the data of the tensors at ``paths``, where it was taken."""
        for path in paths:
            tensor, _, data = self.tensors[path]
            if data is not None:
                tensor.copy_(data)

    def restore_random(self, globally: Sequence[int] | None = None, own: bool = True) -> None:
        """Sets generators back: of the global ones those given (None for all), and all others."""
        for index in range(len(self.random)) if globally is None else globally:
            _set_global_state(index, self.random[index])
        for generator, state in self.generators if own else ():
            _set_state(generator, state)

    def restore_arrays(self) -> None:
        """Puts back the data of small arrays."""
        for array, saved in self.arrays:
            array[...] = saved

    def drawn(self, other: Snapshot) -> tuple[list[int], bool]:
        """Which of the global generators, and whether any other, stand not as in ``other``."""
        pairs = zip(self.random, other.random, strict=True)
        states = [[s for _, s in snapshot.generators] for snapshot in (self, other)]
        own = not all(map(_equal, *states))
        return [i for i, (a, b) in enumerate(pairs) if not _equal(a, b)], own
