"""Purity: a batch runs the user's forward up to T times, and the user must not notice.

What a forward changes (random generators, buffers, attributes, the lists, dicts and sets in them,
metrics, the batch's own containers) is brought back before each replay to what the first forward
met, and afterwards to what it left.
"""

from __future__ import annotations

import operator
import random
import sys
import sysconfig
from collections import UserDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import Metric, MetricCollection

# Of a module's __dict__: parameters move by the optimizer alone, the rest is torch's bookkeeping.
_SKIPPED = frozenset(vars(nn.Module())) - {"_buffers", "training"} | {"_current_fx_name"}
_CONTAINERS = (dict, list, set, deque)
_MISSING = object()
# Longer containers and larger arrays [bytes] hold data, not counts: their items are left alone.
_LONG, _LARGE = 1000, 1 << 20

Generators = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
#: (object, attribute) -> what stands in its place while a batch is replayed.
Shadows = Mapping[tuple[Any, str], Any]


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


@cache
def _own(package: str) -> bool:
    """Whether a module is the user's own code; objects of installed packages are left alone."""
    if package == "__main__" or package.startswith("lightning_pc"):
        return package == "__main__"
    file = getattr(sys.modules.get(package), "__file__", None)
    installed = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    return file is not None and not any(file.startswith(path) for path in installed)


class _Container:
    """One dict, list, set or deque and what was in it."""

    def __init__(self, live: Any, skipped: frozenset[str] = frozenset()) -> None:
        self.live, self.skipped = live, skipped
        self.saved = self._content()

    def _content(self) -> Any:
        if not isinstance(self.live, dict):
            return list(self.live) if not isinstance(self.live, set) else set(self.live)
        if not self.skipped:
            return dict(self.live)
        return {k: v for k, v in self.live.items() if k not in self.skipped}

    def children(self) -> Iterator[tuple[Any, Any]]:
        if len(self.saved) > _LONG:
            return
        if isinstance(self.live, dict):
            yield from self.saved.items()
        elif not isinstance(self.live, set):
            yield from enumerate(self.saved)

    def changed(self) -> bool:
        now = self._content()
        if isinstance(now, set):
            return bool(now != self.saved)
        if len(now) != len(self.saved):
            return True
        if isinstance(now, dict):
            return any(self.saved.get(k, _MISSING) is not v for k, v in now.items())
        return not all(map(operator.is_, now, self.saved))

    def restore(self) -> None:
        if not self.changed():
            return
        if not isinstance(self.live, dict):
            self.live.clear()
            (self.live.update if isinstance(self.live, set) else self.live.extend)(self.saved)
            return
        for key in [k for k in self.live if k not in self.saved and k not in self.skipped]:
            del self.live[key]
        for key, value in self.saved.items():
            if self.live.get(key, _MISSING) is not value:
                self.live[key] = value


class _Snapshot:
    """What modules and a batch held at one moment.

    Args:
        modules: Their attributes, buffers and the containers in them are taken.
        batch: The arguments of the forward.
        copied: Says of a tensor's path whether its data is taken as well, or None for all.
    """

    def __init__(self, modules: Sequence[nn.Module], batch: Any, copied: set[Any] | None) -> None:
        self.containers: list[_Container] = []
        self.tensors: dict[Any, tuple[Tensor, int, Tensor | None]] = {}
        self.compares = copied is None
        self.unversioned: set[Any] = set()
        self.generators: list[tuple[Generators, Any]] = []
        self.arrays: list[tuple[np.ndarray[Any, Any], Any]] = []
        self.random = _global_states()
        seen: set[int] = set()
        pending: list[tuple[Any, _Container]] = [(("batch",), _Container([batch]))]
        for module in modules:
            self._take_attributes((id(module),), module, seen, pending, copied)
        while pending:
            path, container = pending.pop()
            for key, value in container.children():
                self._take((*path, key), value, seen, pending, copied)

    def _take(
        self, path: Any, value: Any, seen: set[int], pending: list[Any], copied: set[Any] | None
    ) -> None:
        if isinstance(value, Tensor):
            if not (isinstance(value, nn.Parameter) or value.is_inference()):
                copies = copied is None or path[0] == "batch" or path in copied
                copies = copies or path in self.unversioned
                data = value.detach().clone() if copies else None
                self.tensors[path] = (value, value._version, data)
        elif isinstance(value, UserDict):
            self._take(path, value.data, seen, pending, copied)
        elif isinstance(value, _CONTAINERS):
            if id(value) not in seen:
                seen.add(id(value))
                container = _Container(value)
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
        elif hasattr(value, "__dict__") and (path[0] == "batch" or _own(type(value).__module__)):
            self._take_attributes(path, value, seen, pending, copied)

    def _take_attributes(
        self, path: Any, value: Any, seen: set[int], pending: list[Any], copied: set[Any] | None
    ) -> None:
        attributes = vars(value)
        if id(attributes) in seen or isinstance(value, type):
            return
        seen.add(id(attributes))
        is_module = isinstance(value, nn.Module)
        container = _Container(attributes, _SKIPPED if is_module else frozenset())
        self.containers.append(container)
        pending.append((path, container))
        if isinstance(value, _NormBase) and value.training:
            self.unversioned |= {(*path, "_buffers", name) for name in value._buffers}
        # Frozen parameters move too: a teacher's, averaged within training_step.
        for name, parameter in value._parameters.items() if is_module else ():
            if parameter is not None and not parameter.requires_grad:
                key = (*path, name)
                data = parameter.detach().clone() if key in (copied or ()) else None
                self.tensors[key] = (parameter, parameter._version, data)

    def written(self) -> set[Any]:
        """Paths of the tensors that were written to since.

        `torch.batch_norm` moves its statistics without a new version: what norm modules hold
        counts as written, and the first batch of all compares everything.
        """
        written = {p for p, (x, version, _) in self.tensors.items() if x._version != version}
        if self.compares:
            written |= {
                path
                for path, (x, _, data) in self.tensors.items()
                if data is not None and x.layout == torch.strided and not torch.equal(x, data)
            }
        return written | (self.unversioned & self.tensors.keys())

    @torch.no_grad()
    def restore_tensors(self, paths: set[Any]) -> None:
        for path in paths:
            tensor, _, data = self.tensors[path]
            if data is not None:
                tensor.copy_(data)

    def restore_random(self, globally: Sequence[int] | None = None, own: bool = True) -> None:
        for index in range(len(self.random)) if globally is None else globally:
            _set_global_state(index, self.random[index])
        for generator, state in self.generators if own else ():
            _set_state(generator, state)

    def restore_arrays(self) -> None:
        for array, saved in self.arrays:
            array[...] = saved

    def drawn(self, other: _Snapshot) -> tuple[list[int], bool]:
        """Which of the global generators, and whether any other, stand not as in ``other``."""
        pairs = zip(self.random, other.random, strict=True)
        states = [[s for _, s in snapshot.generators] for snapshot in (self, other)]
        own = not all(map(_equal, *states))
        return [i for i, (a, b) in enumerate(pairs) if not _equal(a, b)], own


_READERS, _WRITERS = ("forward", "compute"), ("update", "reset")


class _Records:
    """Metrics run in the first forward alone; replays get what it returned."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.metrics = [m for m in modules if isinstance(m, (Metric, MetricCollection))]
        # By id: a metric's hash changes with its state.
        self._returned: dict[tuple[int, str], list[Any]] = {
            (id(m), name): [] for m in self.metrics for name in _READERS
        }
        self._inside = False  # a metric asks others, itself included

    @contextmanager
    def recording(self) -> Iterator[None]:
        def recorder(metric: nn.Module, name: str) -> Callable[..., Any]:
            method = getattr(metric, name)

            def read(*args: Any, **kwargs: Any) -> Any:
                if self._inside:
                    return method(*args, **kwargs)
                self._inside = True
                try:
                    output = method(*args, **kwargs)
                finally:
                    self._inside = False
                self._returned[id(metric), name].append(output)
                return output

            return read

        with shadowed({(m, name): recorder(m, name) for m in self.metrics for name in _READERS}):
            yield

    def shadows(self) -> dict[tuple[Any, str], Callable[..., Any]]:
        def teller(metric: nn.Module, name: str) -> Callable[..., Any]:
            returned = iter(self._returned[id(metric), name])
            return lambda *args, **kwargs: next(returned, None)

        told = {(m, name): teller(m, name) for m in self.metrics for name in _READERS}
        return {**told, **{(m, name): nothing for m in self.metrics for name in _WRITERS}}


#: Methods of a LightningModule that report to the outside.
LOGGING = ("log", "log_dict", "print")


def nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in place of a method that must not act."""


@contextmanager
def shadowed(shadows: Shadows) -> Iterator[None]:
    """Instance attributes that hide methods for the length of a ``with``."""
    before = [(obj, name, vars(obj).get(name, _MISSING)) for obj, name in shadows]
    for (obj, name), stand_in in shadows.items():
        obj.__dict__[name] = stand_in
    try:
        yield
    finally:
        for obj, name, old in before:
            if old is _MISSING:
                obj.__dict__.pop(name, None)
            else:
                obj.__dict__[name] = old


class Purity:
    """Keeps the replays of one batch from showing.

    Args:
        modules: All modules of the model.
        batch: The forward's arguments.
        written: Paths of tensors that forwards are known to write to; learned from batch to batch.
        shadows: Methods that do something else in replays.
        draws: An earlier batch, whose random draws every forward sees again; the generators are
            then left alone.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        batch: Any,
        written: set[Any] | None,
        shadows: Shadows,
        draws: Purity | None = None,
    ) -> None:
        self._modules, self._batch, self._shadows = modules, batch, shadows
        self._start = _Snapshot(modules, batch, written)
        self._records = _Records(modules)
        self._draws = draws
        self._end: _Snapshot | None = None
        self._restless: list[_Container] = []
        self._drawn: tuple[list[int], bool] = ([], False)
        self.written: set[Any] = set() if written is None else set(written)
        self.replaying = False

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around the first forward."""
        if self._draws is not None:
            self._draws._start.restore_random()
        with self._records.recording():
            yield

    def ready(self) -> None:
        """The first forward and the hooks behind it have run; replays come now."""
        self.written |= self._start.written()
        self._end = _Snapshot(self._modules, self._batch, self.written)
        self._restless = [c for c in self._start.containers if c.changed()]
        if self._draws is not None:  # replays draw as that batch did, then all is as it was
            start, drawn = self._start, self._draws._start
            self._end.random, start.random = start.random, drawn.random
            self._end.generators, start.generators = start.generators, drawn.generators
        self._drawn = self._start.drawn(self._end)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Around one later forward."""
        self._to_start()
        self.replaying = True
        try:
            with shadowed({**self._shadows, **self._records.shadows()}):
                yield
        finally:
            self.replaying = False

    def finish(self) -> None:
        """Everything stands as the first forward (and the hooks behind it) left it."""
        if self._end is None:
            return
        for container in self._end.containers:
            container.restore()
        self._end.restore_tensors(self._end.written())
        self._end.restore_arrays()
        self._end.restore_random(*self._drawn)

    def undo(self) -> None:
        """Everything stands as before the first forward."""
        for container in self._start.containers:
            container.restore()
        self._start.restore_tensors(self._start.written())
        self._start.restore_arrays()
        self._start.restore_random()

    def _to_start(self) -> None:
        for container in self._restless:
            container.restore()
        self._start.restore_tensors(self.written & self._start.tensors.keys())
        self._start.restore_arrays()
        self._start.restore_random(*self._drawn)
