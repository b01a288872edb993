"""Calls of pieces that are alike, made once for all of them.

What each of n pieces has of its own stands in a row of one tensor, [n, *]. Functions that are known
to work on such rows take them as they are. Others go through `torch.vmap`, and what that does not
know, or draws, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_pc.recording.calls import Call, Environment, Ref, run, tensors_in
from lightning_pc.recording.sites import hand
from lightning_pc.stages.alike import Look
from lightning_pc.stages.batch import Batch
from lightning_pc.stages.in_place import Change, LinearRows, linear
from lightning_pc.stages.verify import check_same

_functorch: Any = torch._C._functorch
#: Functions of one tensor, entry by entry.
ENTRYWISE = frozenset(
    (
        *(torch.tanh, torch.relu, torch.sigmoid, torch.sin, torch.exp, torch.square, torch.erf),
        *(Tensor.tanh, Tensor.relu, Tensor.sigmoid, F.relu, F.gelu, F.silu, F.elu, F.leaky_relu),
        *(F.softplus, F.mish, F.selu, F.hardtanh, F.relu6, F.celu, F.tanh, F.sigmoid, hand),
    )
)


def is_linear(call: Call, shapes: Sequence[torch.Size]) -> bool:
    """Whether it is `F.linear` with a weight [O, I] and perhaps a bias [O], in that order."""
    order = tuple(map(Ref, range(len(call.reads))))
    if call.function is not F.linear or call.args[: len(order)] != order or call.kwargs:
        return False
    weight, *bias = shapes
    return len(weight) == 2 and all(shape == weight[:1] for shape in bias)


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
        with nullcontext() if call.context is None else call.context.entered():
            if own.isdisjoint(call.reads) and not call.draws:
                call.run(env)
            else:
                likes = [calls[look.piece.program[place][0]] for look in looks[part]]
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
    if all(rows) and is_linear(call, [tensor.shape[1:] for tensor in tensors[1:]]):
        return [_linear(changes.get(call.reads[1]), *tensors)]
    if not call.draws and (results := _vmapped(call, tensors, rows)) is not None:
        return results
    made = []
    for number, like in enumerate(likes):
        for draw in like.draws:
            draw.again()
        each = [t[number] if row else t for t, row in zip(tensors, rows, strict=True)]
        made.append(tensors_in(like.apply(each)))
    return [torch.stack(results) for results in zip(*made, strict=True)]


def _vmapped(call: Call, tensors: list[Tensor], rows: list[bool]) -> list[Tensor] | None:
    """What a call makes on all rows; None where torch cannot, or would go row by row itself."""
    dims = tuple([0 if row else None for row in rows])
    together = torch.vmap(lambda *each: tuple(tensors_in(call.apply(each))), dims)
    before = _functorch._is_vmap_fallback_enabled()
    _functorch._set_vmap_fallback_enabled(False)
    try:
        return list(together(*tensors))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of one row alone it would be raised again
        return None
    finally:
        _functorch._set_vmap_fallback_enabled(before)


def _linear(change: Change | None, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    if change is None:
        y = linear(flat, weight, bias)
    else:
        y = LinearRows.apply(flat, change.token, change)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


@torch.no_grad()
def obstacle(batch: Batch, looks: Sequence[Look]) -> str:
    """Why pieces do not predict together what each predicts alone, "" where they do.

    They are tried once for each form.
    """
    tried, numbers = batch.graph.tried, tuple(n for look in looks for n in look.piece.nodes)
    if numbers not in tried:
        drawn = batch.drawn()
        try:
            _try(batch, looks)
            tried[numbers] = ""
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # alone they run; parallel=True tells it
            tried[numbers] = f"{type(error).__name__}: {error}"
        for generator in drawn:
            generator.again()
    return tried[numbers]


def _try(batch: Batch, looks: Sequence[Look]) -> None:
    calls, own = batch.watch.calls, set[int]()
    env: Environment = {}
    alone = [batch.environment(look.piece) for look in looks]
    for slot in alone[0]:
        each = [
            before[look.own_slot(looks[0], slot)] for look, before in zip(looks, alone, strict=True)
        ]
        shared = each[0] is each[1]
        env[slot] = each[0] if shared else torch.stack(each)
        own |= set() if shared else {slot}
    found: list[Tensor] = []

    def meet(_: int, mu: Tensor) -> Tensor:
        found.append(mu)
        return mu

    for look, before in zip(looks, alone, strict=True):
        run(calls, look.piece.program, before, meet)
    together = run_rows(calls, looks, slice(0, len(looks)), env, own, {})
    for look, row, mu in zip(looks, together.unbind(), found, strict=True):
        node = batch.nodes[look.piece.nodes[0]]
        check_same(row, mu, node.name, node.rounding)
