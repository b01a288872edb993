"""The Trainer's door: schedulers, callbacks of Lightning's own, what training_step returns."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.tuner import Tuner
from torch import nn

import lightning_pc
from tests.engine.lightning_problems import (
    ALGORITHMS,
    C,
    Chosen,
    Memory,
    Module,
    Moves,
    data,
    loader,
    mlp,
    seed_all,
    trainer,
    weights,
)
from tests.engine.modules import MLP
from tests.engine.wrappers import WRAPPERS

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
