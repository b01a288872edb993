"""Classifiers: ordinary LightningModules. Nothing in them knows of predictive coding."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Classification(L.LightningModule):
    """Learns cross-entropy; a subclass maps images to logits in `forward`."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch (images, labels)."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
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
        self.log(f"{split}_loss", F.cross_entropy(logits, labels), batch_size=len(labels))


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
