"""THE IDEA: value nodes stand inside an untouched module for the length of a ``with``.

A `_Stand` takes the place of an activation. Forwards it swaps the prediction ``mu`` for the value
``x``; backwards it swaps the gradient that comes from below for the node's own prediction error.
So one ordinary ``loss.backward()`` yields dF/dx of every node and dF/dtheta of every stage, and
nothing travels further than to the next node. (In error coordinates, `ErrorNode`, the gradients
that values move by do: there a stand hands on what comes from below, and where weights move at the
same step, they have a second backward.)

Who puts stands there is `lightning_pc.watch`, a `TorchFunctionMode` that sees every nonlinearity
that the module calls. Outside its ``with`` there is no hook, no attribute and no changed method on
the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from typing_extensions import override

from lightning_pc.along import Along
from lightning_pc.energies import Energy, Slopes
from lightning_pc.errors import ClosureError

_OVERWRITES = "overwrites"
FROZEN = "frozen above: its prediction depends on no trainable parameter"


@dataclass(eq=False)
class Node:
    """One value node.

    Attributes:
        through: Gradients that move values go through it, on to all that is above.
        name: Dotted name of its place; a second call of the same place is ``name#2``.
        x: The value, float32 or wider, [B, *].
        energy: Its node energy.
        depth: Fewest stages on any path to the loss; a node that the loss reads has 1.
        arrival: First inference step at which its error may not be zero: its depth on a chain,
            sooner where a connection skips stages, or where iPC shares a weight between stages;
            1 where gradients go through.
        parents: The nodes from which its prediction is computed.
        parameters: The trainable parameters of its stage.
        weight: Of its energy in F, at the coming evaluation.
        along: When its value goes along with its prediction; None where it stays.
        velocity: Discounted sum of the gradients it has moved by, [B, *]; None without momentum.
        whole: Parameters learn from its error as if that had come all of its way (`ErrorNode`).
        passes: Why it turned out to be no node, "" where it is one; gradients pass unchanged.
        rounding: Relative, of the arithmetic that computes its prediction.
    """

    through: ClassVar[bool] = False

    name: str
    x: Tensor
    energy: Energy
    depth: int = 0
    arrival: int = 0
    parents: list[Node] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)
    weight: float = 1.0
    along: Along | None = None
    velocity: Tensor | None = None
    whole: bool = False
    passes: str = ""
    rounding: float = torch.finfo(torch.float32).eps
    # Of the current evaluation: the energy's gradients (None until an error arrives), the
    # gradient that comes from below, and where mu was computed.
    slopes: Slopes | None = None
    below: Tensor | None = None
    edge: GradientEdge | None = None

    @property
    def coordinates(self) -> Tensor:
        """What inference moves, [B, *]: the value."""
        return self.x

    @torch.no_grad()
    def evaluate(self, mu: Tensor, scale: float) -> None:
        """Takes in this evaluation's prediction.

        Args:
            mu: The prediction, [B, *].
            scale: Factor from the energy's gradient to the parameters' (1 / M and accumulation).
        """
        mu = mu.detach().to(self.x.dtype)
        along = self.along
        if along and along.always:
            along.follow(self.x, mu, self.energy)
        self.slopes = self.energy.evaluate(self.x, mu, scale, self.weight)
        total = self.slopes.total
        if along and not along.always and along.moved(self.x, mu, self.energy, self.weight, total):
            self.slopes = self.energy.evaluate(self.x, mu, scale, self.weight)

    def moved(self, gamma: float, momentum: float) -> None:
        """Takes in that its coordinates have made a step."""

    def rest(self) -> None:
        """Its coordinates are where they started, and do not move."""
        self.velocity = None

    def forget(self) -> None:
        """Drops what belongs to one evaluation."""
        self.slopes = self.below = self.edge = None


@dataclass(eq=False)
class ErrorNode(Node):
    """A node in error coordinates: inference moves ``e``, and ``x = mu + e`` follows.

    Goemaere et al. 2025 (ePC, arXiv 2505.20137): F(e) is the loss of the whole network plus
    ``0.5 * ||e||^2`` of each node, so dF/de is ``e`` plus the gradient that arrives by ordinary
    backprop through all that is below, undamped at any depth. Its minima are those of F(x).
    The energy must depend on ``x - mu`` alone, as the Gaussian does.

    Attributes:
        e: The error ``x - mu``, in the value's dtype, [B, *]; starts at zero.
        come: How far a lone entry has come that a constant gradient of -1 pulls at; its whole way
            is 1 / weight. To first order all entries have come the same share of theirs.
        pace: The velocity of that entry.
    """

    through: ClassVar[bool] = True

    e: Tensor = field(init=False)
    come: float = 0.0
    pace: float = 0.0

    def __post_init__(self) -> None:
        self.e = torch.zeros_like(self.x, requires_grad=False)

    @property
    @override
    def coordinates(self) -> Tensor:
        """What inference moves, [B, *]: the error."""
        return self.e

    @override
    @torch.no_grad()
    def evaluate(self, mu: Tensor, scale: float) -> None:
        self.x.copy_(mu).add_(self.e)
        # Not of x and mu, whose difference rounds away an error that is small beside them.
        zero = self.e.new_zeros(())
        self.slopes = self.energy.evaluate(self.e, zero, scale * self._gain, self.weight)

    @override
    def moved(self, gamma: float, momentum: float) -> None:
        self.pace = momentum * self.pace + 1.0 - self.weight * self.come
        self.come += gamma * self.pace

    @override
    def rest(self) -> None:
        super().rest()
        self.come = self.pace = 0.0

    @property
    def _gain(self) -> float:
        """Factor of the error that parameters learn from."""
        share = self.weight * self.come if self.whole else 1.0
        return 1.0 / share if share > 0 else 1.0


@dataclass(eq=False)
class WholeErrorNode(ErrorNode):
    """An error from which parameters learn on its way, and which counts as if it were all of it.

    Else weights above the loss's own stage would learn at about gamma times the learning rate.
    """

    whole: bool = True


@dataclass(eq=False)
class Site:
    """A place that was met in call order.

    Attributes:
        key: Tells the kind of place: a function's name, a module, or (module, output).
        name: Dotted name.
        shape: Of the prediction, [B, *]; empty where it was skipped.
        node: Who stands there, None where no node does.
        why: Why no node stands there.
        skipped: That no node can stand there was known before its prediction was computed.
    """

    key: object
    name: str
    shape: tuple[int, ...]
    node: Node | None = None
    why: str = ""
    skipped: bool = False


class Gate:
    """Says whether it is us who differentiate; every stand asks it."""

    def __init__(self) -> None:
        self.open = False
        self.sealed = False  # stands stop every gradient: one stage is differentiated alone
        self.moving = False  # the gradients are for values to move by

    @contextmanager
    def opened(self, sealed: bool = False, moving: bool = False) -> Iterator[None]:
        """For the length of one backward of ours."""
        self.open, self.sealed, self.moving = True, sealed, moving
        try:
            yield
        finally:
            self.open = self.sealed = self.moving = False


class _Stand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, x: Tensor, node: Node, gate: Gate) -> Tensor:
        ctx.node, ctx.gate = node, gate
        ctx.set_materialize_grads(False)
        return x.to(mu.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        node: Node = ctx.node
        if not ctx.gate.open or torch.is_grad_enabled():
            raise ClosureError(
                f"Something other than lightning_pc differentiated through value node "
                f"'{node.name}'. A closure given to a predictive coding optimizer returns the "
                "loss and does not call .backward(). Under Lightning's Trainer, "
                "configure_optimizers gives a plain optimizer and "
                "Trainer(strategy=PCStrategy(...)) does the rest. Gradients inside of a training "
                "step (torch.autograd.grad: penalties, adversarial inputs) cannot be taken: make "
                "such inputs before it, e.g. in on_after_batch_transfer."
            )
        if node.passes:
            return grads[0], None, None, None
        if ctx.gate.sealed:
            return None, None, None, None
        error = None if node.slopes is None else node.slopes.dmu
        if node.through and not ctx.gate.moving:
            return error, None, None, None
        node.below = grads[0] if grads[0] is None else grads[0].to(node.x.dtype)
        return grads[0] if node.through else error, None, None, None


def stand(mu: Tensor, node: Node, gate: Gate) -> Tensor:
    """Puts ``node`` in the place of its prediction.

    Args:
        mu: The prediction, [B, *].
        node: Who stands there.
        gate: Open while we differentiate.

    Returns:
        The node's value in the prediction's dtype, [B, *].
    """
    node.edge = get_gradient_edge(mu)
    value: Tensor = _Stand.apply(mu, node.x, node, gate)  # type: ignore[no-untyped-call]
    return value


def overwrite(tensor: Tensor, value: Tensor) -> Tensor:
    """Writes ``value`` to all of ``tensor``, as an in-place activation does; returns ``tensor``."""
    tensor.copy_(value)
    base = tensor._base
    if base is not None and base.numel() == tensor.numel() and base.grad_fn is not None:
        metadata: Any = base.grad_fn.metadata
        metadata[_OVERWRITES] = True  # a view, but of everything
    return tensor


def overwrites(function: Any) -> bool:
    """Whether an autograd function's result owes nothing to its first input, which it replaced."""
    name = function.name()
    if name == "torch::autograd::CopySlices":
        return _OVERWRITES in function.metadata
    return bool(name == "torch::autograd::CopyBackwards")


def stand_of(function: object) -> Node | None:
    """The node whose stand recorded this autograd function, if any."""
    node = getattr(function, "node", None)
    return node if isinstance(node, Node) else None
