"""The module as it stands: its parts, their names, and where value nodes go."""

from __future__ import annotations

from torch import nn

from lightning_pc.errors import UnsupportedError
from lightning_pc.nodes.placement import Placement, ValueNodes, resolve

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
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
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


class Model:
    """What is known of a module from batch to batch, anew when it has changed.

    Args:
        model: The module.
        value_nodes: Where its nodes stand.

    Attributes:
        modules: The module and all in it.
        names: Their dotted names.
        own: Ids of its buffers and of the parameters that are not trained.
    """

    def __init__(self, model: nn.Module, value_nodes: ValueNodes) -> None:
        self.model, self._value_nodes = model, value_nodes
        self.modules: tuple[nn.Module, ...] = ()
        self.names: dict[nn.Module, str] = {}
        self.own: frozenset[int] = frozenset()
        self._placement: Placement | None = None

    def look(self) -> Placement:
        """Where nodes go.

        Raises:
            PCError: The module cannot be trained, or ``value_nodes`` names what it has not.
        """
        modules = tuple(self.model.modules())
        compiled = any(module._compiled_call_impl is not None for module in modules)
        if self._placement is None or modules != self.modules or compiled:
            check_model(self.model)
            self._placement = resolve(self._value_nodes, self.model)
            self.modules = modules
            self.names = {module: name for name, module in self.model.named_modules()}
        # A buffer may have been replaced since the last batch.
        buffers = [b for module in modules for b in module._buffers.values() if b is not None]
        still = [p for module in modules for p in module._parameters.values() if p is not None]
        self.own = frozenset(map(id, [*buffers, *(p for p in still if not p.requires_grad)]))
        return self._placement
