"""Loss calls: by how many terms a loss was divided, M in the scaling of the parameter gradients.

The free energy F is a sum over terms (samples, tokens); the user's loss is usually their mean.
Value gradients are taken of the sum F and parameter gradients of F / M, so M must be known. It is
read off the calls of torch's loss functions on which the returned loss depends.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_pc.errors import ConfigError, shown
from lightning_pc.losses import squared_error

_BY_SAMPLE = (F.ctc_loss, squared_error)
_BY_CLASS = (F.cross_entropy, F.nll_loss)
_BY_ELEMENT = (
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.kl_div),
    *(F.binary_cross_entropy_with_logits, F.poisson_nll_loss, F.gaussian_nll_loss),
    *(F.soft_margin_loss, F.hinge_embedding_loss, F.margin_ranking_loss),
)
#: Of these, those that divide a weighted mean by the sum of the weights.
_BY_WEIGHT = (F.mse_loss, F.l1_loss)
#: Of these, those whose targets are chances.
_BY_CHANCE = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
_BY_ROW = (  # one term for each row of the last axis
    *(F.multi_margin_loss, F.multilabel_margin_loss, F.multilabel_soft_margin_loss),
    *(F.cosine_embedding_loss, F.triplet_margin_loss, F.triplet_margin_with_distance_loss),
)
_SIGNATURES = {f: inspect.signature(f) for f in (*_BY_CLASS, *_BY_ELEMENT, *_BY_ROW, *_BY_SAMPLE)}
#: The loss functions that are known: torch's and ours.
LOSSES = frozenset(_SIGNATURES)


@dataclass
class LossCall:
    """One call of a loss function.

    Attributes:
        edge: Of what it returned in autograd's graph; None once that is let go.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        batch: Size of dimension 0 of its target (or input, where there is none).
        divisor: What a mean was divided by; None for the other reductions.
        gradient: d loss / d output, []; None where it was not asked for and where none arrives.
        slot: Of its output in the recording.
        guess: Its value where all classes are as likely for every input: ln(classes) of a mean
            cross-entropy. Infinite where it is not known.
    """

    edge: GradientEdge | None
    reduction: str
    batch: int
    divisor: float | None = None
    gradient: Tensor | None = None
    slot: int = -1
    guess: float = math.inf


def _divisor(func: Callable[..., Any], call: dict[str, Any], tensors: list[Tensor]) -> float:
    """What the call divides a mean by."""
    first, weight = tensors[0], call.get("weight")
    if func in _BY_CLASS:
        target: Tensor = call["target"]
        if target.is_floating_point() and target.shape == first.shape:  # class probabilities
            return first.numel() / first.shape[1 if first.dim() > 1 else 0]
        counted = target != call["ignore_index"]
        return float(counted.sum() if weight is None else weight[target[counted]].sum())
    if func in _BY_WEIGHT and weight is not None:
        return float(weight.sum())
    if func in _BY_ELEMENT:
        return float(math.prod(np.broadcast_shapes(*(v.shape for v in tensors if v is not weight))))
    if func in _BY_ROW:
        return first.numel() / first.shape[-1]
    return float(_batch(func, call, first))


def _guess(func: Callable[..., Any], call: dict[str, Any], first: Tensor) -> float:
    """What a mean of the call's terms is where all classes are as likely for every input."""
    if call.get("weight") is not None or call.get("pos_weight") is not None:
        return math.inf
    if func in _BY_CLASS and not call["target"].is_floating_point():
        return math.log(first.shape[1 if first.dim() > 1 else 0])
    return math.log(2) if func in _BY_CHANCE else math.inf


def _batch(func: Callable[..., Any], call: dict[str, Any], first: Tensor) -> int:
    if func is F.ctc_loss:  # log-probabilities are [T, N, C], or [T, C] of one sequence
        return first.shape[1] if first.dim() == 3 else 1
    target = call.get("target", first)
    return target.shape[0] if target.dim() else 1


def read_loss_call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> LossCall | None:
    """The call as a `LossCall`, None where ``func`` is no loss function of torch's."""
    signature = _SIGNATURES.get(func)
    if signature is None or not isinstance(output, Tensor) or output.grad_fn is None:
        return None
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    tensors = [v for v in call.values() if isinstance(v, Tensor)]
    reduction, divisor = call["reduction"], None
    if call.get("reduce") is False:  # the names of torch before 0.4
        reduction = "none"
    elif call.get("size_average") is False:
        reduction = "sum"
    if reduction == "batchmean":
        reduction, divisor = "mean", float(tensors[0].shape[0])
    elif reduction == "mean":
        divisor = _divisor(func, call, tensors)
    edge = GradientEdge(output.grad_fn, output.output_nr)
    guess = _guess(func, call, tensors[0]) if reduction == "mean" else math.inf
    return LossCall(edge, reduction, _batch(func, call, tensors[0]), divisor, guess=guess)


def loss_terms(calls: list[LossCall]) -> float | None:
    """M on which the calls agree, None where they do not or where there is none.

    A sum counts the terms by which the user divided it afterwards, 1 / (d loss / d call).
    """
    terms: list[float] = []
    tolerance = 1e-6
    for call in calls:
        if call.divisor is not None:
            terms.append(call.divisor)
        elif call.reduction == "sum" and call.gradient is not None and call.gradient.any():
            counted = 1.0 / float(call.gradient.abs())
            rounding = 2 * torch.finfo(call.gradient.dtype).eps
            whole = abs(counted - round(counted)) <= rounding * counted
            terms.append(round(counted) if whole else counted)
            tolerance = max(tolerance, 2 * rounding)
        else:
            return None
    if not terms or any(abs(m - terms[0]) > tolerance * terms[0] for m in terms):
        return None
    return terms[0]


def doubt(calls: list[LossCall], terms: float) -> str:
    """What the user should know of the M on which the calls agree, "" where it is plain."""
    found = [c.gradient.float() for c in calls if c.divisor is not None and c.gradient is not None]
    # The mean of two is usual for what looks at the same samples twice (contrastive losses).
    if len(found) < 3:
        return ""
    factors = torch.stack(found).tolist()
    if any(abs(len(factors) * factor - 1.0) > 1e-2 for factor in factors):
        return ""
    return (
        f"The training loss is the mean of {len(factors)} loss calls (terms in each: {terms:g}). "
        f"{terms:g} is taken as their number, which is right where the calls are about the "
        f"same samples (say so by loss_terms={terms:g}); where each is about its own (parts of a "
        f"batch, time steps) set loss_terms={len(factors) * terms:g}, or a callable of the batch."
    )


def count_terms(
    given: float | Callable[..., float] | None,
    calls: list[LossCall],
    batch: Any,
    batch_size: Callable[[], float | None],
    otherwise: float,
) -> tuple[float, str]:
    """M, and what the user should know where it had to be guessed ("" where not).

    Args:
        given: The argument ``loss_terms=``.
        calls: On which the loss depends.
        batch: What the forward was given, () or (batch, ...).
        batch_size: Asked where there is no call of a loss function.
        otherwise: Taken where that does not know either.

    Raises:
        ConfigError: ``given`` is no positive number.
    """
    if given is not None:
        try:
            terms = float(given(*batch[:1])) if callable(given) else float(given)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"loss_terms={shown(given)} gave no number ({error}): under PCStrategy it is called"
                " with the batch, by an optimizer of lightning_pc.optim with nothing."
            ) from error
        if not (math.isfinite(terms) and terms > 0):
            raise ConfigError(f"loss_terms gave {terms}: expected a positive number.")
        return terms, ""
    agreed = loss_terms(calls)
    if agreed is not None:
        return agreed, doubt(calls, agreed)
    guess = calls[0].batch if calls else batch_size()
    why = "the loss functions it calls do not agree on it"
    if not calls:
        why = "it calls no loss function of torch's"
    elif any(call.reduction == "none" for call in calls):
        why = "a loss function is called with reduction='none'"
    terms = float(otherwise if guess is None else guess)
    return terms, (
        f"Cannot read off the training loss how many terms it is a mean of ({why}); the batch "
        f"size, {terms:g}, is taken. Set loss_terms= to a number, or a callable of the batch (of "
        "nothing in plain PyTorch)."
    )
