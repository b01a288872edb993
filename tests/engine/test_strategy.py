"""The Trainer's door: accumulation, clipping, and the same numbers as the wrappers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
)
from lightning.pytorch.strategies import StrategyRegistry
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
from tests.engine.wrappers import WRAPPERS


def squared(scores: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(scores, F.one_hot(y, C).to(scores.dtype))


def summed(scores: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores, y, reduction="sum") / len(y)


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
