"""Data sets that fit in memory: tensors, cut into batches by index."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

Split = tuple[NDArray[np.float32], NDArray[np.int64]]


class _Batchwise(TensorDataset):
    """Fetches a batch with one indexing operation instead of sample by sample."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return self[torch.tensor(indices)]


def _as_it_is(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return batch


class InMemory(L.LightningDataModule):
    """Base of the data modules; a subclass reads its files in `load`.

    Args:
        batch_size: Samples per training batch; the last batch of an epoch may be smaller.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.splits: dict[str, _Batchwise] = {}

    def load(self) -> dict[str, Split]:
        """Images [N, *] and labels [N] of ``"train"``, ``"val"`` and ``"test"``."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Reads the data, once."""
        if not self.splits:
            self.splits = {
                split: _Batchwise(torch.from_numpy(images), torch.from_numpy(labels))
                for split, (images, labels) in self.load().items()
            }

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled anew each epoch."""
        return DataLoader(self.splits["train"], self.batch_size, shuffle=True, collate_fn=_as_it_is)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In order."""
        return DataLoader(self.splits["val"], 1000, collate_fn=_as_it_is)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In order."""
        return DataLoader(self.splits["test"], 1000, collate_fn=_as_it_is)
