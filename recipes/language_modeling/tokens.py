"""Sentences as token ids: SentencePiece BPE, and one compact file that holds all of a corpus."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor

#: Ids of the special tokens, in every vocabulary.
PAD, UNK, BOS, EOS, MASK = range(5)
SPECIAL = 5
SPLITS = ("train", "dev", "test")

Read = Callable[[str], list[str]]


@dataclass(frozen=True)
class Sentences:
    """Token ids of many sentences, without special tokens.

    Attributes:
        ids: All sentences on end, [sum of lengths].
        ends: Where each ends, [N].
    """

    ids: NDArray[np.uint16]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> NDArray[np.uint16]:
        start = self.ends[index - 1] if index else 0
        return self.ids[start : self.ends[index]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sentence, [N]."""
        return np.diff(self.ends, prepend=0)


@dataclass(frozen=True)
class Corpus:
    """A tokenizer and the splits that it has cut up.

    Attributes:
        model: SentencePiece's own serialisation of the tokenizer.
        splits: ``"train"``, ``"dev"`` and ``"test"``; empty lines are left out.
        source: Tells the text that it was made from.
    """

    model: bytes
    splits: dict[str, Sentences]
    source: str

    @property
    def tokenizer(self) -> SentencePieceProcessor:
        """The tokenizer."""
        return tokenizer(self.model)

    def save(self, path: Path) -> None:
        """Writes one ``.npz`` (11 MiB for 200,000 sentences), all of it or nothing."""
        arrays = {
            f"{name}_{part}": getattr(split, part)
            for name, split in self.splits.items()
            for part in ("ids", "ends")
        }
        new = path.with_suffix(f".{os.getpid()}.new")
        path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as file:
            np.savez_compressed(
                file, model=np.frombuffer(self.model, np.uint8), source=self.source, **arrays
            )
        os.replace(new, path)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        """Reads what `save` has written.

        Raises:
            ValueError: It is no such file, or not all of one.
        """
        try:
            with np.load(path) as file:
                splits = {
                    name: Sentences(file[f"{name}_ids"], file[f"{name}_ends"]) for name in SPLITS
                }
                return cls(file["model"].tobytes(), splits, str(file["source"]))
        except Exception as error:  # zipfile, numpy and zlib all have their own
            raise ValueError(
                f"{path} is not a file of tokens ({error}): remove it, and it is made anew."
            ) from error


def tokenizer(model: bytes) -> SentencePieceProcessor:
    """A tokenizer from its serialisation."""
    return SentencePieceProcessor(model_proto=model)


def make(read: Read, vocabulary: int, sentences: int, source: str) -> Corpus:
    """Trains a tokenizer on the training sentences and cuts up all splits.

    Args:
        read: Lines of a split, by its name; empty ones are left out.
        vocabulary: Tokens, the five special ones among them.
        sentences: How many training sentences to take, from the first on.
        source: Kept as `Corpus.source`.

    Raises:
        ValueError: There is too little text for so large a vocabulary, or no text.
    """
    lines = {name: [line for line in map(str.strip, read(name)) if line] for name in SPLITS}
    lines["train"] = lines["train"][:sentences]
    for name, found in lines.items():
        if not found:
            raise ValueError(f"The {name} split holds no sentence.")
    model = train(lines["train"], vocabulary)
    processor = tokenizer(model)
    return Corpus(model, {name: cut(found, processor) for name, found in lines.items()}, source)


def train(lines: Sequence[str], vocabulary: int) -> bytes:
    """A BPE tokenizer; the rarest characters, 0.05 % of the text, are unknown to it.

    Raises:
        ValueError: There is too little text for so large a vocabulary.
    """
    if not SPECIAL < vocabulary <= 2**16:
        raise ValueError(f"vocabulary={vocabulary}: expected {SPECIAL + 1} to {2**16} tokens.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            control_symbols=["[MASK]"],
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"No tokenizer of {vocabulary} tokens can be made from {len(lines):,} sentences: "
            f"{str(error).splitlines()[-1]} Pass a smaller vocabulary, to data and model alike."
        ) from error
    return model.getvalue()


def cut(lines: Sequence[str], processor: SentencePieceProcessor) -> Sentences:
    """Token ids of lines."""
    found = [np.asarray(ids, np.uint16) for ids in processor.encode(list(lines))]
    found = [ids for ids in found if len(ids)]
    ends = np.cumsum([len(ids) for ids in found], dtype=np.int64)
    return Sentences(np.concatenate(found), ends)


def digest(paths: Sequence[Path]) -> str:
    """SHA-256 of the files' contents."""
    total = hashlib.sha256()
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()
