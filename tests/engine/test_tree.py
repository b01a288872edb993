"""Many value nodes are shown as a tree, in which what is alike stands once."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_pc import describe
from lightning_pc.tree import ranges


class Blocks(nn.Module):
    """Equal blocks but for one, and a projection whose output no weight learns from."""

    def __init__(self, blocks, odd):
        super().__init__()
        self.body = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.GELU() if n == odd else nn.Tanh(), nn.Linear(4, 4))
            for n in range(blocks)
        )
        self.body[odd].insert(2, nn.Tanh())
        self.frozen = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).requires_grad_(False)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = x + self.frozen(x)
        for block in self.body:
            x = x + block(x)
        return self.head(x)


def shown(description):
    file = io.StringIO()
    Console(file=file, width=120).print(description)
    return file.getvalue()


def test_alike_neighbours_stand_once():
    found = describe(Blocks(40, 20), torch.randn(3, 4), print_table=False, T=3)
    assert len(found.rows) == 41
    lines = [line.rstrip() for line in shown(found).splitlines()]
    assert lines[:8] == [
        "41 value nodes, depth 2, T = 3",
        "├── body",
        "│   ├── 0 to 19 (20 alike)",
        "│   │   └── 1  3x4  gaussian  depth 1  20 to 400 weights",
        "│   ├── 20",
        "│   │   └── 1 to 2 (2 alike)  3x4  gaussian  depth 1 to 2  0 to 420 weights",
        "│   └── 21 to 39 (19 alike)",
        "│       └── 1  3x4  gaussian  depth 1  440 to 800 weights",
    ]
    assert lines[8].startswith("└── frozen.1  3x4  frozen above")
    assert lines[-2].startswith("stage of the loss: ")
    assert len(lines) == 11


def test_a_module_that_is_called_again_and_one_with_modules_inside():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    found = describe(
        nn.Sequential(*[net] * 32, nn.Linear(4, 2)), torch.randn(3, 4), print_table=False
    )
    text = shown(found)
    assert all(row.name.rpartition(".")[2] in text for row in (found.rows[0], found.rows[-1]))


def test_thirty_nodes_are_a_table():
    assert "┃ value node " in shown(describe(Blocks(29, 3), torch.randn(3, 4), print_table=False))


@pytest.mark.parametrize(
    ("numbers", "told"),
    [([], ""), ([3], "3"), ([1, 2], "1, 2"), ([1, 2, 3, 7, 9, 10, 11, 12], "1-3, 7, 9-12")],
)
def test_ranges(numbers, told):
    assert ranges(numbers) == told
