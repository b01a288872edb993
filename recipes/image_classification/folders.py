"""Your own images, in folders by class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.data import Split
from recipes.image_classification import files
from recipes.image_classification.data import Images, checked
from recipes.image_classification.files import DataError, Pixels


class ImageFolder(Images):
    """Your own images: ``data_dir/train/<class>/*.png`` and ``data_dir/test/<class>/*.png``.

    Classes are the folders' names in alphabetical order. Every class gives the same share of its
    training images for validation.

    Args:
        data_dir: Folder with ``train`` and ``test``; without ``test`` nothing can be tested.
        size: Height and width that the middle square of an image is resized to.
        grey: Whether images are read as grey, one channel, instead of RGB.
        batch_size: Samples per training batch.
        val_share: Of the training images, held out for validation, drawn with a fixed seed.
        crop: Black pixels of padding before the random crop; 0 for none.
        flip: Whether training images are mirrored at random.
    """

    def __init__(
        self,
        data_dir: str,
        size: int = 32,
        grey: bool = False,
        batch_size: int = 64,
        val_share: float = 0.1,
        crop: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(batch_size, 0, None, crop, flip)
        if not 0 < val_share < 1:
            raise ValueError(f"val_share={val_share}: expected a share between 0 and 1.")
        self.folder, self.size, self.val_share = Path(data_dir), size, val_share
        self.mode = "L" if grey else "RGB"
        self.names: list[str] = []

    def load(self) -> dict[str, Split]:
        """Reads the folders, and the mean and deviation of each channel off the training images.

        Raises:
            FileNotFoundError: ``data_dir/train`` is missing.
            DataError: It has fewer than two classes, or a class fewer than two images.
        """
        train = self.folder / "train"
        if not train.is_dir():
            raise FileNotFoundError(
                f"{train} is missing: data_dir must hold train/<class>/*.png, and the same under "
                "test to test on."
            )
        self.names = sorted(p.name for p in train.iterdir() if p.is_dir())
        if len(self.names) < 2:
            raise DataError(f"{train} has {len(self.names)} folders: expected one for each class.")
        self.classes = len(self.names)
        images, labels = checked(self._pixels("train"), self.classes)
        held_out = self._held_out(labels)
        channels = images[~held_out].astype(np.float32) / 255
        self.mean = tuple(channels.mean((0, 2, 3)).tolist())
        self.deviation = tuple((channels.std((0, 2, 3)) + 1e-6).tolist())
        splits = {
            "train": (images[~held_out], labels[~held_out]),
            "val": (images[held_out], labels[held_out]),
        }
        if (self.folder / "test").is_dir():
            splits["test"] = checked(self._pixels("test"), self.classes)
        return splits

    def _pixels(self, split: str) -> Pixels:
        return files.read_folders(self.folder / split, self.names, self.size, self.mode)

    def _held_out(self, labels: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
        """Which images are for validation, bool [N]."""
        held_out, draw = np.zeros(len(labels), bool), np.random.default_rng(0)
        for label, name in enumerate(self.names):
            places = np.flatnonzero(labels == label)
            if len(places) < 2:
                raise DataError(f"{name} has one training image: expected two or more.")
            count = min(max(1, round(self.val_share * len(places))), len(places) - 1)
            held_out[draw.permutation(places)[:count]] = True
        return held_out

    def test_dataloader(self) -> Any:
        """In order.

        Raises:
            FileNotFoundError: ``data_dir/test`` is missing.
        """
        if "test" not in self.splits:
            raise FileNotFoundError(
                f"{self.folder / 'test'} is missing: put images of each class there to test on."
            )
        return super().test_dataloader()
