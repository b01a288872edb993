"""How well predicted probabilities match frequencies: a torchmetrics metric; tensors only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class AdaptiveCalibrationError(Metric):
    """Adaptive expected calibration error, AdaECE (Nguyen & O'Connor 2015), 0..1.

    Predictions are sorted by confidence and cut into bins of equal mass; the error is the mean over
    samples of the distance between a bin's mean confidence and the share of it that is right. If
    the samples cannot be shared out evenly, the bins of the lowest confidences hold one more, as
    with ``numpy.array_split``. Equal confidences stay in the order they came in.

    Args:
        bins: How many; 15 as is usual. With fewer samples than bins, each sample is a bin.
        per_class: Asks of each class whether its probability matches the share of samples in it,
            and takes the mean over classes; otherwise each sample's highest probability is asked.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: ``bins`` is not positive, a batch is not what `update` says, or there is none.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    probabilities: list[Tensor]
    labels: list[Tensor]

    def __init__(self, bins: int = 15, per_class: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if bins < 1:
            raise ValueError(f"bins={bins}: expected 1 or more.")
        self.bins, self.per_class = bins, per_class
        self.add_state("probabilities", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Adds a batch; a ValueError says what is wrong with it.

        Args:
            probabilities: [B, classes], each row with sum 1; not logits.
            labels: Classes [B].
        """
        if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
            told = f"Probabilities {tuple(probabilities.shape)} and labels {tuple(labels.shape)}"
            raise ValueError(f"{told}: expected [B, classes] and [B].")
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"Labels are {labels.dtype}: expected integers.")
        if len(labels):
            sums = probabilities.float().sum(1)
            if not (probabilities >= 0).all() or not ((sums - 1).abs() < 1e-2).all():
                raise ValueError("Rows are no probabilities: expected softmax(logits), sums of 1.")
            if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
                told = f"Labels reach from {labels.min()} to {labels.max()}"
                raise ValueError(f"{told}: expected 0 to {probabilities.shape[1] - 1}.")
        self.probabilities.append(probabilities.detach())
        self.labels.append(labels.detach())

    def compute(self) -> Tensor:
        """The error, a scalar."""
        errors = [(gaps.abs() * shares).sum() for _, gaps, shares in self._questions()]
        return torch.stack(errors).mean()

    def reliability(self) -> tuple[Tensor, Tensor]:
        """What a reliability diagram shows, of the highest probabilities.

        Returns:
            Mean confidence and share that is right, of each bin, [bins] each.
        """
        if self.per_class:
            raise ValueError("A reliability diagram is of the top label: per_class=False.")
        ((means, gaps, _),) = self._questions()
        return means, means - gaps

    def _questions(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The bins of each question: of each class, or of the highest probabilities."""
        if not len(self.labels):  # a list, or after the synchronisation of processes a tensor
            raise ValueError("No sample has been added: call update first.")
        labels, probabilities = dim_zero_cat(self.labels), dim_zero_cat(self.probabilities)
        exact = torch.float32 if probabilities.device.type == "mps" else torch.float64
        probabilities = probabilities.to(exact)
        if not self.per_class:
            confidence, predicted = probabilities.max(1)
            return [_binned(confidence, predicted == labels, self.bins)]
        classes = enumerate(probabilities.unbind(1))
        return [_binned(p, labels == label, self.bins) for label, p in classes]


def _binned(confidence: Tensor, right: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean confidence, its distance to the share that is right, and share of all, of each bin."""
    order, many = confidence.argsort(stable=True), min(bins, len(confidence))
    confidences = confidence[order].tensor_split(many)
    rights = right.to(confidence)[order].tensor_split(many)
    means = torch.stack([part.mean() for part in confidences])
    gaps = means - torch.stack([part.mean() for part in rights])
    return means, gaps, means.new_tensor([len(part) for part in rights]) / len(confidence)
