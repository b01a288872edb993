"""MNIST, from its idx files in a folder or, without one, through Hugging Face `datasets`."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recipes.common.data import InMemory, Split

FILES = {"train": "train", "test": "t10k"}


class MNIST(InMemory):
    """Train 50,000, validation the last 10,000 of the training files, test 10,000 digits.

    Args:
        data_dir: Folder with ``train-images-idx3-ubyte.gz``, ``train-labels-idx1-ubyte.gz`` and
            the two ``t10k-*`` files; None downloads ``ylecun/mnist`` with `datasets`.
        batch_size: Samples per training batch.
        val_size: Samples taken off the end of the training files for validation.
    """

    def __init__(
        self, data_dir: str | None = None, batch_size: int = 64, val_size: int = 10_000
    ) -> None:
        super().__init__(batch_size)
        self.data_dir, self.val_size = data_dir, val_size

    def load(self) -> dict[str, Split]:
        """Pixels scaled to 0..1 and normalised by the training set's mean and deviation."""
        read = _download if self.data_dir is None else _read
        images, labels = read(self.data_dir or "", "train")
        cut = len(images) - self.val_size
        return {
            "train": _split(images[:cut], labels[:cut]),
            "val": _split(images[cut:], labels[cut:]),
            "test": _split(*read(self.data_dir or "", "test")),
        }


def _split(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Split:
    return (images.astype(np.float32) / 255 - 0.1307) / 0.3081, labels.astype(np.int64)


def _read(folder: str, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images = _idx(Path(folder) / f"{FILES[split]}-images-idx3-ubyte.gz", header=16)
    labels = _idx(Path(folder) / f"{FILES[split]}-labels-idx1-ubyte.gz", header=8)
    return images.reshape(-1, 28, 28), labels


def _idx(path: Path, header: int) -> NDArray[np.uint8]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: data_dir must hold the four MNIST .gz files "
            "({train,t10k}-{images-idx3,labels-idx1}-ubyte.gz)."
        )
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def _download(_: str, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    remedy = "pass the folder of MNIST's four .gz files: --data.data_dir=FOLDER."
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"Downloading MNIST needs `pip install datasets`; or else {remedy}"
        ) from error
    try:
        data = load_dataset("ylecun/mnist", split=split)
    except Exception as error:  # whatever the network and the hub come up with
        raise RuntimeError(f"Could not download ylecun/mnist ({error}); {remedy}") from error
    images = np.stack([np.asarray(image) for image in data["image"]])
    return images, np.asarray(data["label"], dtype=np.uint8)
