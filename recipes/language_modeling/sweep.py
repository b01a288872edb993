"""The searches of the paper's appendix D.3.1, one YAML of ranges for each row, beside its YAML.

    python -m recipes.language_modeling.sweep --where row=masked_ipc --data_dir data/lm1b

Size 0 trains every combination on as many batches as hold 25,600 sentences, were all of them full,
size 1 as long as the paper does. The best dev perplexity wins.
"""

from __future__ import annotations

from itertools import product
from math import inf
from typing import Any

import yaml
from matplotlib.figure import Figure
from rich.table import Table

from recipes.common.queue import Job, Row, Study, main
from recipes.language_modeling import study

FOLDER = study.HERE / "sweeps"
ROWS = [f"{task}_{name}" for task in study.TASKS for name in study.ALGORITHMS]
SENTENCES = 400 * 64  # of size 0


def jobs() -> list[Job]:
    """Of each size all combinations of all rows."""
    found: list[Job] = []
    for size, row in product((0, 1), ROWS):
        ranges: dict[str, list[Any]] = yaml.safe_load((FOLDER / f"{row}.yaml").read_text())
        given = yaml.safe_load((study.HERE / f"{row}.yaml").read_text())
        for values in product(*ranges.values()):
            settings = dict(zip(ranges, values, strict=True))
            batch = settings.get("data.batch_size", given["data"]["init_args"]["batch_size"])
            if size == 0:
                settings = study.short(row, SENTENCES, batch) | settings
                settings["trainer.val_check_interval"] = settings["trainer.max_steps"]
            else:
                settings["trainer.val_check_interval"] = 100 * 128 // batch
            found.append({"size": size, "row": row, "seed": 0, "settings": settings})
    return found


def tables(rows: list[Row]) -> list[Table]:
    """The ten best combinations of each row."""
    found = []
    for row in ROWS:
        ranges = yaml.safe_load((FOLDER / f"{row}.yaml").read_text())
        tried = [r for r in rows if r["row"] == row]
        if not tried:
            continue
        table = Table(title=f"size {rows[0]['size']}: {row}, best of {len(tried)} tried")
        for name in ranges:
            table.add_column(name.rpartition(".")[2], justify="right")
        table.add_column("dev", justify="right")
        for r in sorted(tried, key=lambda r: r["best_dev"] or inf)[:10]:
            perplexity = "-" if r["best_dev"] is None else f"{r['best_dev']:.1f}"
            table.add_row(*(str(r["settings"][name]) for name in ranges), perplexity)
        found.append(table)
    return found


def picture(rows: list[Row]) -> Figure:
    """Best dev perplexity against the learning rate, a panel for each row."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True).flat
    for axes, row in zip(panels, ROWS, strict=True):
        tried = [r for r in rows if r["row"] == row and r["best_dev"] is not None]
        rates = [r["settings"]["optimizer.lr"] for r in tried]
        axes.plot(rates, [r["best_dev"] for r in tried], "o", alpha=0.6)
        axes.set(title=row, xscale="log", yscale="log", xlabel="learning rate")
    figure.supylabel("best dev perplexity")
    return figure


STUDY = Study(
    "recipes.language_modeling.sweep",
    "One Billion Word Benchmark: 200,000 training sentences",
    jobs,
    study.train,
    tables,
    picture,
)

if __name__ == "__main__":
    main(STUDY)
