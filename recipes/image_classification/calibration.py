"""Calibration and accuracy under distribution shift, backprop against iPC (the paper's Fig. 3).

    python -m recipes.image_classification.calibration --data_dir data

The weights of every epoch are measured on clean test images and on six corruptions at five
intensities. Two pairs of models are compared: those with the best validation accuracy, and beside
them the pair with the best accuracy among those whose test accuracies differ by half a point at
most. Sizes 0 and 1 are the small CNN of ``cnn/`` with few images and with more, for two CPU cores;
size 2 is AlexNet, as in the paper.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import product
from statistics import median
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from lightning_pc.errors import DivergenceError
from lightning_pc.metrics import AdaptiveCalibrationError
from recipes.common.queue import Figures, Job, Row, Study, main
from recipes.common.training import train
from recipes.image_classification.corruptions import INTENSITIES, SETTINGS, corrupt
from recipes.image_classification.data import Channels, normalised
from recipes.image_classification.study import HALFWAY, HERE, REDUCED, arguments

ALGORITHMS = ("bp", "ipc")
SIZES: tuple[dict[str, Any], ...] = (
    {
        "task": "cnn",
        "seeds": 2,
        "test": 500,
        "settings": REDUCED,
    },
    {
        "task": "cnn",
        "seeds": 2,
        "test": 2_000,
        "settings": HALFWAY,
    },
    {
        "task": "alexnet",
        "seeds": 5,
        "test": 10_000,
        "settings": {"data.crop": 4, "data.flip": True},
    },
)
MATCHED = 0.5  # points of test accuracy
CLEAN = "clean"

#: [accuracy in percent, AdaECE] by corruption and intensity, "clean" or "hue 3".
Measured = dict[str, list[float]]


def jobs() -> list[Job]:
    """Of each size both algorithms, seed after seed."""
    return [
        {"size": size, "algorithm": algorithm, "seed": seed}
        | {name: value for name, value in how.items() if name != "seeds"}
        for size, how in enumerate(SIZES)
        for seed, algorithm in product(range(how["seeds"]), ALGORITHMS)
    ]


class _Measure(L.Callback):
    """Measures the weights of every epoch.

    Args:
        count: Of test images, the first ones.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.epochs: list[dict[str, Any]] = []
        self._shifted: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Corrupts the images."""
        images, _ = self._test(trainer)
        pixels = images.to(module.device) / 255
        self._shifted = {CLEAN: images} | {
            f"{name} {intensity}": (255 * corrupt(pixels, name, intensity)).round().byte().cpu()
            for name, intensity in product(SETTINGS, INTENSITIES)
        }

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Accuracy and AdaECE on each of them."""
        data, (_, labels) = trainer.datamodule, self._test(trainer)  # type: ignore[attr-defined]
        measured = {
            shift: measure(module, (images, labels), data.mean, data.deviation)
            for shift, images in self._shifted.items()
        }
        val = 100 * float(trainer.callback_metrics["val_accuracy"])
        self.epochs.append({"val": round(val, 3), "measured": measured})

    def _test(self, trainer: L.Trainer) -> tuple[Tensor, Tensor]:
        images, labels = trainer.datamodule.splits["test"].tensors  # type: ignore[attr-defined]
        return images[: self.count], labels[: self.count]


@torch.no_grad()
def measure(
    module: L.LightningModule, samples: tuple[Tensor, Tensor], mean: Channels, deviation: Channels
) -> list[float]:
    """Accuracy in percent and AdaECE of the top label.

    Args:
        module: Normalised images to logits.
        samples: Images, uint8 [N, C, H, W], and labels [N].
        mean: Of each channel.
        deviation: Of each channel.
    """
    training, metric = module.training, AdaptiveCalibrationError()
    module.eval()
    for images, labels in zip(*(x.split(500) for x in samples), strict=True):
        pixels = normalised(images.to(module.device) / 255, mean, deviation)
        metric.update(module(pixels).softmax(1).cpu(), labels)
    module.train(training)
    predicted = torch.cat(metric.probabilities).argmax(1)
    accuracy = 100 * float((predicted == samples[1]).double().mean())
    return [round(accuracy, 3), round(float(metric.compute()), 5)]


def run(job: Job, data_dir: str | None) -> Figures:
    """Trains as the YAML says, all epochs, and measures each.

    Returns:
        ``epochs``: for each the accuracy ``val`` in percent, and ``measured``, accuracy and AdaECE
        by corruption and intensity.
    """
    measuring = _Measure(job["test"])
    config = HERE / job["task"] / f"{job['algorithm']}.yaml"
    with suppress(DivergenceError):  # a result: the epochs before it are measured
        train(config, job["seed"], arguments(job, data_dir), callbacks=[measuring])
    return {"epochs": measuring.epochs}


def models(rows: list[Row], algorithm: str) -> list[Measured]:
    """Of each seed the epoch with the best validation accuracy."""
    return [
        max(row["epochs"], key=lambda epoch: epoch["val"])["measured"]
        for row in rows
        if row["algorithm"] == algorithm and row["epochs"]
    ]


def matched(rows: list[Row]) -> tuple[Measured, Measured] | None:
    """The most accurate pair of epochs, backprop's and iPC's, that match; None if there is none.

    The pair's accuracy is the lower one of its two, on clean test images.
    """
    found = [
        [epoch["measured"] for row in rows if row["algorithm"] == name for epoch in row["epochs"]]
        for name in ALGORITHMS
    ]
    pairs = [(a, b) for a, b in product(*found) if abs(a[CLEAN][0] - b[CLEAN][0]) <= MATCHED]
    return max(pairs, key=lambda pair: min(m[CLEAN][0] for m in pair), default=None)


def compared(rows: list[Row]) -> dict[str, tuple[list[Measured], list[Measured]]]:
    """What is compared: title -> models of backprop and of iPC."""
    best = tuple(models(rows, name) for name in ALGORITHMS)
    pair = matched(rows)
    result = {"best validation accuracy": (best[0], best[1])}
    if pair is not None:
        result["matched test accuracy"] = ([pair[0]], [pair[1]])
    return result


def figures(found: list[Measured], intensity: int, which: int) -> list[float]:
    """Accuracies (``which`` 0) or AdaECE (1) at an intensity, of each corruption and model.

    Intensity 0 is the clean images.
    """
    shifts = [CLEAN] if intensity == 0 else [f"{name} {intensity}" for name in SETTINGS]
    return [measured[shift][which] for measured in found for shift in shifts]


def tables(rows: list[Row]) -> list[Table]:
    """Medians of AdaECE and of accuracy over corruptions and seeds, by intensity."""
    result = []
    for title, pair in compared(rows).items():
        table = Table(
            title=f"size {rows[0]['size']}, {rows[0]['task']}: models of {title}",
            caption="medians over six corruptions and the seeds; 0 is clean",
        )
        table.add_column("")
        for intensity in (0, *INTENSITIES):
            table.add_column(str(intensity), justify="right")
        for which, what in ((1, "AdaECE"), (0, "accuracy, %")):
            for name, found in zip(ALGORITHMS, pair, strict=True):
                if found:
                    digits = ".3f" if which else ".1f"
                    cells = (figures(found, i, which) for i in (0, *INTENSITIES))
                    table.add_row(f"{what}, {name}", *(f"{median(c):{digits}}" for c in cells))
        result.append(table)
    return result


def picture(rows: list[Row]) -> Figure:
    """Box plots of AdaECE and of accuracy against intensity, as in Fig. 9."""
    sets = compared(rows)
    figure = Figure(figsize=(11, 4 * len(sets)), layout="constrained")
    panels = figure.subplots(len(sets), 2, squeeze=False)
    for axes_row, (title, pair) in zip(panels, sets.items(), strict=True):
        for axes, which, what in zip(axes_row, (0, 1), ("accuracy, %", "AdaECE"), strict=True):
            for shift, (name, found) in enumerate(zip(ALGORITHMS, pair, strict=True)):
                if not found:
                    continue
                colour = {"bp": "0.6", "ipc": "tab:blue"}[name]
                axes.boxplot(
                    [figures(found, i, which) for i in (0, *INTENSITIES)],
                    positions=[i + 0.35 * (shift - 0.5) for i in (0, *INTENSITIES)],
                    widths=0.3,
                    patch_artist=True,
                    boxprops={"facecolor": colour},
                    medianprops={"color": "black"},
                    manage_ticks=False,
                )
                axes.plot([], [], color=colour, lw=6, label=name)
            axes.set(title=title, xlabel="intensity of the corruption", ylabel=what)
            axes.legend(frameon=False)
    return figure


STUDY = Study(
    "recipes.image_classification.calibration",
    "CIFAR-10: training images, and the first test images (number: test)",
    jobs,
    run,
    tables,
    picture,
)

if __name__ == "__main__":
    main(STUDY)
