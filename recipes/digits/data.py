"""scikit-learn's handwritten digits: 1,797 real scans of 8x8 pixels, inside the package."""

from __future__ import annotations

import numpy as np

from recipes.common.data import InMemory, Split


class Digits(InMemory):
    """Train 1,077, validation 360, test 360 digits, each with the same share of every class.

    The split is fixed: runs of different seeds differ in initial weights and batch order alone.

    Args:
        batch_size: Samples per training batch.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__(batch_size)

    def load(self) -> dict[str, Split]:
        """Pixels scaled from 0..16 to 0..1."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        images, labels = (images / 16).astype(np.float32), labels.astype(np.int64)
        fixed = {"test_size": 360, "random_state": 0}
        rest, test, rest_labels, test_labels = train_test_split(
            images, labels, stratify=labels, **fixed
        )
        train, val, train_labels, val_labels = train_test_split(
            rest, rest_labels, stratify=rest_labels, **fixed
        )
        return {
            "train": (train, train_labels),
            "val": (val, val_labels),
            "test": (test, test_labels),
        }
