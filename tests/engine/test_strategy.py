"""The Trainer's door: accumulation, clipping, schedulers, callbacks of Lightning's own."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.tuner import Tuner
from torch import nn

import lightning_pc
from lightning_pc.optim import EPC, IEPC, IPC, PC, ZIL
from tests.engine.lightning_problems import (
    ALGORITHMS,
    C,
    Memory,
    Module,
    data,
    loader,
    mlp,
    seed_all,
    trainer,
    weights,
)
from tests.engine.modules import MLP

WRAPPERS = {"ipc": IPC, "pc": PC, "zil": ZIL, "epc": EPC, "iepc": IEPC}


def squared(scores: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(scores, F.one_hot(y, C).to(scores.dtype))


def summed(scores: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores, y, reduction="sum") / len(y)


class Chosen(Module):
    def __init__(self, loss=F.cross_entropy, lr=0.3, net=None):
        super().__init__(lr, net)
        self.loss = loss

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self(x), y)


def pairs(n: int) -> list[Any]:
    return data(n, 4, torch.float64)


def joined(batches: list[Any]) -> list[Any]:
    twos = zip(batches[::2], batches[1::2], strict=True)
    return [tuple(torch.cat(both) for both in zip(a, b, strict=True)) for a, b in twos]


# --- accumulation --------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["pc", "zil", "epc"])
@pytest.mark.parametrize("loss", [F.cross_entropy, squared, summed])
def test_accumulating_two_batches_is_one_twice_as_large(algorithm, loss):
    runs = []
    for batches, accumulated in ((pairs(6), 2), (joined(pairs(6)), 1)):
        module = Chosen(loss)
        # decay looks at a batch's energy, an automatic gamma at a batch's curvature
        settings = {"algorithm": algorithm, "gamma_decay": 1.0}
        settings |= {} if algorithm == "zil" else {"gamma": 0.1}
        fit = trainer(settings, accumulate_grad_batches=accumulated, precision="64-true")
        fit.fit(module, loader(batches))
        assert fit.global_step == 3
        runs.append(weights(module))
    start = weights(Chosen(loss))
    assert (runs[0] - start).norm() > 1e-3
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("algorithm", ["pc", "zil", "epc"])
def test_what_is_left_over_at_the_end_of_an_epoch_is_stepped(algorithm):
    """Three batches, accumulated by two: Lightning divides all by two and steps twice."""
    runs = {}
    for strategy in (algorithm, "auto"):
        module = Chosen()
        settings = {"algorithm": algorithm} if strategy != "auto" else "auto"
        fit = trainer(settings, accumulate_grad_batches=2, precision="64-true")
        fit.fit(module, loader(pairs(3)))
        assert fit.global_step == 2
        runs[strategy] = weights(module)
    if algorithm == "zil":
        torch.testing.assert_close(*runs.values(), rtol=1e-9, atol=1e-12)
    else:
        assert not torch.allclose(*runs.values(), rtol=1e-6)


def test_accumulation_that_changes_in_mid_run():
    runs = []
    for strategy in ("zil", "auto"):
        module = Chosen()
        scheduled = GradientAccumulationScheduler({0: 1, 1: 2})
        trainer(strategy, callbacks=[scheduled], max_epochs=2, precision="64-true").fit(
            module, loader(pairs(4))
        )
        runs.append(weights(module))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)


# --- clipping ------------------------------------------------------------------------------------


class Moves(L.Callback):
    """The distance that the weights went in each batch."""

    def __init__(self, order: float = 2) -> None:
        self.order, self.far = order, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.start = weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.far.append(float((weights(pl_module) - self.start).norm(self.order)))


@pytest.mark.parametrize(
    ("how", "order"), [("norm", 2.0), ("value", float("inf"))], ids=["norm", "value"]
)
@pytest.mark.parametrize(("algorithm", "steps"), [("ipc", 5), ("iepc", 5), ("pc", 1), ("epc", 1)])
def test_every_step_is_clipped(how, order, algorithm, steps):
    moves, lr, clip = Moves(order), 0.3, 1e-3
    fit = trainer(
        {"algorithm": algorithm, "T": 5, "gamma": 0.1},
        gradient_clip_val=clip,
        gradient_clip_algorithm=how,
        callbacks=[moves],
        precision="64-true",
    )
    fit.fit(Chosen(lr=lr), loader(pairs(3)))
    assert len(moves.far) == 3
    for far in moves.far:
        assert far <= steps * lr * clip * (1 + 1e-9)
        assert far > 0.9 * steps * lr * clip  # each of the steps was that long


@pytest.mark.parametrize(
    ("algorithm", "times"), [("ipc", 5), ("iepc", 5), ("pc", 1), ("zil", 1), ("epc", 1)]
)
def test_the_users_own_clipping_acts_at_each_step(algorithm, times):
    class Clips(Chosen):
        clipped = 0

        def configure_gradient_clipping(self, optimizer, *args, **kwargs):
            assert isinstance(optimizer, torch.optim.SGD)
            type(self).clipped += 1
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            self.log("norm", nn.utils.get_total_norm(grads))
            self.clip_gradients(optimizer, 1e-4, "norm")

    moves = Moves()
    settings = {"algorithm": algorithm} | ({} if algorithm == "zil" else {"T": 5})
    fit = trainer(
        settings,
        callbacks=[moves],
        precision="64-true",
        logger=Memory(),
    )
    module = Clips()
    fit.fit(module, loader(pairs(2)))
    assert Clips.clipped == 2 * times
    assert max(moves.far) <= times * 0.3 * 1e-4 * (1 + 1e-9)
    assert [sorted(seen) for _, seen in fit.logger.seen] == [["epoch", "norm"]] * 2


# --- both doors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_both_doors_train_alike(algorithm):
    module = Chosen(net=mlp(nn.Dropout(0.2), nn.BatchNorm1d(7)))
    seed_all()
    fit = trainer(algorithm)
    fit.fit(module, loader(data()))
    model = mlp(nn.Dropout(0.2), nn.BatchNorm1d(7))
    optimizer = WRAPPERS[algorithm](torch.optim.SGD(model.parameters(), lr=0.3), model)
    seed_all()
    iterator = iter(loader(data()))  # which draws a seed
    losses = [
        float(optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))) for x, y in iterator
    ]
    assert len(losses) == 3
    for name, value in model.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], value, rtol=0, atol=0)
    assert fit.strategy.report.learned == {
        f"net.{name}": times for name, times in optimizer.report.learned.items()
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_registered_names(algorithm):
    assert algorithm in StrategyRegistry.available_strategies()
    fit = trainer(algorithm)
    assert isinstance(fit.strategy, lightning_pc.PCStrategy)
    assert fit.strategy.settings.algorithm == algorithm
    fit.fit(Module(), loader(data()))
    report = fit.strategy.report
    assert report.algorithm == algorithm
    assert list(fit.strategy.values) == report.nodes == ["net.1", "net.3"]
    assert set(report.learned) == {n for n, _ in Module().named_parameters()}
    assert min(report.learned.values()) > 0
    assert min(report.peak_energy.values()) > 0
    lightning_pc.PCStrategy.register_strategies(StrategyRegistry)  # once more does no harm


def test_before_any_batch_there_is_no_report():
    strategy = lightning_pc.PCStrategy()
    assert strategy.report is None
    assert strategy.values == {}


# --- schedulers and Lightning's callbacks --------------------------------------------------------


class Scheduled(Chosen):
    def __init__(self, make, **config):
        super().__init__()
        self.make, self.config = make, config

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make(optimizer), **self.config},
        }

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0)  # never falls


SCHEDULERS = {
    "step": (lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5), {}),
    "onecycle": (
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        {"interval": "step"},
    ),
    "plateau": (
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        {"monitor": "val_loss"},
    ),
    "warmup": (
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 4)),
        {"interval": "step", "frequency": 2},
    ),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rates_are_plain_lightnings(algorithm, name):
    make, config = SCHEDULERS[name]
    runs = []
    for strategy in (algorithm, "auto"):
        memory = Memory()
        fit = trainer(strategy, logger=memory, max_epochs=3, callbacks=[LearningRateMonitor()])
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", message=".*bottleneck.*|.*treespec.*")
            fit.fit(Scheduled(make, **config), loader(data()), loader(data(1)))
        runs.append((memory.seen, fit.optimizers[0].param_groups[0]["lr"]))
    assert runs[0] == runs[1]
    assert runs[0][1] != 0.3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_early_stopping(algorithm):
    stopping = EarlyStopping("val_loss", patience=1)
    fit = trainer(algorithm, callbacks=[stopping, Timer()], max_epochs=9)
    fit.fit(Scheduled(SCHEDULERS["step"][0]), loader(data()), loader(data(1)))
    assert fit.current_epoch == 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_stochastic_weight_averaging(algorithm):
    """Its last pass runs training_step without backward, to renew BatchNorm's statistics."""
    module = Chosen(net=mlp(nn.BatchNorm1d(7), nn.Dropout(0.3)))
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    fit = trainer(algorithm, callbacks=[averaging], max_epochs=3)
    fit.fit(module, loader(data()))
    assert averaging.n_averaged == 3
    x, y = data()[0]
    model = module.net.eval()
    assert F.cross_entropy(model(x), y).grad_fn is not None
    assert not torch.equal(weights(module), weights(Chosen(net=mlp(nn.BatchNorm1d(7)))))


def test_averaged_statistics_are_plain_lightnings():
    """At lr 0 that last pass must see what plain Lightning's sees."""
    runs = []
    for strategy in ("ipc", "auto"):
        seed_all()
        module = Chosen(lr=0.0, net=mlp(nn.BatchNorm1d(7)))
        averaging = StochasticWeightAveraging(swa_lrs=1e-30, swa_epoch_start=1)
        trainer(strategy, callbacks=[averaging], max_epochs=3).fit(module, loader(data()))
        runs.append(module.state_dict())
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], rtol=0, atol=1e-25)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"fast_dev_run": True}, 1),
        ({"overfit_batches": 1, "max_epochs": 3}, 3),
        ({"limit_train_batches": 2}, 2),
        ({"max_steps": 4, "max_epochs": -1}, 4),
        ({"detect_anomaly": True}, 3),
        ({"deterministic": True}, 3),
        ({"inference_mode": False}, 3),
        ({"val_check_interval": 1}, 3),
        ({"profiler": "simple"}, 3),
        ({"barebones": True}, 3),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_trainer_flags(algorithm, flags, steps, tmp_path):
    module = Scheduled(SCHEDULERS["step"][0])
    before = weights(module)
    if "barebones" in flags:
        flags = {**flags, "logger": None, "enable_checkpointing": None, "log_every_n_steps": None}
        flags |= {"enable_progress_bar": None, "enable_model_summary": None}
    fit = trainer(algorithm, default_root_dir=tmp_path, **flags)
    fit.fit(module, loader(data()), loader(data(1)))
    torch.use_deterministic_algorithms(False)
    assert fit.global_step == steps
    assert not torch.equal(weights(module), before)


def test_learning_rate_finder(tmp_path):
    fit = trainer("pc", default_root_dir=tmp_path, max_epochs=5)
    module = Chosen()
    before = weights(module)
    found = Tuner(fit).lr_find(module, loader(data()), num_training=10, update_attr=False)
    assert len(found.results["loss"]) > 5
    assert torch.equal(weights(module), before)
    fit.fit(module, loader(data()))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_step_that_returns_none_skips_the_batch(algorithm):
    class Skips(Chosen):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    moves = Moves()
    fit = trainer(algorithm, callbacks=[moves])
    fit.fit(Skips(), loader(data()))
    assert [far > 0 for far in moves.far] == [True, False, True]
    assert fit.global_step == 3  # as plain Lightning counts


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_returning_a_dict(algorithm):
    class Dicts(Chosen):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "extra": 1}

    runs = []
    for kind in (Dicts, Chosen):
        module = kind()
        trainer(algorithm).fit(module, loader(data()))
        runs.append(weights(module))
    assert torch.equal(*runs)


def test_the_loss_that_is_seen_is_that_of_the_first_forward():
    seen = []

    class Sees(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs["loss"])

    module = Chosen()
    x, y = data(1)[0]
    expected = F.cross_entropy(module(x), y)
    fit = trainer("ipc", callbacks=[Sees()])
    fit.fit(module, loader(data(1)))
    assert torch.equal(seen[0], expected)
    assert not seen[0].requires_grad
    assert fit.strategy.report.loss[0] == expected


def test_several_fits_with_one_trainer_and_two_models():
    fit = trainer("ipc")
    for module in (Chosen(), Chosen(net=mlp(nn.GELU())), Chosen()):
        before = weights(module)
        fit.fit(module, loader(data()))
        assert not torch.equal(weights(module), before)
        fit.fit_loop.max_epochs += 1


def test_unfreezing_in_mid_run_is_noticed():
    """Transfer learning: layers are frozen at first, by epochs less so."""

    class Unfreezes(Chosen):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)
            self.learned = []

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net[0].requires_grad_(True)

        def on_train_epoch_end(self):
            self.learned.append(sorted(self.trainer.strategy.report.learned))

    module = Unfreezes()
    trainer("ipc", max_epochs=2).fit(module, loader(data()))
    assert "net.0.weight" not in module.learned[0]
    assert "net.0.weight" in module.learned[1]
    assert not torch.equal(module.net[0].weight, Unfreezes().net[0].weight)


def test_a_fresh_gradient_for_each_batch():
    """What is left in .grad by others does not leak into a batch, as with plain Lightning."""

    class Leaves(Chosen):
        def on_train_batch_end(self, *args):
            for p in self.parameters():
                p.grad = torch.full_like(p, 100.0)

    module = Leaves(lr=0.01)
    moves = Moves()
    trainer("ipc", callbacks=[moves]).fit(module, loader(data()))
    assert max(moves.far) < 1.0


class Adversaries(L.LightningModule):
    """Two optimizers, each in a wrapper of the whole, under the Trainer's default strategy."""

    def __init__(self, algorithm):
        super().__init__()
        self.automatic_optimization = False
        self.maker, self.judge, self.wrapper = mlp(), nn.Sequential(), WRAPPERS[algorithm]
        self.judge.extend([nn.Linear(C, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)])

    def configure_optimizers(self):
        parts = (self.maker, self.judge)
        return [self.wrapper(torch.optim.Adam(p.parameters(), 0.01), self) for p in parts]

    def training_step(self, batch, _):
        x, y = batch
        for optimizer, label in zip(self.optimizers(), (0, 1), strict=True):
            labels = torch.full_like(y, label)
            optimizer.step(lambda to=labels: F.cross_entropy(self.judge(self.maker(x)), to))


@pytest.mark.parametrize("algorithm", ["ipc", "pc"])
def test_several_optimizers_in_manual_optimization(algorithm):
    module = Adversaries(algorithm)
    before = [weights(part) for part in (module.maker, module.judge)]
    trainer("auto").fit(module, loader(data()))
    for part, start in zip((module.maker, module.judge), before, strict=True):
        assert not torch.equal(weights(part), start)
    for optimizer, part in zip(module.optimizers(), ("maker", "judge"), strict=True):
        learned = optimizer.report.learned
        assert {name.split(".")[0] for name in learned} == {part}
        assert all(learned.values())
    assert module.judge[1].num_batches_tracked == 2 * len(data())  # the first forwards' alone


def test_an_optimizer_that_a_callback_puts_in_place():
    class Swaps(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            half = list(module.parameters())[trainer.current_epoch :]
            trainer.strategy.optimizers = [torch.optim.SGD(half, 0.1)]

    module, first = Module(), []

    class Looks(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            first.append(set(trainer.strategy.report.learned))

    trainer("pc", callbacks=[Swaps(), Looks()], max_epochs=2).fit(module, loader(data()))
    assert first[0] - first[1] == {next(name for name, _ in module.named_parameters())}


def test_data_of_many_shapes():
    """A ragged last batch, and another batch size in every step."""
    module = Chosen()
    batches = [data(1, n)[0] for n in (4, 3, 1, 8)]
    trainer("ipc").fit(module, loader(batches))
    assert weights(module).isfinite().all()


class StepsItsScheduler(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = MLP((3, 4, 2))

    def training_step(self, batch, batch_idx):
        self.lr_schedulers().step()
        return torch.nn.functional.mse_loss(self.net(batch), batch[:, :2])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("algorithm", ["ipc", "pc", "zil", "epc"])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_a_scheduler_stepped_in_training_step_steps_once(algorithm):
    ends = []
    for strategy in ("auto", algorithm):
        trainer = L.Trainer(
            strategy=strategy,
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(StepsItsScheduler(), torch.utils.data.DataLoader(torch.randn(8, 3), 4))
        ends.append(trainer.lr_scheduler_configs[0].scheduler.last_epoch)
    assert ends[0] == ends[1]


def test_one_strategy_serves_one_trainer_after_the_other():
    """As SingleDeviceStrategy does, where the accelerator is left open."""
    strategy, reports = lightning_pc.PCStrategy("pc", T=4), []
    for _ in range(2):
        seed_all()
        trainer(strategy, accelerator="auto").fit(Module(), loader(data()))
        reports.append(strategy.report.loss)
    assert torch.equal(*reports)
