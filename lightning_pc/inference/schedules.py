"""Who moves when. A schedule is one small class and a row of `SCHEDULES`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from typing_extensions import override

from lightning_pc.errors import ConfigError, shown

#: Ways of values to move; see `Schedule.mover`.
Moves = Literal["plain", "conjugate", "passing on"]


class Schedule(ABC):
    """When values move, when parameters get gradients and when the optimizer steps.

    Inference steps are counted t = 0 .. T-1; depths are those of `lightning_pc.nodes.Node`.
    """

    name: str
    paper: str
    #: The only gamma it allows, None for any.
    fixed_gamma: float | None = None
    #: What gamma="auto" makes of gamma * curvature, and the band in which it leaves it alone.
    #: A low one is no safer: down the gradient errors shrink by gamma per stage on their way up.
    aim, band = 1.4, (0.9, 1.6)
    #: With more stages in a row than these gamma="auto" is smaller by (deep / stages) ** 2, and
    #: weights learn from errors as if they had come all of their way. None for never.
    deep: int | None = None
    #: Weights move while values do.
    incremental = False
    #: Weights never move.
    rests = False
    #: One wave of weights, 1 at t = depth and 0 else: each stage counts once.
    wave = False
    #: How values move unless told otherwise: by plain descent, along conjugate gradients, or so but
    #: on a chain, where they pass errors on; those follow their predictions, too.
    mover: Moves = "plain"
    #: Weight of the loss in F unless told otherwise.
    beta: float | Literal["auto"] = 1.0
    #: Values are held in error coordinates, x = mu + e.
    through = False
    #: Weights learn from an error as if it had come all of its way, and it is not meant to.
    whole = False

    def steps(self, depth: int, T: int | None, wave: bool) -> int:
        """Evaluations per batch; the default is ``max(8, depth + 1)``.

        Where a ``wave`` of precisions passes the module once, it is depth + 1. Error coordinates
        know no depth, which counts as 1.
        """
        depth = 1 if self.through else depth
        if T is None:
            T = depth + 1 if wave else max(8, depth + 1)
        return T

    def moves(self, t: int, T: int) -> bool:
        """Whether values move at t."""
        return True

    @abstractmethod
    def learns(self, t: int, T: int) -> bool:
        """Whether parameters get gradients at t."""

    def updates(self, t: int, T: int) -> bool:
        """Whether the optimizer steps at t."""
        return self.learns(t, T)


class IPC(Schedule):
    """Values and parameters move at every t."""

    name, paper = "ipc", "Salvatori et al. 2024, Algorithm 1"
    # Weights that learn at every step keep the curvature near 2 / gamma by themselves, and learn
    # less well where gamma gives way.
    band = (0.7, 2.5)
    incremental = True
    mover: Moves = "passing on"

    @override
    def learns(self, t: int, T: int) -> bool:
        return True


class PC(Schedule):
    """Values move at t < T-1, parameters once at t = T-1."""

    name, paper = "pc", "Salvatori et al. 2024, Algorithm 2"
    mover: Moves = "conjugate"

    @override
    def moves(self, t: int, T: int) -> bool:
        return t < T - 1

    @override
    def learns(self, t: int, T: int) -> bool:
        return t == T - 1


class ZIL(Schedule):
    """iPC with one wave of weights, the gradients of which add up to one optimizer step.

    At t = d the errors of depth d are those that backprop propagates, and count alone.
    """

    name, paper = "zil", "Salvatori et al. 2024, Algorithm 3; Song et al. 2020"
    fixed_gamma = 1.0
    wave = True

    @override
    def moves(self, t: int, T: int) -> bool:
        return t < T - 1

    @override
    def learns(self, t: int, T: int) -> bool:
        return True

    @override
    def updates(self, t: int, T: int) -> bool:
        return t == T - 1


class Resting(PC):
    """Values move at every t, parameters never: inference in a trained model."""

    rests = True

    @override
    def moves(self, t: int, T: int) -> bool:
        return True

    @override
    def learns(self, t: int, T: int) -> bool:
        return False


class EPC(PC):
    """PC in error coordinates: the signal crosses the whole module at t = 0, at any depth."""

    name, paper = "epc", "Goemaere et al. 2025, arXiv 2505.20137"
    # All errors act on the loss at once, so that values near the output move most, and what the
    # weights there learn from strays from the gradient: 32 layers learn better at 0.7 than at 1.4.
    aim, band = 0.7, (0.45, 1.0)
    # Each of d stages in a row is moved by all errors above it, and what a gradient changes by on
    # its way grows with what all of them are moved by: by d ** 2. From such gradients plain MLPs of
    # 64 layers learned next to nothing.
    deep = 4
    mover: Moves = "plain"
    through = True


class IEPC(IPC):
    """iPC in error coordinates: what moves beside the weights is e, and the values go along.

    iPC's values mostly stay where they are while the weights move, so an entry that the loss does
    not read pulls its prediction back to where it was. An error that stays lets it go.
    """

    name, paper = "iepc", "Salvatori et al. 2024, Algorithm 1, in the coordinates of ePC"
    # A hundredth of 1 / curvature: weights that learn from errors of a tenth of their equilibrium
    # made a masked BERT's curvature grow from 1 to 10 within 115 batches.
    aim, band = 0.01, (0.005, 0.02)
    mover: Moves = "plain"
    through = whole = True


class Auto(EPC):
    """ePC near the feed-forward pass, where its update is backprop's to first order in beta.

    The loss weighs so little that errors are small and weights gain nothing by explaining noise.
    From there one step of the values finds the errors' direction, at any depth.
    """

    name, paper = "auto", f"{EPC.paper}, with the betas of Scellier & Bengio 2017"
    beta: float | Literal["auto"] = "auto"
    whole = True

    @override
    def steps(self, depth: int, T: int | None, wave: bool) -> int:
        return T or 2


SCHEDULES: dict[str, type[Schedule]] = {s.name: s for s in (Auto, IPC, PC, ZIL, EPC, IEPC)}


def schedule(algorithm: str) -> Schedule:
    """The schedule of an algorithm's name.

    Raises:
        ConfigError: The name is none of `SCHEDULES`.
    """
    if algorithm not in [*SCHEDULES]:
        known = ", ".join(map(repr, SCHEDULES))
        raise ConfigError(f"algorithm={shown(algorithm)} is unknown: expected one of {known}.")
    return SCHEDULES[algorithm]()
