"""MNIST digits from causes: reconstructed, drawn, and on the way from one to another.

    python -m recipes.generation.digits --data_dir FOLDER

A network of 16 causes learns to generate digits by iPC. The causes of digits that it has not seen
are inferred. New digits come from causes that are drawn from a normal distribution with the mean
and covariance of those of 1,000 training digits. (The prior itself is standard normal; as weights
grow, causes that are inferred become smaller than that.)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lightning_pc import infer
from lightning_pc.losses import squared_error
from lightning_pc.nn import Latent
from lightning_pc.optim import IPC
from recipes.common.machine import machine
from recipes.stability.data import mnist

CAUSES, WIDTH, RATE, BATCH = 16, 256, 1e-3, 100


class Digits(nn.Module):
    """Causes, two hidden layers, 784 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.causes = Latent(CAUSES)
        self.net = nn.Sequential(
            *(nn.Linear(CAUSES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()),
            nn.Linear(WIDTH, 784),
        )

    def forward(self, size: int) -> Tensor:
        """Pixels, [size, 784]."""
        pixels: Tensor = self.net(self.causes(size))
        return pixels


def learn(x: Tensor, epochs: int, seed: int) -> Digits:
    """A network that has learned to generate digits [N, 784]."""
    torch.manual_seed(seed)
    net = Digits()
    optimizer = IPC(torch.optim.Adam(net.parameters(), RATE), net)
    for _ in track(range(epochs), "epochs"):
        for some in x[torch.randperm(len(x))].split(BATCH):
            optimizer.step(lambda: squared_error(net(len(some)), some))  # noqa: B023
    return net


def causes_of(net: Digits, x: Tensor) -> tuple[Tensor, Tensor]:
    """The causes [N, 16] that are inferred of digits [N, 784], and the digits made from them."""
    found = infer(net, lambda: (squared_error(out := net(len(x)), x), out))
    return found.values["causes"], found.output


@torch.no_grad()
def drawn(net: Digits, causes: Tensor, count: int, seed: int) -> Tensor:
    """New digits [count, 784], from a normal distribution of causes like these [N, 16]."""
    factor = torch.linalg.cholesky(torch.cov(causes.T))
    noise = torch.randn(count, CAUSES, generator=torch.Generator().manual_seed(seed))
    made: Tensor = net.net(causes.mean(0) + noise @ factor.T)
    return made


@torch.no_grad()
def between(net: Digits, first: Tensor, last: Tensor, count: int) -> Tensor:
    """Digits [count, 784] on the way from one's causes [16] to another's."""
    made: Tensor = net.net(torch.lerp(first, last, torch.linspace(0, 1, count).unsqueeze(1)))
    return made


def main() -> None:
    """Learns, infers, draws."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", help="folder of mnist/; without it the data are downloaded")
    parser.add_argument("--digits", type=int, default=10_000, help="to learn from (10,000)")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, default=Path(__file__).with_name("digits.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = None if given.data_dir is None else str(Path(given.data_dir, "mnist"))
    (x, _), (unseen, _) = mnist(folder, given.digits, 1000)
    x, unseen = x.flatten(1), unseen.flatten(1)
    net = learn(x, given.epochs, given.seed)
    causes, again = causes_of(net, unseen)
    error = float((again - unseen).square().sum() / (unseen - x.mean(0)).square().sum())
    known, _ = causes_of(net, x[:1000])
    lines = {
        "digits": unseen[:12],
        "from their causes": again[:12],
        "drawn": drawn(net, known, 12, 0),
        "drawn ": drawn(net, known, 12, 1),
        "between two": between(net, causes[0], causes[1], 12),
        "between two ": between(net, causes[2], causes[3], 12),
    }
    told = {
        "command": f"python -m recipes.generation.digits --digits {given.digits} "
        f"--epochs {given.epochs} --seed {given.seed}",
        **machine(),
        "error of digits that it has not seen, share of variance": round(error, 4),
        "deviation of causes": round(float(known.std(0).mean()), 3),
    }
    Console().print(told)
    given.write.write_text(json.dumps(told, indent=2) + "\n")
    figure, axes = plt.subplots(len(lines), 12, figsize=(12, 1.05 * len(lines)))
    for (name, rows), line in zip(lines.items(), axes, strict=True):
        for row, axis in zip(rows, line, strict=True):
            axis.imshow(row.view(28, 28).numpy(), cmap="gray_r", vmin=-0.4, vmax=2.8)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name.strip(), fontsize=6)
    figure.tight_layout(pad=0.2)
    figure.savefig(given.write.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
