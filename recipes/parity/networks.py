"""Noisy targets, which no input explains: predictive coding against backprop.

    python -m recipes.stability.noise --write recipes/stability/noise.json

Digits with labels drawn at random, a noisy regression, a Markov chain of letters for a small GPT,
and a recurrent net whose targets are clean. Backprop and auto have the best of the same learning
rates, by what is measured; pc, which shows what happens otherwise, has one. The table gives the
mean over seeds, and the processor time of one thread against backprop's. One run learns batches of
64 (the GPT 32) drawn with replacement.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from lightning_pc.optim import PC, PredictiveCoding
from recipes.common.machine import machine

RATES = {"backprop": (3e-4, 1e-3, 3e-3), "auto": (3e-4, 1e-3, 3e-3), "pc": (1e-3,)}
ROWS: dict[str, Any] = {"backprop": None, "auto": PredictiveCoding, "pc": PC}
LETTERS, SEQUENCE = 27, 16


@dataclass
class Task:
    """What is learned.

    Attributes:
        make: Makes the network.
        inputs: Of training, [N, *].
        targets: Of training, noisy, [N, *].
        loss: Of outputs and targets.
        judge: Of the trained network; higher is better where ``up``.
        up: Whether it is.
        batches: How many are learned.
        size: Of a batch.
        given: Arguments of predictive coding.
    """

    make: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    judge: Callable[[nn.Module], float]
    up: bool
    batches: int = 300
    size: int = 64
    given: dict[str, Any] | None = None


class Residual(nn.Module):
    """A pre-norm residual MLP of 3 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
            for _ in range(3)
        )
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of pixels [B, 64]."""
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        logits: Tensor = self.head(self.norm(h))
        return logits


class Recurrent(nn.Module):
    """A GRU cell in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 4] of sequences [B, S, 4]."""
        h = x.new_zeros(len(x), 32)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        logits: Tensor = self.head(h)
        return logits


class Block(nn.Module):
    """A pre-norm transformer block of width 32 and 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.n2 = nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, x: Tensor) -> Tensor:
        """Of [B, S, 32]."""
        b, s, _ = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, s, 3, 4, 8).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).reshape(b, s, 32))
        blended: Tensor = x + self.mlp(self.n2(x))
        return blended


class GPT(nn.Module):
    """Three blocks, initialised as nanoGPT."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(LETTERS, 32), nn.Embedding(SEQUENCE, 32)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(3)), nn.LayerNorm(32)
        self.head = nn.Linear(32, LETTERS, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, S, letters] of ids [B, S]."""
        h = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(self.norm(h))
        return logits


def share(x: Tensor, y: Tensor) -> Callable[[nn.Module], float]:
    """Judges by the share of right classes, %."""
    return lambda net: 100 * float((net(x).argmax(1) == y).float().mean())


def digits(wrong: float) -> Task:
    """Digits of which a share has a label drawn at random; judged by 297 that have not."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)
    drawn = torch.where(torch.rand(len(y)) < wrong, torch.randint(0, 10, (len(y),)), y)
    judge = share(x[1500:], y[1500:])
    return Task(Residual, x[:1500], drawn[:1500], F.cross_entropy, judge, True)


def regression(noise: float) -> Task:
    """A random function of 16 inputs plus noise; judged by the squared error of the function."""
    first, second = torch.randn(16, 64) / 4, torch.randn(64, 8) / 8
    x, x_test = torch.randn(2000, 16), torch.randn(1000, 16)
    y, y_test = torch.tanh(x @ first) @ second, torch.tanh(x_test @ first) @ second

    def make() -> nn.Module:
        hidden = [layer for _ in range(2) for layer in (nn.Linear(64, 64), nn.Tanh())]
        return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), *hidden, nn.Linear(64, 8))

    def judge(net: nn.Module) -> float:
        return float(F.mse_loss(net(x_test), y_test))

    return Task(make, x, y + noise * torch.randn_like(y), F.mse_loss, judge, False, 400)


def markov() -> Task:
    """Letters that depend on the last two, by chance; judged by the loss of other sequences."""
    chances = torch.randn(LETTERS, LETTERS, LETTERS).mul(3).softmax(2)
    letters = [torch.randint(0, LETTERS, (3000,)) for _ in range(2)]
    for _ in range(SEQUENCE - 1):
        letters.append(torch.multinomial(chances[letters[-2], letters[-1]], 1)[:, 0])
    ids = torch.stack(letters, 1)
    x, y = ids[:, :-1], ids[:, 1:]

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def judge(net: nn.Module) -> float:
        return float(loss(net(x[2700:]), y[2700:]))

    return Task(GPT, x[:2700], y[:2700], loss, judge, False, 200, 32)


def recurrent() -> Task:
    """Signs of two sums over 8 steps, without noise."""
    x = torch.randn(2000, 8, 4)
    y = (x[:, :, 0].sum(1) > 0).long() + 2 * (x[:, :, 1].sum(1) > 0).long()
    judge = share(x[1500:], y[1500:])
    given = {"value_nodes": "cell"}
    return Task(Recurrent, x[:1500], y[:1500], F.cross_entropy, judge, True, 250, given=given)


TASKS: dict[str, Callable[[], Task]] = {
    "digits, accuracy %": lambda: digits(0.0),
    "digits, 30 % random labels": lambda: digits(0.3),
    "digits, 60 % random labels": lambda: digits(0.6),
    "regression, noise 0.1: excess error": lambda: regression(0.1),
    "regression, noise 1": lambda: regression(1.0),
    "regression, noise 2": lambda: regression(2.0),
    "Markov chain, GPT: test loss": markov,
    "recurrent, accuracy %": recurrent,
}


def learn(task: Task, row: str, rate: float, seed: int) -> tuple[float, float]:
    """What the judge says after training, and the seconds of training."""
    torch.manual_seed(seed)
    net = task.make()
    optimizer: Any = torch.optim.Adam(net.parameters(), rate)
    if ROWS[row]:
        optimizer = ROWS[row](optimizer, net, **(task.given or {}))
    start = time.process_time()
    for _ in range(task.batches):
        i = torch.randint(0, len(task.inputs), (task.size,))
        x, y = task.inputs[i], task.targets[i]
        if ROWS[row]:
            optimizer.step(lambda x=x, y=y: task.loss(net(x), y))
        else:
            optimizer.zero_grad()
            task.loss(net(x), y).backward()
            optimizer.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        return task.judge(net), seconds


def measure(seeds: int) -> list[dict[str, Any]]:
    """Every row of every task."""
    results: list[dict[str, Any]] = []
    for name, make in track(TASKS.items(), "tasks", transient=True):
        torch.manual_seed(0)
        task, base = make(), 0.0
        for row in ROWS:
            runs = {r: [learn(task, row, r, seed) for seed in range(seeds)] for r in RATES[row]}
            means = {rate: fmean(found for found, _ in runs[rate]) for rate in runs}
            best = (max if task.up else min)(means, key=lambda rate: means[rate])
            seconds = fmean(spent for _, spent in runs[best])
            base = base or seconds
            figures = [found for found, _ in runs[best]]
            results.append(
                {"task": name, "row": row, "lr": best, "mean": means[best], "seeds": figures}
                | {"at each rate": [*means.values()], "time": seconds / base}
            )
    return results


def main() -> None:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--write", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results = measure(options.seeds)
    shown = Table("", *(f"{row} (time)" for row in ROWS))
    for name in TASKS:
        found = {r["row"]: r for r in results if r["task"] == name}
        shown.add_row(name, *(f"{r['mean']:.4g} ({r['time']:.1f})" for r in found.values()))
    Console(width=120).print(shown)
    if options.write:
        command = "python -m recipes.stability.noise " + " ".join(sys.argv[1:])
        record = {"command": command, **machine(), "rates": RATES, "results": results}
        options.write.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
