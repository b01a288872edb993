"""The module as it stands: its parts, their names, and where value nodes go."""

from __future__ import annotations

from torch import nn

from lightning_pc.checks import check_model
from lightning_pc.nodes.placement import Placement, ValueNodes, resolve


class View:
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
