"""The module as it stands: its parts, their names, and where value nodes go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_pc.errors import UnsupportedError
from lightning_pc.nodes.placement import Placement, ValueNodes, resolve

#: How the names of wrappers for several devices end.
_SHARDED = ("DataParallel", "DeepSpeedEngine")


def _check(model: nn.Module) -> None:
    """Refuses compiled and sharded modules and such as have nothing to train."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        where = f"'{name}'" if name else f"the model ({kind})"
        if kind == "OptimizedModule" or module._compiled_call_impl is not None:
            raise UnsupportedError(
                f"{where} is compiled by torch.compile, which hides its nonlinearities from value "
                "nodes: train the module uncompiled and compile it for inference."
            )
        if kind.endswith(_SHARDED):
            raise UnsupportedError(
                f"{where} is wrapped by {kind}: give the bare module here, and call the wrapped "
                "one in the closure."
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
        names: The module and all in it -> their dotted names.
        own: Ids of its buffers and of the parameters that are not trained.
        trained: Its trainable parameters -> their dotted names.
    """

    def __init__(self, model: nn.Module, value_nodes: ValueNodes) -> None:
        self.model, self._value_nodes = model, value_nodes
        self.names: dict[nn.Module, str] = {}
        self.own: frozenset[int] = frozenset()
        self.trained: dict[nn.Parameter, str] = {}
        self._placement: Placement | None = None

    def look(self) -> Placement:
        """Where nodes go.

        Raises:
            PCError: The module cannot be trained, or ``value_nodes`` names what it has not.
        """
        modules = list(self.model.modules())
        compiled = any(module._compiled_call_impl is not None for module in modules)
        if self._placement is None or modules != list(self.names) or compiled:
            _check(self.model)
            self._placement = resolve(self._value_nodes, self.model)
            self.names = {module: name for name, module in self.model.named_modules()}
        # Any of these may have been replaced since the last batch.
        own: list[Tensor] = []
        self.trained = {}
        for module, name in self.names.items():
            own += [b for b in module._buffers.values() if b is not None]
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    self.trained.setdefault(parameter, f"{name}.{key}" if name else key)
                elif parameter is not None:
                    own.append(parameter)
        self.own = frozenset(map(id, own))
        return self._placement

    def save(self, held: set[nn.Parameter]) -> Callable[[], None]:
        """What puts back all that a forward may write to: buffers, and weights of no optimizer."""
        rest = [p for p in self.model.parameters() if p not in held]
        tensors = [t for t in [*self.model.buffers(), *rest] if not (t.is_meta or is_lazy(t))]
        saved = [(t, t.data, t.detach().clone()) for t in tensors]

        @torch.no_grad()
        def put_back() -> None:
            for tensor, data, content in saved:
                if data.shape == content.shape:
                    data.copy_(content)
                if tensor.data_ptr() != data.data_ptr() or tensor.shape != content.shape:
                    tensor.data = data if data.shape == content.shape else content

        return put_back
