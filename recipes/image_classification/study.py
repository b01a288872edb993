"""The rows of the paper's Tables 1 and 2 over seeds.

    python -m recipes.image_classification.study --data_dir data

A row is a YAML of this folder's folders. ``data_dir`` holds a folder for each data set: ``mnist``,
``fashion_mnist``, ``cifar10``, ``svhn``. Size 0, for two CPU cores, has the MLPs in full and
convolutional networks with few images and epochs, size 1 with more of them; size 2, for a GPU, has
all images and few epochs, and size 3 is everything as its YAML says.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from lightning_pc.errors import DivergenceError
from recipes.common.queue import Figures, Job, Row, Study, main
from recipes.common.training import train

HERE = Path(__file__).parent
MODELS = Path(".cache/image_classification/models")
DATA = {"mnist": "mnist", "fashion_mnist": "fashion_mnist", "svhn": "svhn"}  # others: cifar10
#: Algorithm -> its lines' colour.
COLOURS = {
    "bp": "0.35",
    "pc": "tab:orange",
    "ipc": "tab:blue",
    "ipc_spiking": "tab:purple",
    "iepc": "tab:green",
}
AUGMENTED = {"data.crop": 4, "data.flip": True}
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 15, 20)
#: What the convolutional networks of sizes 0 and 1 learn.
REDUCED = {"data.train_size": 2_000, "data.batch_size": 64, "trainer.max_epochs": 4}
HALFWAY = {"data.train_size": 10_000, "data.batch_size": 64, "trainer.max_epochs": 8}
#: What those of size 2 do.
SHORT = {"trainer.max_epochs": 15}

#: Size -> name of a row, its folder, seeds and settings beside the YAML's.
ROWS: tuple[dict[str, tuple[str, int, dict[str, Any]]], ...] = (
    {
        "mnist": ("mnist", 5, {}),
        "fashion_mnist": ("fashion_mnist", 5, {}),
        "cnn": ("cnn", 2, REDUCED),
        **{f"width {c}": ("width", 1, REDUCED | {"model.net.width": c}) for c in WIDTHS[:3]},
    },
    {
        "cnn": ("cnn", 3, HALFWAY),
        **{f"width {c}": ("width", 2, HALFWAY | {"model.net.width": c}) for c in WIDTHS[:3]},
    },
    {
        "cnn": ("cnn", 1, SHORT),
        "alexnet*": ("alexnet", 1, AUGMENTED | SHORT),
        "vgg5": ("vgg5", 1, SHORT),
    },
    {
        "cnn": ("cnn", 5, {}),
        "svhn": ("svhn", 5, {}),
        "alexnet": ("alexnet", 5, {}),
        "alexnet*": ("alexnet", 5, AUGMENTED),
        "vgg5": ("vgg5", 5, {}),
        "vgg7": ("vgg7", 5, {}),
        "resnet18": ("resnet18", 3, {}),
        **{f"width {c}": ("width", 5, {"model.net.width": c}) for c in WIDTHS},
    },
)


def jobs() -> list[Job]:
    """Of each size all rows with the first seed, then with the next."""
    return [
        {"size": size, "row": row, "task": task, "algorithm": path.stem, "seed": seed}
        | {"settings": settings}
        for size, rows in enumerate(ROWS)
        for seed in range(max(seeds for _, seeds, _ in rows.values()))
        for row, (task, seeds, settings) in rows.items()
        if seed < seeds
        for path in sorted((HERE / task).glob("*.yaml"))
    ]


def arguments(job: Job, data_dir: str | None) -> list[str]:
    """LightningCLI's, of a job with a ``task`` and ``settings``."""
    settings = dict(job["settings"])
    if data_dir is not None:
        settings["data.data_dir"] = Path(data_dir) / DATA.get(job["task"], "cifar10")
    return [f"--{name}={value}" for name, value in settings.items()]


def run(job: Job, data_dir: str | None) -> Figures:
    """Trains a row, tests its best weights and leaves them under ``.cache``.

    Returns:
        ``val``, the accuracy of each epoch, ``best_val`` and ``test``, in percent, ``epochs``,
        ``seconds`` of training, validation included, and ``diverged``; a row that diverges in its
        first epoch has no accuracy.
    """
    name = f"{job['row']}_{job['algorithm']}_size{job['size']}_{job['seed']}.ckpt"
    config = HERE / job["task"] / f"{job['algorithm']}.yaml"
    try:
        done = train(config, job["seed"], arguments(job, data_dir), keep=MODELS / name)
    except DivergenceError:
        return {"val": [], "best_val": None, "test": None, "epochs": 0, "diverged": True}
    return {
        "val": [round(value, 3) for value in done.val_accuracy],
        "best_val": round(max(done.val_accuracy), 3),
        "test": round(done.test_accuracy, 3),
        "epochs": len(done.val_accuracy),
        "seconds": round(done.seconds, 1),
        "diverged": done.diverged,
    }


def spread(values: Iterable[float | None], digits: str = ".2f") -> str:
    """Mean and standard deviation of those that are known."""
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    return f"{fmean(found):{digits}}" + (f" ± {stdev(found):{digits}}" if len(found) > 1 else "")


def tables(rows: list[Row]) -> list[Table]:
    """Test accuracy of each row and algorithm."""
    table = Table(
        title=f"size {rows[0]['size']}: test accuracy of the best epoch on validation images, %",
        caption="± is the standard deviation over seeds",
    )
    for heading in ("row", "algorithm", "validation", "test", "epochs", "s / epoch", "seeds"):
        table.add_column(heading, justify="left" if heading in ("row", "algorithm") else "right")
    for name in dict.fromkeys(row["row"] for row in rows):
        for algorithm in COLOURS:
            mine = [r for r in rows if (r["row"], r["algorithm"]) == (name, algorithm)]
            if not mine:
                continue
            paces = [r["seconds"] / r["epochs"] for r in mine if r["epochs"]]
            table.add_row(
                *(name, algorithm),
                spread(r["best_val"] for r in mine),
                spread(r["test"] for r in mine),
                f"{fmean(r['epochs'] for r in mine):.0f}",
                f"{fmean(paces):.1f}" if paces else "-",
                str(len(mine)),
            )
        table.add_section()
    return [table]


def picture(rows: list[Row]) -> Figure:
    """Validation accuracy while training, a panel for each row, a line for each seed."""
    names = list(dict.fromkeys(row["row"] for row in rows))
    figure = Figure(figsize=(12, 3 * (1 + (len(names) - 1) // 3)), layout="constrained")
    panels = list(figure.subplots(1 + (len(names) - 1) // 3, 3, squeeze=False).flat)
    for axes in panels:
        axes.axis("off")
    for axes, name in zip(panels, names, strict=False):
        axes.axis("on")
        for row in (r for r in rows if r["row"] == name):
            axes.plot(
                range(1, row["epochs"] + 1),
                row["val"],
                color=COLOURS[row["algorithm"]],
                label=row["algorithm"] if row["seed"] == 0 else None,
            )
        axes.set(title=name, xlabel="epoch")
        axes.legend(frameon=False)
    figure.supylabel("validation accuracy, %")
    return figure


STUDY = Study(
    "recipes.image_classification.study",
    "MNIST, FashionMNIST (the last 10,000 training images are validation), CIFAR-10, SVHN (the "
    "last 5,000)",
    jobs,
    run,
    tables,
    picture,
)

if __name__ == "__main__":
    main(STUDY)
