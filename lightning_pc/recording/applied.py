"""`torch.autograd.Function.apply`, which no mode sees: it is met on its way to C++."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def functions_met(meet: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Inside, ``meet(kind, args, kwargs)`` is called in the place of each `apply`."""

    def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
        return meet(kind, args, kwargs)

    before = vars(_next).get("apply")
    _next.apply = classmethod(apply)
    try:
        yield
    finally:
        if before is None:
            del _next.apply
        else:
            _next.apply = before
