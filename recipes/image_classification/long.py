"""Rows that take hours: an author's own configuration, and the paper's CNN with all images.

    python -m recipes.image_classification.long --data_dir data

``data_dir`` is as of `recipes.image_classification.study`. A run that is stopped goes on from its
last epoch, by the checkpoints under ``.cache``. Size 0 is the authors' configuration (``authors``),
whose rates do not depend on the length: a job of 5 epochs goes on from that of 1. Size 1 is the CNN
on CIFAR-10, 40 epochs, with a learning rate that falls to 0.
"""

from __future__ import annotations

import fcntl
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from lightning_pc.errors import DivergenceError
from recipes.common.queue import Figures, Job, Row, Study, main
from recipes.common.training import train
from recipes.image_classification.study import HERE, MODELS, arguments

#: Epochs of the authors' configuration: those whose test error they show.
AUTHORS = {"ipc": (1, 5, 10, 15, 25, 40, 80), "bp": (1, 5, 10, 15, 25)}
#: Epoch -> test error, read off the authors' curves (by eye, 0.01 either way), by algorithm.
PUBLISHED = {
    "ipc": {1: 0.49, 5: 0.42, 10: 0.40, 15: 0.38, 25: 0.35, 40: 0.315, 80: 0.29},
    "bp": {1: 0.41, 5: 0.33, 10: 0.315, 15: 0.315, 25: 0.315},
}
RELU = {"model.net.activation": "torch.nn.ReLU"}
#: Of ``ipc`` the best of those tried with 2,000 images; the others keep their YAML's.
FASTER = {"optimizer.lr": 2e-3}
#: Row -> algorithms and settings of the CNN.
CNN: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "cnn, ReLU, 2e-3": (("ipc",), RELU | FASTER),
    "cnn, 2e-3": (("ipc",), FASTER),
    "cnn": (("bp", "ipc", "ipc_spiking", "pc"), {}),
    "cnn, 8 steps a batch": (("bp",), {"data.repeat": 8}),
    "cnn, ReLU": (("bp", "ipc_spiking", "pc"), RELU),
}
EPOCHS = 40


def jobs() -> list[Job]:
    """Of size 0 the short runs of each algorithm first."""
    found: list[Job] = [
        {"size": 0, "row": "authors", "task": "authors", "algorithm": algorithm, "seed": 0}
        | {"settings": {"trainer.max_epochs": epochs}}
        for algorithm, lengths in AUTHORS.items()
        for epochs in lengths
    ]
    for row, (algorithms, settings) in CNN.items():
        whole = {"size": 1, "row": row, "task": "cnn", "seed": 0}
        settings = settings | {"trainer.max_epochs": EPOCHS}
        found += [whole | {"algorithm": a, "settings": settings} for a in algorithms]
    return found


def run(job: Job, data_dir: str | None) -> Figures:
    """Trains a row, from where it was stopped.

    Returns:
        ``val``, the accuracy of each epoch, of the test images where ``authors``; ``test`` and
        ``last_test``, of the best and of the last weights, in percent; ``seconds`` and
        ``cpu_seconds`` of training; ``diverged``.
    """
    name = f"{job['row']}_{job['algorithm']}_{job['seed']}".replace(", ", "_").replace(" ", "_")
    config, folder = HERE / job["task"] / f"{job['algorithm']}.yaml", MODELS.parent / "long" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # jobs of other lengths go on from each other
        try:
            done = train(config, job["seed"], arguments(job, data_dir), resume=folder)
        except DivergenceError:
            return {"val": [], "test": None, "last_test": None, "diverged": True}
    return {
        "val": [round(value, 3) for value in done.val_accuracy],
        "test": round(done.test_accuracy, 3),
        "last_test": round(done.last_test_accuracy, 3),
        "seconds": round(done.seconds),
        "cpu_seconds": round(done.cpu_seconds),
        "diverged": done.diverged,
    }


def tables(rows: list[Row]) -> list[Table]:
    """Test errors beside the authors', or accuracies."""
    authors = rows[0]["task"] == "authors"
    table = Table(title="an author's configuration" if authors else "CNN on CIFAR-10, all images")
    last = ("test error", "the authors'") if authors else ("best epoch's test", "last epoch's test")
    for heading in ("row", "algorithm", "epochs", *last, "CPU min"):
        table.add_column(heading, justify="left" if heading in ("row", "algorithm") else "right")
    for row in rows:
        epochs, algorithm = row["settings"]["trainer.max_epochs"], row["algorithm"]
        if row["test"] is None:
            figures = ["diverged", "", ""]
        elif authors:
            error = 1 - row["last_test"] / 100
            figures = [f"{error:.3f}", f"{PUBLISHED[algorithm].get(epochs, '')}"]
        else:
            figures = [f"{row['test']:.2f}", f"{row['last_test']:.2f}"]
        minutes = [f"{row['cpu_seconds'] / 60:.0f}"] if row["test"] is not None else []
        table.add_row(row["row"], algorithm, str(epochs), *figures, *minutes)
    return [table]


def picture(rows: list[Row]) -> Figure:
    """Test error, or validation accuracy, of each epoch."""
    authors = rows[0]["task"] == "authors"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    longest = {(row["row"], row["algorithm"]): row for row in rows}
    for number, ((name, algorithm), row) in enumerate(longest.items()):
        curve = [1 - v / 100 if authors else v for v in row["val"]]
        axes.plot(range(1, len(curve) + 1), curve, f"C{number}", label=f"{name}, {algorithm}")
        if authors:
            points = PUBLISHED[algorithm]
            axes.plot([*points], [*points.values()], f"C{number}o", label="the authors' curve")
    axes.set(xlabel="epoch", ylabel="test error" if authors else "validation accuracy, %")
    axes.legend(frameon=False)
    return figure


STUDY = Study(
    "recipes.image_classification.long",
    "CIFAR-10: 50,000 images (authors), or 45,000 with the last 5,000 as validation",
    jobs,
    run,
    tables,
    picture,
)

if __name__ == "__main__":
    main(STUDY)
