"""How values move and how stages run, by the settings and the graph."""

from __future__ import annotations

from collections.abc import Callable

from lightning_pc.errors import ConfigError
from lightning_pc.inference.conjugate import Conjugate
from lightning_pc.inference.curvature import START, AutoGamma
from lightning_pc.inference.movers import Descent, Mover, OptimizerMover, PassingOn
from lightning_pc.inference.schedules import schedule
from lightning_pc.settings import Settings
from lightning_pc.stages.alike import Look, alike
from lightning_pc.stages.batch import Batch
from lightning_pc.stages.compiled import Compiler
from lightning_pc.stages.rows import obstacle

#: ``parallel="auto"`` takes at least so many stages side by side, of at most so many weights and
#: value entries each.
FEWEST, WEIGHTS, ENTRIES = 6, 2**15, 2**13


def mover_of(settings: Settings, even: bool) -> Mover:
    """That of one batch, whose errors arrive depth by depth where it is ``even``."""
    if settings.inference is not None:
        return OptimizerMover(settings.inference)
    gamma, decay = settings.fixed_gamma or START, settings.chosen_decay
    if settings.mover == "passing on" and even:
        return PassingOn(gamma, decay, schedule(settings.algorithm).aim)
    if settings.mover != "plain":
        return Conjugate(gamma, decay)
    return Descent(gamma, decay, float(settings.momentum or 0.0))


def auto_of(settings: Settings) -> AutoGamma | None:
    """What chooses gamma, None where it is given."""
    if settings.fixed_gamma is not None or settings.inference is not None:
        return None
    way = schedule(settings.algorithm)
    return AutoGamma(way.aim, *way.band, weighs=settings.chosen_beta == "auto")


def compiler_of(settings: Settings, tell: Callable[[str], None]) -> Compiler | None:
    """What compiles inference steps, where it is asked for; takes what the user is told."""
    if settings.compile is False:
        return None
    return Compiler({} if settings.compile is True else settings.compile, tell)


def side_by_side(settings: Settings, batch: Batch, T: int) -> list[list[Look]]:
    """Groups of pieces of a batch that run as one.

    Raises:
        ConfigError: There are none, but ``parallel=True`` asks for them.
    """
    few = settings.parallel == "auto" and len(batch.nodes) < FEWEST
    if not settings.parallel or few or settings.one_by_one:
        return []
    last = T if settings.reset == "batch" else len(batch.nodes)
    groups = alike(batch, last)
    if settings.parallel == "auto":
        groups = [g for g in groups if len(g) >= FEWEST and _small(batch, g[0])]
    why = [obstacle(batch, group) for group in groups]
    groups = [group for group, met in zip(groups, why, strict=True) if not met]
    if settings.parallel is True and not groups:
        tried = f" Tried together: {why[0]}" if why else ""
        raise ConfigError(
            "parallel=True: no two neighbouring stages run as one. They must make the same calls, "
            "on as many values and weights of equal shapes, with one value node each; without "
            "writes in place, hooks, weights that some share or autograd.Functions. Past nodes on "
            "the branches of a residual stream each stage reads one value more than the last: put "
            "the nodes on the stream (a module that adds the skip itself, value_nodes='blocks')."
            + tried
        )
    return groups


def _small(batch: Batch, look: Look) -> bool:
    value = batch.nodes[look.piece.nodes[0]].x
    return look.weights <= WEIGHTS and value.numel() <= ENTRIES
