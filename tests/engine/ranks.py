"""Trainings of one process or of several: ``torchrun -m tests.engine.ranks FOLDER``.

Each process leaves what it has found of each training in ``FOLDER/NAME-RANK.pt``.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning import Fabric
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
)

from lightning_pc import EnergyMonitor, PCDDPStrategy, PCStrategy
from lightning_pc.errors import PCError
from lightning_pc.hugging_face import PCTrainer
from lightning_pc.optim import IPC, PC, ZIL, PredictiveCoding
from lightning_pc.sharded import PCShardedStrategy
from tests.engine.lightning_problems import C, D, H, Module, data, loader, mlp
from tests.engine.tiny import STILL, bert

COUNT = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
STEPS = 20


def parts(steps: int = STEPS, batch: int = 4) -> list[Any]:
    """Batches of two parts, x [2, batch, D] and y [2, batch]."""
    each = data(2 * steps, batch, torch.float64)
    pairs = [zip(*each[2 * n : 2 * n + 2], strict=True) for n in range(steps)]
    return [tuple(torch.stack(both) for both in pair) for pair in pairs]


class Part(Module):
    """Learns from its process's part of a batch; one process from all parts."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = (both[RANK] if COUNT > 1 else both.flatten(0, 1) for both in batch)
        return F.cross_entropy(self.net(x), y)


class Adam(Part):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


class Unlike(Part):
    """The second process's data are another 30 times as large."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch[0] * (30 if RANK else 1), batch[1]), batch_idx)


class Apart(Part):
    """Weights that begin otherwise in each process."""

    def __init__(self) -> None:
        super().__init__(net=mlp(nn.BatchNorm1d(H), seed=1 + RANK))
        self.buffers_met: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.buffers_met.append(self.net[1].running_mean.clone())
        return super().training_step(batch, batch_idx)


class Depths(nn.Module):
    """The first process runs through one layer, the second one through eight and past a skip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(8))
        self.head = nn.Linear(D, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.layers[0](x))
        for layer in self.layers[1:] if RANK else ():
            x = torch.tanh(layer(x))
        return self.head(x + torch.tanh(self.layers[1](x)) if RANK else x)


class Skips(Part):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        mine = super().training_step(batch, batch_idx)
        return None if RANK and batch_idx == 3 else mine


class NotFinite(Part):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        bad = float("nan") if RANK and batch_idx == 3 else 1.0
        return super().training_step((batch[0] * bad, batch[1]), batch_idx)


class Routed(nn.Module):
    """Of three branches the first process takes the first one, the second process both others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.branches = nn.ModuleList(nn.Linear(D, 6) for _ in range(4))
        self.head = nn.Linear(6, C)
        self.rank = RANK

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        taken = [[0], [1, 2]][self.rank]
        return self.head(torch.tanh(sum(torch.tanh(self.branches[n](x)) for n in taken)))


def convolutions() -> nn.Module:
    """Of images [B, D] that are one row."""
    torch.manual_seed(3)
    layers = [nn.Unflatten(1, (1, 1, D)), nn.Conv2d(1, 4, (1, 3), padding="same"), nn.GELU()]
    layers += [nn.Conv2d(4, 4, (1, 3), padding="same"), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * D, C))


class Total(torch.autograd.Function):
    """The sum over all processes, as `torch.nn.SyncBatchNorm` makes it on a GPU."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return Total.forward(ctx, gradient)


class SyncedNorm(nn.BatchNorm2d):
    """Normalizes by the batches of all processes; SyncBatchNorm itself refuses a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if COUNT == 1:
            return super().forward(x)
        sums = torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
        count = COUNT * x.numel() / x.shape[1]
        mean, square = Total.apply(sums) / count
        var = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale, shift, mean, var = (v[:, None, None] for v in (self.weight, self.bias, mean, var))
        return (x - mean) / (var + self.eps).sqrt() * scale + shift


class Synced(Part):
    """A CNN whose norms meet at every run of their stage."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        layers = [nn.Unflatten(1, (1, 1, D))]
        for width in (1, 4):
            layers += [nn.Conv2d(width, 4, (1, 3), padding="same"), SyncedNorm(4), nn.GELU()]
        super().__init__(net=nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * D, C)))

    def on_train_end(self) -> None:
        self.buffers_met = [buffer.clone() for buffer in self.buffers() if buffer.dim()]


class Words(pl.LightningModule):
    """A tiny BERT; the second process's sentences have fewer words to tell."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.net = bert(BertForMaskedLM, **STILL).double()

    def loss(self, ids: torch.Tensor, rank: int) -> torch.Tensor:
        """Of one process's sentences."""
        told = ids[rank].clone()
        told[:, 2 + 3 * (1 - rank) :] = -100
        return self.net(input_ids=ids[rank], labels=told).loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch, RANK)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def words(steps: int) -> list[torch.Tensor]:
    """Sentences of both processes, [2, 3, 8]."""
    g = torch.Generator().manual_seed(5)
    return [torch.randint(1, 30, (2, 3, 8), generator=g) for _ in range(steps)]


class Watch(pl.Callback):
    """What each batch was inferred with."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        report = trainer.strategy.report
        self.seen.append((report.steps, report.gamma))


class Bursts(Part):
    """Gradients of one batch overflow, in one process; its loss does not."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        bursts = batch_idx == BURST and RANK == COUNT - 1
        return loss * 1e300 if bursts else loss


#: Its batch.
BURST = 3


class FullPrecision(MixedPrecision):
    """Scales gradients, but computes in float64."""

    def forward_context(self) -> Any:
        return nullcontext()


def scaled() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    return {"plugins": FullPrecision("16-mixed", "cpu", scaler=scaler)}


def fit(module: pl.LightningModule, algorithm: str, **others: Any) -> dict[str, Any]:
    """Trains, and tells weights, what was inferred, how often gradients were exchanged."""
    flags = {"max_epochs", "accumulate_grad_batches", "gradient_clip_val", "plugins"}
    own = ("ckpt", "save", "batches", "monitor", "sharded")
    ckpt, save, batches, monitor, sharded = (others.pop(name, None) for name in own)
    given = {name: others.pop(name) for name in flags & others.keys()}
    kind = PCStrategy if COUNT == 1 else PCShardedStrategy if sharded else PCDDPStrategy
    watch = Watch()
    trainer = pl.Trainer(
        **{"max_epochs": 1, **given},
        strategy=kind(algorithm, **others),
        accelerator="cpu",
        devices=COUNT,
        # Lightning shards no 64-true.
        precision=None if "plugins" in given else "32-true" if sharded else "64-true",
        callbacks=[watch, *([EnergyMonitor(plot=str(monitor))] if monitor else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    told = ""
    module = module.double()
    with counted() as exchanged:
        try:
            trainer.fit(module, loader(parts() if batches is None else batches), ckpt_path=ckpt)
        except PCError as error:
            told = f"{type(error).__name__}: {error}"
    if save:
        trainer.save_checkpoint(save)
    state = [*trainer.optimizers[0].state.values()]
    return {
        "weights": {name: _whole(p) for name, p in module.named_parameters()},
        "moments": sum(each["exp_avg"].to_local().numel() for each in state) if sharded else 0,
        "scores": getattr(module, "scores", []),
        "buffers": getattr(module, "buffers_met", []),
        "seen": watch.seen,
        "exchanged": sum(exchanged),
        "told": told,
    }


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    found = parameter.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found.clone()


@contextmanager
def counted() -> Iterator[list[bool]]:
    """Each exchange inside; True of one of gradients."""
    exchanged, reduce = list[bool](), dist.all_reduce

    def count(tensor: torch.Tensor, *args: Any, **others: Any) -> Any:
        exchanged.append(tensor.is_floating_point() and tensor.numel() > C)
        return reduce(tensor, *args, **others)

    dist.all_reduce = count
    try:
        yield exchanged
    finally:
        dist.all_reduce = reduce


def wrapped(kind: type[PredictiveCoding], fabric: bool = False) -> dict[str, Any]:
    """A wrapper around an optimizer, and the network in DistributedDataParallel."""
    net = mlp(nn.BatchNorm1d(H)).double() if kind is ZIL else mlp().double()
    net.eval()  # running statistics, which have no say in whose data they are
    settings = {} if kind is ZIL else GIVEN
    optimizer, whole = kind(torch.optim.SGD(net.parameters(), 0.1), net, **settings), net
    inner = optimizer
    if fabric:
        how = {"devices": COUNT, "strategy": "ddp" if COUNT > 1 else "auto"}
        made = Fabric(accelerator="cpu", precision="64-true", **how)
        made.launch()
        whole, optimizer = made.setup(net, optimizer)
    elif COUNT > 1:
        whole = DistributedDataParallel(net)
    seen = []
    with counted() as exchanged:
        for batch in parts():
            x, y = (both[RANK] if COUNT > 1 else both.flatten(0, 1) for both in batch)
            optimizer.step(lambda x=x, y=y: F.cross_entropy(whole(x), y))
            seen.append((inner.report.steps, inner.report.gamma))
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    rests = not isinstance(whole, DistributedDataParallel) or whole.require_backward_grad_sync
    return {"weights": weights, "seen": seen, "exchanged": sum(exchanged), "told": str(rests)}


def transformed(folder: Path) -> dict[str, Any]:
    """The Trainer of transformers, whose processes deal sentences out among themselves."""
    torch.manual_seed(8)
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8, "vocab_size": 30}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    words = GPT2LMHeadModel(GPT2Config(**sizes, **dropouts)).double()
    ids = torch.randint(1, 30, (24, 8), generator=torch.Generator().manual_seed(7))
    told = ids.clone()
    for number, row in enumerate(told):
        row[: number % 7] = -100  # sentences differ in how many words count
    rows = [{"input_ids": i, "labels": t} for i, t in zip(ids, told, strict=True)]
    settings = {"max_steps": 6, "optim": "sgd", "learning_rate": 0.1, "use_cpu": True}
    settings |= {"report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    settings["per_device_train_batch_size"] = 8 // COUNT
    arguments = TrainingArguments(str(folder), **settings)
    trainer = PCTrainer(words, arguments, train_dataset=rows, algorithm="ipc", T=6, **GIVEN)
    with counted() as exchanged:
        trainer.train()
    weights = {name: p.detach().clone() for name, p in words.named_parameters()}
    seen = [(trainer.report.steps, trainer.report.gamma)]
    return {"weights": weights, "seen": seen, "exchanged": sum(exchanged), "told": ""}


def resumed(folder: Path) -> dict[str, Any]:
    """Two epochs at once, and one after the other."""

    def train(**how: Any) -> dict[str, Any]:
        # Lightning loads weights before it makes them float64.
        return fit(Adam(net=mlp().double()), "ipc", **how)

    whole, path = train(max_epochs=2), folder / f"half-{COUNT}.ckpt"
    train(save=path)
    return whole | {"resumed": train(max_epochs=2, ckpt=path)["weights"]}


class Odd(nn.Module):
    """Has a number of its own, and two weights that share their memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        both = torch.randn(2, D, D, dtype=torch.float64) / 3
        self.one, self.other = (nn.Parameter(part) for part in both)
        self.head = nn.Linear(D, C).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(torch.tanh(x @ self.one) @ self.other) * self.scale)


class Hooked(Part):
    """All weights shrink at each step, whether an error has reached them or not."""

    def configure_optimizers(self) -> Any:
        sgd = super().configure_optimizers()
        sgd.register_step_post_hook(self.shrink)
        return sgd

    @torch.no_grad()
    def shrink(self, optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.mul_(0.9)


class OwnClipping(Part):
    def configure_gradient_clipping(self, optimizer: Any, **_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.01)


class Thaws(Part):
    """The first layer learns in the second epoch alone."""

    def on_train_epoch_start(self) -> None:
        for p in self.net[0].parameters():
            p.requires_grad_(self.current_epoch > 0)


class Scored(Adam):
    """Validates on what it learns from."""

    def __init__(self) -> None:
        super().__init__(net=mlp().double())
        self.scores: list[float] = []

    def val_dataloader(self) -> Any:
        return loader(parts()[:2])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.scores.append(float(F.cross_entropy(self.net(batch[0][0]), batch[1][0])))


def shared_out(folder: Path) -> dict[str, Any]:
    """Two epochs with shards at once, and one after the other, by a folder and by one file."""
    how = {"sharded": True, **GIVEN}
    whole, found = fit(Scored(), "ipc", max_epochs=2, **how), {}
    for name, distributed in (("folder", True), ("file", False)):
        more = how | {"save_distributed_checkpoint": distributed}
        fit(Scored(), "ipc", save=folder / name, **more)
        found[name] = fit(Scored(), "ipc", max_epochs=2, ckpt=folder / name, **more)["weights"]
    plain = fit(Scored(), "ipc", max_epochs=2, ckpt=folder / "file", **GIVEN)["weights"]
    return whole | found | {"without shards": plain, **used_again()}


def used_again() -> dict[str, Any]:
    """A module that is trained twice, tested in between, and read in between."""
    module, quiet = Scored(), ("logger", "enable_progress_bar", "enable_model_summary")
    x = parts()[0][0][0]
    read: list[torch.Tensor] = []

    class Reads(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            with trainer.strategy.whole():
                read.append(pl_module.net(x).detach())

    def trainer() -> pl.Trainer:
        return pl.Trainer(
            max_epochs=1,
            strategy=PCShardedStrategy("pc", **GIVEN),
            accelerator="cpu",
            devices=COUNT,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            callbacks=[Reads()],
            **dict.fromkeys(quiet, False),
        )

    first, batches = trainer(), loader(parts())
    first.fit(module, batches)
    after = module.net(x).detach()
    kinds = {type(value) for value in module.state_dict().values()}
    first.validate(module, verbose=False)
    with first.strategy.whole():
        pass  # the weights are whole anyway, and stay so
    same = torch.equal(module.net(x), after)
    trainer().fit(module, batches)
    moved = not torch.equal(module.net(x), after)
    return {"used": (torch.equal(read[0], after), kinds == {torch.Tensor}, same, moved)}


GIVEN = {"gamma": 0.1}
#: Name -> the training, given a folder; all processes must end at the same weights.
TRAININGS: dict[str, Callable[[Path], dict[str, Any]]] = {
    # The same as of one process with all data.
    "pc": lambda _: fit(Part(), "pc", **GIVEN),
    "ipc": lambda _: fit(Part(), "ipc", **GIVEN),
    "zil": lambda _: fit(Part(), "zil"),
    "epc": lambda _: fit(Part(), "epc", gamma=0.3),
    "iepc": lambda _: fit(Part(), "iepc", gamma=0.3),
    "decay": lambda _: fit(Part(), "pc", gamma=0.4, gamma_decay=0.5),
    "conjugate": lambda _: fit(Part(), "pc", gamma=0.3, momentum="conjugate"),
    "until": lambda _: fit(Part(), "pc", gamma=0.2, T=60, until=1e-3),
    "convolutions": lambda _: fit(Part(net=convolutions()), "ipc", **GIVEN),
    "accumulated": lambda _: fit(Part(), "pc", accumulate_grad_batches=3, **GIVEN),
    "clipped": lambda _: fit(Adam(), "ipc", gradient_clip_val=0.1, **GIVEN),
    "scaled": lambda _: fit(Bursts(), "ipc", **scaled(), **GIVEN),
    "scaled pc": lambda _: fit(Bursts(), "pc", T=8, **scaled(), **GIVEN),
    "synced pc": lambda _: fit(Synced(), "pc", **GIVEN),
    "synced ipc": lambda _: fit(Synced(), "ipc", **GIVEN),
    "synced zil": lambda _: fit(Synced(), "zil"),
    "wrapped pc": lambda _: wrapped(PC),
    "wrapped ipc": lambda _: wrapped(IPC),
    "wrapped zil": lambda _: wrapped(ZIL),
    "fabric pc": lambda _: wrapped(PC, fabric=True),
    "fabric ipc": lambda _: wrapped(IPC, fabric=True),
    "transformed": transformed,
    # Of several processes alone.
    "words": lambda _: fit(Words(), "pc", batches=words(3), T=8, **GIVEN),
    "unlike pc": lambda _: fit(Unlike(), "pc"),
    "unlike ipc": lambda _: fit(Unlike(), "ipc"),
    "unlike auto": lambda _: fit(Unlike(), "auto"),
    "routed": lambda _: fit(Adam(net=Routed()), "pc", **GIVEN),
    "routed ipc": lambda _: fit(Part(1e-8, Routed()), "ipc", batches=parts(1), T=8, **GIVEN),
    "routed iepc": lambda _: fit(Part(1e-8, Routed()), "iepc", batches=parts(1), T=8, **GIVEN),
    "apart": lambda _: fit(Apart(), "pc", **GIVEN),
    "depths pc": lambda _: fit(Part(net=Depths()), "pc"),
    "depths ipc": lambda _: fit(Part(net=Depths()), "ipc"),
    "depths auto": lambda _: fit(Part(net=Depths()), "auto"),
    "depths until": lambda _: fit(Part(net=Depths()), "epc", gamma=0.2, T=40, until=1e-3),
    "monitored": lambda folder: fit(Part(), "pc", monitor=folder / "energy.png", **GIVEN),
    "skips": lambda _: fit(Skips(), "pc", **GIVEN),
    "not finite": lambda _: fit(NotFinite(), "ipc", **GIVEN),
    "resumed": resumed,
    # Of shards, the same as without.
    "odd": lambda _: fit(Part(net=Odd()), "ipc", **GIVEN),
    "sharded odd": lambda _: fit(Part(net=Odd()), "ipc", sharded=True, **GIVEN),
    "hooked": lambda _: fit(Hooked(), "ipc", **GIVEN),
    "sharded hooked": lambda _: fit(Hooked(), "ipc", sharded=True, **GIVEN),
    "own clipping": lambda _: fit(OwnClipping(), "ipc", **GIVEN),
    "sharded own clipping": lambda _: fit(OwnClipping(), "ipc", sharded=True, **GIVEN),
    "thaws": lambda _: fit(Thaws(), "pc", max_epochs=2, **GIVEN),
    "sharded thaws": lambda _: fit(Thaws(), "pc", max_epochs=2, sharded=True, **GIVEN),
    "sharded pc": lambda _: fit(Part(), "pc", sharded=True, **GIVEN),
    "sharded ipc": lambda _: fit(Part(), "ipc", sharded=True, **GIVEN),
    "sharded zil": lambda _: fit(Part(), "zil", sharded=True),
    "sharded iepc": lambda _: fit(Part(), "iepc", gamma=0.3, sharded=True),
    "sharded accumulated": lambda _: fit(
        Part(), "pc", accumulate_grad_batches=3, sharded=True, **GIVEN
    ),
    "sharded clipped": lambda _: fit(Adam(), "ipc", gradient_clip_val=0.1, sharded=True, **GIVEN),
    "sharded words": lambda _: fit(Words(), "pc", batches=words(3), T=8, sharded=True, **GIVEN),
    "sharded routed": lambda _: fit(Adam(net=Routed()), "pc", sharded=True, **GIVEN),
    "sharded unlike auto": lambda _: fit(Unlike(), "auto", sharded=True),
    "sharded apart": lambda _: fit(Apart(), "pc", sharded=True, **GIVEN),
    "sharded skips": lambda _: fit(Skips(), "pc", sharded=True, **GIVEN),
    "shared out": shared_out,
}
#: Those that end where one process does.
SAME = [*TRAININGS][:22]


def main() -> None:
    """Runs all, in this process."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, train in TRAININGS.items():
        torch.save(copy.copy(train(folder)), folder / f"{name}-{RANK}.pt")
    gc.collect()  # DistributedDataParallel holds on to the processes' group
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
