"""A real text task: is a sentence as it was written, or are its words shuffled?"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipes.language_modeling.data import OneBillionWords, SmallText, TextData

Encoded = dict[str, Tensor]
AS_WRITTEN, SHUFFLED = 1, 0  # labels


class Padded:
    """A loader: sentences of about the same length in a batch, padded by the model's tokenizer.

    Args:
        encoded: Token ids of each sentence.
        labels: Of each, [N].
        tokenizer: Pads.
        batch_size: Sentences of a batch.
        seed: Of the order, another in each epoch; None keeps it.
    """

    def __init__(
        self,
        encoded: list[list[int]],
        labels: list[int],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seed: int | None,
    ) -> None:
        self.encoded, self.labels, self.tokenizer = encoded, labels, tokenizer
        self.batch_size, self.seed, self._epoch = batch_size, seed, 0

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Encoded]:
        draws = random.Random(f"{self.seed} {self._epoch}")
        self._epoch += self.seed is not None
        order = list(range(len(self.labels)))
        if self.seed is not None:
            draws.shuffle(order)
        order.sort(key=lambda i: len(self.encoded[i]))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.seed is not None:
            draws.shuffle(batches)
        for batch in batches:
            padded = self.tokenizer.pad(
                {"input_ids": [self.encoded[i] for i in batch]}, return_tensors="pt"
            )
            yield {**padded, "labels": torch.tensor([self.labels[i] for i in batch])}


class WordOrder(L.LightningDataModule):
    """Half of the sentences are as they were written; of the others the words are shuffled.

    The first and the last word stay: capitals and full stops would tell.

    Args:
        checkpoint: Folder or name of the model whose tokenizer cuts the sentences.
        data_dir: As of `OneBillionWords`; "small" takes `SmallText`.
        train: Training sentences, the last of the training split that have three different words
            between the first and the last; a language model that was trained on other ones (of the
            250,000 at hand on the first 200,000) has not seen them.
        test: Sentences of dev and of test.
        batch_size: Sentences of a batch.
        max_tokens: Longer sentences are cut.
        seed: Of the order of batches.

    Raises:
        ValueError: A number that cannot be, or there are not enough sentences.
    """

    def __init__(
        self,
        checkpoint: str,
        data_dir: str | None = None,
        train: int = 4000,
        test: int = 2000,
        batch_size: int = 32,
        max_tokens: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        numbers = {"train": (train, 1), "test": (test, 1), "batch_size": (batch_size, 1)}
        for name, (value, least) in (numbers | {"max_tokens": (max_tokens, 3)}).items():
            if value < least:
                raise ValueError(f"{name}={value}: expected {least} or more.")
        self.checkpoint, self.data_dir = checkpoint, data_dir
        self.counts = {"train": train, "dev": test, "test": test}
        self.batch_size, self.max_tokens, self.seed = batch_size, max_tokens, seed
        self.tokenizer: Any = None
        self._encoded: dict[str, tuple[list[list[int]], list[int]]] = {}

    def setup(self, stage: str) -> None:
        """Reads, shuffles and cuts the sentences."""
        if self._encoded:
            return
        self.tokenizer = AutoTokenizer.from_pretrained(self.checkpoint)
        text: TextData = SmallText() if self.data_dir == "small" else OneBillionWords(self.data_dir)
        for split, count in self.counts.items():
            lines = [line for line in text.read(split) if len(set(line.split()[1:-1])) > 2]
            if len(lines) < count:
                argument = "train" if split == "train" else "test"
                raise ValueError(
                    f"The {split} split has {len(lines)} sentences that can be shuffled, not "
                    f"{count}: pass a smaller {argument}."
                )
            draws = random.Random(split)
            labels = [draws.choice((SHUFFLED, AS_WRITTEN)) for _ in range(count)]
            chosen = [
                " ".join(line.split()) if label == AS_WRITTEN else _shuffled(line, draws)
                for line, label in zip(lines[-count:], labels, strict=True)
            ]
            cut = self.tokenizer(chosen, truncation=True, max_length=self.max_tokens)
            self._encoded[split] = (cut["input_ids"], labels)

    def train_dataloader(self) -> Padded:
        """In another order in every epoch."""
        return self._loader("train", self.seed)

    def val_dataloader(self) -> Padded:
        """The dev split."""
        return self._loader("dev", None)

    def test_dataloader(self) -> Padded:
        """The test split."""
        return self._loader("test", None)

    def _loader(self, split: str, seed: int | None) -> Padded:
        encoded, labels = self._encoded[split]
        return Padded(encoded, labels, self.tokenizer, self.batch_size, seed)


def _shuffled(line: str, draws: random.Random) -> str:
    """In another order; the words within hold three different ones at least."""
    first, *inner, last = line.split()
    order = inner.copy()
    while order == inner:
        draws.shuffle(order)
    return " ".join((first, *order, last))
