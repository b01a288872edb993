"""The first images of CIFAR-10, MNIST and FashionMNIST, as tensors."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recipes.image_classification import files
from recipes.image_classification.data import (
    CIFAR10,
    MNIST,
    Channels,
    FashionMNIST,
    normalised,
)
from recipes.image_classification.files import Pixels


class Images(NamedTuple):
    """Normalised images [N, *] and labels [N], for training and for testing."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@lru_cache(maxsize=1)
def mnist(data_dir: str | None, train: int, test: int) -> Images:
    """The first ``train`` and ``test`` digits, [N, 1, 28, 28].

    Args:
        data_dir: Folder of the four ``.gz`` files; None downloads them with `datasets`.
        train: Number of training images.
        test: Number of test images.
    """
    return _grey(MNIST, data_dir, train, test)


@lru_cache(maxsize=1)
def fashion_mnist(data_dir: str | None, train: int, test: int) -> Images:
    """As `mnist`, of clothes."""
    return _grey(FashionMNIST, data_dir, train, test)


@lru_cache(maxsize=1)
def cifar10(data_dir: str | None, train: int, test: int) -> Images:
    """The first ``train`` and ``test`` images, [N, 3, 32, 32].

    Args:
        data_dir: Folder with ``train-*.parquet`` and ``test-*.parquet`` as on the Hugging Face hub
            (columns ``img`` and ``label``); None downloads ``uoft-cs/cifar10`` with `datasets`.
        train: Number of training images.
        test: Number of test images.
    """

    def first(split: str, count: int) -> tuple[Tensor, Tensor]:
        name, image, _ = CIFAR10.hub
        pixels = (
            files.download(name, f"{split}[:{count}]", image)
            if data_dir is None
            else files.read_parquet(Path(data_dir), split, image, count)
        )
        return _first(pixels, count, CIFAR10.mean, CIFAR10.deviation)

    return Images(first("train", train), first("test", test))


def _grey(
    kind: type[MNIST] | type[FashionMNIST], data_dir: str | None, train: int, test: int
) -> Images:
    read = kind(data_dir).read
    return Images(
        _first(read("train"), train, kind.mean, kind.deviation),
        _first(read("test"), test, kind.mean, kind.deviation),
    )


def _first(
    pixels: Pixels, count: int, mean: Channels, deviation: Channels
) -> tuple[Tensor, Tensor]:
    images, labels = (torch.from_numpy(array[:count].copy()) for array in pixels)
    return normalised(images.permute(0, 3, 1, 2) / 255, mean, deviation).contiguous(), labels
