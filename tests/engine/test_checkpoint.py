"""Checkpoints are plain Lightning's, both ways, and a resumed run is the run that went through."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_pc import RandomState
from tests.engine.lightning_problems import (
    ALGORITHMS,
    Module,
    data,
    loader,
    mlp,
    seed_all,
    shuffling,
    trainer,
)
from tests.marks import mostly_slow

STRATEGIES = [*ALGORITHMS, "auto"]


class Net(Module):
    """Dropout, BatchNorm, momentum, a schedule and draws of every kind."""

    def __init__(self, dropout: float = 0.0):
        super().__init__(net=mlp(nn.BatchNorm1d(7), nn.Dropout(dropout)))
        self.noise = 0.1 if dropout else 0.0

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + self.noise * (np.random.normal() + random.random())
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))
        torch.rand(3)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fitted(
    strategy: str, path: Path, epochs: int, batches: Any, ckpt: Any = None, dropout=0.0, **kwargs
) -> tuple[Net, Any]:
    seed_all(1 if ckpt is None else 99)
    module = Net(dropout)
    callbacks = [ModelCheckpoint(path, save_last=True, filename="{epoch}", save_top_k=-1)]
    callbacks += kwargs.pop("callbacks", [])
    fit = trainer(
        strategy,
        max_epochs=epochs,
        callbacks=callbacks,
        enable_checkpointing=True,
        default_root_dir=path,
        **kwargs,
    )
    fit.fit(module, batches, loader(data(1)), ckpt_path=ckpt)
    return module, fit


def assert_same(module: nn.Module, other: nn.Module) -> None:
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=0, atol=0)


def outline(value: Any) -> Any:
    """Keys and types of a checkpoint."""
    if isinstance(value, dict):
        return {k: outline(v) for k, v in value.items() if "ModelCheckpoint" not in str(k)}
    if isinstance(value, (list, tuple)):
        return [outline(v) for v in value]
    return (
        (type(value), value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)
    )


@pytest.mark.parametrize("gamma", [0.1, "auto"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_checkpoint_has_nothing_of_ours_but_an_automatic_gamma(algorithm, gamma, tmp_path):
    """Numbers and a name beside the optimizer's state; with a given gamma not even these."""
    if algorithm == "zil":
        gamma = 1.0
    saved = []
    for strategy in ({"algorithm": algorithm, "gamma": gamma}, "auto"):
        _, fit = fitted(strategy, tmp_path / str(len(saved)), 2, loader(data()))
        saved.append(torch.load(fit.checkpoint_callback.last_model_path, weights_only=True))
    ours = saved[0]["optimizer_states"][0].pop("lightning_pc", None)
    assert (ours is not None) == (gamma == "auto")
    if ours is not None:
        kinds = {name: type(value) for name, value in ours.items()}
        expected = {
            **dict.fromkeys(("gamma", "curvature"), float),
            **dict.fromkeys(
                ("batches", "evaluations", "looked_at", "looks", "failures", "soonest"), int
            ),
            **dict.fromkeys(("alarmed", "anew", "fine"), bool),
            **dict.fromkeys(("loss_mean", "loss_spread", "loss_first", "loss_least"), float),
            **dict.fromkeys(("loss_level", "loss_squares", "loss_products", "loss_guess"), float),
            **dict.fromkeys(("loss_batches", "loss_high", "loss_above"), int),
            "loss_recent": list,
            "precisions": str,
        }
        assert kinds == expected
    assert outline(saved[0]) == outline(saved[1])
    assert "lightning_pc" not in repr(saved[0])
    assert saved[0]["global_step"] == saved[1]["global_step"] == 6
    assert saved[0]["lr_schedulers"] == saved[1]["lr_schedulers"]
    assert repr(saved[0]["loops"]) == repr(saved[1]["loops"])
    net = mlp(nn.BatchNorm1d(7), nn.Dropout(0.0))  # the bare module, without Lightning
    net.load_state_dict({k.removeprefix("net."): v for k, v in saved[0]["state_dict"].items()})


@pytest.mark.parametrize(
    ("first", "then"), [(a, "auto") for a in ALGORITHMS] + [("auto", a) for a in STRATEGIES]
)
def test_checkpoints_go_both_ways(first, then, tmp_path):
    begun, fit = fitted(first, tmp_path / "first", 2, loader(data()))
    last = fit.checkpoint_callback.last_model_path
    assert_same(Net.load_from_checkpoint(last), begun)
    module, resumed = fitted(then, tmp_path / "then", 3, loader(data()), last)
    assert resumed.global_step == 9
    assert resumed.current_epoch == 3
    assert not torch.equal(module.net[0].weight, begun.net[0].weight)
    if then == "auto":  # exactly what plain Lightning makes of those weights and moments
        plain = Net()
        plain.load_state_dict(begun.state_dict())
        (adam,), (schedule,) = plain.configure_optimizers()
        adam.load_state_dict(fit.optimizers[0].state_dict())
        schedule["scheduler"].load_state_dict(fit.lr_scheduler_configs[0].scheduler.state_dict())
        for x, y in loader(data()):
            adam.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            adam.step()
            schedule["scheduler"].step()
        assert_same(module, plain)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resuming_with_one_order_of_the_data(strategy, tmp_path):
    """Without draws a resumed run is the whole run, with no help of ours."""
    whole, _ = fitted(strategy, tmp_path / "whole", 4, loader(data()))
    _, half = fitted(strategy, tmp_path / "half", 2, loader(data()))
    last = half.checkpoint_callback.last_model_path
    resumed, fit = fitted(strategy, tmp_path / "resumed", 4, loader(data()), last)
    assert_same(resumed, whole)
    assert fit.global_step == 12


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("at", mostly_slow([0, 2], 2))
def test_resuming_to_the_bit(strategy, at, tmp_path):
    """Shuffled data, dropout, numpy and random: the generators travel in the checkpoint."""
    whole, _ = fitted(
        strategy, tmp_path / "whole", 4, shuffling(), dropout=0.5, callbacks=[RandomState()]
    )
    checkpoint = next((tmp_path / "whole").glob(f"epoch={at}*.ckpt"))
    resumed, _ = fitted(
        strategy,
        tmp_path / "resumed",
        4,
        shuffling(),
        checkpoint,
        dropout=0.5,
        callbacks=[RandomState()],
    )
    assert_same(resumed, whole)
    without, _ = fitted(strategy, tmp_path / "without", 4, shuffling(), checkpoint, dropout=0.5)
    assert not torch.equal(without.net[0].weight, whole.net[0].weight)


@pytest.mark.parametrize("strategy", ["ipc", "auto"])
def test_random_state_changes_nothing_by_itself(strategy, tmp_path):
    runs = [
        fitted(strategy, tmp_path / str(len(c)), 2, shuffling(), dropout=0.5, callbacks=c)[0]
        for c in ([], [RandomState()])
    ]
    assert_same(*runs)


def test_random_state_is_safe_to_load(tmp_path):
    """Plain types alone: torch.load(weights_only=True) reads it."""
    _, fit = fitted("ipc", tmp_path, 1, shuffling(), callbacks=[RandomState()])
    saved = torch.load(fit.checkpoint_callback.last_model_path, weights_only=True)
    assert set(saved["callbacks"]["RandomState"]) >= {"torch", "numpy", "python"}
    seed_all(4)
    kept = RandomState().state_dict()
    expected = (torch.rand(3), np.random.rand(3), random.random(), np.random.normal())
    seed_all(5)
    callback = RandomState()
    callback.load_state_dict(kept)
    callback.on_fit_start(None, None)
    now = (torch.rand(3), np.random.rand(3), random.random(), np.random.normal())
    assert repr(now) == repr(expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_in_the_middle_of_an_epoch(algorithm, tmp_path):
    """Lightning goes on with the next batch index; data that follow the index go on exactly."""

    class Indexed(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(data(4)[batch_idx], batch_idx)

    def run(path: str, ckpt: Any = None, **kwargs: Any):
        seed_all(1 if ckpt is None else 99)
        module = Indexed()
        saves = ModelCheckpoint(tmp_path / path, every_n_train_steps=2, save_top_k=-1)
        fit = trainer(
            algorithm, max_epochs=2, callbacks=[saves], enable_checkpointing=True, **kwargs
        )
        fit.fit(module, loader(data(4)), ckpt_path=ckpt)
        return module, fit

    whole, fit = run("whole")
    checkpoint = next((tmp_path / "whole").glob("*step=2.ckpt"))
    resumed, again = run("resumed", checkpoint)
    assert again.global_step == fit.global_step == 8
    assert_same(resumed, whole)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_best_model_is_kept(algorithm, tmp_path):
    seed_all()
    module = Net()
    best = ModelCheckpoint(tmp_path, monitor="val_loss", mode="min")
    fit = trainer(algorithm, max_epochs=3, callbacks=[best], enable_checkpointing=True)
    fit.fit(module, loader(data()), loader(data(1)))
    assert Path(best.best_model_path).exists()
    (result,) = fit.validate(module, loader(data(1)), ckpt_path="best", verbose=False)
    assert result["val_loss"] == pytest.approx(float(best.best_model_score), rel=1e-6)
    (tested,) = fit.validate(Net(), loader(data(1)), ckpt_path=best.best_model_path, verbose=False)
    assert tested == result


def test_generators_of_another_number_of_processes_stay():
    callback, module = RandomState(), Module()
    own = callback.state_dict()
    callback.load_state_dict({"each": [own, own]})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="of 2 processes, this run has 1. Generators stay"):
        callback.on_fit_start(trainer("pc"), module)
    assert torch.equal(torch.get_rng_state(), before)
