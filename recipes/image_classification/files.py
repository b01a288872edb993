"""Reads images as bytes: idx, parquet and .mat files, folders by class, or a download."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: uint8 [N, H, W, C] and labels [N].
Pixels = tuple[NDArray[np.uint8], NDArray[np.int64]]

IDX = {"train": "train", "test": "t10k"}
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


class DataError(ValueError):
    """Files that are missing, damaged or not what they should be."""


def read_idx(folder: Path, split: str) -> Pixels:
    """MNIST's format: ``{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz``.

    Args:
        folder: Of the four files.
        split: ``"train"`` or ``"test"``.

    Raises:
        FileNotFoundError: A file is missing.
        DataError: It is damaged.
    """
    images = _idx(folder / f"{IDX[split]}-images-idx3-ubyte.gz", 3)
    labels = _idx(folder / f"{IDX[split]}-labels-idx1-ubyte.gz", 1)
    return images[..., None], labels.astype(np.int64)


def _idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: data_dir must hold the four .gz files of MNIST's format "
            "({train,t10k}-{images-idx3,labels-idx1}-ubyte.gz)."
        )
    try:
        content = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(content, ">i4", dimensions, offset=4)
        return np.frombuffer(bytearray(content), np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (EOFError, OSError, zlib.error, ValueError) as error:
        raise DataError(f"{path} is damaged or cut off ({error}): fetch it again.") from error


def read_parquet(folder: Path, split: str, image: str, count: int | None = None) -> Pixels:
    """Images as on the Hugging Face hub: ``<split>-*.parquet``.

    Args:
        folder: Of the files.
        split: ``"train"`` or ``"test"``.
        image: Name of the column of images; that of labels is ``label``.
        count: Only so many, the first ones; None for all.

    Raises:
        FileNotFoundError: There is none.
        DataError: One is damaged.
        ImportError: pyarrow or pillow is missing.
    """
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no {split}-*.parquet: data_dir must hold train-*.parquet and "
            "test-*.parquet."
        )
    try:
        from PIL import Image
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Reading parquet needs `pip install pyarrow pillow`.") from error
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for file in files:
        left = None if count is None else count - len(images)
        if left == 0:
            break
        try:
            rows = parquet.read_table(file, columns=[image, "label"]).slice(0, left).to_pylist()
            images += [np.asarray(Image.open(io.BytesIO(row[image]["bytes"]))) for row in rows]
        except (OSError, ValueError) as error:  # pyarrow's errors are of these two
            raise DataError(f"{file} is damaged or cut off ({error}): fetch it again.") from error
        labels += [row["label"] for row in rows]
    return np.stack(images), np.asarray(labels, np.int64)


def read_mat(folder: Path, split: str) -> Pixels:
    """SVHN's ``{train,test}_32x32.mat``, in which label 10 is the digit 0.

    Args:
        folder: Of the two files.
        split: ``"train"`` or ``"test"``.

    Raises:
        FileNotFoundError: The file is missing.
        DataError: It is damaged.
    """
    from scipy.io import loadmat

    path = folder / f"{split}_32x32.mat"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: data_dir must hold train_32x32.mat and test_32x32.mat, or "
            "train-*.parquet and test-*.parquet."
        )
    try:
        content = loadmat(path)
        images = np.ascontiguousarray(content["X"].transpose(3, 0, 1, 2))
        return images, content["y"].reshape(-1).astype(np.int64) % 10
    except (OSError, ValueError, TypeError, KeyError, zlib.error) as error:
        raise DataError(f"{path} is damaged or cut off ({error}): fetch it again.") from error


def read_folders(folder: Path, classes: Sequence[str], size: int, mode: str) -> Pixels:
    """Images in folders by class, ``<folder>/<class>/*.png`` and the like.

    Args:
        folder: Of the folders.
        classes: Their names; the label is the place in it.
        size: Height and width that images are resized to, after cutting out their middle square.
        mode: Pillow's: ``"RGB"`` or ``"L"``.

    Raises:
        DataError: A folder is not one of the classes, or holds no image, or one is damaged.
    """
    from PIL import Image, ImageOps

    strange = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name not in classes)
    if strange:
        raise DataError(f"{folder} has {', '.join(strange)}: classes are {', '.join(classes)}.")
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(p for p in (folder / name).glob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"{folder / name} holds no image ({', '.join(SUFFIXES)}).")
        for file in files:
            try:
                with Image.open(file) as image:
                    images.append(np.asarray(ImageOps.fit(image.convert(mode), (size, size))))
            except OSError as error:
                raise DataError(f"{file} is damaged or no image ({error}).") from error
        labels += [label] * len(files)
    return np.stack(images).reshape(len(images), size, size, -1), np.asarray(labels, np.int64)


def download(name: str, split: str, image: str, config: str | None = None) -> Pixels:
    """A data set of the Hugging Face hub.

    Args:
        name: Of the data set.
        split: ``"train"`` or ``"test"``, or a part of it, such as ``"train[:400]"``.
        image: Name of the column of images; that of labels is ``label``.
        config: Of the data set, where it has several.

    Raises:
        ImportError: `datasets` is missing.
        RuntimeError: The download failed.
    """
    remedy = "pass the folder that holds it: data_dir."
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"Downloading {name} needs `pip install datasets pillow`; or else {remedy}"
        ) from error
    try:
        rows: Iterable[Any] = load_dataset(name, config, split=split)
        images, labels = zip(*((np.asarray(r[image]), r["label"]) for r in rows), strict=True)
    except Exception as error:  # whatever the network and the hub come up with
        raise RuntimeError(f"Could not download {name} ({error}); {remedy}") from error
    pixels = np.stack(images)
    return pixels.reshape(*pixels.shape[:3], -1), np.asarray(labels, np.int64)


def check(name: str, split: str, pixels: Pixels, sums: Mapping[str, tuple[str, str]]) -> None:
    """Compares a split with what is known of it.

    Args:
        name: Of the data set, for the message.
        split: ``"train"`` or ``"test"``.
        pixels: All of the split.
        sums: Split -> sha256 of the images' bytes and of the labels', one byte each.

    Raises:
        DataError: They differ.
    """
    for what, array, known in zip(("images", "labels"), pixels, sums[split], strict=True):
        found = hashlib.sha256(array.astype(np.uint8).tobytes()).hexdigest()
        if found != known:
            raise DataError(
                f"The {len(array):,} {split} {what} are not {name}'s (sha256 {found[:12]}.., "
                f"expected {known[:12]}..): fetch the files again, or take them as they are with "
                "checksums: false."
            )
