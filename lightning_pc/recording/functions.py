"""What the torch functions mean to us: nonlinearities, softmaxes, draws, writes, composites."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Any]

SOFTMAXES = ("softmax", "log_softmax")
# Functions whose input is what the field calls a pre-activation: a node stands there.
ACTIVATIONS = (
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu"),
    *("mish", "glu", "tanh", "sigmoid", "logsigmoid", "softplus", "softsign", "tanhshrink"),
    *("hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softshrink", "threshold"),
    *("clamp", "clamp_min", "clip", "sin", "cos", "expit"),
)
# Functions that by themselves make no node, but make the module that uses them a nonlinearity.
INGREDIENTS = ("exp", "exp2", "expm1", "erf", "atan", "arctan", "sinh", "cosh", "log1p")


def _named(names: Iterable[str]) -> dict[Function, str]:
    """Every torch callable of these names, and its in-place twin, mapped to the bare name."""
    spaces = (torch, F, torch.Tensor, torch._C._nn, torch.special)
    return {
        getattr(space, variant): name
        for name in names
        for variant in (name, name + "_")
        for space in spaces
        if hasattr(space, variant)
    }


#: Torch callable -> its bare name, for the functions at whose input a node may stand.
NONLINEARITIES: dict[Function, str] = _named(ACTIVATIONS + SOFTMAXES)
#: Torch callables that make a module without parameters count as a nonlinearity.
NONLINEAR: dict[Function, str] = _named(ACTIVATIONS + INGREDIENTS)


def out_of_place(func: Function, kwargs: dict[str, Any]) -> tuple[Function, bool]:
    """The variant of a nonlinearity that leaves its input alone.

    Returns:
        The function to call, and whether the original call would have written to its input.
        ``kwargs`` loses a true ``inplace``.
    """
    if kwargs.get("inplace"):
        kwargs["inplace"] = False
        return func, True
    name: str = getattr(func, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        space = torch.Tensor if getattr(torch.Tensor, name, None) is func else torch
        return getattr(space, name[:-1], None) or getattr(F, name[:-1]), True
    return func, False


def rectifies(name: str, rest: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a nonlinearity is one: a clamp is where it cuts at zero, as a ReLU does."""
    if name not in ("clamp", "clamp_min", "clip"):
        return True
    bounds = [*rest, kwargs.get("min"), kwargs.get("max")]
    return any(isinstance(b, (int, float)) and b == 0 for b in bounds)


L1_LOSS = cast(types.FunctionType, F.l1_loss)


def whole_call(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `L1_LOSS` was called with: torch keeps its ``weight`` from any mode.

    So it would be left out of the loss.
    """
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not L1_LOSS.__code__:
        frame = frame.f_back
    weight = None if frame is None else frame.f_locals.get("weight")
    return kwargs if weight is None else {**kwargs, "weight": weight}


def softmax_dim(name: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The axis of a softmax call, None where ``name`` is no softmax."""
    if name not in SOFTMAXES:
        return None
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dim is None:  # torch's own (deprecated) guess
        return 0 if x.dim() in (0, 1, 3) else 1
    return int(dim)


def _opened(func: types.FunctionType) -> Function:
    """A copy of a torch composite that no longer hides what it calls from a TorchFunctionMode."""

    def never(*_: Any) -> bool:
        return False

    space = {**func.__globals__, "has_torch_function": never, "has_torch_function_unary": never}
    copy = types.FunctionType(func.__code__, space, func.__name__, func.__defaults__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def attention(
    logits_node: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` written out, so that its logits can be a value node.

    All arguments but one are torch's. ``logits_node`` is called with the masked, scaled logits
    [N..., L, S] of L queries and S keys, and returns what stands there.
    """
    if enable_gqa:
        groups = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    factor = query.size(-1) ** -0.5 if scale is None else scale
    logits = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~causal, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        else:
            logits = logits + attn_mask
    x = logits_node(logits)
    if attn_mask is None:
        weights = F.softmax(x, -1)
    else:  # a query that may see no key at all gets zeros, as in torch's own
        blind = (logits.detach() == float("-inf")).all(-1, keepdim=True)
        weights = F.softmax(x.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    return weights @ value


def branch(pred: Any, true_fn: Function, false_fn: Function, operands: Any = ()) -> Any:
    """``torch.cond`` written out: which branch it takes is a constant of the batch."""
    return (true_fn if pred else false_fn)(*operands)


COND: Function = torch.ops.higher_order.cond
SDPA: Function = F.scaled_dot_product_attention
#: Composites that hide a softmax from the mode -> a copy that shows it.
COMPOSITES: dict[Function, Function] = {
    f: _opened(cast(types.FunctionType, f))
    for f in (F.multi_head_attention_forward, F.gumbel_softmax, F.softmin)
}


# What they do to generators and arguments

#: Functions that draw from a random generator, by name; others are found out at their first call.
_DRAWING = frozenset(
    (
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
        *("feature_alpha_dropout", "rrelu", "bernoulli", "multinomial", "normal", "poisson"),
        *("rand_like", "randn_like", "randint_like", "scaled_dot_product_attention", "lstm", "gru"),
        *("rnn_tanh", "rnn_relu", "uniform", "random", "exponential", "cauchy", "log_normal"),
        *("multi_head_attention_forward", "geometric", "gumbel_softmax"),
        *("fractional_max_pool2d", "fractional_max_pool3d"),
    )
)
#: Functions that move running statistics without making a new version of them.
NORMS = frozenset((F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm))
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
_WRITING = frozenset(("__setitem__", *(f"__i{name}__" for name in _OPERATORS)))
#: Types of what a passive function gives.
TELLS = frozenset((bool, int, float, torch.Size, torch.dtype, torch.device, torch.layout))


@dataclass
class Traits:
    """What is known of a function.

    Attributes:
        draws: It may draw from a random generator.
        writes: It may write to an argument.
        passive: It tells something of a tensor (its shape, a number) and makes none.
        met: What it does to what a recording keeps has been watched once.
    """

    draws: bool
    writes: bool
    passive: bool = False
    met: bool = False


class Known(dict[Any, Traits]):
    """What is known of functions; of a new one, what its name tells."""

    def __missing__(self, function: Function) -> Traits:
        name = getattr(function, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        writes = in_place or name in _WRITING or function in NORMS
        self[function] = Traits(name.rstrip("_") in _DRAWING, writes)
        return self[function]
