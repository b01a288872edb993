"""Flags, data and callbacks of Lightning, against the same done by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_pc.stages.local import LocalErrors
from tests.engine.by_hand import LR, SETTINGS, Ends, Net, T, by_hand, each_algorithm, fitted, same
from tests.engine.lightning_problems import (
    Memory,
    Module,
    data,
    loader,
    mlp,
    shuffling,
    trainer,
    weights,
)

# --- flags, profilers, callbacks and data that decide what is trained on, and no more ------------


class Stops(L.Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = True


class Late(pl_callbacks.Timer):
    """A second passes each time that the Trainer looks; ``max_time`` is a Timer as well."""

    seconds = 0

    def time_elapsed(self, stage="train"):
        self.seconds += 1
        return self.seconds


class Endless(IterableDataset):
    """Has no length."""

    def __iter__(self):
        return iter(data(3))


def combined(mode: str) -> CombinedLoader:
    return CombinedLoader({"a": loader(data(4)), "b": loader(data(2)[::-1])}, mode)


def throughput() -> L.Callback:
    return pl_callbacks.ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=3)


BAREBONES = dict.fromkeys(("logger", "enable_checkpointing", "log_every_n_steps"))
BAREBONES |= dict.fromkeys(("enable_progress_bar", "enable_model_summary"))
#: name -> the Trainer's arguments, the training data, the validation data
CASES: dict[str, tuple[Any, Any, Any]] = {
    "overfit_batches": ({"overfit_batches": 2, "max_epochs": 2}, data, data),
    "limit_train_batches": ({"limit_train_batches": 0.5, "max_epochs": 2}, data, data),
    "fast_dev_run": ({"fast_dev_run": 2}, data, data),
    "val_check_interval": ({"val_check_interval": 2}, partial(data, 5), data),
    "a share": ({"val_check_interval": 0.5, "max_epochs": 2}, partial(data, 4), data),
    "not by epochs": (
        {"check_val_every_n_epoch": None, "val_check_interval": 4, "max_epochs": 3},
        *(data, data),
    ),
    "limit_val_batches": ({"limit_val_batches": 0}, data, data),
    "max_steps": ({"max_steps": 4, "max_epochs": -1}, data, data),
    "min_steps": ({"min_steps": 5, "max_epochs": 9, "callbacks": [Stops()]}, data, data),
    "stop": ({"max_epochs": 9, "callbacks": [Stops()]}, data, data),
    "max_time": ({"callbacks": [Late({"seconds": 4})], "max_epochs": 9}, data, data),
    "detect_anomaly": ({"detect_anomaly": True}, data, data),
    "num_sanity_val_steps": ({"num_sanity_val_steps": 1}, data, data),
    "inference_mode": ({"inference_mode": False}, data, data),
    "benchmark": ({"benchmark": True}, data, data),
    "deterministic": ({"deterministic": True}, data, data),
    "barebones": ({"barebones": True, **BAREBONES}, data, data),
    "reload": ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, shuffling, data),
    "advanced profiler": ({"profiler": "advanced"}, data, data),
    "pytorch profiler": ({"profiler": "pytorch"}, data, data),
    "device stats": (
        {"callbacks": [pl_callbacks.DeviceStatsMonitor(cpu_stats=True)], "logger": Memory()},
        *(data, data),
    ),
    "throughput": ({"callbacks": [throughput()], "logger": Memory()}, data, data),
    "no length": ({"max_epochs": 2}, lambda: DataLoader(Endless(), batch_size=None), data),
    "two of validation": ({}, data, lambda: [loader(data(1)), loader(data(2))]),
    "max_size_cycle": ({"max_epochs": 2}, partial(combined, "max_size_cycle"), data),
    "min_size": ({"max_epochs": 2}, partial(combined, "min_size"), data),
    "max_size": ({"max_epochs": 2}, partial(combined, "max_size"), data),
    "a dict": ({}, lambda: [{"x": x, "y": y} for x, y in data()], data),
}


@each_algorithm
@pytest.mark.parametrize("name", CASES)
def test_trains_on_plain_lightnings_batches_as_by_hand(name, algorithm, tmp_path):
    flags, batches, validation = CASES[name]
    module, fit = fitted(SETTINGS[algorithm], flags, batches, validation, tmp_path / "ours")
    plain, expected = fitted("auto", flags, batches, validation, tmp_path / "plain")
    assert repr(module.seen) == repr(plain.seen)
    assert fit.global_step == expected.global_step == len(module.batches) > 0
    same(weights(module), by_hand(algorithm, module.batches)[-1])
    if fit.loggers:
        assert [[s, sorted(m)] for s, m in fit.logger.seen] == [
            [s, sorted(m)] for s, m in expected.logger.seen
        ]


class Clips(torch.optim.SGD):
    """Clips by itself, before each step."""

    how: Any = None

    def step(self, closure=None):
        self.how([p for group in self.param_groups for p in group["params"]], 0.05)
        return super().step(closure)


@each_algorithm
@pytest.mark.parametrize("how", ["norm", "value"])
def test_clipping_is_that_of_an_optimizer_that_clips(how, algorithm, tmp_path):
    flags = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": how}
    module, _ = fitted(SETTINGS[algorithm], flags, data, data, tmp_path)
    kind = type("Kind", (Clips,), {"how": staticmethod(getattr(nn.utils, f"clip_grad_{how}_"))})
    same(weights(module), by_hand(algorithm, data(), sgd=kind)[-1])
    assert not torch.allclose(weights(module), by_hand(algorithm, data())[-1], rtol=1e-3)


def test_accumulation_that_changes_is_batches_that_grow():
    module = Net()
    scheduled = pl_callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    fit = trainer(SETTINGS["pc"], callbacks=[scheduled], max_epochs=2)
    fit.fit(module, loader(data(4)))
    pairs = zip(data(4)[::2], data(4)[1::2], strict=True)
    joined = [tuple(map(torch.cat, zip(a, b, strict=True))) for a, b in pairs]
    same(weights(module), by_hand("pc", data(4) + joined)[-1])


# --- callbacks that touch the weights ------------------------------------------------------------


@each_algorithm
def test_stochastic_weight_averaging_is_the_mean_of_epochs(algorithm, graphs):
    """Lightning takes the weights where an epoch starts, so those of the last epoch are left out.

    Statistics of its pass for BatchNorm are those of the mean. The last batch of that pass is its
    own fault: it steps on what is left in .grad, under any strategy.
    """
    ends, batches = Ends(), data(3, 8)
    module = Net(net=mlp(nn.BatchNorm1d(7)))
    averaging = pl_callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2)
    fit = trainer(SETTINGS[algorithm], callbacks=[ends, averaging], max_epochs=4)
    fit.fit(module, loader(batches))
    assert graphs() == 0  # the forwards of that pass, after which nothing is inferred
    mean = torch.stack(ends.epochs[1:4]).mean(0)
    same(ends.batches[12], mean)
    same(ends.batches[13], mean)
    nn.utils.vector_to_parameters(mean.float(), module.parameters())
    inputs = [module.net[0](x) for x, _ in batches]
    same(module.net[1].running_mean, torch.stack([z.mean(0) for z in inputs]).mean(0))
    same(module.net[1].running_var, torch.stack([z.var(0) for z in inputs]).mean(0))


@each_algorithm
def test_an_ema_counts_batches_whatever_steps_they_have(algorithm):
    """iPC steps T times a batch, of which global_step and so the average count one."""
    ends, averaged = Ends(), []

    class Looks(Net):
        def validation_step(self, batch, batch_idx):
            averaged.append(weights(self))

    module = Looks()
    ema = pl_callbacks.EMAWeightAveraging(decay=0.5)
    fit = trainer(SETTINGS[algorithm], callbacks=[ends, ema], num_sanity_val_steps=0)
    fit.fit(module, loader(data(4)), loader(data(1)))
    assert fit.global_step == 4
    assert max(fit.strategy.report.learned.values()) == (T if algorithm == "ipc" else 1)
    expected = ends.batches[0]
    for now in ends.batches[1:]:
        expected = 0.5 * expected + 0.5 * now
    same(averaged[0], expected)
    same(weights(module), expected)
    same(ends.batches[-1], by_hand(algorithm, data(4))[-1])


@each_algorithm
def test_pruned_weights_stay_zero(algorithm):
    """Weights become weight_orig * weight_mask between two epochs, in other modules' hooks."""
    module, masks = Net(), []

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.current_epoch:
                masks.append(module.net[2].weight_mask.clone())
                assert not module.net[2].weight[masks[-1] == 0].any()

    pruning = pl_callbacks.ModelPruning(
        "l1_unstructured",
        [(module.net[0], "weight"), (module.net[2], "weight")],
        amount=0.5,
        use_global_unstructured=False,
        use_lottery_ticket_hypothesis=False,
        apply_pruning=lambda epoch: epoch == 0,
    )
    ends = Ends()
    fit = trainer(SETTINGS[algorithm], callbacks=[pruning, Looks(), ends], max_epochs=2)
    fit.fit(module, loader(data()))
    assert set(dict(module.named_parameters())) == set(dict(Net().named_parameters()))
    assert int((module.net[2].weight == 0).sum()) == int((masks[-1] == 0).sum()) in (24, 25)
    other = Net()
    by_hand(algorithm, data(), other)
    for layer in (other.net[0], other.net[2]):
        nn.utils.prune.l1_unstructured(layer, "weight", amount=0.5)
    by_hand(algorithm, data(), other)
    for layer in (other.net[0], other.net[2]):
        nn.utils.prune.remove(layer, "weight")
    for name, value in other.state_dict().items():
        same(module.state_dict()[name], value)


class Tuned(Net):
    """A backbone, and a head that is trained first."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = self.net[:2], self.net[2:]

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=LR)


@each_algorithm
def test_a_backbone_moves_once_it_is_thawed(algorithm):
    module, starts, learned = Tuned(), [], []
    tuning = pl_callbacks.BackboneFinetuning(1, backbone_initial_lr=LR, should_align=False)

    class Looks(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            starts.append(weights(module.backbone))

        def on_train_epoch_end(self, trainer, pl_module):
            learned.append(set(trainer.strategy.report.learned))

    trainer(SETTINGS[algorithm], callbacks=[tuning, Looks()], max_epochs=2).fit(
        module, loader(data())
    )
    assert torch.equal(starts[0], starts[1])
    assert (weights(module.backbone) - starts[1]).norm() > 1e-3
    assert learned[1] - learned[0] == {"net.0.weight", "net.0.bias"}
    other = Tuned()
    other.backbone.requires_grad_(False)
    by_hand(algorithm, data(), other)
    other.backbone.requires_grad_(True)
    by_hand(algorithm, data(), other)
    same(weights(module), weights(other))


@each_algorithm
@pytest.mark.parametrize("gamma", [0.1, "auto"])
def test_a_fit_after_a_search_for_a_learning_rate(gamma, algorithm, tmp_path):
    """All that the search has moved is put back, the automatic gamma as well."""
    settings = SETTINGS[algorithm] | ({"gamma": gamma} if algorithm != "zil" else {})
    finder = pl_callbacks.LearningRateFinder(num_training_steps=16, early_stop_threshold=None)
    module, fit = fitted(settings, {"callbacks": [finder]}, partial(data, 20), data, tmp_path)
    (finder,) = (c for c in fit.callbacks if isinstance(c, pl_callbacks.LearningRateFinder))
    assert len(finder.optimal_lr.results["loss"]) >= 16
    assert module.lr == finder.optimal_lr.suggestion() != LR
    other, expected = fitted(settings, {}, partial(data, 20), data, tmp_path, Net(module.lr))
    assert torch.equal(weights(module), weights(other))
    assert fit.strategy.report.gamma == expected.strategy.report.gamma
    assert not torch.equal(weights(module), weights(Net()))


class Sized(Module):
    def __init__(self, batch_size):
        super().__init__(LR)
        self.batch_size = batch_size

    def train_dataloader(self):
        x, y = (torch.cat(part) for part in zip(*data(16), strict=True))
        return DataLoader(TensorDataset(x, y), self.batch_size)


@pytest.mark.parametrize("algorithm", ["ipc", "pc"])
def test_a_fit_after_a_search_for_a_batch_size(algorithm, monkeypatch, tmp_path):
    """Inference that finds no memory is what the search looks for."""
    settings, whole = {**SETTINGS[algorithm], "gamma": "auto"}, LocalErrors.__call__

    def short(self, asked):
        if asked.t == 2 and len(self.nodes[0].x) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, asked)

    monkeypatch.setattr(LocalErrors, "__call__", short)
    finder = pl_callbacks.BatchSizeFinder(init_val=2, steps_per_trial=2)
    ends, run = [], {"callbacks": [finder], "default_root_dir": tmp_path}
    for module, flags in ((Sized(1), run), (Sized(8), {})):
        fit = trainer(settings, **flags)
        fit.fit(module)
        assert module.batch_size == 8
        assert fit.global_step == 8
        ends.append(weights(module))
    assert torch.equal(*ends)


def test_a_combined_loader_in_sequence_is_not_for_training():
    for strategy in (SETTINGS["pc"], "auto"):
        with pytest.raises(ValueError, match="does not support the `CombinedLoader"):
            trainer(strategy).fit(Net(), combined("sequential"))
