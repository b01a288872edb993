"""What a recording goes by, and what is kept from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_pc.nodes.placement import Placement
from lightning_pc.recording.functions import Known
from lightning_pc.recording.sites import Expected, Site

#: A module of the model; of one that the forward makes on the spot, its type.
Kind = nn.Module | type[nn.Module]


@dataclass
class Learned:
    """What has been learned about modules and functions, kept from batch to batch.

    Attributes:
        nonlinearity: A module without parameters -> whether it is a nonlinearity.
        writes: Nonlinearities that write to their input.
        functions: What is known of torch functions.
    """

    nonlinearity: dict[Kind, bool] = field(default_factory=dict)
    writes: set[Kind] = field(default_factory=set)
    functions: Known = field(default_factory=Known)


@dataclass(frozen=True)
class Task:
    """What a recording goes by.

    Attributes:
        placement: Where nodes are asked for.
        softmax: Energy at the logits of a softmax.
        names: Module -> dotted name.
        own: Ids of the tensors that the model holds.
        early: What is wrong with a tensor that was computed before the forward, "" for nothing.
        forms: What this recording may turn out to be, the likeliest first.
        through: Gradients go through all nodes.
        half: Predictions may be of float16, since gradients are scaled.
        kept: Sites with values to stand again instead of fresh ones (``reset="never"``).
        learned: What is known of modules and functions; it is added to.
    """

    placement: Placement
    softmax: str
    names: Mapping[nn.Module, str]
    own: frozenset[int]
    early: Callable[[Tensor], str]
    forms: Sequence[Expected]
    through: bool
    half: bool
    kept: list[Site] | None
    learned: Learned
