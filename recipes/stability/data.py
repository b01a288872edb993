"""The first images of CIFAR-10 and MNIST, as tensors."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recipes.mnist.data import MNIST

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's channels


class Images(NamedTuple):
    """Normalised images [N, *] and labels [N], for training and for testing."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@lru_cache(maxsize=1)
def mnist(data_dir: str | None, train: int, test: int) -> Images:
    """The first ``train`` and ``test`` digits, from the folder of `recipes.mnist` or downloaded."""
    splits = MNIST(data_dir).load()

    def first(split: str, count: int) -> tuple[Tensor, Tensor]:
        images, labels = splits[split]
        return torch.from_numpy(images[:count].copy()), torch.from_numpy(labels[:count].copy())

    return Images(first("train", train), first("test", test))


@lru_cache(maxsize=1)
def cifar10(data_dir: str | None, train: int, test: int) -> Images:
    """The first ``train`` and ``test`` images.

    Args:
        data_dir: Folder with ``train-*.parquet`` and ``test-*.parquet`` as on the Hugging Face hub
            (columns ``img`` and ``label``); None downloads ``uoft-cs/cifar10`` with `datasets`.
        train: Number of training images.
        test: Number of test images.
    """

    def first(split: str, count: int) -> tuple[Tensor, Tensor]:
        if data_dir is None:
            rows = _download(split, count)
        else:
            rows = _read(sorted(Path(data_dir).glob(f"{split}-*.parquet")), data_dir, count)
        pixels, labels = zip(*rows, strict=True)
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
        mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, DEVIATION))
        return ((images - mean) / deviation).contiguous(), torch.tensor(labels)

    return Images(first("train", train), first("test", test))


def _read(files: list[Path], folder: str, count: int) -> Iterable[tuple[Any, int]]:
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no CIFAR-10: expected train-*.parquet and test-*.parquet."
        )
    try:
        from PIL import Image
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Reading CIFAR-10 needs `pip install pyarrow pillow`.") from error
    rows: list[tuple[Any, int]] = []
    for file in files:
        table = parquet.read_table(file).slice(0, count - len(rows))
        rows += [
            (np.asarray(Image.open(io.BytesIO(row["img"]["bytes"]))), row["label"])
            for row in table.to_pylist()
        ]
    return rows


def _download(split: str, count: int) -> Iterable[tuple[Any, int]]:
    remedy = "pass a folder that holds it: --data_dir FOLDER."
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"Downloading CIFAR-10 needs `pip install datasets pillow`; or else {remedy}"
        ) from error
    try:
        data = load_dataset("uoft-cs/cifar10", split=f"{split}[:{count}]")
    except Exception as error:  # whatever the network and the hub come up with
        raise RuntimeError(f"Could not download uoft-cs/cifar10 ({error}); {remedy}") from error
    return [(np.asarray(row["img"]), row["label"]) for row in data]
