"""Thousands of steps of changing shapes and control flow: memory and all that is kept stay."""

import gc
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc.optim import IPC, PC
from tests.engine.lightning_problems import Module, loader, trainer

STATM = Path("/proc/self/statm")


class Changing(nn.Module):
    """As many steps as the batch has, and one of two branches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.read, self.step = nn.Linear(6, 16), nn.Linear(16, 16)
        self.branches = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x, steps, branch):
        h = torch.tanh(self.read(x))
        for _ in range(steps):
            h = torch.tanh(self.step(h))
        return self.head(torch.relu(self.branches[branch](h)))


def resident():
    """MiB."""
    gc.collect()
    return int(STATM.read_text().split()[1]) * 4096 / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="tells memory where there is /proc")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [IPC, PC])
def test_thousands_of_steps(kind):
    model, draw = Changing(), random.Random(0)
    optimizer = kind(torch.optim.Adam(model.parameters(), 1e-3), model, T=4)
    memory, objects = {}, {}
    for n in range(1, 5001):
        size, steps, branch = draw.randint(1, 40), draw.randint(0, 12), draw.randint(0, 1)
        x, y = torch.randn(size, 6), torch.randint(4, (size,))
        optimizer.step(lambda: F.cross_entropy(model(x, steps, branch), y))  # noqa: B023
        if n in (500, 5000):
            memory[n], objects[n] = resident(), len(gc.get_objects())
    assert memory[5000] < 1.02 * memory[500]
    assert objects[5000] < 1.05 * objects[500]


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="tells memory where there is /proc")
def test_fits_in_turn():
    """Of one module, with tests in between, which do not add up."""

    class Tested(Module):
        def test_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    module, memory = Tested(), []
    batches = loader([(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(4)])
    for n in range(60):
        fit = trainer("ipc" if n % 2 else "pc")
        fit.fit(module, batches)
        fit.test(module, batches, verbose=False)
        memory.append(resident())
    assert memory[-1] < 1.02 * memory[14]
    assert not module.net._forward_hooks
