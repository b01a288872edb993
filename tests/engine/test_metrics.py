"""AdaptiveCalibrationError against a plain NumPy reference: whole, in batches, over processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from lightning_pc.metrics import AdaptiveCalibrationError


def reference(probabilities, labels, bins, per_class):
    """Sorted by confidence, cut into bins of equal mass, gaps weighed by mass."""
    if per_class:
        asked = [(probabilities[:, c], labels == c) for c in range(probabilities.shape[1])]
    else:
        asked = [(probabilities.max(1), probabilities.argmax(1) == labels)]
    errors = []
    for confidence, right in asked:
        order = np.argsort(confidence, kind="stable")
        error = 0.0
        for part in np.array_split(order, min(bins, len(order))):
            error += len(part) / len(order) * abs(confidence[part].mean() - right[part].mean())
        errors.append(error)
    return np.mean(errors)


def predictions(samples=203, classes=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, generator=draw, dtype=torch.float64)
    labels = torch.randint(classes, (samples,), generator=draw)
    logits[torch.arange(samples), labels] += 1
    return logits.softmax(1), labels


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize(("samples", "bins"), [(203, 15), (200, 10), (7, 15), (1, 1)])
def test_equals_the_reference(samples, bins, per_class):
    probabilities, labels = predictions(samples)
    metric = AdaptiveCalibrationError(bins, per_class)
    expected = reference(probabilities.numpy(), labels.numpy(), bins, per_class)
    assert float(metric(probabilities, labels)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("per_class", [False, True])
def test_batches_make_one_whole(per_class):
    probabilities, labels = predictions()
    whole, parts = (AdaptiveCalibrationError(per_class=per_class) for _ in range(2))
    whole.update(probabilities, labels)
    for piece in torch.arange(len(labels)).split(30):
        parts.update(probabilities[piece], labels[piece])
    assert float(parts.compute()) == float(whole.compute())
    parts.reset()
    parts.update(probabilities[:50], labels[:50])
    expected = reference(probabilities[:50].numpy(), labels[:50].numpy(), 15, per_class)
    assert float(parts.compute()) == pytest.approx(expected, abs=1e-12)


def test_known_values():
    sure = torch.tensor([[1.0, 0.0]] * 4)
    metric = AdaptiveCalibrationError(bins=1)
    metric.update(sure, torch.tensor([0, 0, 0, 1]))  # confidence 1, right in 3 of 4
    assert float(metric.compute()) == pytest.approx(0.25)
    metric.reset()
    metric.update(torch.tensor([[0.75, 0.25]] * 4), torch.tensor([0, 0, 0, 1]))
    assert float(metric.compute()) == pytest.approx(0)


def test_bins_are_of_equal_mass_not_of_equal_width():
    # One bin of width 1/2 would hold all; bins of equal mass tell the sure from the very sure.
    p = torch.tensor([0.6, 0.6, 0.9, 0.9])
    metric = AdaptiveCalibrationError(bins=2)
    metric.update(torch.stack([p, 1 - p], 1), torch.tensor([0, 0, 0, 1]))
    assert float(metric.compute()) == pytest.approx((0.4 + 0.4) / 2)
    means, right = metric.reliability()
    assert means.tolist() == pytest.approx([0.6, 0.9])
    assert right.tolist() == pytest.approx([1.0, 0.5])


def _rank(rank, file):
    """The error that one of two processes computes, each with a part of the samples."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    probabilities, labels = predictions()
    mine = slice(0, 80) if rank == 0 else slice(80, None)  # unequal shares
    metric = AdaptiveCalibrationError()
    metric.update(probabilities[mine], labels[mine])
    found = float(metric.compute())
    torch.distributed.destroy_process_group()
    return found


def test_two_processes_compute_the_same_as_one(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as other:
        theirs = other.apply_async(_rank, (1, tmp_path / "store"))
        found = [_rank(0, tmp_path / "store"), theirs.get(timeout=120)]
    probabilities, labels = predictions()
    expected = reference(probabilities.numpy(), labels.numpy(), 15, False)
    assert found == pytest.approx([expected] * 2, abs=1e-12)


def test_in_a_collection_and_in_half_precision():
    probabilities, labels = predictions()
    both = MetricCollection(
        {"top": AdaptiveCalibrationError(), "all": AdaptiveCalibrationError(per_class=True)}
    )
    found = both(probabilities.bfloat16(), labels)
    assert 0 < float(found["all"]) < float(found["top"]) < 1


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (torch.ones(3), torch.zeros(3).long(), r"expected \[B, classes\]"),
        (torch.full((3, 2), 0.5), torch.zeros(2).long(), r"expected \[B, classes\] and \[B\]"),
        (torch.full((3, 2), 0.5), torch.zeros(3), "expected integers"),
        (torch.tensor([[2.0, -1.0]]), torch.tensor([0]), "softmax"),
        (torch.tensor([[3.0, 4.0]]), torch.tensor([0]), "softmax"),
        (torch.tensor([[float("nan"), 0.5]]), torch.tensor([0]), "softmax"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), "expected 0 to 1"),
    ],
)
def test_bad_input_is_an_error(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveCalibrationError().update(probabilities, labels)


def test_what_cannot_be_computed_is_an_error():
    with pytest.raises(ValueError, match="1 or more"):
        AdaptiveCalibrationError(bins=0)
    with pytest.raises(ValueError, match="call update first"):
        AdaptiveCalibrationError().compute()
    with pytest.raises(ValueError, match="top label"):
        AdaptiveCalibrationError(per_class=True).reliability()
