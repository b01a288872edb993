"""Which mover moves the values, by the settings and the graph."""

from __future__ import annotations

from lightning_pc.inference.conjugate import Conjugate
from lightning_pc.inference.curvature import START
from lightning_pc.inference.movers import Descent, Mover, OptimizerMover, PassingOn
from lightning_pc.inference.schedules import schedule
from lightning_pc.settings import Settings
from lightning_pc.stages.graph import Graph


def mover_of(settings: Settings, graph: Graph) -> Mover:
    """That of one batch of a form."""
    if settings.inference is not None:
        return OptimizerMover(settings.inference)
    gamma, decay = settings.fixed_gamma or START, settings.chosen_decay
    if settings.mover == "passing on" and graph.even:
        return PassingOn(gamma, decay, schedule(settings.algorithm).aim)
    if settings.mover != "plain":
        return Conjugate(gamma, decay)
    return Descent(gamma, decay, float(settings.momentum or 0.0))
