"""What a pretrained model is worth: fine-tuning against the same model from scratch.

    python -m recipes.fine_tuning.study --data_dir data/lm1b --threads 2

All jobs start from one masked language model, trained with backpropagation, or from the same
model untrained; the first one makes both and leaves them under ``.cache/fine_tuning``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import LightningCLI
from matplotlib.figure import Figure
from rich.table import Table

from lightning_pc.errors import DivergenceError
from recipes.common.machine import clock
from recipes.common.queue import Figures, Job, Row, Study, key, main
from recipes.common.training import hushed
from recipes.language_modeling import study as language_modeling
from recipes.language_modeling.data import OneBillionWords
from recipes.language_modeling.export import export
from recipes.language_modeling.model import LanguageModel, load

HERE = Path(__file__).parent
CACHE = Path(".cache/fine_tuning")
ALGORITHMS = ("bp", "ipc", "epc", "iepc")
SENTENCES = 96_000  # of the pretraining
#: The model that all start from: a row of the language models, and LightningCLI's settings.
PRETRAINING: Job = {
    "row": "masked_bp",
    "seed": 0,
    "settings": language_modeling.short("masked_bp", SENTENCES),
}
RATES = (0.00005, 0.0002, 0.001)
COLOURS = ("0.6", "tab:blue", "tab:orange", "tab:green")
EVERYWHERE = {"trainer.strategy.value_nodes": "auto"}


class How(NamedTuple):
    """A row.

    Attributes:
        start: "pretrained" or "untrained".
        settings: LightningCLI's, beside the YAML's.
        algorithms: Of `ALGORITHMS`.
        rates: Learning rates, of which dev accuracy chooses one.
    """

    start: str
    settings: dict[str, Any]
    algorithms: tuple[str, ...] = ("bp", "ipc")
    rates: tuple[float, ...] = RATES


#: What is trained -> how.
ROWS = {
    "all, from scratch": How("untrained", {}),
    "all": How("pretrained", {}, ALGORITHMS),
    # As many steps of the optimizer as iPC takes, T = 4 a batch.
    "all, 16 epochs": How("pretrained", {"trainer.max_epochs": 16}, ("bp",), RATES[:2]),
    "all, nodes at auto": How("pretrained", EVERYWHERE, ("ipc",), RATES[:2]),
    "last block": How("pretrained", {"model.trained": 1}),
    "LoRA": How("pretrained", {"model.trained": "lora"}, rates=(0.001, 0.004)),
}
SIZES: tuple[dict[str, int], ...] = ({"train": 4000, "seeds": 2}, {"train": 20_000, "seeds": 3})


def jobs() -> list[Job]:
    """Of each size all rows, one seed after the other."""
    return [
        {"size": size, "algorithm": algorithm, "row": row, "lr": lr, "seed": seed}
        | {"pretraining": SENTENCES, "settings": {"data.train": given["train"], **how.settings}}
        for size, given in enumerate(SIZES)
        for seed in range(given["seeds"])
        for row, how in ROWS.items()
        for lr, algorithm in product(how.rates, how.algorithms)
    ]


def starts(data_dir: str | None) -> Path:
    """A folder of the models ``pretrained`` and ``untrained``; the first call makes them."""
    made_of = [key(PRETRAINING), OneBillionWords(data_dir).source()]
    folder = CACHE / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "pretraining.lock").open("w") as lock:  # other processes wait for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            checkpoint, new = folder.with_suffix(".ckpt"), folder.with_suffix(".new")
            language_modeling.train(PRETRAINING, data_dir, CACHE / "runs", checkpoint)
            shutil.rmtree(new, ignore_errors=True)
            trained = load(checkpoint)
            torch.manual_seed(0)
            untrained = LanguageModel(**trained.hparams)
            untrained.tokenizer = trained.tokenizer
            export(trained, new / "pretrained")
            export(untrained.eval(), new / "untrained")
            new.rename(folder)
    return folder


def run(job: Job, data_dir: str | None) -> Figures:
    """Fine-tunes, and tests the final weights.

    Returns:
        ``dev`` and ``test`` accuracy in percent, ``seconds`` of the fit (on a CPU
        the processor's), ``diverged``.
    """
    folder = starts(data_dir) / ROWS[job["row"]].start
    settings: dict[str, Any] = {
        "model.checkpoint": folder,
        "data.checkpoint": folder,
        "optimizer.lr": job["lr"],
        "data.seed": job["seed"],
        **job["settings"],
    }
    if data_dir is not None:
        settings["data.data_dir"] = data_dir
    diverged = False
    silent = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    with hushed():
        cli = LightningCLI(
            args=[
                *(f"--config={HERE / job['algorithm']}.yaml", f"--seed_everything={job['seed']}"),
                *("--trainer.num_sanity_val_steps=0", "--trainer.check_val_every_n_epoch=1000"),
                *(f"--{name}={value}" for name, value in settings.items()),
            ],
            run=False,
            save_config_callback=None,
            trainer_defaults=dict.fromkeys(silent, False),
        )
        start = clock()
        try:
            cli.trainer.fit(cli.model, cli.datamodule)
        except DivergenceError:
            diverged = True
        seconds = clock() - start
        cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
        dev = cli.trainer.callback_metrics["dev_accuracy"].item()
        cli.trainer.test(cli.model, cli.datamodule, verbose=False)
        test = cli.trainer.callback_metrics["test_accuracy"].item()
    return {
        "dev": round(100 * dev, 2),
        "test": round(100 * test, 2),
        "seconds": round(seconds, 1),
        "diverged": diverged,
    }


def best(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """What is trained and algorithm -> the rows of the learning rate with the best dev accuracy.

    Of the rates that as many seeds have run as any: seeds differ more than rates.
    """
    found = {}
    for row, algorithm in product(ROWS, ALGORITHMS):
        tried: dict[float, list[Row]] = {}
        for r in rows:
            if (r["row"], r["algorithm"]) == (row, algorithm):
                tried.setdefault(r["lr"], []).append(r)
        if tried:
            found[row, algorithm] = max(
                tried.values(), key=lambda t: (len(t), fmean(r["dev"] for r in t))
            )
    return found


def tables(rows: list[Row]) -> list[Table]:
    """Accuracy of each row at the learning rate that dev accuracy chooses."""
    sentences = rows[0]["settings"]["data.train"]
    table = Table(
        title=f"size {rows[0]['size']}: word order, {sentences} training sentences, accuracy in %",
        caption="learning rates by dev accuracy",
    )
    table.add_column("trained")
    table.add_column("algorithm")
    for heading in ("lr", "dev", "test", "seconds", "diverged", "seeds"):
        table.add_column(heading, justify="right")
    for (row, algorithm), found in best(rows).items():
        table.add_row(
            *(row, algorithm, str(found[0]["lr"])),
            language_modeling.mean(r["dev"] for r in found),
            language_modeling.mean(r["test"] for r in found),
            language_modeling.mean((r["seconds"] for r in found), ".0f"),
            f"{sum(r['diverged'] for r in found)} of {len(found)}",
            str(len(found)),
        )
    return [table]


def picture(rows: list[Row]) -> Figure:
    """Test accuracy of each row, a bar for the mean over seeds and a dot for each."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, chosen = figure.subplots(), best(rows)
    for i, (algorithm, colour) in enumerate(zip(ALGORITHMS, COLOURS, strict=True)):
        for place, row in enumerate(ROWS):
            found = [r["test"] for r in chosen.get((row, algorithm), [])]
            x = place + 0.2 * (i - 1.5)
            if found:
                label = algorithm if row == "all" else None
                axes.bar(x, fmean(found), 0.18, color=colour, label=label)
                axes.plot([x] * len(found), found, "k.", ms=4)
    axes.set(ylim=(45, 100), ylabel="test accuracy, %", title="Are the words shuffled?")
    axes.set_xticks(range(len(ROWS)), list(ROWS))
    axes.axhline(50, color="k", lw=0.5)
    axes.legend(frameon=False)
    return figure


STUDY = Study(
    "recipes.fine_tuning.study",
    "One Billion Word Benchmark: the last of its training sentences, 2,000 each of dev and test",
    jobs,
    run,
    tables,
    picture,
)

if __name__ == "__main__":
    main(STUDY)
