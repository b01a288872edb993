"""What a batch costs: fetching and augmenting it, and a step of backprop, PC and iPC on the CNN.

    python -m recipes.image_classification.speed --data_dir data/cifar10

All four are measured in turns, round after round, with the settings of ``cnn/``. On a CPU the time
is the processor's, which other work on the machine does not lengthen.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from lightning_pc import optim
from recipes.common.machine import machine
from recipes.image_classification.data import CIFAR10
from recipes.image_classification.model import CNN
from recipes.image_classification.study import HERE

BATCH = 128


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(data: CIFAR10, rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds a batch, the median of the rounds, and what follows from them.

    Args:
        data: Set up.
        rounds: How many, beside a first one that is not counted.
        device: Where the network is.
    """
    net = CNN().to(device)
    adamw = torch.optim.AdamW(net.parameters(), 1e-4)
    learners: dict[str, Any] = {
        "pc": optim.PC(adamw, net, gamma=0.1),
        "ipc": optim.IPC(adamw, net, gamma=0.1),
    }
    loader = iter([])
    batch: tuple[torch.Tensor, torch.Tensor]

    def fetch() -> None:
        nonlocal loader, batch
        found = next(loader, None)
        if found is None:
            loader = iter(data.train_dataloader())
            found = next(loader)
        images, labels = (part.to(device) for part in found)
        images = data.augmented(images.float() / 255)
        batch = data.normalise(images), labels

    def loss() -> torch.Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    def backprop() -> None:
        adamw.zero_grad()
        loss().backward()
        adamw.step()

    works = {"data": fetch, "bp": backprop}
    works |= {name: lambda step=o.step: step(loss) for name, o in learners.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            seconds = _seconds(work, device)
            if number:
                times[name].append(1000 * seconds)
    found = {name: round(median(values), 3) for name, values in times.items()}
    return {
        "milliseconds": found,
        "data_share": {
            name: round(found["data"] / (found["data"] + found[name]), 4)
            for name in found
            if name != "data"
        },
        "images_per_second": {
            name: round(1000 * BATCH / (found["data"] + found[name]), 1)
            for name in found
            if name != "data"
        },
    }


def main(args: Sequence[str] | None = None) -> None:
    """Measures from the command line, and writes ``speed.json`` beside this file."""
    parser = argparse.ArgumentParser(prog="python -m recipes.image_classification.speed")
    parser.add_argument("--data_dir", help="folder of CIFAR-10; without it it is downloaded")
    parser.add_argument("--rounds", type=int, default=30, help="default 30")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--out", type=Path, default=HERE / "speed.json")
    given = list(sys.argv[1:] if args is None else args)
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    data = CIFAR10(options.data_dir, BATCH, crop=4, flip=True)
    data.setup("fit")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(data, options.rounds, device)
    command = shlex.join(["python", "-m", "recipes.image_classification.speed", *given])
    written = {"command": command, "rounds": options.rounds, "batch": BATCH, **machine(), **found}
    options.out.write_text(json.dumps(written, indent=2) + "\n")
    table = Table(title=f"CNN, batches of {BATCH}, crop and flip")
    for heading in ("", "ms / batch", "share of the data", "images / s"):
        table.add_column(heading, justify="right")
    for name, ms in found["milliseconds"].items():
        pace = found["images_per_second"].get(name, "")
        share = "" if name == "data" else f"{found['data_share'][name]:.1%}"
        table.add_row(name, f"{ms:.1f}", share, str(pace))
    Console().print(table)


if __name__ == "__main__":
    main()
