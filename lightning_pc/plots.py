"""Pictures of what inference did; needs matplotlib (the ``plots`` extra)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_pc.report import StepReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_energy(report: StepReport, ax: Axes | None = None) -> Axes:
    """Energy against inference step, a line per node, on a logarithmic scale.

    Args:
        report: What a step did.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes drawn on.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    if ax is None:
        ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")[1]
    steps = range(report.steps)
    per_term = report.energy / report.loss_terms
    colours = plt.get_cmap("viridis")
    for index, name in enumerate(report.nodes):
        colour = colours(0.85 * index / max(1, len(report.nodes) - 1))
        ax.plot(steps, per_term[:, index].tolist(), color=colour, marker="o", ms=3, label=name)
    ax.plot(
        steps,
        (report.free_energy / report.loss_terms).tolist(),
        *("k--",),
        lw=1.2,
        label="free energy F",
    )
    ax.set(xlabel="inference step t", ylabel="energy per loss term")
    ax.set_title(f"{report.algorithm}: energy during one batch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_yscale("log", nonpositive="mask")  # a node appears when the first error reaches it
    ax.spines[["top", "right"]].set_visible(False)
    if len(report.nodes) <= 12:
        ax.legend(frameon=False, fontsize="small")
    return ax
