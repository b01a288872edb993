"""What Lightning tells of a run: bars, profilers, loggers, and hooks of the module."""

from __future__ import annotations

import csv
import struct
import warnings
from collections import Counter
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities.data import warning_cache

from lightning_pc import EnergyMonitor
from tests.engine.by_hand import SETTINGS, Net, T, each_algorithm, fitted
from tests.engine.lightning_problems import data, loader, trainer

# --- what is told: the progress bar, profilers, loggers ------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shown"), [("TQDMProgressBar", "={:.3g}"), ("RichProgressBar", ": {:.3f}")]
)
def test_the_energy_stands_in_the_bar(kind, shown, tmp_path, capfd):
    flags = {"callbacks": [getattr(pl_callbacks, kind)(), EnergyMonitor()]}
    flags["enable_progress_bar"] = True
    _, fit = fitted(SETTINGS["ipc"], flags, data, data, tmp_path)
    out, err = capfd.readouterr()
    energy = fit.progress_bar_metrics["pc/energy"]
    assert "pc/energy" + shown.format(energy) in out + err


def test_stopping_by_the_energy(tmp_path):
    """What is logged each step is there to be monitored at the end of an epoch."""
    stopping = pl_callbacks.EarlyStopping("pc/energy", divergence_threshold=-1.0)
    flags = {"callbacks": [EnergyMonitor(), stopping], "max_epochs": 9}
    _, fit = fitted(SETTINGS["pc"], flags, data, data, tmp_path)
    assert fit.current_epoch == 1


@each_algorithm
@pytest.mark.parametrize("kind", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
def test_profilers_see_the_same_actions(kind, algorithm, tmp_path):
    found = []
    for strategy in (SETTINGS[algorithm], "auto"):
        counts: Counter[str] = Counter()

        class Counts(kind):
            def start(self, action_name, counts=counts):
                counts[action_name] += 1
                super().start(action_name)

        flags = {"profiler": Counts(tmp_path, "profile"), "num_sanity_val_steps": 0}
        fit = trainer(strategy, **flags)
        fit.fit(Net(), loader(data(4)), loader(data()))
        name = type(fit.strategy).__name__
        (told,) = tmp_path.glob("*profile*.txt")
        assert f"[Strategy]{name}.backward" in told.read_text()
        found.append({action.replace(name, "of"): n for action, n in counts.items()})
        told.unlink()
    assert found[0] == found[1]
    assert found[0]["[Strategy]of.backward"] == 4


def read_csv(path, _):
    with (path / "lightning_logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {int(r["step"]): {k: float(v) for k, v in r.items() if v} for r in rows}


def read_tensorboard(path, logger):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(logger.log_dir).Reload()
    found: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault(event.step, {})[tag] = event.value
    return found


def read_wandb(path, logger):
    """A run's file is a log of blocks: each piece has a checksum, its length and its kind."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    logger.experiment.finish()
    pytest.importorskip("wandb").teardown()  # once it has written all
    raw, at, record, found = next(path.glob("wandb/offline-*/*.wandb")).read_bytes(), 7, b"", {}
    while at < len(raw):
        left = -at % 2**15 or 2**15
        if left < 7:  # padding
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", raw, at)
        record, at = record + raw[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last piece
            items = proto.Record.FromString(record).history.item
            row = {i.key or "/".join(i.nested_key): float(i.value_json) for i in items}
            found[int(row.get("trainer/global_step", -1))], record = row, b""
    found.pop(-1)  # what is no row of the history
    return found


LOGGERS = {
    "csv": ("csv", CSVLogger, read_csv, {}),
    "tensorboard": ("tensorboard", TensorBoardLogger, read_tensorboard, {}),
    "wandb": ("wandb", WandbLogger, read_wandb, {"offline": True}),
}


@pytest.mark.parametrize("algorithm", ["ipc", "pc"])
@pytest.mark.parametrize("name", LOGGERS)
def test_energies_arrive_in_the_loggers_files(name, algorithm, tmp_path):
    package, kind, read, options = LOGGERS[name]
    pytest.importorskip(package)
    reports: list[Any] = []

    class Reports(Net):
        def on_train_batch_end(self, *args):
            reports.append(self.trainer.strategy.report)

    logger = kind(save_dir=tmp_path, **options)
    settings = {**SETTINGS[algorithm], "gamma": "auto"}
    flags = {"logger": logger, "callbacks": [EnergyMonitor(per_node=True)]}
    trainer(settings, log_every_n_steps=2, **flags).fit(Reports(), loader(data(4)))
    logger.finalize("success")
    found = read(tmp_path, logger)
    assert set(found) == {1, 3}
    for step, row in found.items():
        report = reports[step]
        each = (report.energy[-1] / report.loss_terms).tolist()
        expected = {f"pc/energy/{n}": e for n, e in zip(report.nodes, each, strict=True)}
        expected |= {"pc/energy": sum(each), "pc/gamma": report.gamma, "pc/steps": report.steps}
        expected["pc/curvature"] = report.curvature
        row = {k: v for k, v in row.items() if k.startswith("pc/")}
        assert row == pytest.approx(expected, rel=1e-5)
    assert reports[1].gamma > 0


class Arithmetic(Net):
    """Its loss calls no loss function, and a batch has tensors of two sizes."""

    def training_step(self, batch, batch_idx):
        return (self(batch[0])[:, 0] - batch[1]).square().mean() + 0.0 * batch[2].sum()


@pytest.mark.parametrize("algorithm", ["auto", "pc"])
def test_no_advice_on_logging_where_nothing_is_logged(algorithm):
    """Lightning is asked for the batch size, and warns of ambiguous ones once in a process."""
    warning_cache.clear()
    batches = [(x, y.float(), torch.zeros(2)) for x, y in data()]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer({"algorithm": algorithm}).fit(Arithmetic(), loader(batches))
    said = [str(w.message) for w in told if "batch" in str(w.message)]
    assert all("loss_terms=" in message for message in said)
    assert len(said) == (algorithm == "pc")


# --- hooks ---------------------------------------------------------------------------------------

HOOKS = [n for n in dir(L.LightningModule) if n.startswith(("on_", "optimizer_", "lr_scheduler_"))]
HOOKS += ["configure_gradient_clipping", "transfer_batch_to_device", "configure_optimizers"]
HOOKS += ["configure_callbacks", "configure_model", "prepare_data", "setup", "teardown", "forward"]
HOOKS += ["training_step", "validation_step"]


def telling(without=()):
    """A module class all of whose hooks tell that they are called, and do as they do."""
    told: list[str] = []

    def override(name):
        def hook(self, *args, **kwargs):
            told.append(name)
            return getattr(super(kind, self), name)(*args, **kwargs)

        return hook

    body = {name: override(name) for name in HOOKS if name not in without}
    kind = type("Tells", (Scheduled,), body)
    return kind, told


class Scheduled(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@each_algorithm
def test_hooks_of_the_module_are_called_as_ever(algorithm, tmp_path):
    """iPC clips at each of its steps, which are Lightning's one; all else is plain Lightning's."""
    without, orders = {"optimizer_step"} if algorithm == "ipc" else set(), []
    for strategy in (SETTINGS[algorithm], "auto"):
        kind, told = telling(without)
        saves = pl_callbacks.ModelCheckpoint(tmp_path / str(strategy)[:4])
        flags = {"callbacks": [saves], "enable_checkpointing": True, "max_epochs": 2}
        trainer(strategy, gradient_clip_val=0.1, **flags).fit(
            kind(), loader(data(2)), loader(data(1))
        )
        orders.append(told)
    expected = []
    for name in orders[1]:
        again = ["configure_gradient_clipping"] * (T - 1)
        more = again if name == "on_before_backward" and algorithm == "ipc" else []
        expected += [name, *more]
    assert orders[0] == expected
    assert {"lr_scheduler_step", "on_before_zero_grad", "on_save_checkpoint"} <= set(expected)
