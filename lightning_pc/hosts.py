"""What surrounds the wrappers: DistributedDataParallel, Fabric and Accelerate."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from lightning_pc.errors import ClosureError, ConfigError, refuse
from lightning_pc.learner import Learner
from lightning_pc.nodes.latent import Latent
from lightning_pc.nodes.learned import LearnedGaussian
from lightning_pc.nodes.registry import energies_of
from lightning_pc.ranks import ALONE, Processes
from lightning_pc.settings import Settings


def refuse_to_share(module: nn.Module, settings: Settings) -> None:
    """Refuses what is learned of single samples or nodes, where each process has its own."""
    numbered = [n for n, m in module.named_modules() if isinstance(m, Latent) and m.samples]
    energies = energies_of(settings.energies).items()
    learned = [name for name, energy in energies if isinstance(energy, LearnedGaussian)]
    sparse = [n for n, m in module.named_modules() if getattr(m, "sparse", False) is True]
    told = "would learn in each process by itself. Train on one device"
    refuse(
        {
            f"The gradients of {sparse} are sparse, which processes do not exchange: set "
            "sparse=False.": sparse,
            f"The values of {numbered}, Latents with samples=, {told}.": numbered,
            f"The variances at {learned} {told}, or give another energy.": learned,
        }
    )


#: Learners that have skipped a batch before they met other processes.
_SKIPPED = WeakSet[Learner]()


@contextmanager
def met(learner: Learner, door: str) -> Iterator[None]:
    """A DistributedDataParallel that runs inside has ``learner`` share its gradients.

    Its own reducer would average after the first of several backward passes alone, so it rests.

    Args:
        learner: Whose model runs.
        door: Who the user asked to train, for what is told.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    resting: list[DDP] = []
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", DDP)

    def before(module: nn.Module, args: Any) -> None:
        if isinstance(module, (DDP, sharded)):
            if not {*module.parameters()} & {*_parameters(learner)}:
                return
            _refuse(module)
            assert isinstance(module, DDP)
            if learner.ranks is ALONE:
                if learner in _SKIPPED:
                    told = "skipped a batch before its DistributedDataParallel ran once"
                    raise ClosureError(
                        f"{door} {told}: give each process a loss in the first batch."
                    )
                refuse_to_share(learner.model, learner.settings)
                device = next(module.parameters()).device
                learner.ranks = Processes(device, lambda: _parameters(learner))
            if module.require_backward_grad_sync:
                module.require_backward_grad_sync = False
                resting.append(module)
            module.require_forward_param_sync = True  # buffers are those of the first process

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
        for module in resting:
            module.require_backward_grad_sync = True
    if learner.ranks is ALONE:
        if learner.waiting is None:
            _SKIPPED.add(learner)
        told = f"{dist.get_world_size()} processes run, and each learns by itself: {door} has met"
        cure = "To learn together wrap the model in it, and call the wrapped one."
        learner.alerts.say("alone", f"{told} no DistributedDataParallel of this model. {cure}")


def _parameters(learner: Learner) -> list[nn.Parameter]:
    """Those that the optimizer moves, in the order of the model, which is all processes' own."""
    groups = learner.optimizer.param_groups if learner.optimizer else []
    held = dict.fromkeys(p for group in groups for p in group["params"])
    ours = {p: None for p in learner.model.parameters() if p in held}
    return [*ours, *(p for p in held if p not in ours)]


def _refuse(module: nn.Module) -> None:
    name = type(module).__name__
    group = getattr(module, "process_group", None)
    refuse(
        {
            f"{name} cannot train with predictive coding: use DistributedDataParallel, or "
            "PCStrategy on one device.": not isinstance(module, DDP),
            f"{name} has a process group of its own, and predictive coding agrees among all: leave "
            "it out.": group not in (None, dist.group.WORLD),
            f"{name} counts on one backward a forward by static_graph=True: leave it out.": getattr(
                module, "static_graph", False
            ),
            f"{name} has a communication hook, which nothing would call: leave it out.": getattr(
                module, "_comm_hooks", []
            ),
        }
    )


def refuse_accumulation() -> None:
    """Accelerate runs the closure of the last of several batches alone, and never says so."""
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    batches = state().num_steps if state and state._shared_state else 1
    if batches > 1:
        told = f"Accelerate would run the closure of the last of {batches} batches alone"
        raise ConfigError(f"{told}: set gradient_accumulation_steps=1, and take larger batches.")


@contextmanager
def fabric_agrees() -> Iterator[None]:
    """Fabric's mixed precision raises on a backward that is not its own, where it is loaded."""
    names = ("lightning.fabric.wrappers", "lightning_fabric.wrappers")
    loaded: list[Any] = [sys.modules[name] for name in names if name in sys.modules]
    before = [getattr(wrappers, "_in_fabric_backward", False) for wrappers in loaded]
    for wrappers in loaded:
        wrappers._in_fabric_backward = True
    try:
        yield
    finally:
        for wrappers, flag in zip(loaded, before, strict=True):
            wrappers._in_fabric_backward = flag
