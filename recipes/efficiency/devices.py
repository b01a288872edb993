"""Samples a second of two processes against one, each with one thread and batches of its own.

    torchrun --nproc_per_node=2 -m recipes.efficiency.devices --write FILE

The two learn together, and the first one alone, in turn, round after round. Seconds are those of
the clock, so that waiting counts: the median of the rounds' ratios is told. Beside it stands what
a process sends for a batch. Over a ring of N each update sends 2 (N - 1) / N times the gradients.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from lightning_pc import PCDDPStrategy, PCStrategy
from recipes.common.machine import machine
from recipes.efficiency.benchmark import NETWORKS, Classifier

WARM, BATCHES, ROUNDS = 3, 12, 5
ROWS = {"pc": {"gamma": 0.1}, "ipc": {"gamma": 0.1}, "zil": {}, "auto": {}}


class Clock(L.Callback):
    """Seconds of the batches after the first ones."""

    def on_train_batch_end(self, *_: Any) -> None:
        """Notes when a batch has been learned."""
        self.ends = [*getattr(self, "ends", []), time.perf_counter()]

    @property
    def seconds(self) -> float:
        """Median of a batch."""
        ends = self.ends[WARM:]
        return statistics.median(b - a for a, b in itertools.pairwise(ends))


def batch_seconds(network: str, strategy: Any, devices: int) -> float:
    """Time of a batch."""
    make, shape, size, _ = NETWORKS[network]
    torch.manual_seed(0)
    count = size * (WARM + BATCHES + 1)
    data = TensorDataset(torch.randn(count, *shape), torch.randint(10, (count,)))
    clock = Clock()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        max_epochs=1,
        callbacks=[clock],
        use_distributed_sampler=False,
        **dict.fromkeys(quiet, False),
    )
    trainer.fit(Classifier(make()), DataLoader(data, batch_size=size))
    return clock.seconds


def measure(network: str, algorithm: str) -> dict[str, Any]:
    """Both in turn; the second process waits while the first one works alone."""
    how, rank = ROWS[algorithm], dist.get_rank()
    ratios, times = [], []
    for _ in range(ROUNDS):
        together = batch_seconds(network, PCDDPStrategy(algorithm, **how), 2)
        alone = batch_seconds(network, PCStrategy(algorithm, **how), 1) if not rank else 1.0
        dist.monitored_barrier()
        ratios.append(2 * alone / together)
        times.append(together)
    updates = 8 if algorithm == "ipc" else 1
    sent = 4 * updates * sum(p.numel() for p in NETWORKS[network][0]().parameters())
    return {
        "network": network,
        "algorithm": algorithm,
        "faster": round(statistics.median(ratios), 2),
        "each": [round(ratio, 2) for ratio in ratios],
        "milliseconds": round(1e3 * statistics.median(times), 1),
        "megabytes": round(sent / 1e6, 1),
    }


def main() -> None:
    """Measures, shows and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path, help="file for the figures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [measure(network, algorithm) for network in NETWORKS for algorithm in ROWS]
    if dist.get_rank():
        return
    table = Table(*rows[0], title="samples a second of two processes against one")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if options.write:
        command = "torchrun --nproc_per_node=2 -m recipes.efficiency.devices"
        options.write.write_text(
            json.dumps({"command": command, **machine(), "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
