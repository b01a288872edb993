"""Placements, energies and first weights; what makes iPC fail, and what cures it.

    python -m recipes.language_modeling.variants --data_dir data/lm1b

All variants of a set learn from the same sentences; see `SETS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.table import Table

from recipes.common.queue import Job, Row, Study, main
from recipes.language_modeling import study

_STRATEGY = "trainer.strategy.init_args."
#: One gamma does not suit all placements; values descend as at the others.
_AUTO = {f"{_STRATEGY}gamma": "auto", f"{_STRATEGY}momentum": 0}
_BLOCKS = [f"net.bert.encoder.layer.{i}" for i in range(2)]
_NONLINEAR = {f"{_STRATEGY}value_nodes": "auto"}
_HEAD = {f"{_STRATEGY}value_nodes": ["net.cls.predictions.transform"]}
_FLAT = {"decay": False}
_BARE = {"decay": False, "trainer.gradient_clip_val": "null"}


#: With so few tokens a short run gets past saying the most frequent ones.
_FEW = {"data.vocabulary": 1001, "model.vocabulary": 1001}
_NORMED = {"model.layer_norm": True}


class Set(NamedTuple):
    """Variants of one row that learn from the same sentences.

    Attributes:
        row: A YAML of this folder.
        fixed: What LightningCLI is given beside the YAML, for all variants.
        variants: Name -> what it is given for this one; ``batches`` and ``decay`` are the
            arguments of its `WarmUp`.
    """

    row: str
    fixed: dict[str, Any]
    variants: dict[str, dict[str, Any]]


SETS = {
    "placement": Set(
        "masked_ipc",
        _FEW | {"model.layer_norm": False},
        {
            "the head's activation alone": {},
            "auto, F_KL, gamma 0.5 as in the paper": _NONLINEAR,
            "auto, F_KL, gamma 1": _NONLINEAR | {f"{_STRATEGY}gamma": 1.0},
            "auto, F_KL": _NONLINEAR | _AUTO,
            "auto, Gaussian": _NONLINEAR | _AUTO | {f"{_STRATEGY}softmax_energy": "gaussian"},
            "block outputs": _AUTO | {f"{_STRATEGY}value_nodes": _BLOCKS},
            "all linear outputs": _AUTO | {f"{_STRATEGY}value_nodes": "linear"},
            "with LayerNorm: the head's activation alone (the recipe)": _NORMED,
            "with LayerNorm: auto, F_KL, gamma 1": _NORMED
            | _NONLINEAR
            | {f"{_STRATEGY}gamma": 1.0},
            "with LayerNorm: auto, iePC, lr 0.0002": _NORMED
            | _NONLINEAR
            | _AUTO
            | {f"{_STRATEGY}algorithm": "iepc", "optimizer.lr": 0.0002},
        },
    ),
    "initialisation": Set(
        "masked_ipc",
        _FEW,
        {
            "the recipe": {},
            "linear layers as BERT's": {"model.linear": "bert"},
            "embeddings as BERT's": {"model.embeddings": 0.02},
            "both as BERT's": {"model.linear": "bert", "model.embeddings": 0.02},
        },
    ),
    "stability": Set(
        "conditional_ipc",
        _NONLINEAR,
        {
            "the head's activation alone, decay and clipping (the recipe)": _HEAD,
            "the head's activation alone, neither": _HEAD | _BARE,
            "auto, decay and clipping": {},
            "auto, decay": {"trainer.gradient_clip_val": "null"},
            "auto, clipping": _FLAT,
            "auto, neither": _BARE,
            "auto, neither, gamma auto": _BARE | _AUTO,
            "auto, neither, gamma 0.1": _BARE | {f"{_STRATEGY}gamma": 0.1},
            "auto, neither, half the learning rate": _BARE | {"optimizer.lr": 0.0016},
            "auto, neither, no warm-up": _BARE | {"batches": 0},
            "auto, neither, gamma not decayed": _BARE | {f"{_STRATEGY}gamma_decay": 1.0},
            "auto, neither, energies weigh 0.1": _BARE | {f"{_STRATEGY}precisions": 0.1},
        },
    ),
    "backprop": Set(
        "conditional_bp",
        {},
        {
            "the recipe": {},
            "decay": {"decay": True},
            "clipping": {"trainer.gradient_clip_val": 1.0},
            "decay and clipping": {"decay": True, "trainer.gradient_clip_val": 1.0},
        },
    ),
}
#: Sentences in batches of 16, in which the conditional model becomes unstable early.
BATCH_SIZE = 16
SIZES = ({"sentences": 9600, "seeds": 2}, {"sentences": 38_400, "seeds": 3})


def jobs() -> list[Job]:
    """Of each size all variants, one seed after the other."""
    return [
        {"size": size, "set": name, "variant": variant, "row": group.row, "seed": seed}
        | {"settings": _settings(group, settings, how["sentences"], seed)}
        for size, how in enumerate(SIZES)
        for seed in range(how["seeds"])
        for name, group in SETS.items()
        for variant, settings in group.variants.items()
    ]


def _settings(group: Set, changes: dict[str, Any], sentences: int, seed: int) -> dict[str, Any]:
    settings = study.short(group.row, sentences, BATCH_SIZE) | {"data.seed": seed} | group.fixed
    warm_up = "trainer.callbacks.init_args"  # they are only given together
    of_warm_up = {name: changes[name] for name in ("batches", "decay") if name in changes}
    rest = {name: value for name, value in changes.items() if name not in of_warm_up}
    return settings | rest | {warm_up: settings[warm_up] | of_warm_up}


def tables(rows: list[Row]) -> list[Table]:
    """A table for each set."""
    return [_table(rows, name) for name in SETS]


def _table(rows: list[Row], name: str) -> Table:
    row, _, variants = SETS[name]
    table = Table(title=f"size {rows[0]['size']}: {name}, {row}, perplexity")
    table.add_column("variant")
    for heading in ("dev", "test of each seed", "s / batch", "diverged"):
        table.add_column(heading, justify="right")
    for variant in variants:
        found = [r for r in rows if (r["set"], r["variant"]) == (name, variant)]
        if found:
            table.add_row(
                variant,
                _list(r["best_dev"] for r in found),
                _list(r["test"] for r in found),
                study.mean((r["seconds"] for r in found), ".2f"),
                f"{sum(r['diverged'] for r in found)} of {len(found)}",
            )
    return table


def _list(values: Any) -> str:
    return ", ".join("-" if value is None else f"{value:.0f}" for value in values)


def picture(rows: Sequence[Row]) -> Figure:
    """Dev perplexity while training, a panel for each set, a line for each seed."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (name, (row, _, variants)) in zip(
        figure.subplots(1, len(SETS), squeeze=False)[0], SETS.items(), strict=True
    ):
        for i, variant in enumerate(variants):
            for r in rows:
                points = [p for p in r["dev"] if p[1] is not None]
                if (r["set"], r["variant"]) == (name, variant) and points:
                    label = variant if r["seed"] == 0 else None
                    style = "o-" if i < 10 else "s--"  # there are ten colours
                    axes.plot(*zip(*points, strict=True), style, ms=3, color=f"C{i}", label=label)
        axes.set(title=f"{name}: {row}", yscale="log", xlabel="batches")
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    figure.supylabel("dev perplexity")
    return figure


STUDY = Study(
    "recipes.language_modeling.variants",
    "One Billion Word Benchmark: 200,000 training sentences, 1,000 of dev and of test",
    jobs,
    study.train,
    tables,
    picture,
)

if __name__ == "__main__":
    main(STUDY)
