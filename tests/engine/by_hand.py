"""A module under the Trainer, and a loop of one's own over the same batches."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc.optim import PredictiveCoding
from tests.engine.lightning_problems import Module, loader, seed_all, trainer, weights

T = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "ipc": {"algorithm": "ipc", "T": T, "gamma": 0.1},
    "pc": {"algorithm": "pc", "T": T, "gamma": 0.1},
    "zil": {"algorithm": "zil"},
}
each_algorithm = pytest.mark.parametrize("algorithm", SETTINGS)
LR = 0.3


class Net(Module):
    """Keeps what it is given, in its order; batches may be of many forms."""

    def __init__(self, lr: float = LR, net: nn.Module | None = None) -> None:
        super().__init__(lr, net)
        self.seen: list[Any] = []

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append(batch)

    def training_step(self, batch, batch_idx):
        if isinstance(batch, dict) and "y" in batch:
            return F.cross_entropy(self(batch["x"]), batch["y"])
        parts = batch.values() if isinstance(batch, dict) else [batch]
        return sum(F.cross_entropy(self(p[0]), p[1]) for p in parts if p is not None)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.append(f"validation {batch_idx} of {dataloader_idx}")
        self.log("val", 1.0)

    @property
    def batches(self) -> list[Any]:
        return [batch for batch in self.seen if not isinstance(batch, str)]


def by_hand(algorithm, batches, module=None, sgd=torch.optim.SGD):
    """A loop of one's own over the batches; the weights after each."""
    module, found = Net() if module is None else module, []
    optimizer = PredictiveCoding(sgd(module.parameters(), lr=LR), module, **SETTINGS[algorithm])
    for number, batch in enumerate(batches):
        optimizer.step(lambda b=batch, n=number: module.training_step(b, n))
        found.append(weights(module))
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def fitted(strategy, flags, batches, validation, path, module=None):
    """The module and its Trainer after a fit, from the same generators each time."""
    seed_all()
    module = Net() if module is None else module
    fit = trainer(strategy, default_root_dir=path, **copy.deepcopy(flags))
    given, validated = batches(), validation()
    given = loader(given) if isinstance(given, list) else given
    if isinstance(validated[0], tuple):
        validated = loader(validated)
    seed_all()
    fit.fit(module, given, validated)
    torch.use_deterministic_algorithms(False)  # and what else the flags have set
    torch.backends.cudnn.benchmark = False
    return module, fit


class Ends(L.Callback):
    """The weights at the end of each batch and at the start of each epoch."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []
        self.epochs: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.batches.append(weights(pl_module))

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append(weights(pl_module))
