"""Losses of generative models."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from lightning_pc.errors import refuse, shown

__all__ = ["squared_error"]


def squared_error(
    output: Tensor, target: Tensor, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """``0.5 * ||output - target||^2``: Eq. 5 of Salvatori et al. 2024, with the usual factor 1/2.

    `torch.nn.functional.mse_loss` is another one: a mean over entries as well as samples, and twice
    as much. Its F would weigh data of n entries by 2 / n.

    Args:
        output: What the model gives, [B, *].
        target: Data of the same shape, [B, *].
        reduction: ``"mean"`` over samples, or their ``"sum"``.

    Returns:
        The loss, [].

    Raises:
        ConfigError: The shapes differ, or another reduction.
    """
    if has_torch_function((output, target)):
        error: Tensor = handle_torch_function(
            squared_error, (output, target), output, target, reduction=reduction
        )
        return error
    shapes = tuple(output.shape), tuple(target.shape)
    refuse(
        {
            f"squared_error: the output has shape {shapes[0]}, the target {shapes[1]}: expected "
            "one shape, [B, *].": shapes[0] != shapes[1] or not shapes[0],
            f"reduction={shown(reduction)}: expected 'mean' (over samples) or 'sum'.": (
                reduction not in ("mean", "sum")
            ),
        }
    )
    total = 0.5 * (output - target).square().sum()
    return total if reduction == "sum" else total / max(len(output), 1)
