"""Pictures of what inference did; needs matplotlib (the ``plots`` extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_pc.errors import from_extra, require
from lightning_pc.insight.report import StepReport
from lightning_pc.metrics import AdaptiveCalibrationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@from_extra("plots", "matplotlib")
def plot_energy(report: StepReport, ax: Axes | None = None) -> Axes:
    """Draws energy against inference step, a line per node, on a logarithmic scale.

    Args:
        report: What a step did.
        ax: Where to draw; None for a new figure.
    """
    from matplotlib.ticker import MaxNLocator

    require(StepReport, report, "plot_energy(report): expected the StepReport of a batch")
    per_term = (report.energy / report.loss_terms).T.tolist()
    lines = {name: [*enumerate(e)] for name, e in zip(report.nodes, per_term, strict=True)}
    ax = _energies(ax, lines, marker="o", ms=3)
    free = (report.free_energy / report.loss_terms).tolist()
    ax.plot(range(report.steps), free, "k--", lw=1.2, label="free energy F")
    ax.set(xlabel="inference step t", title=f"{report.algorithm}: energy during one batch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _beside(ax, len(lines))


@from_extra("plots", "matplotlib")
def plot_history(
    history: Sequence[tuple[int, Mapping[str, Tensor]]], ax: Axes | None = None
) -> Axes:
    """Draws each node's energy over training, on a logarithmic scale.

    Args:
        history: As `lightning_pc.EnergyMonitor` keeps it: batch and energy per loss term by node.
        ax: Where to draw; None for a new figure.
    """
    names = dict.fromkeys(name for _, energies in history for name in energies)
    lines = {name: [(batch, float(e[name])) for batch, e in history if name in e] for name in names}
    ax = _energies(ax, lines, lw=1)
    ax.set(xlabel="batch", title="energy after inference")
    return _beside(ax, len(lines))


@from_extra("plots", "matplotlib")
def plot_reliability(metric: AdaptiveCalibrationError, ax: Axes | None = None) -> Axes:
    """Draws the share that is right against confidence, a point per bin of equal mass.

    Args:
        metric: With what has been predicted.
        ax: Where to draw; None for a new figure.
    """
    ax = _axes(ax)
    confidence, right = (values.tolist() for values in metric.reliability())
    ax.plot((0, 1), (0, 1), "k--", lw=1, label="calibrated")
    ax.plot(confidence, right, "o-", ms=4, label=f"AdaECE {float(metric.compute()):.3f}")
    ax.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
    return ax


def _axes(ax: Axes | None) -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6.4, 4.0), layout="constrained")[1] if ax is None else ax


def _energies(ax: Axes | None, lines: dict[str, list[tuple[int, float]]], **style: Any) -> Axes:
    from matplotlib import colormaps

    ax = _axes(ax)
    for index, (name, points) in enumerate(lines.items()):
        colour = colormaps["viridis"](0.85 * index / max(1, len(lines) - 1))
        ax.plot(*zip(*points, strict=True), color=colour, label=name, **style)
    ax.set_ylabel("energy per loss term")
    ax.set_yscale("log", nonpositive="mask")  # a node appears when the first error reaches it
    return ax


def _beside(ax: Axes, nodes: int) -> Axes:
    """Names up to 12 nodes, beside the curves: within the axes they would hide some."""
    ax.spines[["top", "right"]].set_visible(False)
    if nodes <= 12:
        ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax
