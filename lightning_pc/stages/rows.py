"""Calls of pieces that are alike, made once for all of them.

What each of n pieces has of its own stands in a row of one tensor, [n, *]. Functions that are known
to work on such rows take them as they are. Others go through `torch.vmap`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_pc.recording.calls import Call, Environment, Ref, tensors_in
from lightning_pc.recording.sites import hand
from lightning_pc.stages.alike import Look
from lightning_pc.stages.in_place import Change, LinearRows, linear

#: Functions of one tensor, entry by entry.
ENTRYWISE = frozenset(
    (
        *(torch.tanh, torch.relu, torch.sigmoid, torch.sin, torch.exp, torch.square, torch.erf),
        *(Tensor.tanh, Tensor.relu, Tensor.sigmoid, F.relu, F.gelu, F.silu, F.elu, F.leaky_relu),
        *(F.softplus, F.mish, F.selu, F.hardtanh, F.relu6, F.celu, F.tanh, F.sigmoid, hand),
    )
)


def is_linear(call: Call) -> bool:
    """Whether it is `F.linear`, of tensors in that order."""
    order = tuple(map(Ref, range(len(call.reads))))
    return call.function is F.linear and call.args[: len(order)] == order and not call.kwargs


def run_rows(
    calls: Sequence[Call],
    looks: Sequence[Look],
    part: slice,
    env: Environment,
    own: set[int],
    changes: Mapping[int, Change],
) -> Tensor:
    """Runs what alike pieces do, as `lightning_pc.recording.calls.run` does for one.

    Args:
        calls: Of the recording.
        looks: Of the pieces, each with one prediction; slots below are those of the first.
        part: Which of them run.
        env: Slot -> rows [n, *], or what is the same for all pieces.
        own: The slots that hold rows.
        changes: Slot of linear layers' weights -> what is to become of them.

    Returns:
        The predictions, [n, B, *].
    """
    for place, (index, stop, dropped) in enumerate(looks[0].piece.program):
        call = calls[index]
        if stop is not None:
            return env[stop[1]]
        if own.isdisjoint(call.reads) and not call.draws:
            call.run(env)
        else:
            likes = [calls[look.piece.program[place][0]] for look in looks[part]]
            if call.context is None:
                made = _made(call, likes, env, own, changes)
            else:
                with call.context.entered():
                    made = _made(call, likes, env, own, changes)
            env.update(zip(call.fills, made, strict=True))
            own.update(call.fills)
        for slot in dropped:
            env.pop(slot, None)
    raise AssertionError("a piece without a prediction")


def _made(
    call: Call, likes: list[Call], env: Environment, own: set[int], changes: Mapping[int, Change]
) -> list[Tensor]:
    """What a call and its like make, each [n, *]."""
    tensors, rows = [env[slot] for slot in call.reads], [slot in own for slot in call.reads]
    if call.function in ENTRYWISE and len(tensors) == 1:
        return [call.apply(tensors)]
    if is_linear(call) and all(rows):
        return [_linear(changes.get(call.reads[1]), *tensors)]
    if not call.draws:
        together = torch.vmap(
            lambda *each: tuple(tensors_in(call.apply(each))),
            tuple([0 if row else None for row in rows]),
        )
        return list(together(*tensors))
    made = []
    for number, like in enumerate(likes):
        for draw in like.draws:
            draw.again()
        each = [t[number] if row else t for t, row in zip(tensors, rows, strict=True)]
        made.append(tensors_in(like.apply(each)))
    return [torch.stack(results) for results in zip(*made, strict=True)]


def _linear(change: Change | None, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    if change is None:
        y = linear(flat, weight, bias)
    else:
        y = LinearRows.apply(flat, change.token, change)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])
