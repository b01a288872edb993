"""Inference in a trained model: weights rest, values relax until F has converged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_pc.errors import ClosureError, ConfigError, require, shown
from lightning_pc.inference.schedules import Resting
from lightning_pc.insight.report import StepReport
from lightning_pc.learner import Learner
from lightning_pc.settings import Settings, refuse_unknown
from lightning_pc.stages.checks import let_free


@dataclass(eq=False)
class Inferred:
    """What `infer` found.

    Attributes:
        values: Node name -> value, [B, *].
        output: What the closure returned beside the loss, at these values; None where it did not.
        loss: The loss at these values, [].
        report: F and energies at each step, and how many steps there were.
        converged: Whether F has settled within T steps.
    """

    values: dict[str, Tensor]
    output: Any
    loss: Tensor
    report: StepReport
    converged: bool


def infer(
    model: nn.Module,
    closure: Callable[[], Any],
    *,
    T: int = 500,
    gamma: float | Literal["auto"] = "auto",
    free: Sequence[str] | None = None,
    **settings: Any,
) -> Inferred:
    """Infers the values of a model whose weights rest, by descent on F = E + loss.

    Data that are known are clamped by the loss: a mask leaves the others out.

    Args:
        model: The model; as it was afterwards, with its generators, buffers and gradients.
        closure: Runs the model and returns the loss, or the loss and whatever you want to have at
            the values that were inferred, ``lambda: (loss, output)``. It runs twice: at the start,
            and at the end, where the values stand.
        T: Inference steps, the most: the last is where F has changed by no more than rounding.
        gamma: Inference rate, or ``"auto"``.
        free: Names of nodes that no prediction holds: their energy is left out of F. What stands
            below pulls at them alone.
        **settings: Others of `Settings`: ``value_nodes``, ``momentum``, ``loss_terms`` and so on.

    Returns:
        Values, output, loss and report.

    Raises:
        PCError: Of the closure or the model, as in training; a name in ``free`` that no node has.
    """
    require(nn.Module, model, "infer(model, closure): expected an nn.Module")
    if not callable(closure):
        raise ClosureError(f"infer needs a closure that returns the loss, got {shown(closure)}.")
    taken = {"algorithm", "reset", "until"} & settings.keys()
    refuse_unknown("infer", settings, algorithm=False)
    if taken:
        raise ConfigError(f"infer sets {', '.join(sorted(taken))} itself: leave it out.")
    rounding = max([torch.finfo(p.dtype).eps for p in model.parameters()], default=1e-7)
    how = {"momentum": "conjugate" if gamma == "auto" else None, **settings}
    learner = Learner(model, Settings("pc", T, gamma, reset="never", until=8 * rounding, **how))
    learner.schedule = Resting()
    with torch.enable_grad(), learner.undone():
        learner.begin(closure, _loss_of, must="infer")
        if learner.waiting is None:
            raise ClosureError("The closure given to infer did not run the model.")
        let_free(learner.waiting.batch, free or ())
        learner.infer(1.0, lambda: None)
        report, values = learner.report, learner.values
        returned = learner.begin(closure, _loss_of, must="infer")  # where the values stand
    assert report is not None
    loss, *rest = tree_map_only(Tensor, Tensor.detach, _parts(returned))
    values = {name: value.detach().clone() for name, value in values.items()}
    first, last = report.free_energy[[0, -1]].abs().tolist()
    settled = report.steps < T or last <= rounding * first
    output = rest[0] if len(rest) == 1 else tuple(rest) or None
    return Inferred(values, output, loss, report, settled)


def _parts(returned: Any) -> tuple[Any, ...]:
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def _loss_of(returned: Any) -> Any:
    return _parts(returned)[0]
