"""What a run did, as one HTML file that needs nothing else; pictures need matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_pc.insight.explain import explain
from lightning_pc.insight.report import StepReport
from lightning_pc.plots import plot_energy, plot_history

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Batch -> loss, gamma, and curvature (None where gamma is given).
Course = Mapping[int, tuple[float, float, float | None]]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 1rem;
  color: #222; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
svg { width: 100%; height: auto; } table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid #ddd;
  overflow-wrap: anywhere; }
td + td, th + th { text-align: right; } .told { border-left: 4px solid #c60; padding-left: .8rem; }
"""


def write_page(
    path: Path,
    report: StepReport,
    history: Sequence[tuple[int, Mapping[str, Tensor]]],
    course: Course,
    told: Sequence[str],
) -> None:
    """Writes the page.

    Args:
        path: The file.
        report: Of the last batch.
        history: As `lightning_pc.EnergyMonitor` keeps it.
        course: Of the same batches.
        told: Warnings that the user has met.
    """
    *sentences, verdict = explain(report).splitlines()
    shares = {f"depth {d}": f"{share:.1%}" for d, share in report.energy_by_depth.items()}
    learned = {name: str(count) for name, count in report.learned.items()}
    title = f"{report.algorithm}, {len(history) and history[-1][0] + 1:,} batches"
    parts = [
        f"<h1>{escape(title)}</h1><p><b>{escape(verdict)}</b></p>",
        "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences),
        "<h2>Over training</h2>" + _picture(_over_training(history, course)),
        "<h2>The last batch</h2>" + _picture(_last_batch(report)),
        _table("Where the energy is", ("next to the loss is depth 1", "share"), shares),
        _table("What learned in the last batch", ("parameter", "updates"), learned),
        "<h2>Warnings</h2>" + ("".join(map(_warning, told)) or "<p>None.</p>"),
    ]
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
    head += '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
    path.write_text(f"{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>")


def _warning(message: str) -> str:
    return f'<p class="told">{escape(message)}</p>'


def _table(title: str, heads: tuple[str, str], rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    cells = [f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows.items()]
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    return f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{''.join(cells)}</table>"


def _over_training(history: Sequence[tuple[int, Mapping[str, Tensor]]], course: Course) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 9.0), layout="constrained")
    energies, losses, rates = figure.subplots(3)
    plot_history(history, energies)
    batches = [*course]
    losses.plot(batches, [course[b][0] for b in batches], color="0.2", lw=1)
    losses.set(xlabel="batch", title="training loss")
    rates.plot(batches, [course[b][1] for b in batches], color="tab:blue", lw=1, label="gamma")
    looked = [b for b in batches if course[b][2] is not None]
    rates.plot(looked, [course[b][2] for b in looked], color="tab:orange", lw=1, label="curvature")
    rates.set(xlabel="batch", title="inference rate, and curvature of F", yscale="log")
    rates.legend(frameon=False, fontsize="small")
    return figure


def _last_batch(report: StepReport) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    plot_energy(report, figure.subplots())
    return figure


def _picture(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    found = text.getvalue()
    return found[found.index("<svg") :]
