"""Inference in a trained model: weights rest, values relax until F has converged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_pc.errors import ClosureError, ConfigError, refuse, require, shown
from lightning_pc.inference.schedules import Resting
from lightning_pc.insight.report import StepReport
from lightning_pc.learner import Learner
from lightning_pc.nodes.learned import LearnedGaussian
from lightning_pc.nodes.registry import energies_of
from lightning_pc.precisions import precisions
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
        T: Inference steps, the most: fewer where F has converged, which is where its squared slope
            is no larger than the rounding of F.
        gamma: Inference rate, or ``"auto"``, along conjugate gradients.
        free: Names of nodes that no prediction holds: their energy is left out of F. What stands
            below pulls at them alone.
        **settings: Others of `Settings`: ``value_nodes``, ``energies``, ``loss_terms`` and so on.

    Returns:
        Values, output, loss and report.

    Raises:
        PCError: Of the closure or the model, as in training; DivergenceError where F is no longer
            finite; a name in ``free`` that no node has.
    """
    require(nn.Module, model, "infer(model, closure): expected an nn.Module")
    own = {"algorithm", "reset", "until", "compile"} & settings.keys()
    refuse_unknown("infer", settings, algorithm=False)
    weights, expected = precisions(settings.get("precisions", 1.0)), "expected a list of names"
    refuse(
        {
            f"infer: leave {', '.join(sorted(own))} out, it has no choice there.": own,
            f"infer(T={shown(T)}): expected a whole number of steps.": T is None,
            "infer: F must stay the same, give precisions= a number.": weights.varies,
            f"infer(free={shown(free)}): {expected}.": isinstance(free, str),
            "infer needs gradients, which torch.inference_mode forbids to all that is made in it: "
            "use torch.no_grad, in Lightning Trainer(inference_mode=False).": (
                torch.is_inference_mode_enabled()
            ),
        }
    )
    if not callable(closure):
        raise ClosureError(f"infer needs a closure that returns the loss, got {shown(closure)}.")
    how: dict[str, Any] = {}
    if gamma == "auto" and settings.get("inference") is None:
        how = {"momentum": "conjugate", "gamma_decay": 0.9}
    settings = {**how, **settings}
    learner = Learner(model, Settings("pc", T, gamma, reset="never", **settings))
    learner.schedule = Resting()
    for name, energy in energies_of(learner.settings.energies).items():
        if isinstance(energy, LearnedGaussian) and energy.variance is None:
            told = f"infer: the variances at '{name}' have not been learned: give energies= the"
            raise ConfigError(f"{told} LearnedGaussian that was trained.")
    with torch.enable_grad(), _unfrozen(model), learner.undone():
        learner.begin(closure, _loss_of, must="infer")
        if learner.waiting is None:
            raise ClosureError("The closure given to infer did not run the model.")
        nodes = learner.waiting.batch.nodes
        rounding = 8 * max(node.rounding for node in nodes)
        learner.settings = replace(learner.settings, until=rounding)
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


@contextmanager
def _unfrozen(model: nn.Module) -> Iterator[None]:
    """Recordings follow parameters that are trained; here all rest."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _parts(returned: Any) -> tuple[Any, ...]:
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def _loss_of(returned: Any) -> Any:
    parts = _parts(returned)
    return parts[0] if parts else None
