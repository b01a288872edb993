"""The data sets: bytes in memory, normalised and augmented on the device, once for each batch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from recipes.common.data import InMemory, Split
from recipes.image_classification import files
from recipes.image_classification.files import DataError, Pixels

Channels = tuple[float, ...]


def normalised(images: Tensor, mean: Channels, deviation: Channels) -> Tensor:
    """Pixels 0..1, [N, C, H, W], less the mean and over the deviation of each channel, [C]."""
    shape = (-1, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(deviation).view(shape)


class Images(InMemory):
    """Base of the data modules; a subclass reads its files in `read`.

    Batches are uint8 until they are on the device. There they are scaled to 0..1, training batches
    are augmented, and all are normalised; a batch that predictive coding goes through several times
    is augmented once.

    Args:
        batch_size: Samples per training batch.
        val_size: Training images held out for validation, the last ones. 0 learns all
            images and validates on the test images, as curves of the test error do.
        train_size: How many of the others are learned, the first ones; None for all.
        crop: Training images are padded by so many black pixels on each side and cropped to their
            size at a random place; 0 for none.
        flip: Training images are mirrored with probability 1/2.
        raw: Pixels stay in 0..1 and are not normalised.
        repeat: How many times in a row a training batch is learned.

    Raises:
        ValueError: ``crop`` is negative, or ``repeat`` is not above 0.
    """

    mean: Channels
    deviation: Channels
    classes: int = 10

    def __init__(
        self,
        batch_size: int,
        val_size: int,
        train_size: int | None,
        crop: int,
        flip: bool,
        raw: bool = False,
        repeat: int = 1,
    ) -> None:
        super().__init__(batch_size, repeat)
        if crop < 0:
            raise ValueError(f"crop={crop}: expected pixels of padding, 0 or more.")
        self.val_size, self.train_size = val_size, train_size
        self.crop, self.flip, self.raw = crop, flip, raw
        self._augment: nn.Module | None = None

    def read(self, split: str) -> Pixels:
        """Images and labels of ``"train"``, validation included, or of ``"test"``."""
        raise NotImplementedError

    def load(self) -> dict[str, Split]:
        """Images uint8 [N, C, H, W].

        Raises:
            DataError: Labels are no classes, or there are too few images for the sizes.
        """
        images, labels = checked(self.read("train"), self.classes)
        held_in = len(images) - self.val_size
        learned = held_in if self.train_size is None else self.train_size
        if not (0 < learned <= held_in <= len(images)):
            raise DataError(
                f"val_size={self.val_size}, train_size={self.train_size}: expected sizes above 0 "
                f"that take no more than the {len(images):,} training images."
            )
        test = checked(self.read("test"), self.classes)
        return {
            "train": (images[:learned], labels[:learned]),
            "val": (images[held_in:], labels[held_in:]) if self.val_size else test,
            "test": test,
        }

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Bytes become numbers, in the dtype of the module that learns them."""
        images, labels = batch
        images = images.float() / 255
        module = None if self.trainer is None else self.trainer.lightning_module
        if self.trainer is not None and self.trainer.training:
            images = self.augmented(images)
        images = self.normalise(images)
        return images.to(torch.float32 if module is None else module.dtype), labels

    def normalise(self, images: Tensor) -> Tensor:
        """Images 0..1, [B, C, H, W], less this data set's mean and over its deviation."""
        return images if self.raw else normalised(images, self.mean, self.deviation)

    def augmented(self, images: Tensor) -> Tensor:
        """Images 0..1, [B, C, H, W], cropped and mirrored at random, each on its own."""
        if not (self.crop or self.flip):
            return images
        if self._augment is None:
            self._augment = _augmentation(images.shape[-2:], self.crop, self.flip)
        augmented: Tensor = self._augment(images)
        return augmented


def _augmentation(size: torch.Size, crop: int, flip: bool) -> nn.Module:
    try:
        import kornia.augmentation as K
    except ImportError as error:
        raise ImportError("Augmentation needs `pip install kornia`.") from error
    steps: list[nn.Module] = []
    if crop:
        steps.append(K.RandomCrop(tuple(size), padding=crop, cropping_mode="slice"))
    if flip:
        steps.append(K.RandomHorizontalFlip(p=0.5))
    return nn.Sequential(*steps)


def checked(pixels: Pixels, classes: int) -> Split:
    """Images [N, C, H, W] and labels of images [N, H, W, C] and labels.

    Raises:
        DataError: A label is none of the classes.
    """
    images, labels = pixels
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            f"Labels reach from {labels.min()} to {labels.max()}: expected {classes} classes, "
            f"0 to {classes - 1}."
        )
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels


class _Known(Images):
    """A published data set, in a folder or downloaded.

    Args:
        data_dir: Folder of its files; None downloads it with `datasets`.
        batch_size: Samples per training batch.
        val_size: Training images held out for validation, the last ones. 0 learns all
            images and validates on the test images, as curves of the test error do.
        train_size: How many of the others are learned, the first ones; None for all.
        crop: Black pixels of padding before the random crop; 0 for none.
        flip: Whether training images are mirrored at random.
        checksums: Whether the pixels must be the published ones.
        raw: Whether pixels stay in 0..1.
        repeat: How many times in a row a training batch is learned.
    """

    hub: ClassVar[tuple[str, str, str | None]]  # name, column of images, configuration
    sums: ClassVar[Mapping[str, tuple[str, str]]]  # split -> sha256 of images and of labels

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 64,
        val_size: int = 5_000,
        train_size: int | None = None,
        crop: int = 0,
        flip: bool = False,
        checksums: bool = True,
        raw: bool = False,
        repeat: int = 1,
    ) -> None:
        super().__init__(batch_size, val_size, train_size, crop, flip, raw, repeat)
        self.data_dir, self.checksums = data_dir, checksums

    def read(self, split: str) -> Pixels:
        """From the folder or the hub."""
        return _read(type(self), self.data_dir, split, self.checksums)

    @classmethod
    def read_files(cls, folder: Path, split: str) -> Pixels:
        """From the folder."""
        return files.read_idx(folder, split)

    @classmethod
    def check(cls, pixels: Pixels, split: str) -> None:
        """Raises `DataError` if the pixels are not the published ones."""
        files.check(cls.__name__, split, pixels, cls.sums)


@lru_cache(maxsize=2)  # the splits of one data set, for the next job of a study
def _read(data: type[_Known], data_dir: str | None, split: str, checksums: bool) -> Pixels:
    name, image, config = data.hub
    pixels = (
        files.download(name, split, image, config)
        if data_dir is None
        else data.read_files(Path(data_dir), split)
    )
    if checksums:
        data.check(pixels, split)
    return pixels


class MNIST(_Known):
    """70,000 handwritten digits, 28x28 grey, in the original four ``.gz`` files."""

    mean, deviation = (0.1307,), (0.3081,)
    hub = ("ylecun/mnist", "image", None)
    sums: ClassVar = {
        "train": (
            "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
            "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
        ),
        "test": (
            "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
            "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
        ),
    }


class FashionMNIST(_Known):
    """70,000 pieces of clothing, 28x28 grey, in four ``.gz`` files as MNIST's."""

    mean, deviation = (0.2860,), (0.3530,)
    hub = ("zalando-datasets/fashion_mnist", "image", None)
    sums: ClassVar = {
        "train": (
            "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
            "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
        ),
        "test": (
            "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
            "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
        ),
    }


class CIFAR10(_Known):
    """60,000 photographs, 32x32 RGB, as ``train-*.parquet`` and ``test-*.parquet``."""

    mean, deviation = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    hub = ("uoft-cs/cifar10", "img", None)
    sums: ClassVar = {
        "train": (
            "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
            "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        ),
        "test": (
            "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
            "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        ),
    }

    @classmethod
    def read_files(cls, folder: Path, split: str) -> Pixels:
        """From parquet."""
        return files.read_parquet(folder, split, "img")


class SVHN(_Known):
    """99,289 house numbers, 32x32 RGB: ``.mat`` files as first published, or parquet."""

    mean, deviation = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    hub = ("ufldl-stanford/svhn", "image", "cropped_digits")
    counts: ClassVar = {"train": 73_257, "test": 26_032}

    @classmethod
    def read_files(cls, folder: Path, split: str) -> Pixels:
        """From parquet where there is any, else from ``.mat``."""
        if list(folder.glob("*.parquet")):
            return files.read_parquet(folder, split, "image")
        return files.read_mat(folder, split)

    @classmethod
    def check(cls, pixels: Pixels, split: str) -> None:
        """Counts the images: no checksum was at hand."""
        if len(pixels[0]) != cls.counts[split]:
            raise DataError(
                f"{len(pixels[0]):,} {split} images: SVHN has {cls.counts[split]:,}. Fetch the "
                "files again, or take them as they are with checksums: false."
            )
