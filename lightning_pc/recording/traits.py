"""What is known of torch functions: whether they draw, and whether they write to an argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Function = Callable[..., Any]

#: Functions that draw from a random generator, by name; others are found out at their first call.
_DRAWING = frozenset(
    (
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
        *("feature_alpha_dropout", "rrelu", "bernoulli", "multinomial", "normal", "poisson"),
        *("rand_like", "randn_like", "randint_like", "scaled_dot_product_attention", "lstm", "gru"),
        *("rnn_tanh", "rnn_relu", "uniform", "random", "exponential", "cauchy", "log_normal"),
        *(
            "multi_head_attention_forward",
            "geometric",
            "gumbel_softmax",
            "fractional_max_pool2d",
            "fractional_max_pool3d",
        ),
    )
)
#: Functions that move running statistics without making a new version of them.
NORMS = frozenset((F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm))
_WRITING = frozenset(("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"))


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
