"""Counts matrix multiplications, and how many of them must wait for each other.

The measure of Salvatori et al. 2024, Appendix C: what can be multiplied side by side counts once
(simultaneous matrix multiplications). Products of a weight's own gradient are left out, as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from lightning_pc.stages.batch import Batch, memory_of
from lightning_pc.stages.evaluator import Asked, Evaluator
from lightning_pc.stages.through import ThroughErrors


class Products(NamedTuple):
    """Numbers of matrix multiplications, convolutions among them.

    Attributes:
        total: All.
        in_a_row: On the longest way on which one needs the result of another (SMMs).
    """

    total: int
    in_a_row: int

    def times(self, steps: int) -> Products:
        """Of so many steps, one after the other."""
        return Products(steps * self.total, steps * self.in_a_row)


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows how many products each tensor has behind it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self._behind: dict[int, int] = {}  # memory -> products in a row
        self._alive: list[Tensor] = []  # or another tensor might get the memory

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        read, made = (
            [v for v in pytree.tree_leaves(tree) if isinstance(v, Tensor)]
            for tree in ((args, kwargs), result)
        )
        count = 0
        if func._overloadpacket in flop_registry:
            # Of a convolution's backward: to its input and to its weight, which run side by side.
            masks = [v for v in args if isinstance(v, list) and v and isinstance(v[0], bool)]
            backward = func._overloadpacket is torch.ops.aten.convolution_backward
            count = sum(masks[-1][:2]) if backward else 1
        self.total += count
        behind = max((self._behind.get(memory_of(t), 0) for t in read), default=0)
        for tensor in made:
            at = memory_of(tensor)
            self._behind[at] = max(self._behind.get(at, 0), behind + bool(count))
        self._alive += made
        return result

    @property
    def in_a_row(self) -> int:
        """The most that any tensor has behind it."""
        return max(self._behind.values(), default=0)


def products(batch: Batch, kind: type[Evaluator], held: set[nn.Parameter] | None) -> Products:
    """What one inference step multiplies, if all gradients of values are computed anew.

    Args:
        batch: A batch that is not used again.
        kind: Of its evaluator; `ThroughErrors` goes through the network as backprop does.
        held: Parameters that the optimizer moves, None for all.
    """
    t = len(batch.nodes) + 1  # an error stands at each
    if kind is ThroughErrors:
        t = 0
        for node in batch.nodes:
            node.e = torch.zeros_like(node.x)  # values need what predicts them
    evaluator = kind(batch, held)
    evaluator.finish()
    autocast = torch.autocast(batch.loss.device.type, enabled=False)
    with autocast, _step_by_step(), _Counting() as counting:
        evaluator(Asked(t, moves=True, learns=False, last=False, root=1.0, scale=1.0))
    return Products(counting.total, counting.in_a_row)


@contextmanager
def _step_by_step() -> Iterator[None]:
    """Recurrent nets run step by step, not in one call."""
    before = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before[0])
        torch._C._set_cudnn_enabled(before[1])
