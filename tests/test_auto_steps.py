"""T="auto": inference ends when F hardly moves. And what is no T, no gamma."""

import math

import numpy as np
import pytest
import torch
from lightning_problems import Module, data, loader, trainer
from problems import MLP, Counted, classifier, double, sgd, twin, vectors

from lightning_pc.errors import ConfigError
from lightning_pc.optim import EPC, IPC, PC, ZIL

every = pytest.mark.parametrize("algorithm", [PC, IPC, EPC])


def assert_stopped(report, least, most):
    """At the first fourth step, not before `least`, that moved F by at most 1 % of all its way."""
    free = report.free_energy
    moved, all_of_it = free.diff().abs(), free[0] - free[1:]
    done = (moved <= 0.01 * all_of_it).tolist()
    # after step i, which compares F(i) with F(i - 1), evaluation i + 1 is the last
    ends = [i + 2 for i in range(3, len(free) - 1, 4) if done[i - 1] and i + 2 >= least]
    assert least <= report.steps <= most
    assert ends == ([report.steps] if report.steps < most else [])


@every
def test_inference_ends_when_it_has_converged(algorithm):
    """And T of the run is what the report says: a run of that T is the same run."""
    model, (x, y) = MLP((6, 9, 7, 4)), vectors(12)
    other = twin(model)
    optimizer = algorithm(sgd(model), model, gamma=0.3, gamma_decay=1, T="auto")
    counted = Counted(classifier(model, x, y))
    optimizer.step(counted)
    report = optimizer.report
    assert counted.calls == report.steps == len(report.loss) == len(report.energy)
    least = 2 if algorithm is EPC else report.depth + 1
    assert_stopped(report, least, 32)
    if algorithm is not IPC:
        assert least < report.steps < 32
    fixed = algorithm(sgd(other), other, gamma=0.3, gamma_decay=1, T=report.steps)
    fixed.step(classifier(other, x, y))
    assert fixed.report.learned == report.learned
    if algorithm is not IPC:
        assert set(report.learned.values()) == {1}
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(fixed.report.free_energy, report.free_energy)


@every
@pytest.mark.parametrize("layers", [1, 12])
@pytest.mark.filterwarnings("ignore")  # it is said that gamma is small
def test_inference_that_does_not_converge_takes_the_most_steps(algorithm, layers):
    model, (x, y) = MLP((6, *[6] * layers, 4)), vectors(12)
    optimizer = algorithm(sgd(model, 1e-6), model, gamma=1e-4, T="auto")
    optimizer.step(classifier(model, x, y))
    assert optimizer.report.depth == layers
    most = 32 if algorithm is EPC else max(32, 4 * (layers + 1))
    assert optimizer.report.steps == most
    assert_stopped(optimizer.report, 2 if algorithm is EPC else layers + 1, most)


@every
@pytest.mark.filterwarnings("ignore")  # the error fades out on its way, which is said
def test_inference_does_not_end_before_the_error_is_everywhere(algorithm):
    """Twelve stages, and F as good as settled after the first two."""
    model, (x, y) = MLP((6, *[6] * 12, 4)), vectors(12)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.05)
    optimizer = algorithm(sgd(model, 0.0), model, T="auto", gamma=1.0, gamma_decay=1)
    optimizer.step(classifier(model, x, y))
    assert optimizer.report.steps == (5 if algorithm is EPC else 13)
    assert min(optimizer.report.learned.values()) >= 1


@pytest.mark.parametrize("algorithm", ["pc", "ipc", "epc"])
def test_t_auto_under_the_trainer(algorithm):
    seen = []

    class Tells(Module):
        calls = 0

        def training_step(self, batch, batch_idx):
            type(self).calls += 1
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *args):
            seen.append((self.trainer.strategy.report, type(self).calls))
            type(self).calls = 0

    fit = trainer({"algorithm": algorithm, "T": "auto", "gamma": 0.3})
    fit.fit(Tells(), loader(data(4)))
    for report, calls in seen:
        assert calls == report.steps
        assert_stopped(report, 2 if algorithm == "epc" else report.depth + 1, 32)
    assert fit.global_step == 4


def test_t_auto_works_with_an_automatic_gamma_and_centered_nudging():
    model, (x, y) = MLP((6, 9, 7, 4)).double(), map(double, vectors(12))
    optimizer = PC(sgd(model), model, T="auto", nudging="centered", beta=0.1)
    for _ in range(4):
        optimizer.step(classifier(model, x, y))
        assert 2 * 4 - 1 <= optimizer.report.steps <= 63
        assert set(optimizer.report.learned.values()) == {1}


@pytest.mark.parametrize(
    ("wrapper", "arguments", "says"),
    [
        (ZIL, {"T": "auto"}, "zil always takes depth"),
        (PC, {"T": "auto", "precisions": "spiking"}, "varying precisions move it by themselves"),
        (IPC, {"T": "auto", "precisions": "decaying"}, "give a number of steps"),
        (EPC, {"T": "auto", "precisions": lambda d, t: 1.0}, "give a number of steps"),
        (PC, {"T": "Auto"}, "T='Auto': expected a whole number"),
        (IPC, {"T": "automatic"}, "'auto' or None"),
        (PC, {"T": 2.5}, "whole number"),
        (IPC, {"T": np.array([3, 4])}, "whole number"),
        (PC, {"gamma": np.array([0.1, 0.2])}, "expected a positive inference rate or 'auto'"),
        (PC, {"precisions": lambda depth: 1.0}, r"called with \(depth, t\): too many"),
        (PC, {"T": True}, "whole number"),
        (PC, {"gamma": "Auto"}, "gamma='Auto': expected a positive inference rate or 'auto'"),
        (IPC, {"gamma": None}, "gamma=None"),
        (EPC, {"gamma": "0.1"}, "gamma='0.1'"),
        (PC, {"gamma": math.nan}, "gamma=nan"),
        (ZIL, {"gamma": 0.1}, "leave gamma at 'auto'"),
    ],
)
def test_what_is_no_setting_is_told(wrapper, arguments, says):
    model = MLP((6, 5, 4))
    with pytest.raises(ConfigError, match=says):
        wrapper(sgd(model), model, **arguments)
