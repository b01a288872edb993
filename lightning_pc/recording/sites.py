"""Sites: places of a forward at which a value node may stand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_pc.nodes.latent import Stand
from lightning_pc.nodes.node import Node

FROZEN = "frozen above: its prediction depends on no trainable parameter"
CAUSE = "computed from a Latent without weights"
OVERWRITES = "overwrites"
INSIDE = "part of another place"
LINEAR = "not a nonlinearity"
WEIGHT_ALONE = "computed from parameters alone"
#: Reasons that what comes before a place decides.
KNOWN_AT_ONCE = frozenset((FROZEN, INSIDE, LINEAR, WEIGHT_ALONE, CAUSE))


@dataclass(eq=False)
class Site:
    """A place that was met in call order.

    Attributes:
        key: Tells the kind of place: a function's name, a module, or (module, output).
        name: Dotted name.
        shape: Of the prediction, [B, *]; empty where it was skipped.
        why: Why no node stands there, "" where one may.
        reported: The user is told of it.
        mu: Slot of the prediction; -1 where the recording is not cut.
        slot: Slot of what is handed on.
        at: Index of the call that stands for it in the recording.
        leaves: Leaves that autograd reaches from the prediction; None where nobody looked.
        edge: Where autograd holds the first forward's prediction; None where it is let go.
        first: That prediction, [B, *].
        version: Of ``first``, by which later writes to it are told.
        node: What stands there, where autograd was cut; no value node where there is a ``why``.
        stand: A latent variable stands there, whose prediction is its prior's mean.
    """

    key: object
    name: str
    shape: tuple[int, ...]
    why: str = ""
    reported: bool = True
    mu: int = -1
    slot: int = -1
    at: int = 0
    leaves: list[Tensor] | None = None
    edge: GradientEdge | None = None
    first: Tensor | None = None
    version: int = 0
    node: Node | None = None
    stand: Stand | None = None

    @property
    def away(self) -> bool:
        """Whether its value may start elsewhere than at its prediction."""
        return self.stand is not None and not self.stand.of.at_mean


@dataclass
class Expected:
    """A form that a recording may turn out to have.

    Attributes:
        keys: Of the recording, in order.
        why: Of each site, why no node stands there.
        keeps: Of each site, whether autograd keeps the first forward's prediction.
    """

    keys: list[Any]
    why: list[str]
    keeps: list[bool]


def hand(value: Tensor, dtype: torch.dtype, copy: bool) -> Tensor:
    """What the module goes on with in the place of a prediction."""
    return value.to(dtype, copy=copy)


class Passage(torch.autograd.Function):
    """Stands a value in for its prediction, to which gradients go on while the node is open.

    In error coordinates, x = mu + e, one backward pass so gives the gradients of all errors while
    nodes are open, and those of each stage's own parameters while they are not. Where no error
    stands a weight that stages share may lead the pass on: to hooks and Functions of the user's,
    which take zeros and not None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mu: Tensor, node: Node) -> Tensor:
        """The value, [B, *]."""
        ctx.node, ctx.dtype = node, mu.dtype
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """To the value, and to the prediction or not."""
        (gradient,) = gradients
        if ctx.node.open:
            return gradient, gradient.to(ctx.dtype), None
        none = ctx.node.total is not None
        return gradient, None if none else torch.zeros_like(gradient, dtype=ctx.dtype), None


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """The leaves that autograd reaches from a tensor."""
    function: Any = tensor.grad_fn
    if function is None:
        return [tensor] if tensor.requires_grad else []
    found: list[Tensor] = []
    pending, seen = [function], {function}
    while pending:
        function = pending.pop()
        leaf = getattr(function, "variable", None)
        if leaf is not None:
            found.append(leaf)
        overwrites = function.name() == "torch::autograd::CopyBackwards" or (
            function.name() == "torch::autograd::CopySlices" and OVERWRITES in function.metadata
        )
        above_all = function.next_functions[1:] if overwrites else function.next_functions
        if function.name() == f"{Passage.__name__}Backward":
            above_all = above_all[:1]  # the value's
        for above, _ in above_all:
            if above is not None and above not in seen:
                seen.add(above)
                pending.append(above)
    return found


def saved_elsewhere() -> bool:
    """Whether hooks (gradient checkpoints) hold what autograd would save."""
    return bool(torch._C._autograd._top_saved_tensors_default_hooks(False))


def rounding_of(mu: Tensor) -> float:
    """Relative, of what computes ``mu``: its own dtype, or a shorter one behind it."""
    device, backends, found = mu.device.type, torch.backends, _eps(mu.dtype)
    if torch.is_autocast_enabled(device):
        found = max(found, _eps(torch.get_autocast_dtype(device)))
    if device == "cuda" and (backends.cuda.matmul.allow_tf32 or backends.cudnn.allow_tf32):
        found = max(found, 2.0**-10)
    return found


_eps = cache(lambda dtype: torch.finfo(dtype).eps)
