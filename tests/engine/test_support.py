"""What goes with what: each cell of the page's table is a training, or one of our errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_pc import PCStrategy
from lightning_pc.errors import PCError
from tests.engine.lightning_problems import C, D, Module, data, loader
from tests.engine.modules import MLP

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "several_devices.md"
ALGORITHMS = ("auto", "ipc", "pc", "zil", "epc", "iepc")
GAMMA = {"gamma": 0.1}
#: As precision="16-mixed" has it on a GPU; on a CPU the Trainer makes bf16-mixed of that.
HALF = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
#: Row of the table -> the Trainer's flags, and settings of predictive coding.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "`64-true`, `bf16-true`": ({"precision": "bf16-true"}, {}),
    "`bf16-mixed`": ({"precision": "bf16-mixed"}, {}),
    "`16-mixed`, with a scaler": ({"plugins": HALF}, {}),
    "`16-true`": ({"precision": "16-true"}, {}),
    "`accumulate_grad_batches`": ({"accumulate_grad_batches": 2}, {}),
    "`gradient_clip_val`": ({"gradient_clip_val": 0.1}, {}),
    "`compile`": ({}, {"compile": {"backend": "eager"}, **GAMMA}),
    "`parallel=True`": ({}, {"parallel": True, **GAMMA}),
    "`compile` and `parallel=True`": (
        {},
        {"compile": {"backend": "eager"}, "parallel": True, **GAMMA},
    ),
    "`until`": ({}, {"until": 1e-3}),
    '`reset="never"`': ({}, {"reset": "never"}),
    "`gamma`, `gamma_decay`": ({}, {"gamma_decay": 0.5, **GAMMA}),
    '`momentum="conjugate"`': ({}, {"momentum": "conjugate"}),
    "`inference`": ({}, {"inference": lambda values: torch.optim.SGD(values, 0.1)}),
    '`precisions="spiking"`': ({}, {"precisions": "spiking"}),
    "`energies`": ({}, {"energies": {"net.1": "laplace"}}),
    "`beta`": ({}, {"beta": 0.3}),
}


def stack() -> nn.Module:
    """Layers that are alike, so that they may stand side by side."""
    torch.manual_seed(0)
    return MLP((D, *[6] * 4, C))


def outcome(algorithm: str, flags: dict[str, Any], settings: dict[str, Any]) -> str:
    """``"yes"`` of a training in which all values had energy and all weights moved."""
    module = Module(net=stack())
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    try:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            strategy=PCStrategy(algorithm, **settings),
            **dict.fromkeys(quiet, False),
            **flags,
        )
        trainer.fit(module, loader(data(4)))
    except (PCError, MisconfigurationException):
        for name, p in module.named_parameters():
            assert torch.equal(p, before[name].to(p)), name
        return "error"
    for name, p in module.named_parameters():
        assert not torch.equal(p, before[name].to(p)), name
        assert p.isfinite().all(), name
    report = trainer.strategy.report
    assert min(report.peak_energy.values()) > 0
    assert not settings.get("parallel") or report.side_by_side
    assert not settings.get("compile") or report.compiled
    return "yes"


def table() -> dict[str, list[str]]:
    """The page's, row by row."""
    text = PAGE.read_text()
    head = "| with | " + " | ".join(f"`{name}`" for name in ALGORITHMS) + " |\n"
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return {row: cells for row, *cells in (re.split(r" ?\| ?", line)[1:-1] for line in lines)}


def test_the_table_has_these_rows():
    assert [*table()] == [*ROWS]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.filterwarnings("ignore")
def test_cell(row, algorithm):
    flags, settings = ROWS[row]
    assert outcome(algorithm, flags, settings) == table()[row][ALGORITHMS.index(algorithm)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.filterwarnings("ignore")
def test_the_other_precision_of_a_row(algorithm):
    assert outcome(algorithm, {"precision": "64-true"}, {}) == "yes"


def main() -> None:
    """Prints the table."""
    print("| with | " + " | ".join(f"`{name}`" for name in ALGORITHMS) + " |")
    print("| --- " * (len(ALGORITHMS) + 1) + "|")
    for row, (flags, settings) in ROWS.items():
        cells = [outcome(algorithm, flags, settings) for algorithm in ALGORITHMS]
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
