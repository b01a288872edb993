"""Every row of the paper's Table 3 over seeds: perplexities, and how they fell.

    python -m recipes.language_modeling.study --data_dir data/lm1b

A row is a YAML of this folder, or a variant of one with other settings (`VARIANTS`): iPC with nodes
at all activations, as the paper has it, and backprop with iPC's falling rate, for as many batches
and for as much processor time. ``--where variant='all nodes'`` chooses one.

Sizes 0 and 1 train all rows on as many sentences, less than an epoch; size 2, for a GPU, as the
YAMLs say but for three epochs, in which every rate falls; size 3 is the paper's own, 16 epochs with
early stopping. A run that is stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import copy
import hashlib
import math
import shutil
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from matplotlib.figure import Figure
from rich.table import Table

from lightning_pc.errors import DivergenceError
from recipes.common.machine import clock
from recipes.common.queue import Figures, Job, Row, Study, key, main
from recipes.common.training import hushed

HERE = Path(__file__).parent
TASKS = ("masked", "conditional")
ALGORITHMS = ("bp", "pc", "ipc")
#: Test perplexity from which on a run counts as one that has not converged (section 5).
THRESHOLDS = {"bp": 200.0, "pc": 800.0, "ipc": 200.0}
RUNS, MODELS = (Path(".cache/language_modeling") / name for name in ("runs", "models"))

SIZES: tuple[dict[str, Any], ...] = (
    {"sentences": 25_600, "seeds": 1},
    {"sentences": 102_400, "seeds": 3},
    {"sentences": None, "seeds": 1, "epochs": 3},
    {"sentences": None, "seeds": 10},
)
#: Sentences of a batch in runs that are shorter than the paper's. A masked sentence asks for a
#: seventh of the tokens, and what the masked model lacks at first are steps.
BATCH_SIZES = {"masked": 16, "conditional": 64}
#: Of such runs; the paper's rate of this row is for batches of 256.
RATES = {"masked_bp": 0.001}


_AUTO = {"trainer.strategy.init_args.value_nodes": "auto"}
#: Variant -> its algorithm, its settings by task, and how many times the batches it has. With all
#: nodes the masked model has no LayerNorm, as in the paper: it harms there (`variants`).
VARIANTS: dict[str, tuple[str, dict[str, dict[str, Any]], float]] = {
    "all nodes": (
        "ipc",
        {"masked": _AUTO | {"model.layer_norm": False}, "conditional": _AUTO},
        1,
    ),
    "falling rate": ("bp", {}, 1),
    "falling rate, 4.5 times as long": ("bp", {}, 4.5),
}


#: Weight steps of a batch, T, where there are several.
STEPS = {"masked_ipc": 6, "conditional_ipc": 4}


def short(
    row: str, sentences: int, batch_size: int | None = None, decay: bool = False
) -> dict[str, Any]:
    """What LightningCLI is given for a run of so many sentences, all new where there are enough."""
    task, _, algorithm = row.partition("_")
    batch_size = batch_size or BATCH_SIZES[task]
    batches = sentences // batch_size
    settings: dict[str, Any] = {
        "model.dropout": 0.0,
        "data.batch_size": batch_size,
        "data.eval_sentences": 1000,
        "trainer.max_steps": batches,
        "trainer.val_check_interval": batches // 8,
        "trainer.callbacks.init_args": {
            "batches": batches // 20,
            "decay": decay or algorithm == "ipc",
        },
    }
    return settings | ({"optimizer.lr": RATES[row]} if row in RATES else {})


def jobs() -> list[Job]:
    """Of each size all rows, the conditional ones first.

    ``settings`` are what LightningCLI is given beside the YAML.
    """
    found: list[Job] = []
    for size, how in enumerate(SIZES):
        for seed, task in product(range(how["seeds"]), reversed(TASKS)):
            for row in (f"{task}_{name}" for name in ("bp", "ipc", "pc")):  # PC takes longest
                settings = {"data.seed": seed}
                if how["sentences"] is not None:
                    settings |= short(row, how["sentences"])
                if "epochs" in how:
                    settings["trainer.max_epochs"] = how["epochs"]
                    settings["trainer.callbacks.init_args"] = {"batches": 100, "decay": True}
                found.append({"size": size, "row": row, "seed": seed, "settings": settings})
    return found + [_variant(name, task, seed) for seed, task, name in product(*_EACH)]


#: Of variants, which are run at size 1 alone.
_EACH = (range(SIZES[1]["seeds"]), TASKS, VARIANTS)


def _variant(name: str, task: str, seed: int) -> Job:
    algorithm, own, times = VARIANTS[name]
    row, sentences = f"{task}_{algorithm}", int(SIZES[1]["sentences"] * times)
    settings = {"data.seed": seed} | short(row, sentences, decay=True) | own.get(task, {})
    return {"size": 1, "row": row, "seed": seed, "variant": name, "settings": settings}


def label(row: Row) -> str:
    """What tables call an algorithm."""
    algorithm = row["row"].rpartition("_")[2]
    own = "head only" if algorithm == "ipc" else ""
    return ", ".join(filter(None, [algorithm, row.get("variant", own)]))


#: What tables call them, in the order of their lines.
LABELS = ("bp", *(f"bp, {n}" for n, v in VARIANTS.items() if v[0] == "bp"), "pc")
LABELS += ("ipc, head only", "ipc, all nodes")


class Record(L.Callback):
    """The run's figures, which a checkpoint keeps."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {"dev": [], "seconds": [], "nodes": []}
        self._steepest = torch.zeros(())

    def on_train_batch_start(self, *args: Any) -> None:
        """Starts the watch."""
        self._start = clock()

    def on_train_batch_end(self, *args: Any) -> None:
        """Stops it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.figures["seconds"].append(round(clock() - self._start, 4))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, *_: Any
    ) -> None:
        """Keeps the longest gradient."""
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        length = torch.nn.utils.get_total_norm(gradients)
        self._steepest = torch.maximum(length, self._steepest.to(length))

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        """After how many batches which dev perplexity, longest gradient and energies."""
        if trainer.sanity_checking:
            return
        batches = trainer.global_step
        value = float(trainer.callback_metrics["dev_perplexity"])
        self.figures["dev"].append([batches, _plain(value)])
        report = getattr(trainer.strategy, "report", None)
        energies = (
            {}
            if report is None
            else dict(
                zip(report.nodes, (report.energies[-1] / report.loss_terms).tolist(), strict=True)
            )
        )
        found = {"gradient": float(self._steepest), **energies}
        shown = {n: float(f"{v:.4g}") if math.isfinite(v) else None for n, v in found.items()}
        self.figures["nodes"].append([batches, shown])
        self._steepest = torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """The figures so far."""
        return self.figures

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.figures = state


def run(job: Job, data_dir: str | None) -> Figures:
    """Trains a row; its best checkpoint is left under ``.cache/language_modeling/models``."""
    return train(job, data_dir, keep=MODELS / f"{job['row']}_size{job['size']}_{job['seed']}.ckpt")


def train(job: Job, data_dir: str | None, runs: Path = RUNS, keep: Path | None = None) -> Figures:
    """Trains a row and tests its weights of the best dev perplexity.

    Args:
        job: One of `jobs`, or of another study with a ``row`` and ``settings``.
        data_dir: Folder of the sentences.
        runs: Where checkpoints lie until the run is done.
        keep: Where to leave the best checkpoint.

    Returns:
        ``dev``, the curve as [batches, perplexity], ``best_dev``, ``test``, ``test_with_end`` (of
        the conditional model, ends of sentences counted), ``seconds`` of a batch (median; on a CPU
        the processor's), ``batches`` and ``diverged``; ``nodes``, at each validation the longest
        ``gradient`` since the last and each node's energy at the end of the last batch, as the
        loss a mean. What is not finite is None.
    """
    folder = runs / hashlib.sha256(key(job).encode()).hexdigest()[:16]
    settings = [f"--{name}={value}" for name, value in job["settings"].items()]
    if data_dir is not None:
        settings.append(f"--data.data_dir={data_dir}")
    record, diverged = Record(), False
    silent = ("logger", "enable_progress_bar", "enable_model_summary")
    with hushed():
        cli = LightningCLI(
            args=[
                *(f"--config={HERE / job['row']}.yaml", f"--seed_everything={job['seed']}"),
                *("--trainer.num_sanity_val_steps=0", *settings),
            ],
            run=False,
            save_config_callback=None,
            trainer_defaults=dict.fromkeys(silent, False) | {"callbacks": [record]},
        )
        best = cli.trainer.checkpoint_callback
        assert isinstance(best, ModelCheckpoint)
        best.dirpath = str(folder)
        last = folder / "last.ckpt"
        try:
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=last if last.exists() else None)
        except DivergenceError:
            diverged = True
        # testing loads the best checkpoint, callbacks included
        figures, test, with_end = copy.deepcopy(record.figures), math.inf, math.inf
        if best.best_model_path:
            tested = cli.trainer.test(
                cli.model, cli.datamodule, ckpt_path=best.best_model_path, verbose=False
            )
            test = tested[0]["test_perplexity"]
            with_end = tested[0].get("test_perplexity_with_end", math.inf)
            if keep is not None:
                keep.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(best.best_model_path, keep)
    shutil.rmtree(folder, ignore_errors=True)
    curve, seconds = figures["dev"], figures["seconds"]
    return {
        "dev": curve,
        "best_dev": min((value for _, value in curve if value is not None), default=None),
        "test": _plain(test),
        "test_with_end": _plain(with_end),
        "seconds": round(median(seconds), 4) if seconds else None,
        "batches": len(seconds),
        "nodes": figures["nodes"],
        "diverged": diverged or any(value is None for _, value in curve),
    }


def _plain(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def tables(rows: list[Row]) -> list[Table]:
    """A row for each YAML: mean and deviation over seeds."""
    table = Table(
        title=f"size {rows[0]['size']}: perplexity",
        caption="converged: test perplexity below 200 (bp, ipc) or 800 (pc), as in the paper; "
        "seconds: the processor's, but where there is a GPU",
    )
    table.add_column("row")
    for heading in ("batches", "dev", "test", "with end", "s / batch", "converged", "seeds"):
        table.add_column(heading, justify="right")
    for task in TASKS:
        for name in LABELS:
            found = [r for r in rows if r["row"].startswith(task) and label(r) == name]
            if found:
                table.add_row(
                    f"{task} {name}",
                    str(round(fmean(row["batches"] for row in found))),
                    mean(row["best_dev"] for row in found),
                    mean(row["test"] for row in found),
                    mean(row["test_with_end"] for row in found),
                    mean((row["seconds"] for row in found), ".2f"),
                    f"{sum(converged(row) for row in found)} of {len(found)}",
                    str(len(found)),
                )
        table.add_section()
    return [table]


def converged(row: Row) -> bool:
    """By the paper's thresholds."""
    threshold = THRESHOLDS[row["row"].rpartition("_")[2]]
    return not row["diverged"] and row["test"] is not None and row["test"] < threshold


def mean(values: Iterable[float | None], digits: str = ".1f") -> str:
    """Mean and deviation of those that are known, and how many are not."""
    found = list(values)
    finite = [value for value in found if value is not None]
    if not finite:
        return "-"
    spread = f" ± {stdev(finite):{digits}}" if len(finite) > 1 else ""
    missing = f" ({len(finite)} of {len(found)})" if len(finite) < len(found) else ""
    return f"{fmean(finite):{digits}}{spread}{missing}"


def picture(rows: list[Row]) -> Figure:
    """Dev perplexity while training, as in Fig. 3 right; a panel for each task."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    colours = dict(zip(LABELS, ("0", "0.4", "0.7", "C1", "C0", "C2"), strict=True))
    for axes, task in zip(figure.subplots(1, len(TASKS), squeeze=False)[0], TASKS, strict=True):
        for row in (row for row in rows if row["row"].startswith(task)):
            name = label(row)
            if points := [p for p in row["dev"] if p[1] is not None]:
                told = name if row["seed"] == 0 else None
                batches, values = zip(*points, strict=True)
                axes.plot(batches, values, "o-", ms=3, color=colours[name], label=told)
        axes.set(title=task, yscale="log", xlabel="batches")
        if axes.lines:
            axes.legend(frameon=False)
    figure.supylabel("dev perplexity")
    return figure


STUDY = Study(
    "recipes.language_modeling.study",
    "One Billion Word Benchmark: 200,000 training sentences, dev and test of their first sentences",
    jobs,
    run,
    tables,
    picture,
)

if __name__ == "__main__":
    main(STUDY)
