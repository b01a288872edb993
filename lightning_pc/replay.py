"""Purity: a batch runs the user's forward up to T times, and the user must not notice.

What a forward changes (random generators, buffers, attributes, the lists, dicts and sets in them,
metrics, the batch's own containers) is brought back before each replay to what the first forward
met, and afterwards to what it left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_pc.containers import Container
from lightning_pc.snapshot import Snapshot

_MISSING = object()

#: (object, attribute) -> what stands in its place while a batch is replayed.
Shadows = Mapping[tuple[Any, str], Any]

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
        held: As of `Snapshot`.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        batch: Any,
        written: set[Any] | None,
        shadows: Shadows,
        draws: Purity | None = None,
        held: set[nn.Parameter] | None = None,
    ) -> None:
        self._modules, self._batch, self._shadows, self._held = modules, batch, shadows, held
        self._start = Snapshot(modules, batch, written, held)
        self._bits = self._start.bits()
        self._records = _Records(modules)
        self._draws = draws
        self._end: Snapshot | None = None
        self._restless: list[Container] = []
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
        self.written |= self._start.written(self._bits)
        self._end = Snapshot(self._modules, self._batch, self.written, self._held)
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
        # What has been written to before may have been so again behind its version.
        self._end.restore_tensors(self._end.written() | (self.written & self._end.tensors.keys()))
        self._end.restore_arrays()
        self._end.restore_random(*self._drawn)

    def undo(self) -> None:
        """Everything stands as before the first forward."""
        for container in self._start.containers:
            container.restore()
        self._start.restore_tensors(self._start.written(self._bits))
        self._start.restore_arrays()
        self._start.restore_random()

    def _to_start(self) -> None:
        for container in self._restless:
            container.restore()
        self._start.restore_tensors(self.written & self._start.tensors.keys())
        self._start.restore_arrays()
        self._start.restore_random(*self._drawn)
