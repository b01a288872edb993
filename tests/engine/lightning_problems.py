"""Small LightningModules, data and a Trainer for the tests of the doors."""

from __future__ import annotations

import random
import warnings
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_pc

ALGORITHMS = ("ipc", "pc", "zil", "epc", "iepc")
D, H, C = 5, 7, 3  # inputs, hidden units, classes


def data(batches: int = 3, batch: int = 4, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Batches (x [batch, D], y [batch]), the same at every call."""
    g = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(batch, D, generator=g, dtype=torch.float64).to(dtype),
            torch.randint(C, (batch,), generator=g),
        )
        for _ in range(batches)
    ]


def loader(batches: list[Any]) -> DataLoader:
    """The batches as they are, no sampler and no collation."""
    return DataLoader(batches, batch_size=None)


def shuffling() -> DataLoader:
    """Samples in batches of four, in another order each epoch."""
    x, y = (torch.cat(part) for part in zip(*data(4), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)


def mlp(*extra: nn.Module, seed: int = 1) -> nn.Sequential:
    """Linear, Tanh, Linear, ReLU, Linear, with ``extra`` behind the first Linear."""
    torch.manual_seed(seed)
    layers = [nn.Linear(D, H), *extra, nn.Tanh(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, C)]
    return nn.Sequential(*layers)


class Module(L.LightningModule):
    """A classifier; tests override what they need."""

    def __init__(self, lr: float = 0.05, net: nn.Module | None = None) -> None:
        super().__init__()
        self.lr = lr
        self.net = mlp() if net is None else net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=self.lr)


class Memory(Logger):
    """Keeps every metric that reaches a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int | None, dict[str, float]]] = []
        self.experiment: list[Any] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def save_dir(self) -> str:
        return "here"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((step, dict(metrics)))


def trainer(strategy: Any = "ipc", **kwargs: Any) -> L.Trainer:
    """A quiet Trainer on the CPU; a dict of kwargs for PCStrategy may stand for the strategy."""
    if isinstance(strategy, dict):
        strategy = lightning_pc.PCStrategy(**strategy)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return L.Trainer(strategy=strategy, **{**settings, **kwargs})


def seed_all(seed: int = 3) -> None:
    """Seeds torch, numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def weights(module: nn.Module) -> torch.Tensor:
    """All parameters, flat."""
    return torch.cat([p.detach().double().reshape(-1) for p in module.parameters()])


GLOBAL_HOOKS = [n for n in vars(nn.modules.module) if n.startswith("_global_") and "hooks" in n]
_HOOK_DICTS = [n for n in vars(nn.Module()) if "hooks" in n]


def traces(module: nn.Module) -> dict[str, Any]:
    """All of a module in which somebody could leave something: compare before and after."""
    found: dict[str, Any] = {n: len(getattr(nn.modules.module, n)) for n in GLOBAL_HOOKS}
    for name, part in module.named_modules():
        getattr(part, "hparams", None)  # Lightning makes it when it is first asked for
        found[name] = (
            type(part),
            sorted(k for k in vars(part)),
            [len(getattr(part, hooks)) for hooks in _HOOK_DICTS],
            getattr(part.forward, "__func__", part.forward),
            part.training,
        )
    found["state_dict"] = [(k, type(v), v.shape, v.dtype) for k, v in module.state_dict().items()]
    found["requires_grad"] = [p.requires_grad for p in module.parameters()]
    return found


class Chosen(Module):
    """Its loss is given."""

    def __init__(self, loss=F.cross_entropy, lr=0.3, net=None):
        super().__init__(lr, net)
        self.loss = loss

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self(x), y)


class Moves(L.Callback):
    """The distance that the weights went in each batch."""

    def __init__(self, order: float = 2) -> None:
        self.order, self.far = order, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.start = weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.far.append(float((weights(pl_module) - self.start).norm(self.order)))
