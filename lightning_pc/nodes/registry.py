"""Energies by name, and energies of your own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pc.errors import ConfigError, shown
from lightning_pc.nodes.energies import (
    Bernoulli,
    Categorical,
    Energy,
    Gaussian,
    Huber,
    Laplace,
    Slopes,
)
from lightning_pc.nodes.learned import LearnedGaussian


class Entrywise(Energy):
    """An energy of your own: a sum over entries, whose gradients autograd finds.

    Define ``name`` and ``energy(x, mu)``, the energy of each entry, [B, *].
    """

    masks = False

    @abstractmethod
    def energy(self, x: Tensor, mu: Tensor) -> Tensor:
        """Of each entry, [B, *]."""

    @override
    def evaluate(self, x: Tensor, mu: Tensor, scale: float | Tensor, weight: float = 1.0) -> Slopes:
        with torch.enable_grad():
            x, mu = x.detach().requires_grad_(), mu.detach().to(x.dtype).requires_grad_()
            each = self.energy(x, mu)
            if not isinstance(each, Tensor) or each.shape != x.shape:
                got = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
                told = f"{type(self).__name__}.energy gave {got}: expected the energy of each entry"
                raise ConfigError(f"{told}, {tuple(x.shape)}.")
            total = each.sum()
            dx, dmu = torch.zeros_like(x), torch.zeros_like(mu)
            if total.requires_grad:  # it may read one of them alone
                dx, dmu = torch.autograd.grad(
                    total, (x, mu), allow_unused=True, materialize_grads=True
                )
        return Slopes(dmu * (scale * weight), dx * (scale * weight), total.detach() * weight)


#: Name -> what makes the energy.
ENERGIES: dict[str, Callable[[], Energy]] = {
    kind.name: kind for kind in (Gaussian, LearnedGaussian, Laplace, Huber, Bernoulli, Categorical)
}


def register(kind: type[Energy]) -> type[Energy]:
    """Makes an energy known by its ``name``; a decorator of its class.

    Raises:
        ConfigError: It has no name, or another has it.
    """
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{kind.__name__}: give it a name, such as name = 'cauchy'.")
    known = ENERGIES.get(name)
    place = kind.__module__, kind.__qualname__
    same = (getattr(known, "__module__", ""), getattr(known, "__qualname__", "")) == place
    if known is not None and not same:
        raise ConfigError(f"{kind.__name__}: there is an energy named {name!r} already.")
    ENERGIES[name] = kind
    return kind


def energies_of(given: object) -> dict[str, Energy]:
    """What the argument ``energies=`` stands for: name of a place -> energy; None is none.

    Raises:
        ConfigError: It is no dict of names and energies, or one object learns at two places.
    """
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        told = f"energies={shown(given)}: expected a dict of node names and energies."
        raise ConfigError(told)
    found = {place: _energy_of(one, place) for place, one in given.items()}
    learned = [energy for energy in found.values() if isinstance(energy, LearnedGaussian)]
    if len({*map(id, learned)}) < len(learned):
        raise ConfigError("energies: give each node a LearnedGaussian of its own.")
    return found


def _energy_of(given: object, place: str) -> Energy:
    if isinstance(given, Energy):
        return given
    if isinstance(given, str) and given in ENERGIES:
        try:
            return ENERGIES[given]()
        except TypeError as error:
            told = f"energies: {given!r} needs arguments ({error}): give an object of its class."
            raise ConfigError(told) from error
    known = ", ".join(map(repr, ENERGIES))
    raise ConfigError(
        f"energies: {place!r} is given {shown(given)}: expected one of {known}, or an object of "
        "lightning_pc.energies, such as Huber(0.5)."
    )
