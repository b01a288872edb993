"""Classifiers: ordinary LightningModules. Nothing in them knows of predictive coding."""

from __future__ import annotations

from typing import Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Classification(L.LightningModule):
    """Learns to classify; a subclass maps images to logits in `forward`.

    Args:
        loss: Of logits [B, classes] and labels [B]; cross-entropy by default.
    """

    def __init__(self, loss: nn.Module | None = None) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss() if loss is None else loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch (images, labels)."""
        images, labels = batch
        loss: Tensor = self.loss(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``val_accuracy`` and ``val_loss``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``test_accuracy`` and ``test_loss``."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        images, labels = batch
        logits = self(images)
        correct = (logits.argmax(1) == labels).to(torch.float32)
        self.log(f"{split}_accuracy", correct.mean(), prog_bar=True, batch_size=len(labels))
        self.log(f"{split}_loss", self.loss(logits, labels), batch_size=len(labels))


class SquaredError(nn.Module):
    """Half the squared distance of the outputs to 1 for the label's class and 0 for the others.

    Args:
        reduction: ``"mean"`` over images, or their ``"sum"``.
    """

    def __init__(self, reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Of outputs [B, classes] and labels [B]."""
        wanted = F.one_hot(labels, outputs.shape[1]).to(outputs)
        total = 0.5 * F.mse_loss(outputs, wanted, reduction="sum")
        return total / len(outputs) if self.reduction == "mean" else total


class Classifier(Classification):
    """A multilayer perceptron with two hidden layers (the paper's section 4 has 64 units each).

    The optimizer is named in the YAML, under ``optimizer:``.

    Args:
        inputs: Number of input pixels.
        hidden: Units of each hidden layer.
        classes: Number of classes.
    """

    def __init__(self, inputs: int, hidden: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits, [B, classes], of images, [B, *]."""
        return self.layers(images)
