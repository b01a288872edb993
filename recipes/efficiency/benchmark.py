"""Time and memory of one inference step against one backprop step of the same Trainer.

    python -m recipes.efficiency.benchmark --write recipes/efficiency/results.json
    python -m recipes.efficiency.benchmark --accelerator cuda --write recipes/efficiency/gpu.json

Backprop, iPC and PC run in turn within one process, round after round, so that a busy machine
slows all of them alike; a ratio is taken within each round, the table gives the rounds' median. A
PC value step is the difference between batches of PC with many and with two inference steps,
divided by the steps between them. The automatic gamma is made to look at the curvature in every
batch; what that adds, over the evaluations between two looks of a long run, is its share. That of
conjugate gradients is what they add to a batch of iPC.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pc import PCStrategy
from lightning_pc.inference import curvature
from recipes.common.machine import machine

T = 8


def mlp() -> nn.Module:
    """784-256-256-256-10."""
    layers: list[nn.Module] = [nn.Linear(784, 256), nn.LeakyReLU()]
    for _ in range(2):
        layers += [nn.Linear(256, 256), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def cnn() -> nn.Module:
    """Conv 3x3 64-128-64 with max-pools, then fully connected 256 and 10, on 3x32x32."""
    layers: list[nn.Module] = []
    for before, after in ((3, 64), (64, 128), (128, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 256), nn.LeakyReLU(), nn.Linear(256, 10)
    )


#: Name -> (network, input shape, batch size, batches per round).
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "mlp": (mlp, (784,), 128, 12),
    "cnn": (cnn, (3, 32, 32), 64, 3),
}


class Classifier(L.LightningModule):
    """Cross-entropy and Adam around a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss."""
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-4)


class Stopwatch(L.Callback):
    """Seconds from the start to the end of each batch, on a GPU until its work is done."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Starts the watch."""
        self._start = self._time(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Stops it."""
        self.seconds.append(self._time(trainer) - self._start)

    def _time(self, trainer: L.Trainer) -> float:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def strategies() -> dict[str, str | PCStrategy]:
    """What is compared; PC with two inference steps is there to be subtracted."""
    return {
        "bp": "auto",
        "ipc": PCStrategy("ipc", T=T, gamma=0.1),
        "ipc, auto": PCStrategy("ipc", T=T, momentum=0.0),
        "ipc, conjugate": PCStrategy("ipc", T=T, gamma=0.1, momentum="conjugate"),
        "pc": PCStrategy("pc", T=T + 2, gamma=0.1),
        "pc, T=2": PCStrategy("pc", T=2, gamma=0.1),
    }


def fit(
    network: str, strategy: str | PCStrategy, batches: int, accelerator: str = "cpu"
) -> list[float]:
    """Seconds of each batch of a short run, the first left out."""
    make, shape, size, _ = NETWORKS[network]
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(size, *shape), torch.randint(0, 10, (size,)))
    watch = Stopwatch()
    trainer = L.Trainer(
        strategy=strategy,
        accelerator=accelerator,
        devices=1,
        max_epochs=batches + 1,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(make()), DataLoader(data, size))
    return watch.seconds[1:]


def time_steps(network: str, rounds: int, accelerator: str = "cpu") -> dict[str, float]:
    """Ratios to a backprop step, and its own milliseconds."""
    batches = NETWORKS[network][3]
    medians: list[dict[str, float]] = []
    every = curvature.EVERY
    for _ in track(range(rounds), f"{network}: time", transient=True):
        with patch.object(curvature, "EVERY", 0):
            medians.append(
                {
                    name: statistics.median(
                        fit(network, strategy, batches * (T if name == "bp" else 1), accelerator)
                    )
                    for name, strategy in strategies().items()
                }
            )
    return {
        "bp_step_ms": 1e3 * statistics.median(r["bp"] for r in medians),
        "ipc_step": statistics.median(r["ipc"] / T / r["bp"] for r in medians),
        "conjugate_share": statistics.median(r["ipc, conjugate"] / r["ipc"] - 1 for r in medians),
        "pc_value_step": statistics.median((r["pc"] - r["pc, T=2"]) / T / r["bp"] for r in medians),
        "auto_share": statistics.median(
            (r["ipc, auto"] - r["ipc"]) / (r["ipc"] / T * every) for r in medians
        ),
    }


def peak_bytes(network: str, strategy: str | PCStrategy, accelerator: str = "cpu") -> int:
    """Most tensor bytes alive at once during two batches, beyond those alive before.

    On a GPU with the workspaces of its libraries, some 64 MiB.
    """
    gc.collect()  # what an earlier run leaves must not be freed within this one
    if accelerator == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fit(network, strategy, 1, accelerator)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        fit(network, strategy, 1, accelerator)
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes):
        alive += change
        peak = max(peak, alive)
    return peak


def measure_memory(network: str, accelerator: str = "cpu") -> dict[str, float]:
    """Peak bytes of backprop and iPC, and what the nodes themselves take."""
    strategy = PCStrategy("ipc", T=T)
    compared: dict[str, str | PCStrategy] = {"bp": "auto", "ipc": strategy}
    peaks = {name: peak_bytes(network, s, accelerator) for name, s in compared.items()}
    nodes = sum(x.numel() * x.element_size() for x in strategy.values.values())
    return {
        "bp_peak_mib": peaks["bp"] / 2**20,
        "ipc_peak_mib": peaks["ipc"] / 2**20,
        "nodes_mib": nodes / 2**20,
        "ipc_allowed_mib": (peaks["bp"] + 3 * nodes) * 1.1 / 2**20,
    }


def table(results: dict[str, dict[str, float]]) -> Table:
    """The ratios, a row per network."""
    shown = Table(title="one step against one backprop step of the same Trainer")
    shown.add_column("network")
    steps = ("backprop step, ms", "iPC step", "PC value step")
    steps += ("automatic gamma", "conjugate gradients")
    for title in (*steps, "peak MiB: BP", "iPC", "nodes"):
        shown.add_column(title, justify="right")
    for network, row in results.items():
        shown.add_row(
            network,
            f"{row['bp_step_ms']:.2f}",
            f"{row['ipc_step']:.2f} x",
            f"{row['pc_value_step']:.2f} x",
            f"{row['auto_share']:+.1%}",
            f"{row['conjugate_share']:+.1%}",
            *(f"{row[key]:.1f}" for key in ("bp_peak_mib", "ipc_peak_mib", "nodes_mib")),
        )
    return shown


def main() -> None:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--write", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    results = {
        network: time_steps(network, options.rounds, options.accelerator)
        | measure_memory(network, options.accelerator)
        for network in options.networks
    }
    Console().print(table(results))
    if options.write:
        record = {
            "command": "python -m recipes.efficiency.benchmark " + " ".join(sys.argv[1:]),
            **machine(),
            "T": T,
            "results": results,
        }
        options.write.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
