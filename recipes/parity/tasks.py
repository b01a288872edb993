"""What is learned: clean and noisy targets, images, text, sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import repeat
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.image_classification.model import CNN, MLP, WidthCNN
from recipes.language_modeling.batches import IGNORED
from recipes.language_modeling.data import OneBillionWords
from recipes.language_modeling.model import LanguageModel
from recipes.language_modeling.tokens import EOS
from recipes.parity import networks
from recipes.stability import depth
from recipes.stability.data import Images, cifar10, fashion_mnist, mnist
from recipes.stability.networks import NETWORKS, problem

LETTERS, SEQUENCE = 27, 16  # of the Markov chain
Pair = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Judge = Callable[[nn.Module], float]


@dataclass
class Task:
    """A network, its data and what is asked of it.

    Attributes:
        make: Makes the network.
        stream: Batches of inputs [B, *] and targets [B, *] without end, by a seed.
        loss: Of outputs and targets.
        judge: Of the trained network.
        up: Whether its figure is better when higher.
        batches: How many are learned.
        sgd: The optimizer is SGD, else AdamW.
        given: Arguments of predictive coding.
    """

    make: Callable[[], nn.Module]
    stream: Callable[[int], Iterator[Pair]]
    loss: Loss
    judge: Judge
    up: bool
    batches: int
    sgd: bool = False
    given: dict[str, Any] = field(default_factory=dict)


def shuffled(inputs: Tensor, targets: Tensor, size: int) -> Callable[[int], Iterator[Pair]]:
    """Epochs, each in an order of its own, cut into batches; a smaller rest is left out."""

    def stream(seed: int) -> Iterator[Pair]:
        order = torch.Generator().manual_seed(seed)
        while True:
            for i in torch.randperm(len(inputs), generator=order).split(size):
                if len(i) == size:
                    yield inputs[i], targets[i]

    return stream


def accuracy(inputs: Tensor, targets: Tensor) -> Judge:
    """The share of right classes, %; the classes of outputs are on their last axis."""

    def judge(net: nn.Module) -> float:
        parts = zip(inputs.split(500), targets.split(500), strict=True)
        right = [net(x).argmax(-1) == y for x, y in parts]
        return 100 * float(torch.cat(right).float().mean())

    return judge


def each(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [B, S, C] and classes [B, S]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def digits(wrong: float, data_dir: str | None) -> Task:
    """Digits of which a share has a label drawn at random; judged by 297 that have not."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)
    drawn = torch.where(torch.rand(len(y)) < wrong, torch.randint(0, 10, (len(y),)), y)
    judge = accuracy(x[1500:], y[1500:])
    stream = shuffled(x[:1500], drawn[:1500], 64)
    return Task(networks.Residual, stream, F.cross_entropy, judge, True, 300)


def regression(noise: float, data_dir: str | None) -> Task:
    """A random function of 16 inputs plus noise; judged by the squared error of the function."""
    first, second = torch.randn(16, 64) / 4, torch.randn(64, 8) / 8
    x, x_test = torch.randn(2000, 16), torch.randn(1000, 16)
    y, y_test = torch.tanh(x @ first) @ second, torch.tanh(x_test @ first) @ second

    def make() -> nn.Module:
        hidden = [layer for _ in range(2) for layer in (nn.Linear(64, 64), nn.Tanh())]
        return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), *hidden, nn.Linear(64, 8))

    def judge(net: nn.Module) -> float:
        return float(F.mse_loss(net(x_test), y_test))

    stream = shuffled(x, y + noise * torch.randn_like(y), 64)
    return Task(make, stream, F.mse_loss, judge, False, 400)


def markov(data_dir: str | None) -> Task:
    """Letters that depend on the last two, by chance; judged by other sequences' perplexity."""
    chances = torch.randn(LETTERS, LETTERS, LETTERS).mul(3).softmax(2)
    letters = [torch.randint(0, LETTERS, (3000,)) for _ in range(2)]
    for _ in range(SEQUENCE - 1):
        letters.append(torch.multinomial(chances[letters[-2], letters[-1]], 1)[:, 0])
    ids = torch.stack(letters, 1)
    make = partial(networks.GPT, LETTERS, SEQUENCE, 32)
    return _language(make, ids[:2700], ids[2700:], 200)


def recurrent(data_dir: str | None) -> Task:
    """Signs of two sums over 8 steps, without noise."""
    x = torch.randn(2000, 8, 4)
    y = (x[:, :, 0].sum(1) > 0).long() + 2 * (x[:, :, 1].sum(1) > 0).long()
    judge, stream = accuracy(x[1500:], y[1500:]), shuffled(x[:1500], y[:1500], 64)
    make = partial(networks.Recurrent, 4, 4)
    given = {"value_nodes": "cell"}
    return Task(make, stream, F.cross_entropy, judge, True, 250, given=given)


def rows_of_pixels(data_dir: str | None) -> Task:
    """MNIST read row by row, twice: a loop of 56 steps."""
    images = mnist(_folder(data_dir, "mnist"), 10_000, 2000)
    x, x_test = (part[0][:, 0].repeat(1, 2, 1) for part in images)
    judge, stream = accuracy(x_test, images.test[1]), shuffled(x, images.train[1], 64)
    make = partial(networks.Recurrent, 28, 10)
    given = {"value_nodes": "cell"}
    return Task(make, stream, F.cross_entropy, judge, True, 300, given=given)


def translation(data_dir: str | None) -> Task:
    """Sequences of 10 out of 12 letters, to be written in reverse."""
    read = torch.randint(0, 12, (6000, 10))
    pairs, written = torch.stack([read, read.flip(1)], 1), read.flip(1)
    judge, stream = accuracy(pairs[5000:], written[5000:]), shuffled(pairs[:5000], written, 64)
    return Task(partial(networks.Translator, 12, 48), stream, each, judge, True, 800)


def pictures(
    images: Callable[[str | None], Images], make: Callable[[], nn.Module], epochs: int, sgd: bool
) -> Callable[[str | None], Task]:
    """A classifier of images, in batches of 64."""

    def task(data_dir: str | None) -> Task:
        found = images(data_dir)
        judge, stream = accuracy(*found.test), shuffled(*found.train, 64)
        batches = epochs * (len(found.train[0]) // 64)
        return Task(make, stream, F.cross_entropy, judge, True, batches, sgd)

    return task


@lru_cache(maxsize=1)
def _text(data_dir: str | None) -> tuple[Tensor, Tensor, int]:
    """Characters of the One Billion Word Benchmark, 65 a row, and how many there are."""
    words = OneBillionWords(_folder(data_dir, "lm1b"))
    texts = [
        "\n".join(words.read(name)[:count]) for name, count in (("train", 20_000), ("dev", 400))
    ]
    common = sorted(c for c in set(texts[0]) if c.isascii())
    number = {c: n + 1 for n, c in enumerate(common)}  # 0 is any other
    rows = []
    for text in texts:
        ids = torch.tensor([number.get(c, 0) for c in text])
        rows.append(ids[: len(ids) // 65 * 65].view(-1, 65))
    return rows[0], rows[1], len(common) + 1


def characters(kind: str, data_dir: str | None) -> Task:
    """Text, character by character."""
    train, test, letters = _text(data_dir)
    if kind == "gpt":
        return _language(partial(networks.GPT, letters, 64, 64), train, test, 600)
    task = _language(partial(networks.LSTM, letters, 96), train, test, 600)
    task.given["value_nodes"] = "modules"
    return task


def _language(make: Callable[[], nn.Module], train: Tensor, test: Tensor, batches: int) -> Task:
    """Each next token of sequences of ids [N, S]; judged by perplexity."""

    def judge(net: nn.Module) -> float:
        return exp(fmean(float(each(net(x[:, :-1]), x[:, 1:])) for x in test.split(len(test) // 4)))

    stream = shuffled(train[:, :-1], train[:, 1:], 32)
    return Task(make, stream, each, judge, False, batches)


class _Logits(nn.Module):
    """The conditional model of recipes/language_modeling: logits of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LanguageModel(task="conditional")

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids)
        return logits


def conditional(data_dir: str | None) -> Task:
    """The conditional recipe's model: 25,600 sentences of the One Billion Word Benchmark, once."""
    folder = _folder(data_dir, "lm1b")
    data = OneBillionWords(
        folder, task="conditional", batch_size=64, sentences=25_600, eval_sentences=1000
    )
    data.setup("fit")
    asked = partial(F.cross_entropy, ignore_index=IGNORED)

    def stream(seed: int) -> Iterator[Pair]:
        batches = data._batches("train", 64, seed + 1)
        while True:
            for batch in batches:
                yield batch.ids, batch.targets

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return asked(logits.flatten(0, 1), targets.flatten())

    def judge(net: nn.Module) -> float:
        total, count = 0.0, 0
        for batch in data.val_dataloader():
            own = batch.targets.masked_fill(batch.targets == EOS, IGNORED).flatten()
            total += float(asked(net(batch.ids).flatten(0, 1), own, reduction="sum"))
            count += int((own != IGNORED).sum())
        return exp(total / count)

    return Task(_Logits, stream, loss, judge, False, 420)


class _ByHeart(nn.Module):
    """A network with its one batch, which it learns by heart; the output is the loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net, self._loss = problem(name, int(torch.initial_seed()))

    def forward(self, _: Tensor) -> Tensor:
        """The loss, []."""
        return self._loss()


def by_heart(name: str, data_dir: str | None) -> Task:
    """One of the twelve architectures of the stability study learns one random batch."""

    def stream(seed: int) -> Iterator[Pair]:
        return repeat((torch.zeros(()), torch.zeros(())))

    def judge(net: nn.Module) -> float:
        return float(net(torch.zeros(())))

    places = NETWORKS[name][2]
    if places != "auto":
        places = [place if place == "auto" else f"net.{place}" for place in places]
    made, given = partial(_ByHeart, name), {"value_nodes": places}
    return Task(made, stream, lambda loss, _: loss, judge, False, 50, given=given)


def _folder(data_dir: str | None, name: str) -> str | None:
    return None if data_dir is None else str(Path(data_dir, name))


def _some(
    read: Callable[[str | None, int, int], Images], name: str, train: int, test: int
) -> Callable[[str | None], Images]:
    return lambda data_dir: read(_folder(data_dir, name), train, test)


def _scaled(images: Callable[[str | None], Images], factor: float) -> Callable[..., Images]:
    def scaled(data_dir: str | None) -> Images:
        train, test = images(data_dir)
        return Images((factor * train[0], train[1]), (factor * test[0], test[1]))

    return scaled


_MNIST = _some(mnist, "mnist", 60_000, 10_000)
_MNIST_10 = _some(mnist, "mnist", 10_000, 10_000)
_FASHION = _some(fashion_mnist, "fashion_mnist", 60_000, 10_000)
_FASHION_10 = _some(fashion_mnist, "fashion_mnist", 10_000, 10_000)
_CIFAR_10 = _some(cifar10, "cifar10", 10_000, 4_000)

ACCURACY, ERROR, PERPLEXITY, LOSS = "accuracy %", "excess error", "perplexity", "loss"

#: Name -> what its figure is, and how it is made of the folder of the data.
TASKS: dict[str, tuple[str, Callable[[str | None], Task]]] = {
    "digits": (ACCURACY, partial(digits, 0.0)),
    "digits, 30 % random labels": (ACCURACY, partial(digits, 0.3)),
    "digits, 60 % random labels": (ACCURACY, partial(digits, 0.6)),
    "regression, noise 0.1": (ERROR, partial(regression, 0.1)),
    "regression, noise 1": (ERROR, partial(regression, 1.0)),
    "regression, noise 2": (ERROR, partial(regression, 2.0)),
    "Markov chain, GPT": (PERPLEXITY, markov),
    "GRU in a loop of 8": (ACCURACY, recurrent),
    "MNIST rows, GRU in a loop of 56": (ACCURACY, rows_of_pixels),
    "reversing, GRUs with attention": (ACCURACY, translation),
    "MNIST, MLP": (ACCURACY, pictures(_MNIST, MLP, 2, False)),
    "MNIST, inputs x 30, MLP": (ACCURACY, pictures(_scaled(_MNIST_10, 30.0), MLP, 4, False)),
    "MNIST, tanh MLP of 64 layers": (
        ACCURACY,
        pictures(_MNIST_10, partial(depth.mlp, 64, 64), 2, False),
    ),
    "FashionMNIST, MLP": (ACCURACY, pictures(_FASHION, MLP, 2, False)),
    "FashionMNIST, tanh MLP, SGD": (ACCURACY, pictures(_FASHION_10, networks.tanh_mlp, 4, True)),
    "FashionMNIST, CNN + BatchNorm": (
        ACCURACY,
        pictures(_FASHION_10, networks.convolutions, 4, False),
    ),
    "FashionMNIST, residual MLP of 32": (
        ACCURACY,
        pictures(_FASHION_10, partial(networks.deep, False), 3, False),
    ),
    "the same, tanh before the head": (
        ACCURACY,
        pictures(_FASHION_10, partial(networks.deep, True), 3, False),
    ),
    "CIFAR-10, width CNN": (ACCURACY, pictures(_CIFAR_10, partial(WidthCNN, 2), 5, False)),
    "CIFAR-10, ResNet of 8": (ACCURACY, pictures(_CIFAR_10, networks.resnet8, 2, False)),
    "CIFAR-10, CNN": (ACCURACY, pictures(_CIFAR_10, CNN, 4, False)),
    "characters, LSTM by modules": (PERPLEXITY, partial(characters, "lstm")),
    "characters, GPT": (PERPLEXITY, partial(characters, "gpt")),
    "conditional BERT": (PERPLEXITY, conditional),
    **{f"by heart, {name}": (LOSS, partial(by_heart, name)) for name in NETWORKS},
}
