"""Tests and calibrates a trained classifier, and exports its weights for plain PyTorch.

    python -m recipes.image_classification.evaluate CHECKPOINT OUT -c RECIPE.yaml --data.data_dir D

The YAML and what follows are those of the training. OUT gets ``weights.pt``, the network's
``state_dict``, ``report.json`` and ``reliability.png``. Calibration is temperature scaling (Guo et
al. 2017): the logits are divided by the number that is best on the validation images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningCLI
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_pc.metrics import AdaptiveCalibrationError
from lightning_pc.plots import plot_reliability
from recipes.common.training import hushed

QUIET = dict.fromkeys(("logger", "enable_progress_bar"), False)


@torch.no_grad()
def predicted(cli: LightningCLI, loader: DataLoader[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] and labels [N] of a data loader, on the CPU."""
    module, found = cli.model.eval(), []
    for images, labels in loader:
        images, labels = cli.datamodule.on_after_batch_transfer(
            (images.to(module.device), labels), 0
        )
        found.append((module(images).float().cpu(), labels))
    logits, labels = (torch.cat(part) for part in zip(*found, strict=True))
    return logits, labels


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The number by which to divide logits [N, classes] so that the cross-entropy is lowest."""
    log = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits.double() / log.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log.detach().exp())


def measured(logits: Tensor, labels: Tensor) -> tuple[dict[str, float], AdaptiveCalibrationError]:
    """Accuracy in percent, cross-entropy and AdaECE; and the metric, for its diagram."""
    metric = AdaptiveCalibrationError()
    metric.update(logits.softmax(1), labels)
    found = {
        "accuracy": 100 * float((logits.argmax(1) == labels).double().mean()),
        "loss": float(F.cross_entropy(logits, labels)),
        "calibration_error": float(metric.compute()),
    }
    return {name: round(value, 5) for name, value in found.items()}, metric


def main(args: Sequence[str] | None = None) -> None:
    """Evaluates from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.image_classification.evaluate", description=__doc__
    )
    parser.add_argument("checkpoint", type=Path, help="of the training")
    parser.add_argument("out", type=Path, help="folder for what comes out")
    options, rest = parser.parse_known_args(args)
    if not options.checkpoint.is_file():
        parser.error(f"{options.checkpoint} is no file: expected a checkpoint, .../NAME.ckpt.")
    with hushed():
        cli = LightningCLI(args=rest, run=False, save_config_callback=None, trainer_defaults=QUIET)
    saved = torch.load(options.checkpoint, map_location="cpu", weights_only=True)
    cli.model.load_state_dict(saved["state_dict"])
    cli.model.to(cli.trainer.strategy.root_device)
    cli.datamodule.setup("test")
    val, test = (
        predicted(cli, loader())
        for loader in (cli.datamodule.val_dataloader, cli.datamodule.test_dataloader)
    )
    heat = temperature(*val)
    before, metric = measured(*test)
    after, scaled = measured(test[0] / heat, test[1])
    report: dict[str, Any] = {"test": before, "temperature": round(heat, 5)}
    report |= {"test_calibrated": after}
    for name in ("mean", "deviation", "names"):  # what a plain script needs to know of the data
        report |= {
            f"data.{name}": found for found in [getattr(cli.datamodule, name, None)] if found
        }
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save(cli.model.cpu().net.state_dict(), options.out / "weights.pt")
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    figure = Figure(figsize=(8, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, which, title in zip(
        panels, (metric, scaled), ("as it is", "calibrated"), strict=True
    ):
        plot_reliability(which, axes).set_title(title)
    figure.savefig(options.out / "reliability.png", dpi=120)
    Console().print_json(data=report)


if __name__ == "__main__":
    main()
