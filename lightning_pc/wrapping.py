"""What both doors do to the optimizer that they wrap: its state, and its closure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_pc.errors import ConfigError
from lightning_pc.learner import Learner

#: Where an optimizer's state dict holds the learner's.
STATE = "lightning_pc"


def with_state(state_dict: dict[str, Any], learner: Learner) -> dict[str, Any]:
    """An optimizer's state with the learner's beside it, which torch's optimizers pass over."""
    ours = learner.state_dict()
    return {**state_dict, STATE: ours} if ours else state_dict


def without_state(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """An optimizer's state alone, and the learner's ({} where it has none)."""
    return {k: v for k, v in state_dict.items() if k != STATE}, state_dict.get(STATE, {})


def once(closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
    """``closure``, for an optimizer that reads its loss; it computes no gradient anew.

    Called once more, or at other weights, it is a ConfigError: it would need another gradient.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    learning = any(p.grad is not None for p in parameters)
    versions = [p._version for p in parameters]
    called = False

    def first() -> Any:
        nonlocal called
        moved = [p._version for p in parameters] != versions
        if called or moved or (learning and all(p.grad is None for p in parameters)):
            raise ConfigError(
                f"{type(optimizer).__name__} evaluates its closure more than once a step, or at "
                "other weights, each of which would be a whole inference: use an optimizer of one "
                "gradient a step."
            )
        called = True
        return closure()

    return first
