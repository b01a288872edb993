"""`torch.autograd.Function.apply`, which no mode sees: it is met on its way to C++."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_next: Any = torch.autograd.function._SingleLevelFunction  # where Function.apply ends up
_plain: Any = torch._C._FunctionBase.__dict__["apply"]


class Applied:
    """The `apply` of one kind of Function, the same object each time.

    Args:
        kind: The user's class.
    """

    _made: dict[Any, Applied] = {}  # noqa: RUF012

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.__name__ = f"{kind.__name__}.apply"

    @classmethod
    def of(cls, kind: Any) -> Applied:
        """That of a class."""
        return cls._made.setdefault(kind, cls(kind))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Applies it, unseen."""
        return _plain.__get__(None, self.kind)(*args, **kwargs)


_recording = threading.local()  # who is met, of each thread
_shared = ExitStack()  # what all threads share while one of them records
_lock = threading.Lock()
_many = 0  # forwards that are recorded now


def _apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
    meets: list[Any] = getattr(_recording, "meets", [])
    return meets[-1](kind, args, kwargs) if meets else Applied.of(kind)(*args, **kwargs)


@contextmanager
def functions_met(meet: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Meets this thread's `apply` inside; compiled functions, which hide theirs, run as written."""
    global _many
    meets: list[Any] = vars(_recording).setdefault("meets", [])
    with _lock:
        if not _many:
            if "torch._dynamo" in sys.modules:  # which refuses within a compiled function
                _shared.enter_context(torch.compiler.set_stance("force_eager"))
            _next.apply = classmethod(_apply)
            _shared.callback(delattr, _next, "apply")
        _many += 1
    meets.append(meet)
    try:
        yield
    finally:
        meets.pop()
        with _lock:
            _many -= 1
            if not _many:
                _shared.close()
