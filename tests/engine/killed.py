"""A training that kills itself, or goes on: ``killed.py FOLDER ALGORITHM HOOK BATCH``.

At the ``BATCH``-th call of ``HOOK`` the process is killed; -1 is never. Where the folder has a
checkpoint it goes on from there. The weights at the end are in ``FOLDER/end-RANK.pt``.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_pc import PCDDPStrategy, PCStrategy
from lightning_pc.callbacks import RandomState
from tests.engine.lightning_problems import Module, data, mlp

RANK, COUNT = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


class Killer(pl.Callback):
    """Kills its process at one call of a hook, the second process alone where there are two."""

    def __init__(self, hook: str, batch: int) -> None:
        self._left = batch
        setattr(self, hook, self._called)

    def _called(self, *_: Any) -> None:
        self._left -= 1
        if not self._left and RANK == COUNT - 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Batches:
    """A loader that remembers where it is, as Lightning asks of one to go on in mid-epoch."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches, self._given = batches, 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        self._given %= len(self._batches)
        while self._given < len(self._batches):
            self._given += 1
            yield self._batches[self._given - 1]

    def state_dict(self) -> dict[str, int]:
        return {"given": self._given % len(self._batches)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._given = state["given"]


class Trained(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


def main() -> None:
    """Trains three epochs of seven batches."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder, algorithm, hook, batch = Path(sys.argv[1]), *sys.argv[2:5]
    pl.seed_everything(1 + RANK)
    saves = ModelCheckpoint(folder, "last", every_n_train_steps=1, enable_version_counter=False)
    strategy: Any = "auto"
    if algorithm != "backprop":
        strategy = (PCStrategy if COUNT == 1 else PCDDPStrategy)(algorithm)
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=COUNT,
        max_epochs=3,
        callbacks=[saves, RandomState(), Killer(hook, int(batch))],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Trained(net=mlp(nn.Dropout(0.3)))
    batches = Batches(data(14)[RANK::2])
    last = folder / "last.ckpt"
    trainer.fit(module, batches, ckpt_path=last if last.exists() else None)
    torch.save(module.state_dict(), folder / f"end-{RANK}.pt")


if __name__ == "__main__":
    main()
