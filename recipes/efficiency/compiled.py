"""A batch with compiled inference steps (``compile=True``) against one without.

    python -m recipes.efficiency.compiled --write recipes/efficiency/compiled.json

Processor time of one thread, after all kinds of steps are compiled. Both learn a batch in turn,
round after round; the median of the rounds' ratios is told, and how long it took to compile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightning_pc.optim import IPC, PC
from recipes.common.machine import machine
from recipes.efficiency.cost import GIVEN, TIMED, Learner, cpu_seconds

#: Row -> algorithm and arguments.
ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ipc": (IPC, GIVEN),
    "ipc, side by side": (IPC, {**GIVEN, "parallel": True}),
    "pc": (PC, GIVEN),
    "pc, defaults": (PC, {}),
}
#: Batches before any is timed: looks at the curvature are compiled, too.
SETTLED = 16


def measure(network: str, row: str, rounds: int) -> dict[str, Any]:
    """Time of a compiled batch against one that is not, and backprop's."""
    algorithm, given = ROWS[row]
    backprop = Learner(network, None, {}, 0)
    plain = Learner(network, algorithm, given, 0)
    compiled = Learner(network, algorithm, {**given, "compile": True}, 0)
    each = backprop, plain, compiled
    for learn in each:
        cpu_seconds(learn, SETTLED)
    times = [[cpu_seconds(learn, 2) for learn in each] for _ in range(rounds)]
    ratios = {
        "of backprop": statistics.median(b / a for a, b, _ in times),
        "compiled, of backprop": statistics.median(c / a for a, _, c in times),
        "compiled, of not compiled": statistics.median(c / b for _, b, c in times),
    }
    return {
        "network": network,
        "row": row,
        **{name: round(ratio, 2) for name, ratio in ratios.items()},
        "told": compiled.optimizer.report.compiled,
    }


def main() -> None:
    """Measures, shows and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", choices=TIMED, default=TIMED)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", type=Path, help="JSON to write")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "In the first batch no error reached")
    pairs = [(network, row) for network in given.networks for row in ROWS]
    pairs = [(n, row) for n, row in pairs if n == "deep" or row != "ipc, side by side"]
    cells = [measure(*pair, given.rounds) for pair in track(pairs, "batches")]
    table = Table(*cells[0], title="a batch with compiled steps")
    for cell in cells:
        table.add_row(*map(str, cell.values()))
    Console().print(table)
    if given.write:
        command = f"python -m recipes.efficiency.compiled --rounds {given.rounds}"
        told = {"command": command, **machine(), "cells": cells}
        given.write.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
