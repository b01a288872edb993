"""Every precision that a Trainer offers trains, or is refused (test_errors) with a reason."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc.errors import UnsupportedError
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
from tests.engine.wrappers import WRAPPERS

WEIGHTS = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
}


class Learns(Module):
    def __init__(self):
        super().__init__(0.2, mlp(nn.LayerNorm(7)))
        self.losses, self.dtypes, self.logits = [], set(), set()

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self(x)
        loss = F.cross_entropy(scores, y)
        self.losses.append(loss.item())
        self.logits.add(scores.dtype)
        return loss

    def on_train_batch_end(self, *args):
        self.dtypes |= {v.dtype for v in self.trainer.strategy.values.values()}


@pytest.mark.parametrize("wrapper", WRAPPERS.values())
@pytest.mark.parametrize("autocast", [True, False])
def test_float16_is_refused_wherever_it_comes_from(autocast, wrapper):
    model, x = mlp(), torch.randn(8, 5)
    if not autocast:
        model, x = model.half(), x.half()
    optimizer = wrapper(torch.optim.SGD(model.parameters(), 0.1), model)

    def closure():
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            return model(x).float().square().mean()

    before = weights(model)
    with pytest.raises(UnsupportedError, match="float16"):
        optimizer.step(closure)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("precision", WEIGHTS)
def test_precision(precision, algorithm):
    seed_all()
    module = Learns()
    dtype = torch.float64 if precision == "64-true" else torch.float32
    fit = trainer(algorithm, precision=precision, max_epochs=20)
    fit.fit(module, loader(data(1, 8, dtype)))
    assert module.losses[-1] < 0.9 * module.losses[0]
    assert len(module.losses) == 20
    assert {p.dtype for p in module.parameters()} == {WEIGHTS[precision]}
    assert module.dtypes == {torch.float64 if precision == "64-true" else torch.float32}
    half = {"bf16-mixed", "bf16-true"}
    assert module.logits == {torch.bfloat16 if precision in half else WEIGHTS[precision]}
    assert weights(module).isfinite().all()
    assert fit.strategy.report.energy.dtype == max(
        torch.float32, WEIGHTS[precision], key=lambda d: torch.finfo(d).bits
    )


def test_zil_in_bf16_is_near_backprop_in_bf16():
    """Rounding apart, the same weights: bf16 has 8 bits."""
    runs = []
    for strategy in ("zil", "auto"):
        seed_all()
        module = Module()
        trainer(strategy, precision="bf16-mixed").fit(module, loader(data(3, 8)))
        runs.append(weights(module))
    moved = (runs[1] - weights(Module())).norm()
    assert (runs[0] - runs[1]).norm() < 0.02 * moved


# --- autocast around step ------------------------------------------------------------------------


def autocast(**kwargs):
    return torch.autocast("cpu", dtype=torch.bfloat16, **kwargs)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_autocast_around_step_sees_the_new_weights(algorithm):
    """Autocast keeps the weights' bf16 copies: without care iPC trains on stale ones."""

    def train(around, within):
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        optimizer = WRAPPERS[algorithm](sgd, model)
        losses = []
        with around:  # one for all batches, as a loop inside it has
            for x, y in data():

                def closure(x=x, y=y):
                    with within:
                        return F.cross_entropy(model(x), y)

                losses.append(optimizer.step(closure))
        return weights(model), torch.stack(losses)

    off = torch.autocast("cpu", enabled=False)
    inside = train(nullcontext(), autocast())
    for around in (autocast(), autocast(cache_enabled=False), off):
        for now, then in zip(train(around, autocast()), inside, strict=True):
            assert torch.equal(now, then)
    around, losses = train(autocast(), torch.enable_grad())
    assert torch.equal(around, inside[0])
    assert torch.equal(losses, inside[1])
    assert not torch.equal(inside[0], train(off, torch.enable_grad())[0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_trainers_autocast_sees_the_new_weights(algorithm):
    module = Module(lr=0.5)
    trainer(algorithm, precision="bf16-mixed").fit(module, loader(data()))
    model = mlp()
    optimizer = WRAPPERS[algorithm](torch.optim.SGD(model.parameters(), lr=0.5), model)
    for x, y in data():

        def closure(x=x, y=y):
            with autocast(cache_enabled=False):
                return F.cross_entropy(model(x), y)

        optimizer.step(closure)
    assert torch.equal(weights(module), weights(model))
