"""A container, or an object with slots, and what was in it at one moment."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import suppress
from types import MemberDescriptorType
from typing import Any

from typing_extensions import override

_MISSING = object()
#: Longer containers hold data, not counts: their items are left alone.
_LONG = 1000


class Container:
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
        """Keys and values, of a long one none: that holds data, not counts."""
        if len(self.saved) > _LONG:
            return
        if isinstance(self.live, dict):
            yield from self.saved.items()
        elif not isinstance(self.live, set):
            yield from enumerate(self.saved)

    def changed(self) -> bool:
        """Whether it holds other objects now."""
        now = self._content()
        if isinstance(now, set):
            return bool(now != self.saved)
        if len(now) != len(self.saved):
            return True
        if isinstance(now, dict):
            return any(self.saved.get(k, _MISSING) is not v for k, v in now.items())
        return not all(map(operator.is_, now, self.saved))

    def restore(self) -> None:
        """Puts back what was in it, in place."""
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


class Slots(Container):
    """An object with slots and what was in them."""

    def __init__(self, live: Any) -> None:
        members = [m for kind in type(live).__mro__ for m in vars(kind).values()]
        self._slots = [m for m in members if isinstance(m, MemberDescriptorType)]
        super().__init__(live)

    @override
    def _content(self) -> dict[Any, Any]:
        found = {}
        for slot in self._slots:
            with suppress(AttributeError):  # an empty one
                found[slot] = slot.__get__(self.live)
        return found

    @override
    def children(self) -> Iterator[tuple[Any, Any]]:
        yield from ((slot.__name__, value) for slot, value in self.saved.items())

    @override
    def restore(self) -> None:
        now = self._content()
        for slot in now.keys() - self.saved.keys():
            slot.__delete__(self.live)
        for slot, value in self.saved.items():
            if now.get(slot, _MISSING) is not value:
                slot.__set__(self.live, value)
