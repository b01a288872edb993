"""The data modules of the masked and of the conditional model."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import lightning as L

from recipes.language_modeling import tokens
from recipes.language_modeling.batches import Batches, Task
from recipes.language_modeling.tokens import SPLITS, Corpus, Sentences

ARCHIVE = "https://www.statmt.org/lm-benchmark/"
#: The benchmark's heldout shards (306,688 sentences), read without running code.
REPOSITORY = "billion-word-benchmark/lm1b"
REVISION = "8d52bfd3cc2819fc1166dbb8144c328e2690de3e"
PARQUET = "plain_text/test/0000.parquet"
LAYOUT = (
    "data_dir must hold train.txt.gz, dev.txt.gz and test.txt.gz, UTF-8, a sentence a line; the "
    f"archive of the One Billion Word Benchmark is at {ARCHIVE}."
)


class TextData(L.LightningDataModule):
    """Base of the data modules; a subclass reads its sentences in `read`.

    Sentences are cut into tokens once and kept in one compact file under ``cache_dir``, which can
    be taken to another machine in place of the text.

    Args:
        task: What is asked: "masked" tokens, or each next token ("conditional").
        batch_size: Sentences of a training batch.
        sentences: Training sentences, from the first on.
        vocabulary: Tokens, special ones included (the paper: 8001).
        max_tokens: Longer sentences are cut; special tokens count.
        eval_batch_size: Sentences of a dev or test batch.
        eval_sentences: Only the first so many of dev and of test; None takes all.
        cache_dir: Where the file of tokens lies.
        seed: Of order and masks while training.

    Raises:
        ValueError: No such task, or a number that cannot be.
    """

    name: str

    def __init__(
        self,
        task: Task = "masked",
        batch_size: int = 128,
        sentences: int = 200_000,
        vocabulary: int = 8001,
        max_tokens: int = 64,
        eval_batch_size: int = 128,
        eval_sentences: int | None = None,
        cache_dir: str = ".cache/language_modeling",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if task not in ("masked", "conditional"):
            raise ValueError(f"task={task!r}: expected 'masked' or 'conditional'.")
        numbers = {
            "batch_size": (batch_size, 1),
            "sentences": (sentences, 1),
            "max_tokens": (max_tokens, 3),
            "eval_batch_size": (eval_batch_size, 1),
            "eval_sentences": (eval_sentences, 1),
        }
        for name, (value, least) in numbers.items():
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected {least} or more.")
        self.task, self.batch_size, self.count, self.vocabulary = (
            *(task, batch_size, sentences),
            vocabulary,
        )
        self.max_tokens, self.eval_batch_size = max_tokens, eval_batch_size
        self.eval_sentences, self.cache_dir, self.seed = eval_sentences, Path(cache_dir), seed
        self.corpus: Corpus | None = None

    def read(self, split: str) -> list[str]:
        """Lines of ``"train"``, ``"dev"`` or ``"test"``."""
        raise NotImplementedError

    def source(self) -> str | None:
        """Tells this text from others; None if the cached one is as good."""
        return None

    @property
    def path(self) -> Path:
        """The file of tokens."""
        return self.cache_dir / f"{self.name}-{self.count}-{self.vocabulary}.npz"

    def setup(self, stage: str) -> None:
        """Reads the file of tokens, or makes it."""
        if self.corpus is not None:
            return
        source = self.source()
        if self.path.exists():
            corpus = Corpus.load(self.path)
            if source in (None, corpus.source):
                self.corpus = corpus
                return
        self.corpus = tokens.make(self.read, self.vocabulary, self.count, source or "")
        self.corpus.save(self.path)

    def train_dataloader(self) -> Batches:
        """In another order with other masks in every epoch."""
        return self._batches("train", self.batch_size, self.seed)

    def val_dataloader(self) -> Batches:
        """The dev split, the same every time."""
        return self._batches("dev", self.eval_batch_size, None)

    def test_dataloader(self) -> Batches:
        """The test split, the same every time."""
        return self._batches("test", self.eval_batch_size, None)

    def _batches(self, split: str, batch_size: int, seed: int | None) -> Batches:
        assert self.corpus is not None
        sentences = self.corpus.splits[split]
        if split != "train" and self.eval_sentences is not None:
            ends = sentences.ends[: self.eval_sentences]
            sentences = Sentences(sentences.ids[: ends[-1]], ends)
        task, longest = self.task, self.max_tokens
        return Batches(sentences, task, batch_size, longest, self.vocabulary, seed)


class OneBillionWords(TextData):
    """Sentences of the One Billion Word Benchmark (Chelba et al. 2013).

    Args:
        data_dir: Folder with ``train.txt.gz``, ``dev.txt.gz`` and ``test.txt.gz``, a sentence a
            line; None takes the cached file of tokens, or downloads the benchmark's heldout
            sentences with `datasets`: the first 6,075 are test, the next 10,000 dev.
        options: As `TextData`.
    """

    name = "one_billion_words"

    def __init__(self, data_dir: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.data_dir = None if data_dir is None else Path(data_dir)
        self._downloaded: list[str] | None = None

    def read(self, split: str) -> list[str]:
        """Lines of the files, or of the download.

        Raises:
            FileNotFoundError: ``data_dir`` lacks a file.
            ValueError: A file is damaged.
            RuntimeError: Nothing could be downloaded.
        """
        if self.data_dir is None:
            if self._downloaded is None:
                self._downloaded = _download()
            first, last = {"test": (0, 6075), "dev": (6075, 16_075), "train": (16_075, None)}[split]
            return self._downloaded[first:last]
        path = self._files()[SPLITS.index(split)]
        try:
            return gzip.decompress(path.read_bytes()).decode().split("\n")
        except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}). {LAYOUT}") from error

    def source(self) -> str | None:
        """The digest of the three files."""
        return None if self.data_dir is None else tokens.digest(self._files())

    def _files(self) -> list[Path]:
        assert self.data_dir is not None
        paths = [self.data_dir / f"{split}.txt.gz" for split in SPLITS]
        for path in paths:
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing. {LAYOUT}")
        return paths


def _download() -> list[str]:
    try:
        from datasets import load_dataset

        lines = load_dataset(REPOSITORY, revision=REVISION, data_files=PARQUET, split="train")
        return list(lines["text"])
    except Exception as error:  # whatever is missing, or the network and the hub come up with
        raise RuntimeError(
            f"Could not download {PARQUET} of {REPOSITORY} ({type(error).__name__}: {error}). "
            f"Install `datasets` and connect, or pass data_dir. {LAYOUT}"
        ) from error


class SmallText(TextData):
    """Sentences made on the spot, of a grammar of some fifty words: for tests and a first try.

    Args:
        sentences: Training sentences.
        vocabulary: Tokens, special ones included.
        options: As `TextData`.
    """

    name = "small_text"

    def __init__(self, sentences: int = 2000, vocabulary: int = 120, **options: Any) -> None:
        super().__init__(sentences=sentences, vocabulary=vocabulary, **options)

    def read(self, split: str) -> list[str]:
        """Other sentences for each split, the same every time."""
        draws = random.Random(split)
        count = self.count if split == "train" else 200
        return [_sentence(draws) for _ in range(count)]


_THINGS = {
    "one": ("dog", "child", "bank", "minister", "river"),
    "many": ("dogs", "banks", "rivers"),
}
_ACTIONS = {"one": ("sees", "buys", "leaves", "likes"), "many": ("see", "buy", "leave", "like")}
_WHERE = ("in the city", "on Monday", "near the sea", "without a word", "at night")


def _sentence(draws: random.Random) -> str:
    """Subject and verb agree; a quoted or a placed sentence is longer."""

    def noun(number: str) -> str:
        article = draws.choice(("the", "a", "every") if number == "one" else ("the", "some", "all"))
        adjective = draws.choice(("old ", "new ", "small ", "", "", ""))
        return f"{article} {adjective}{draws.choice(_THINGS[number])}"

    number = draws.choice(("one", "many"))
    words = f"{noun(number)} {draws.choice(_ACTIONS[number])} {noun(draws.choice(('one', 'many')))}"
    if draws.random() < 0.4:
        words += f" {draws.choice(_WHERE)}"
    if draws.random() < 0.2:
        words = f"{draws.choice(('he', 'she'))} said that {words}"
    return f"{words} ."
