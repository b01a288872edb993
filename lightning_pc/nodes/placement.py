"""Where value nodes are asked to stand: from the user's ``value_nodes`` to modules of the model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_pc.errors import ConfigError, PlacementError, misfit, shown

#: One entry of ``value_nodes``: a preset, a module name or regex, a module type, or a callable
#: ``(name, module) -> bool``.
Entry = str | type[nn.Module] | Callable[[str, nn.Module], bool]
ValueNodes = Entry | Sequence[Entry]

#: Their nonlinearities are inside, in one call.
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_LINEAR = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Placement:
    """A resolved ``value_nodes``.

    Attributes:
        nonlinearities: Nodes stand at the inputs of nonlinearities.
        outputs: Modules at whose outputs nodes stand.
        entries: Each entry that the user wrote out (no preset), and the modules it matched.
    """

    nonlinearities: bool
    outputs: set[nn.Module]
    entries: list[tuple[str, list[nn.Module]]]

    def insists(self, module: nn.Module) -> bool:
        """Whether the user wrote out an entry that matches ``module``."""
        return any(module in modules for _, modules in self.entries)


def _leaves(model: nn.Module) -> list[nn.Module]:
    """Leaf modules that hold parameters."""
    return [m for m in model.modules() if not [*m.children()] and [*m.parameters()]]


def _linear_maps(model: nn.Module) -> list[nn.Module]:
    """Linear and convolution modules, transformers' transposed ``Conv1D`` among them."""
    return [m for m in _leaves(model) if isinstance(m, _LINEAR) or type(m).__name__ == "Conv1D"]


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The outermost repeated blocks: what a ModuleList holds, or a Sequential holds twice.

    Members of a Sequential count where they have children of their own (a residual block does, a
    Linear does not).
    """
    found = [m for m in module.children() if [*m.parameters()]]
    if isinstance(module, nn.Sequential):
        found = [m for m in found if [*m.children()]]
        types = [type(m) for m in found if type(m) is not nn.Sequential]
        found = [m for m in found if types.count(type(m)) > 1]
    elif not isinstance(module, nn.ModuleList):
        found = []
    others = [m for m in module.children() if m not in found]
    return [*found, *(block for other in others for block in _blocks(other))]


#: Preset name -> the modules at whose outputs it puts nodes.
PRESETS: dict[str, Callable[[nn.Module], Iterable[nn.Module]]] = {
    "auto": lambda model: [m for m in model.modules() if isinstance(m, _RECURRENT)],
    "nonlinearities": lambda model: (),
    "modules": _leaves,
    "linear": _linear_maps,
    "blocks": _blocks,
}


def _match(entry: Entry, named: dict[str, nn.Module]) -> list[nn.Module]:
    """The modules that one written-out entry matches."""
    inner = [(name, module) for name, module in named.items() if name]
    told = f"value_nodes entry {shown(entry)}"
    if isinstance(entry, str):
        if entry in named:
            return [named[entry]]
        try:
            pattern = re.compile(entry)
        except re.error as error:
            raise ConfigError(
                f"{told} is neither a module's name nor a valid regular expression ({error})."
            ) from error
        return [module for name, module in inner if pattern.fullmatch(name)]
    if isinstance(entry, type) and issubclass(entry, nn.Module):
        return [module for _, module in inner if isinstance(module, entry)]
    if callable(entry) and not isinstance(entry, (type, nn.Module)):
        if why := misfit(entry, "", None):
            raise ConfigError(f"{told} cannot be called as (name, module) -> bool: {why}.")
        return [module for name, module in inner if entry(name, module)]
    raise ConfigError(
        f"{told}: expected a preset ({', '.join(PRESETS)}), a module name or regular expression, a "
        "module type, or a callable (name, module) -> bool."
    )


def _near_misses(entry: Entry, named: dict[str, nn.Module]) -> str:
    if isinstance(entry, str):
        names = [*PRESETS, *(name for name in named if name)]
        close = difflib.get_close_matches(entry, names, n=4, cutoff=0.5)
        close = close or [name for name in names if entry in name][:4] or names[len(PRESETS) :][:6]
    else:
        close = sorted({type(m).__name__ for name, m in named.items() if name})[:8]
    return ", ".join(map(repr, close)) or "nothing: the model has no submodules"


def resolve(value_nodes: ValueNodes, model: nn.Module) -> Placement:
    """Finds the modules that ``value_nodes`` names.

    Args:
        value_nodes: A preset (also where a module has that name; ``"(blocks)"`` is the module), a
            module name or regular expression (which must match the whole name), a module type, a
            callable ``(name, module) -> bool``, or a list of these.
        model: The module that is trained.

    Raises:
        ConfigError: An entry is of no known kind.
        PlacementError: An entry matches no module; the message lists near misses.
    """
    if isinstance(value_nodes, Sequence) and not isinstance(value_nodes, str):
        entries = list(value_nodes)
    else:
        entries = [value_nodes]
    if not entries:
        raise ConfigError("value_nodes is empty: expected 'auto' or at least one entry.")
    named = dict(model.named_modules())
    at_nonlinearities = any(entry in ("auto", "nonlinearities") for entry in entries)
    placement = Placement(at_nonlinearities, set(), [])
    for entry in entries:
        if isinstance(entry, str) and entry in PRESETS:
            found = list(PRESETS[entry](model))
            if not found and entry not in ("auto", "nonlinearities"):
                told = f"value_nodes={entry!r} finds no place in {type(model).__name__}"
                raise PlacementError(f"{told}: try 'auto', 'linear', 'modules', or name modules.")
        else:
            found = _match(entry, named)
            if not found:
                told = f"value_nodes entry {shown(entry)} matches no module of"
                near = f"Near misses: {_near_misses(entry, named)}."
                if isinstance(entry, str) and entry.partition("#")[0] in named:
                    near += " A module's name stands for all of its calls."
                elif isinstance(entry, str) and entry.rpartition(".")[0] in named:
                    near += " A node of a function that is called there has no module to name."
                raise PlacementError(f"{told} {type(model).__name__}. {near}")
            label = entry if isinstance(entry, str) else getattr(entry, "__name__", "?")
            placement.entries.append((label, found))
        placement.outputs.update(found)
    return placement
