"""What the user is told: which node, since when, and what to change."""

import math
import re
import warnings
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from problems import MLP, classifier
from torch import nn

from lightning_pc import explain
from lightning_pc.errors import DivergenceError
from lightning_pc.inference.conjugate import Conjugate
from lightning_pc.insight.explain import LONG_PATIENCE, divergence, overshot
from lightning_pc.optim import EPC, IEPC, IPC, PC


def steep(gain=4.0, layers=5):
    """Tanh would bound what diverges, so that ReLU; curvature grows as the square of the gain."""
    torch.manual_seed(0)
    net = MLP((20, *[20] * layers, 5), "relu")
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight *= gain
    x, y = torch.randn(64, 20), torch.randint(0, 5, (64,))
    return net, lambda: F.cross_entropy(net(x), y)


def frozen(algorithm, net, **kwargs):
    return algorithm(torch.optim.SGD(net.parameters(), 0.0), net, gamma_decay=1, **kwargs)


def run(optimizer, loss, batches):
    for _ in range(batches):
        optimizer.step(loss)


def curvature(net, loss):
    optimizer = frozen(PC, net)
    optimizer.step(loss)
    return optimizer.report.curvature


def test_a_divergence_says_since_when_where_and_what_to_do():
    net, loss = steep()
    with pytest.raises(DivergenceError) as error:
        frozen(PC, net, gamma=1000.0, T=20).step(loss)
    message = str(error.value)
    assert "F has risen since t = 1" in message
    assert "gamma = 1e+03 times its curvature is at least" in message
    product = float(message.split("is at least ")[1].split(",")[0])
    assert 2 < product < 1.5 * 1000 * curvature(net, loss)
    assert any(f"energy was at '{name}'" in message for name in ("1", "3", "5", "7", "9"))
    rate = float(message.split("gamma < ")[1].rstrip("."))
    assert rate == pytest.approx(2 * 1000 / product, rel=0.1)


def test_an_automatic_gamma_is_not_advised_to_be_automatic():
    net, loss = steep(1.0)
    optimizer = frozen(PC, net, T=30, momentum=0)
    for _ in range(60):
        optimizer.step(loss)
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight *= 30
    with pytest.raises(DivergenceError, match="weights have changed since gamma was chosen"):
        run(optimizer, loss, 3)


def test_there_is_nothing_to_explain_before_a_batch():
    assert explain(None).startswith("There has been no batch yet")


class Cube(nn.Module):
    def forward(self, x):
        return 0.3 * x**3


def test_a_rise_along_conjugate_gradients_is_not_gammas_fault():
    torch.manual_seed(2)
    net = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(10, 10), Cube())))
    net.append(nn.Linear(10, 4))
    x, y = torch.randn(32, 10), torch.randn(32, 4)
    optimizer = PC(torch.optim.SGD(net.parameters(), 0.0), net, value_nodes="linear", T=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor that of weights, which stand
        for _ in range(LONG_PATIENCE + 2):
            optimizer.step(lambda: F.mse_loss(net(x), y))
            assert rose(optimizer.report)
    assert "It rose: F is steeper further off than steps had seen, momentum=0 makes" in explain(
        optimizer.report
    )


def test_a_divergence_along_conjugate_gradients_tells_no_curvature():
    """Their steps have lengths of their own, so that F's growth says nothing of gamma."""
    energies = [torch.tensor([e]) for e in (0.0, 5.0, 50.0, torch.inf)]
    losses = [torch.tensor(1.0)] * 4
    told = {}
    for momentum in (0.0, None):
        error = divergence(
            *(["a"], losses, energies, [1, 6, 51], 0, 0.1, momentum, True, False, Conjugate.remedy)
        )
        told[momentum] = str(error)
        assert "F has risen since t = 1" in told[momentum]
    assert "above the limit of 2" in told[0.0]
    assert told[None].endswith("too far along conjugate gradients: use momentum=0.")


def test_a_divergence_of_an_optimizer_of_the_values_names_its_rate():
    torch.manual_seed(0)
    net, x = MLP((4, 8, 8, 3)), torch.randn(5, 4)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    optimizer = PC(sgd, net, T=400, inference=lambda values: torch.optim.SGD(values, 100.0))
    with pytest.raises(DivergenceError, match="lower the rate of the optimizer that inference= "):
        optimizer.step(lambda: F.mse_loss(net(x), torch.ones(5, 3)))


def test_a_first_loss_that_is_not_finite_is_not_gammas_fault():
    net = MLP((4, 4, 3))
    with pytest.raises(DivergenceError, match="Inference has not begun"):
        frozen(PC, net).step(
            lambda: F.cross_entropy(net(torch.full((2, 4), torch.nan)), torch.ones(2).long())
        )


@pytest.mark.parametrize("algorithm", [PC, IPC, EPC])
def test_a_gamma_that_raises_the_energy_is_told_once(algorithm):
    net, loss = steep(2.0)
    right = frozen(algorithm, net, gamma=0.3 / curvature(net, loss))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            right.step(loss)
    wrong = frozen(algorithm, net, gamma=3.0)
    with pytest.warns(UserWarning, match="Since batch 1 inference raises the energy") as told:
        run(wrong, loss, 8)
    assert len(told) == 1
    message = str(told[0].message)
    assert float(message.split("gamma < ")[1].rstrip(".")) < 1
    assert "value node '" in message


def test_looking_at_the_curvature_changes_nothing():
    """The curvature that the warning names is measured between two steps, without a trace."""
    runs = []
    for patience in (3, 10**6):
        net, loss = steep(2.0)
        optimizer = IPC(torch.optim.Adam(net.parameters(), 1e-3), net, gamma=1.0)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            patch.setattr("lightning_pc.insight.alerts.PATIENCE", patience)
            for _ in range(6):
                optimizer.step(loss)
        runs.append((torch.cat([p.detach().flatten() for p in net.parameters()]), len(told)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert [count for _, count in runs] == [1, 0]


def wide(scale, algorithm=IPC, lr=0.01, epochs=2, **given):
    """What is said while a classifier of large inputs learns, and each batch's report.

    Of inputs 100 times as large each step of Adam moves the first node's prediction past it.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(400, 16), nn.ReLU(), nn.Linear(16, 4))
    net[0].weight.data /= scale
    x = torch.randn(600, 400)
    x, y = scale * x, x[:, :4].argmax(1)
    optimizer = algorithm(torch.optim.Adam(net.parameters(), lr), net, **given)
    told, reports = [], []
    for batch in torch.arange(600).split(32) * epochs:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step(classifier(net, x[batch], y[batch]))
        reports.append(optimizer.report)
        told += [(len(reports), str(each.message)) for each in caught]
    return told, reports


def rose(report):
    return bool(report.free_energy[-1] > report.free_energy[0])


def test_a_leap_of_f_is_told_at_once():
    """The first rise by a hundred times all F at a start, at an automatic gamma."""
    told, reports = wide(100.0, momentum=0)
    largest, leaps = 0.0, []
    for batch, free in enumerate((report.free_energy for report in reports), 1):
        largest = max(largest, float(free[0]))
        leaps += [batch] if free[-1] - free[0] > 100 * largest else []
    ((batch, message),) = [each for each in told if each[1].startswith("In batch")]
    assert batch == leaps[0]
    start, end = reports[batch - 1].free_energy[[0, -1]]
    assert f"In batch {batch} F rose from {start:.3g} to {end:.3g}: the weights" in message
    assert "value node '1' went from" in message
    assert not any("In batch" in message for _, message in wide(100.0, gamma=0.3)[0])


def test_a_leap_along_a_loss_that_is_pushed_up_is_told():
    """F rises there in any case, but not a hundredfold."""
    told, _ = wide(1.0, lr=0.3, epochs=3, beta=-0.1)
    assert [message.startswith("In batch ") for _, message in told] == [True]


@pytest.mark.parametrize("given", [{"momentum": 0}, {"gamma": 0.3}])
def test_weights_that_go_too_far_are_told_once(given, monkeypatch):
    monkeypatch.setattr("lightning_pc.insight.alerts.LEAP", math.inf)
    assert wide(1.0, **given)[0] == []
    ((batch, message),), reports = wide(100.0, **given)
    since = batch - LONG_PATIENCE + 1
    assert all(map(rose, reports[since - 1 : batch]))
    assert not rose(reports[since - 2])
    assert f"Since batch {since} F rises within each batch" in message
    assert "and gamma is not to blame: the weights" in message
    report = reports[batch - 1]
    t = int(report.free_energy.diff().argmax())
    before, after = report.energy[t : t + 2, 0]
    leap = f"value node '1' went from {before:.3g} to {after:.3g} between evaluations {t + 1} and"
    assert leap in message
    assert leap in explain(report)


def test_weights_are_not_blamed_for_what_is_not_theirs():
    """Weights that stand, a loss that is pushed up, data known by heart."""
    for algorithm, gamma in product((IPC, PC), (1.7, 2.0, 2.3)):
        told, reports = wide(1.0, algorithm, gamma=gamma, gamma_decay=1.0, lr=0.0)
        assert all(map(rose, reports))
        assert told
        assert not any("not to blame" in message for _, message in told)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_pc.insight.explain.KNOWN", 10.0)  # F is below zero
        told, reports = wide(1.0, IEPC, beta=-0.3, lr=1e-3)
    assert sum(map(rose, reports)) > 2 * LONG_PATIENCE
    assert told == []
    assert "a loss that values push up" in explain(reports[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lightning_pc.insight.explain.KNOWN", 1e6
        )  # F is as good as zero in all batches
        told, reports = wide(100.0, gamma=0.3)
    assert sum(map(rose, reports)) > LONG_PATIENCE
    assert told == []


@pytest.mark.parametrize(("share", "told"), [(0.005, False), (0.02, True)])
def test_an_f_below_a_hundredth_of_the_first_may_rise(share, told):
    report = wide(1.0)[1][0]
    first = float(report.free_energy[-1]) / share
    assert bool(overshot(report, 0.5, 0.0, 1.0, False, first, 1)) is told


def test_a_gamma_that_ipc_mostly_bears_is_named_where_f_rises():
    """Between the limit and the four times curvature of `unstable`, where nothing was said."""
    ((batch, message),), reports = wide(1.0, gamma=2.3, gamma_decay=1.0, lr=1e-3)
    assert batch == LONG_PATIENCE
    assert all(map(rose, reports[:batch]))
    found = re.search(r"gamma = 2.3 times the curvature of (\S+) is (\S+), where the", message)
    curvature, times = map(float, found.groups())
    assert 2.0 < times < 4.0
    assert times == pytest.approx(2.3 * curvature, rel=0.01)
    least = float(re.search(r"Give gamma < (\S+), lower the learning rate", message).group(1))
    assert least == pytest.approx(1.4 / curvature, rel=0.05)
    assert wide(1.0, gamma=least, gamma_decay=1.0, lr=1e-3)[0] == []


def test_a_gamma_that_has_been_blamed_is_not_excused_later():
    ((batch, message),), reports = wide(1.0, gamma=3.5, gamma_decay=1.0, lr=0.0)
    assert all(map(rose, reports))
    assert len(reports) > 3 * LONG_PATIENCE
    assert batch < LONG_PATIENCE
    assert "above the limit" in message


def test_an_automatic_gamma_is_not_to_be_given():
    """Near the limit of 2 by its own choice, times a curvature that is seen now more, now less."""
    (message,) = [said for _, said in wide(100.0, momentum=0)[0] if said.startswith("Since")]
    assert "gamma is not to blame" in message
    report = wide(1.0)[1][0]
    for times, blamed in ((1.5, False), (2.2, True)):
        said = overshot(report, 0.5, 0.0, 2 * times, given=False, first=0.0, since=1)
        assert ("values or weights" in said) == blamed
        assert "Give gamma" not in said
    assert overshot(report, 0.5, 0.0, math.nan, given=False, first=0.0, since=1) == ""
    assert "Give gamma < 0.93, lower" in overshot(report, 1.0, 0.0, 1.5, True, 0.0, 1)
    assert "not to blame" in overshot(report, 1.0, 0.5, 1.5, True, 0.0, 1)  # its limit is 3


def test_where_gamma_is_given_its_default_is_named():
    for given in ({}, {"gamma": 0.5}):
        said = overshot(wide(1.0, **given)[1][0], 0.5, 0.0, 1.0, False, 0.0, 1)
        assert ("leave gamma and momentum at their defaults" in said) == bool(given)


def test_spiking_precisions_are_named_where_ipc_has_them_and_help():
    """They take one step of full weight from each error, which no later one takes back."""
    said = [message for _, message in wide(100.0, momentum=0)[0]]
    assert said
    assert all("or precisions='spiking' where the nodes form a chain" in each for each in said)
    report = wide(1.0, IEPC)[1][0]
    assert overshot(report, 0.5, 0.0, 1.0, False, 0.0, 1).endswith(", or use a smaller T.")
    plain, spiking = (
        wide(100.0, lr=1e-3, epochs=4, **given)[1]
        for given in ({"momentum": 0}, {"precisions": "spiking"})
    )
    ends = [float(torch.stack([r.loss[0] for r in run[-19:]]).mean()) for run in (plain, spiking)]
    assert ends[1] < 0.7 * ends[0]


def test_the_loss_is_named_where_it_rises():
    report = replace(
        wide(1.0)[1][0],
        loss=torch.tensor([1.0, 2.0, 1.0]),
        loss_terms=10.0,
        pulls=(1.0, 1.0, 1.0),
        energies=torch.tensor([[0.0], [1.0], [30.0]]),
    )
    said = "the loss went from 1 to 2 between evaluations 1 and 2"
    assert said not in explain(report)  # F rose more from the second to the third
    assert said in explain(replace(report, energies=torch.tensor([[0.0], [1.0], [10.0]])))


@pytest.mark.parametrize("gamma", [1e-12, 1e-30])
def test_values_that_never_move_are_told(gamma):
    net, loss = steep(1.0)
    with pytest.warns(UserWarning, match="no value moved: all 5 value nodes have energy zero"):
        frozen(PC, net, gamma=gamma).step(loss)


def test_a_loss_of_zero_moves_nothing_and_says_nothing():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    y = net(x).detach()
    optimizer = frozen(PC, net)
    assert optimizer.step(lambda: F.mse_loss(net(x), y)).item() == 0
    assert set(optimizer.report.peak_energy.values()) == {0.0}


def test_explain():
    net, loss = steep(1.0)
    optimizer = frozen(PC, net)
    optimizer.step(loss)
    report = optimizer.report
    lines = explain(report).splitlines()
    free = report.free_energy
    assert f"F went from {free[0]:.4g} to {free[-1]:.4g} in 8 evaluations" in lines[0]
    assert f"curvature {report.curvature:.3g} is" in lines[1]
    assert "next to the loss (depth 1)" in lines[2]
    assert "(depth 5)" in lines[2]
    shares = report.energy_by_depth
    assert list(shares) == [1, 2, 3, 4, 5]
    assert sum(shares.values()) == pytest.approx(1)
    by_hand = report.energy[-1] / report.energy[-1].sum()
    assert list(shares.values()) == pytest.approx(by_hand.flip(0).tolist())
    net, loss = steep()
    wrong = frozen(PC, net, gamma=3.0)
    with pytest.warns(UserWarning, match="Since batch"):
        run(wrong, loss, 5)
    assert "It rose: gamma is too large; most of the energy is at '" in explain(wrong.report)


def test_momentum_widens_the_limit():
    """One value, F = x^2 / 2 + (sqrt(2) x - y)^2: curvature 5; momentum 0.5: limit 3."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with torch.no_grad():
        for layer, weight in zip(net, (1.0, 2**0.5), strict=True):
            layer.weight.fill_(weight), layer.bias.zero_()
    x, y = torch.zeros(4, 1), torch.full((4, 1), 1e-3)

    def optimizer(gamma, T):
        return frozen(PC, net, gamma=gamma, momentum=0.5, value_nodes="linear", T=T)

    for gamma, falls in ((2.9 / 5, True), (3.1 / 5, False)):
        run(found := optimizer(gamma, 200), loss := lambda: F.mse_loss(net(x), y), 1)
        assert (found.report.free_energy[-1] < found.report.free_energy[0]) == falls
    with pytest.raises(DivergenceError) as error:
        optimizer(6.0 / 5, 400).step(loss)
    message = str(error.value)
    assert "is at least 6, above the limit of 3;" in message
    assert "or gamma < 0.6." in message
    with pytest.warns(UserWarning, match=r"above the limit of 3\. Use .* gamma < 0\.6"):
        run(optimizer(3.3 / 5, 30), loss, 8)
    automatic = frozen(PC, net, momentum=0.5, value_nodes="linear")
    automatic.step(loss)
    assert automatic.report.momentum == 0.5
    assert "the limit is 3." in explain(automatic.report)
