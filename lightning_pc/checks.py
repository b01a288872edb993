"""What a predictive coding step cannot train, and how the user is told."""

from __future__ import annotations

from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from lightning_pc.errors import ClosureError, DivergenceError, PlacementError, UnsupportedError
from lightning_pc.graph import Graph
from lightning_pc.nodes import Site
from lightning_pc.placement import Placement

_SHARDED = {
    "FullyShardedDataParallel": "FSDP",
    "DistributedDataParallel": "DistributedDataParallel",
    "DataParallel": "DataParallel",
    "DeepSpeedEngine": "DeepSpeed",
}


def check_model(model: nn.Module) -> None:
    """Refuses compiled and sharded modules and such as have nothing to train.

    Raises:
        UnsupportedError: Naming the module and what to do.
    """
    for name, module in model.named_modules():
        where = f"'{name}'" if name else f"the model ({type(module).__name__})"
        if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
            raise UnsupportedError(
                f"{where} is compiled by torch.compile, which hides its nonlinearities from value "
                "nodes: train the module uncompiled and compile it for inference."
            )
        wrapper = _SHARDED.get(type(module).__name__)
        if wrapper is not None:
            raise UnsupportedError(
                f"{where} is wrapped by {wrapper}: predictive coding runs on one device for now, "
                "give it the bare module."
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UnsupportedError(
            f"{type(model).__name__} has no trainable parameter: unfreeze some (requires_grad)."
        )


def checked_loss(loss: object) -> Tensor:
    """The loss, if one can be learned from.

    Raises:
        ClosureError: Saying what it is instead.
    """
    if not isinstance(loss, Tensor):
        raise ClosureError(f"Expected a loss tensor, got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ClosureError(f"Expected a scalar loss, got one of shape {tuple(loss.shape)}.")
    if not loss.requires_grad:
        raise ClosureError(
            "The loss depends on no trainable parameter: it was computed under no_grad, detached, "
            "or every parameter is frozen."
        )
    return loss


def check_nodes(placement: Placement, graph: Graph, model: nn.Module) -> None:
    """Every entry that the user wrote out has a node, and there is one at all.

    Raises:
        PlacementError: Naming the entry or the places met, and what to do.
    """
    by_module: dict[object, list[Site]] = {}
    for site in graph.sites:
        key = site.key[0] if isinstance(site.key, tuple) else None
        by_module.setdefault(key, []).append(site)
    for entry, modules in placement.entries:
        sites = [site for module in modules for site in by_module.get(module, ())]
        if any(site.node is not None for site in sites):
            continue
        if sites:
            why = "no node can stand there: " + "; ".join(
                dict.fromkeys(f"'{site.name}' is {site.why}" for site in sites[:3])
            )
        else:
            why = (
                f"the forward never called {'it' if entry in placement.exact else 'them'} "
                "as module(...), so its node never fired"
            )
        raise PlacementError(
            f"value_nodes entry {entry!r}: {why}. Name a module that takes part in the loss "
            "(lightning_pc.describe shows the places)."
        )
    if not graph.nodes:
        met = "; ".join(f"'{s.name}' is {s.why}" for s in graph.sites[:5]) or "none was met"
        raise PlacementError(
            f"No value node stands in {type(model).__name__}, so this would be plain "
            f"backprop. Places: {met}. Name modules whose outputs become nodes, e.g. "
            "value_nodes='linear', 'modules', 'blocks' or a list of module names."
        )


def divergence(
    graph: Graph, losses: list[Tensor], energies: list[Tensor], start: int
) -> DivergenceError:
    """Names the first loss or energy that was not finite."""
    evaluations = zip(range(start, start + len(losses)), losses, energies, strict=True)
    for t, loss, energy in evaluations:  # noqa: B007
        finite = energy.isfinite().tolist()
        bad = [n.name for n, fine in zip(graph.nodes, finite, strict=True) if not fine]
        if bad or not loss.isfinite():
            break
    where = f"the energy of value node '{bad[0]}'" if bad else "the loss"
    remedy = "Lower gamma, or the learning rate."
    if not t:
        remedy = "Inference has not begun: look at the batch, the model, the learning rate."
    return DivergenceError(
        f"At inference step t = {t} {where} is not finite (loss {float(loss):g}). No weight "
        f"has moved on it. {remedy}"
    )
