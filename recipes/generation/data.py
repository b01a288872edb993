"""The first images of CIFAR-10 and Tiny ImageNet and MNIST's digits, as rows in [-1, 1]."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from recipes.image_classification import files

#: Name -> (data set on the Hugging Face hub, column of the images, [height, width, channels]).
SETS: dict[str, tuple[str, str, tuple[int, int, int]]] = {
    "cifar10": ("uoft-cs/cifar10", "img", (32, 32, 3)),
    "tiny_imagenet": ("zh-plus/tiny-imagenet", "image", (64, 64, 3)),
}


@lru_cache(maxsize=2)
def pictures(name: str, count: int, data_dir: str | None = None) -> Tensor:
    """The first ``count`` training images of a data set, [count, height * width * channels].

    Args:
        name: Of `SETS`.
        count: How many.
        data_dir: Folder with a folder ``name`` of ``train-*.parquet``; None downloads them.
    """
    hub, column, _ = SETS[name]
    if data_dir is None:
        pixels, _ = files.download(hub, f"train[:{count}]", column)
    else:
        pixels, _ = files.read_parquet(Path(data_dir, name), "train", column, count)
    return torch.from_numpy(pixels[:count].copy()).flatten(1).float() / 127.5 - 1.0


def as_picture(row: Tensor, name: str) -> Tensor:
    """A row as [height, width, channels] in [0, 1]."""
    return ((row + 1.0) / 2.0).clamp(0.0, 1.0).view(SETS[name][2])
