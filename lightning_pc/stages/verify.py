"""Whether a recording is all of the forward, which is checked once for each form."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_pc.errors import PCError, RecordingError
from lightning_pc.recording.applied import Applied
from lightning_pc.recording.calls import run
from lightning_pc.recording.draws import Draws
from lightning_pc.recording.sites import leaves_of
from lightning_pc.stages.batch import Batch, memory_of
from lightning_pc.stages.graph import Piece, Stage

#: A stage's graph of the first forward is kept where it holds at most so many times the bytes of
#: the values that it reads (or predicts, where it reads none).
KEPT = 2.0


def check(batch: Batch) -> None:
    """Whether the recording is all of the forward; and how much autograd holds of each piece.

    The parameters and values that autograd reaches must be known to the recording. And the pieces,
    run on the values that they start with, must give the predictions and the loss that the forward
    gave.

    Raises:
        RecordingError: Naming the module.
    """
    graph = batch.graph
    states = [Draws(torch.default_generator), *batch.drawn()]
    for number, stage in enumerate(graph.stages[:-1]):
        site = batch.site(number)
        _check_leaves(batch, site.leaves, stage, site.name)
    _check_leaves(batch, leaves_of(batch.loss), graph.stages[-1], "the loss")
    for piece in graph.pieces:
        read = [batch.nodes[n].x for n in piece.values.values() or piece.nodes]
        known = {memory_of(tensor) for tensor in (*batch.environment(piece).values(), *read)}
        held = _run_again(batch, piece)
        size = sum(n for at, n in held.items() if at not in known)
        small = size <= KEPT * sum(x.nbytes for x in read)
        for number in piece.nodes:  # in error coordinates all is held at each evaluation anyway
            keeps = small or batch.nodes[number].e is not None
            graph.expected.keeps[graph.sites[number]] = keeps
    for state in states:
        state.again()


def _run_again(batch: Batch, piece: Piece) -> dict[int, int]:
    """Checks what a piece gives; returns what autograd holds of it, memory -> bytes."""
    watch, held, outputs = batch.watch, dict[int, int](), list[Tensor]()
    calls = [watch.calls[i] for i, *_ in piece.program]
    applied = any(isinstance(call.function, Applied) for call in calls)

    def pack(tensor: Tensor) -> Tensor | None:
        held.setdefault(memory_of(tensor), tensor.numel() * tensor.element_size())
        return tensor.detach() if applied else None

    def meet(number: int, mu: Tensor) -> Tensor:
        node = batch.nodes[number]
        if watch.task.kept is None and not batch.site(number).away:  # kept values have moved
            check_same(mu, node.x, f"'{node.name}'", node.rounding)
        outputs.append(mu)
        return node.x

    before, env = torch.get_rng_state(), batch.environment(piece)
    with torch.enable_grad(), saved_tensors_hooks(pack, lambda kept: kept):
        try:
            run(watch.calls, piece.program, env, meet)
        except (PCError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise RecordingError(
                f"A call of the forward does not run a second time ({error}): it keeps "
                "something from one call to the next, such as the cache of an "
                "autograd.Function (transformers: use_cache=False)."
            ) from error
    if not any(call.draws for call in calls) and not torch.equal(before, torch.get_rng_state()):
        raise RecordingError(
            "A call of the forward drew from a random generator now and then only, so that it "
            "cannot be repeated: draw before the forward."
        )
    if piece.loss:
        eps = torch.finfo(batch.loss.dtype).eps
        rounding = max([eps, *(site.node.rounding for site in watch.sites if site.node)])
        check_same(env[batch.graph.loss], batch.loss, "the loss", rounding)
        outputs.append(env[batch.graph.loss])
    if applied:
        _check_backward(batch, piece, outputs)
    return held


def _check_backward(batch: Batch, piece: Piece, outputs: list[Tensor]) -> None:
    """A backward of the user's own adds to no ``.grad`` where it is asked for values alone."""
    outputs = [out for out in outputs if out.requires_grad]
    values = [batch.nodes[n].x for n in piece.parents]
    if not outputs or not values:
        return
    weights = [p for m in batch.watch.task.names for p in m._parameters.values() if p is not None]
    before = [(p.grad, p.grad._version if p.grad is not None else 0) for p in weights]
    torch.autograd.grad(outputs, values, [*map(torch.zeros_like, outputs)], allow_unused=True)
    changed = [
        (weight, gradient)
        for weight, (gradient, version) in zip(weights, before, strict=True)
        if (made := weight.grad) is not None and (made is not gradient or made._version != version)
    ]
    for weight, gradient in changed:
        weight.grad = gradient  # to one that is there zeros were added
    if changed:
        raise RecordingError(
            "The backward of an autograd.Function adds to the gradients of parameters of shape "
            f"{tuple(changed[0][0].shape)} by itself, as reversible blocks do to save memory. It "
            "would do so at each inference step: leave it out while training."
        )


def _check_leaves(batch: Batch, leaves: list[Tensor] | None, stage: Stage, name: str) -> None:
    """Autograd reaches nothing from a prediction, or the loss, that its stage does not know."""
    known = {id(parameter) for parameter in batch.parameters(stage)}
    known |= {id(batch.nodes[n].x) for n in stage.parents}
    ours = {id(node.x) for node in batch.nodes}
    for given in batch.watch.given.values():  # what another network made before belongs to it
        if given.grad_fn is not None:
            known.update(map(id, leaves_of(given)))
    cut = {id(s.node.x): s for s in batch.watch.sites if s.node is not None and s.why}
    pending, seen = list(leaves or []), set[int]()
    while pending:
        leaf = pending.pop()
        if id(leaf) in seen or id(leaf) in known:
            continue
        seen.add(id(leaf))
        if id(leaf) in cut:
            pending += cut[id(leaf)].leaves or []
        elif isinstance(leaf, nn.Parameter) or id(leaf) in ours:
            what = "a parameter" if isinstance(leaf, nn.Parameter) else "the value of another node"
            raise RecordingError(
                f"{name!r} depends on {what} of shape {tuple(leaf.shape)} by a call that the "
                "recording has missed: a C++ extension, TorchScript or a function transform."
            )


def check_same(again: Tensor, before: Tensor, what: str, rounding: float) -> None:
    """Whether what runs again gives the same.

    Raises:
        RecordingError: It does not.
    """
    again, before = again.detach().to(before.dtype), before.detach()
    if torch.equal(again, before):
        return
    finite = before[before.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 1.0
    far = math.sqrt(rounding) * size
    close = torch.isclose(again, before, rtol=0.0, atol=far, equal_nan=True)
    if not bool(close.all()):
        raise RecordingError(
            f"The recorded calls give {what} another value than the forward did: something wrote "
            "to a tensor behind torch's back (through .numpy() or a C++ extension), or a call "
            "does not give the same result twice. Use plain PyTorch calls while training."
        )
