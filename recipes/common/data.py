"""Data sets that fit in memory: tensors, cut into batches by index."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, TensorDataset

Split = tuple[NDArray[np.float32], NDArray[np.int64]]


class _Batchwise(TensorDataset):
    """Fetches a batch with one indexing operation instead of sample by sample."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return self[torch.tensor(indices)]


class _Repeated(BatchSampler):
    """Batches, each several times in a row."""

    def __init__(
        self, sampler: Sampler[int], batch_size: int, drop_last: bool, repeat: int
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.repeat = repeat

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield from repeat(batch, self.repeat)

    def __len__(self) -> int:
        return self.repeat * super().__len__()


def _as_it_is(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return batch


class InMemory(L.LightningDataModule):
    """Base of the data modules; a subclass reads its files in `load`.

    Args:
        batch_size: Samples per training batch; the last batch of an epoch may be smaller.
        repeat: How many times in a row a training batch is learned.

    Raises:
        ValueError: ``repeat`` is not above 0.
    """

    def __init__(self, batch_size: int, repeat: int = 1) -> None:
        super().__init__()
        if repeat < 1:
            raise ValueError(f"repeat={repeat}: expected 1 or more.")
        self.batch_size, self.repeat = batch_size, repeat
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
        data = self.splits["train"]
        batches = _Repeated(RandomSampler(data), self.batch_size, False, self.repeat)
        return DataLoader(data, batch_sampler=batches, collate_fn=_as_it_is)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In order."""
        return DataLoader(self.splits["val"], 1000, collate_fn=_as_it_is)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """In order."""
        return DataLoader(self.splits["test"], 1000, collate_fn=_as_it_is)
