"""Batches of sentences of one length: what is read and what is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.language_modeling.tokens import BOS, EOS, MASK, SPECIAL, Sentences

Task = Literal["masked", "conditional"]
IGNORED = -100  # torch's own ignore_index
#: BERT's: of the tokens 15 % are asked for; of these 80 % are masked, 10 % random, 10 % left.
ASKED, MASKED, RANDOM = 0.15, 0.8, 0.1


class Batch(NamedTuple):
    """Sentences of one length S, special tokens included.

    Attributes:
        ids: What the model reads, [B, S].
        targets: What it is to say, [B, S]; `IGNORED` where nothing is asked.
    """

    ids: Tensor
    targets: Tensor


class Batches:
    """A loader of one split: batches of sentences that have exactly the same length.

    So nothing is padded: no step is spent on padding, and no value node stands on any. A batch has
    ``batch_size`` sentences, or fewer where no more of a length are left. Saved amid an epoch it
    goes on from there.

    Args:
        sentences: What to load.
        task: What is asked of the model.
        batch_size: Most sentences of a batch.
        max_tokens: Longer sentences are cut; special tokens count.
        vocabulary: Random tokens are drawn from it.
        seed: Of order and masks, both anew in each epoch; None gives the same ones every time.
    """

    def __init__(
        self,
        sentences: Sentences,
        task: Task,
        batch_size: int,
        max_tokens: int,
        vocabulary: int,
        seed: int | None,
    ) -> None:
        self.sentences, self.task, self.batch_size = sentences, task, batch_size
        self.vocabulary, self.seed = vocabulary, seed
        self._longest = max_tokens - 2
        lengths = np.minimum(sentences.lengths, self._longest)
        self._groups = [np.flatnonzero(lengths == n) for n in np.unique(lengths)]
        self._epoch, self._position, self._resume = 0, 0, False

    def __len__(self) -> int:
        return sum(-(-len(group) // self.batch_size) for group in self._groups)

    def __iter__(self) -> Iterator[Batch]:
        if not self._resume:
            self._epoch, self._position = self._epoch + (self.seed is not None), 0
        self._resume = False
        draws = np.random.default_rng((self.seed or 0, self._epoch))
        batches: list[NDArray[np.int64]] = []
        for group in self._groups:
            order = group if self.seed is None else draws.permutation(group)
            batches += np.split(order, range(self.batch_size, len(order), self.batch_size))
        places = range(len(batches)) if self.seed is None else draws.permutation(len(batches))
        asks = self._draw_masks(draws) if self.task == "masked" else ()
        for place in list(places)[self._position :]:
            self._position += 1
            yield self._batch(batches[place], *asks)

    def state_dict(self) -> dict[str, int]:
        """Where the epoch stands."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there."""
        self._epoch, self._position = state["epoch"], state["position"]
        self._resume = 0 < self._position < len(self)

    def _draw_masks(self, draws: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
        """For every token of the split: whether it is asked for if < `ASKED`; what is read then."""
        count = len(self.sentences.ids)
        kind = draws.random(count, np.float32)
        read = np.where(kind < MASKED + RANDOM, MASK, self.sentences.ids)
        strange = (kind >= MASKED) & (kind < MASKED + RANDOM)
        read[strange] = draws.integers(SPECIAL, self.vocabulary, strange.sum(), np.uint16)
        return draws.random(count, np.float32), read

    def _batch(self, indices: NDArray[np.int64], *asks: NDArray[Any]) -> Batch:
        lengths = self.sentences.lengths[indices]
        length = min(int(lengths[0]), self._longest)
        places = (self.sentences.ends[indices] - lengths)[:, None] + np.arange(length)
        ids = np.full((len(indices), length + 2), BOS, np.int64)
        ids[:, 1:-1] = self.sentences.ids[places]
        ids[:, -1] = EOS
        targets = np.full_like(ids, IGNORED)
        if self.task == "conditional":
            targets = ids[:, 1:].copy()
            targets[lengths > length, -1] = IGNORED  # it went on
            return Batch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets))
        chances, read = asks
        drawn = chances[places]
        asked = (drawn < ASKED) | (drawn == drawn.min(1, keepdims=True))  # one at least
        targets[:, 1:-1][asked] = ids[:, 1:-1][asked]
        ids[:, 1:-1][asked] = read[places][asked]
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets))
