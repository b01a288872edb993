"""Processor time and memory of a batch of predictive coding against one of backprop.

    python -m recipes.efficiency.cost --write recipes/efficiency/cost.json

Time is the process's on one thread. Backprop and all rows learn a few batches in turn, round after
round within one process, so that a busy machine slows all of them alike; a ratio is taken within
each round, the table gives the rounds' median. Rows by hand are the same arithmetic written out for
a chain of layers (`recipes.efficiency.by_hand`), which end at the same weights. Rows at the
defaults look at the curvature now and then: they learn until that has become rare before they are
timed, and as many rounds count as one as lie between two looks, so that each has its share.

Memory is the most tensor bytes alive at once of those that learning a batch allocates. A batch of
the same form has gone before, so weights, states of AdamW and the values of that batch are there
already, and to free them makes no room; gradients are not. `recorded_forward_ratio` is for whoever
records.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightning_pc.optim import IPC, PC, ZIL, PredictiveCoding
from recipes.common.machine import machine
from recipes.efficiency import benchmark
from recipes.efficiency.by_hand import ByHand
from recipes.efficiency.memory import peak_bytes
from recipes.efficiency.networks import Transformer, deep

#: Arguments of the paper's descent.
GIVEN: dict[str, Any] = {"gamma": 0.1, "gamma_decay": 1.0, "momentum": 0.0}
DEFAULTS, BY_HAND = ", defaults", ", by hand"

#: Name -> (network, input shape, batch size, batches per round).
NETWORKS = benchmark.NETWORKS | {"deep": (deep, (784,), 128, 6)}
NETWORKS["blocks"] = (Transformer, (64, 256), 16, 1)
TIMED, CHAINS = ("mlp", "cnn", "deep"), ("mlp", "deep")

#: Row -> network -> (target, limit) of its ratio to backprop, at the defaults to the row with a
#: given gamma.
LIMITS: dict[str, dict[str, tuple[float | None, float]]] = {
    "zil": {"mlp": (1.3, 1.6), "cnn": (1.3, 1.5), "deep": (1.4, 1.8)},
    "spiking": {"mlp": (1.5, 1.9), "cnn": (1.5, 1.6), "deep": (1.5, 2.2)},
    "ipc": {"mlp": (7.0, 7.2), "cnn": (6.5, 6.8), "deep": (None, 10.0)},
    "pc": {"mlp": (4.0, 4.5), "cnn": (5.0, 5.5)},
    "auto": dict.fromkeys(TIMED, (2.0, 4.0)),
    "ipc" + DEFAULTS: dict.fromkeys(TIMED, (None, 1.1)),
    "pc" + DEFAULTS: dict.fromkeys(TIMED, (None, 1.1)),
}

#: (network, T, where nodes stand, share of backprop's peak and of all nodes' bytes allowed).
MEMORY: list[tuple[str, int, str, float, float]] = [
    ("blocks", 4, "blocks", 0.25, 0.0),
    ("blocks", 13, "blocks", 0.5, 0.0),
    ("mlp", 8, "auto", 1.0, 2.0),
    ("cnn", 8, "auto", 1.0, 2.0),
]


class Learner:
    """A network, random batches, and what learns one of them at each call.

    Args:
        network: A name of `NETWORKS`.
        algorithm: Goes around a fused AdamW; None for backprop with it.
        given: Arguments of the algorithm.
        seed: Of weights and data.
    """

    def __init__(self, network: str, algorithm: Any, given: dict[str, Any], seed: int) -> None:
        make, shape, size, _ = NETWORKS[network]
        torch.manual_seed(seed)
        self.net, self.algorithm = make(), algorithm
        data = [(torch.randn(size, *shape), torch.randint(0, 10, (size,))) for _ in range(16)]
        self.batches = itertools.cycle(data)
        adamw = torch.optim.AdamW(self.net.parameters(), lr=1e-4, fused=True)
        self.optimizer: Any = algorithm(adamw, self.net, **given) if algorithm else adamw
        self.adamw = adamw

    def __call__(self) -> None:
        """Learns a batch."""
        x, y = next(self.batches)
        if self.algorithm is ByHand:
            self.optimizer.learn(x, y)
        elif self.algorithm:
            self.optimizer.step(lambda: F.cross_entropy(self.net(x), y))
        else:
            self.optimizer.zero_grad()
            F.cross_entropy(self.net(x), y).backward()
            self.optimizer.step()


def rows(network: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> algorithm and arguments; in a deep network errors have further to go."""
    ipc_steps, pc_steps = (17, 17) if network == "deep" else (8, 9)
    by_hand = {
        "zil" + BY_HAND: (ByHand, {"algorithm": "zil", "gamma": 1.0}),
        "ipc" + BY_HAND: (ByHand, {"algorithm": "ipc", "gamma": GIVEN["gamma"], "T": ipc_steps}),
    }
    return {
        "backprop": (None, {}),
        "zil": (ZIL, {}),
        "spiking": (IPC, {"precisions": "spiking", "gamma": 0.5, "momentum": 0.0}),
        "ipc": (IPC, {"T": ipc_steps, **GIVEN}),
        "pc": (PC, {"T": pc_steps, **GIVEN}),
        "auto": (PredictiveCoding, {}),
        "ipc" + DEFAULTS: (IPC, {}),
        "pc" + DEFAULTS: (PC, {}),
        **(by_hand if network in CHAINS else {}),
    }


def cpu_seconds(run: Callable[[], object], times: int) -> float:
    """The process's, for one of several runs on end."""
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times


def ratio(rounds: Sequence[Mapping[str, float]], row: str, base: str, span: int = 1) -> float:
    """The median, over every ``span`` rounds on end, of the row's time against the base's."""
    spans = [rounds[start : start + span] for start in range(0, len(rounds), span)]
    return statistics.median(sum(r[row] for r in s) / sum(r[base] for r in s) for s in spans)


def measure_cost(
    network: str, rounds: int, seed: int = 0, look: int = 300, settled: int = 40
) -> list[dict[str, Any]]:
    """A batch of each row against one of backprop.

    Args:
        network: A name of `NETWORKS`.
        rounds: At least; whole times as many as lie between two looks at the curvature.
        seed: Of weights and data.
        look: Evaluations from one look to the next, as ``gamma`` documents them.
        settled: Batches of rows at the defaults before any is timed.
    """
    learners = {name: Learner(network, *row, seed) for name, row in rows(network).items()}
    for name, learn in track(learners.items(), f"{network}: warm-up", transient=True):
        cpu_seconds(learn, settled if name.endswith((DEFAULTS, "auto")) else 2)
    steps = {
        name: each.optimizer.T if each.algorithm is ByHand else each.optimizer.report.steps
        for name, each in learners.items()
        if each.algorithm
    }
    between = ceil(look / steps["ipc" + DEFAULTS])  # batches
    span = max(1, round(between / NETWORKS[network][3]))  # rounds
    seconds = []
    for _ in track(range(ceil(rounds / span) * span), f"{network}: time", transient=True):
        gc.collect()
        seconds.append({n: cpu_seconds(e, ceil(between / span)) for n, e in learners.items()})
    backprop = {"ms": 1e3 * statistics.median(r["backprop"] for r in seconds)}
    results: list[dict[str, Any]] = [{"network": network, "row": "backprop", **backprop}]
    for name, T in steps.items():
        given = name.removesuffix(DEFAULTS)
        together = 1 if name == given else span
        row = {"network": network, "row": name, "T": T}
        limited = row["ratio"] = ratio(seconds, name, "backprop", together)
        if name != given:
            limited = row["of_given"] = ratio(seconds, name, given, together)
            row["of_given_per_step"] = limited * steps[given] / T
        target, limit = LIMITS.get(name, {}).get(network, (None, None))
        met = None if limit is None else limited <= limit
        results.append({**row, "target": target, "limit": limit, "met": met})
    return results


def batch_bytes(learner: Learner) -> int:
    """Peak of a batch that is like the last one."""
    learner()
    learner.adamw.zero_grad()
    return peak_bytes(learner)


def measure_memory(network: str, seed: int = 0) -> list[dict[str, Any]]:
    """Peaks of backprop, of ipc with a given gamma, which has a limit, without, and by hand."""
    backprop = batch_bytes(Learner(network, None, {}, seed))
    results = [{"network": network, "row": "backprop", "peak_mib": backprop / 2**20}]
    for _, T, placed, share, of_nodes in (case for case in MEMORY if case[0] == network):
        for name, given in (("ipc", GIVEN), ("ipc, auto gamma", {})):
            learn = Learner(network, IPC, {"T": T, "value_nodes": placed, **given}, seed)
            peak = batch_bytes(learn)
            nodes = sum(x.numel() * x.element_size() for x in learn.optimizer.values.values())
            row = {"network": network, "row": name, "T": T, "peak_mib": peak / 2**20}
            row |= {"ratio": peak / backprop, "nodes_mib": nodes / 2**20}
            limit = share * backprop + of_nodes * nodes
            limited = {"limit_mib": limit / 2**20, "met": peak <= limit} if given else {}
            results.append({**row, **limited})
    if network == "mlp":
        name = "ipc" + BY_HAND
        peak = batch_bytes(Learner(network, *rows(network)[name], seed))
        found = {"T": 8, "peak_mib": peak / 2**20, "ratio": peak / backprop}
        results.append({"network": network, "row": name, **found})
    return results


def recorded_forward_ratio(
    plain: Callable[[], object], record: Callable[[], object], rounds: int = 30, times: int = 10
) -> float:
    """Processor time of recording a forward and its loss against running it under autograd.

    Args:
        plain: The forward, as of `networks.tiny_bert`.
        record: The same, recorded.
        rounds: How often both run in turn; the median counts.
        times: Runs on end.
    """
    timed = {"plain": plain, "record": record}
    with torch.enable_grad():
        seconds = [{n: cpu_seconds(r, times) for n, r in timed.items()} for _ in range(rounds + 1)]
    return ratio(seconds[1:], "record", "plain")


def table(title: str, results: Sequence[Mapping[str, Any]]) -> Table:
    """A column per key, empty where a row has none."""
    keys = list(dict.fromkeys(key for row in results for key in row))
    shown = Table(*keys, title=title)
    for cells in ([row.get(key) for key in keys] for row in results):
        texts = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
        shown.add_row(*(text.replace("None", "") for text in texts))
    return shown


def main() -> None:
    """Measures, prints the tables, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    held = [n for n in options.networks if any(n == case[0] for case in MEMORY)]
    timed = [n for n in options.networks if n in TIMED]
    results = {
        "memory": [row for n in held for row in measure_memory(n, options.seed)],
        "cost": [row for n in timed for row in measure_cost(n, options.rounds, options.seed)],
    }
    for found in results.items():
        Console(width=120).print(table(*found))
    if options.write:
        command = "python -m recipes.efficiency.cost " + " ".join(sys.argv[1:])
        record = {"command": command, **machine(), "seed": options.seed, **results}
        options.write.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
