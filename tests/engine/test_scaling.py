"""float16: with a gradient scaler, whose powers of two change nothing, and whose skips skip."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_pc.scaling import Scaled
from lightning_pc.sharded import PCShardedStrategy
from tests.engine.lightning_problems import (
    ALGORITHMS,
    Module,
    data,
    loader,
    mlp,
    seed_all,
    trainer,
    weights,
)

#: Of the inference, so that a float16 run infers as its float32 twin does.
GIVEN = {"T": 6, "gamma": 0.1}


class FullPrecision(MixedPrecision):
    """Scales gradients, but computes in float32."""

    def forward_context(self):
        return nullcontext()


class Skips(torch.optim.SGD):
    """Takes every step but some."""

    left_out = ()
    count = 0

    def step(self, closure=None):
        if closure is not None:
            closure()
        self.count += 1
        if self.count not in self.left_out:
            super().step()


class Overflows(torch.amp.GradScaler):
    """Finds gradients of some steps infinite."""

    def __init__(self, left_out, **settings):
        super().__init__("cpu", **settings)
        self.left_out, self.count = left_out, 0

    def unscale_(self, optimizer):
        self.count += 1
        if self.count in self.left_out:
            for group in optimizer.param_groups:
                for p in (p for p in group["params"] if p.grad is not None):
                    p.grad.fill_(float("inf"))
        super().unscale_(optimizer)


class Normed(Module):
    """The factor is of the loss, whose gradients it makes small or large."""

    def __init__(self, factor=1.0, left_out=()):
        super().__init__(0.1, mlp(nn.LayerNorm(7)))
        self.factor, self.left_out, self.dtypes = factor, left_out, set()

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self(x)
        self.dtypes.add(scores.dtype)
        return F.cross_entropy(scores, y) * self.factor

    def configure_optimizers(self):
        optimizer = Skips(self.net.parameters(), self.lr / self.factor)
        optimizer.left_out = self.left_out
        return optimizer


def settings_of(algorithm):
    return {"algorithm": algorithm, **({} if algorithm == "zil" else GIVEN)}


def trained(algorithm, module=None, scaler=None, plugin=FullPrecision, **flags):
    seed_all()
    module = module or Normed()
    if scaler is not None:
        flags["plugins"] = plugin("16-mixed", "cpu", scaler=scaler)
    fit = trainer(settings_of(algorithm), **{"max_epochs": 3, **flags})
    fit.fit(module, loader(data(4, 8)))
    return weights(module), fit, module


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("flags", [{}, {"gradient_clip_val": 0.3}, {"accumulate_grad_batches": 2}])
def test_a_scale_changes_nothing(algorithm, flags):
    """The scale is a power of two, which costs no digit."""
    if "accumulate_grad_batches" in flags and algorithm in ("ipc", "iepc"):
        pytest.skip("has nothing to accumulate")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=5)
    plain, _, _ = trained(algorithm, **flags)
    scaled, _, _ = trained(algorithm, scaler=scaler, **flags)
    assert torch.equal(scaled, plain)
    assert scaler.get_scale() > 2.0**20


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_skipped_step_skips_that_update_alone(algorithm):
    """Steps within a batch, at its end, and two on end, as an optimizer that leaves them out."""
    left_out = (2, 3, 6)
    scaler = Overflows(left_out, init_scale=2.0**20)
    plain, fit, _ = trained(algorithm, Normed(left_out=left_out))
    scaled, again, _ = trained(algorithm, scaler=scaler)
    assert torch.equal(scaled, plain)
    assert scaler.get_scale() == 2.0**17
    assert scaler.count == fit.optimizers[0].count
    assert again.strategy.report.learned == fit.strategy.report.learned


def test_a_skipped_step_counts_as_none():
    last_but_one = 3 * 4 * 6 - 1  # epochs, batches, updates
    _, fit, _ = trained("ipc", scaler=Overflows([last_but_one], init_scale=2.0**20))
    _, plain, _ = trained("ipc")
    for name, count in plain.strategy.report.learned.items():
        assert fit.strategy.report.learned[name] == count - 1, name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_values_whose_gradients_overflow_stay(algorithm):
    """No step of the batch fits: it leaves no trace but a lower scale."""
    factor, scale = 2.0**10, 2.0**127
    before = weights(Normed())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    once = {"max_epochs": 1, "limit_train_batches": 1}
    after, fit, module = trained(algorithm, Normed(factor), scaler, **once)
    assert torch.equal(after, before)
    assert scaler.get_scale() < scale
    assert all(value.isfinite().all() for value in fit.strategy.values.values())
    x, _ = data(4, 8)[0]
    torch.testing.assert_close(fit.strategy.values["net.2"], module.net[:2](x).detach())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_float16_is_near_float32(algorithm):
    """Rounding apart, 11 bits, in each of up to 72 updates."""
    assert off(algorithm, 1.0, 2.0**10) < 72 * 2.0**-11


@pytest.mark.parametrize("algorithm", ["pc", "zil"])
def test_small_errors_do_not_vanish(algorithm):
    assert off(algorithm, 2.0**-20, 2.0**20) < 72 * 2.0**-11
    assert off(algorithm, 2.0**-20, 1.0) > 0.2


def off(algorithm, factor, scale):
    """How far from float32 float16 ends, against the way that weights have gone."""
    plain, _, _ = trained(algorithm, Normed(factor))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    found, _, module = trained(algorithm, Normed(factor), scaler, MixedPrecision)
    assert module.dtypes == {torch.float16}
    return float((found - plain).norm() / (plain - weights(Normed())).norm())


def test_an_overflow_reaches_the_scaler():
    scaled = Scaled(torch.amp.GradScaler("cpu"))
    weight = nn.Parameter(torch.ones(2))
    finite, infinite = torch.ones(3), torch.tensor([1.0, float("inf")])
    assert scaled.fit([None, finite])
    scaled.pass_on([weight])
    weight.grad = torch.ones(2)
    scaled.pass_on([weight])
    assert weight.grad.isfinite().all()
    assert not scaled.fit([finite, infinite])
    assert scaled.fit([finite])  # the word stays until a gradient has taken it
    scaled.pass_on([weight])
    assert not weight.grad.isfinite().any()


def test_shards_do_not_train_in_float16():
    strategy, plugin = PCShardedStrategy("ipc"), MixedPrecision("16-mixed", "cpu")
    strategy.connect(Module())
    with pytest.raises(MisconfigurationException, match=r"PCShardedStrategy.*float16.*bf16"):
        strategy.setup(SimpleNamespace(callbacks=[], precision_plugin=plugin))
