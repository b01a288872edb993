"""What the user is told: which node, since when, and what to change."""

import inspect
import math
import re
import warnings
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc import PCStrategy, explain
from lightning_pc.errors import ConfigError, DivergenceError
from lightning_pc.inference.conjugate import Conjugate
from lightning_pc.inference.curvature import AutoGamma
from lightning_pc.inference.movers import Descent
from lightning_pc.inference.relax import Trace
from lightning_pc.inference.schedules import schedule
from lightning_pc.insight.alerts import Alerts
from lightning_pc.insight.explain import divergence
from lightning_pc.nodes.energies import Gaussian
from lightning_pc.nodes.node import Node
from lightning_pc.optim import EPC, IEPC, IPC, PC
from tests.engine.modules import MLP
from tests.engine.problems import classifier

PATIENCE = inspect.signature(Alerts).parameters["patience"].default


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
    assert re.search(r"At inference step t = \d+ the energy at value node '\d' is not", message)
    grew = r"F rose before: the energy at value node '\d' went from \S+ to \S+ between evaluations"
    assert re.search(grew, message)
    assert message.endswith("Use gamma='auto', or gamma < 1e+03.")


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
        for _ in range(PATIENCE + 2):
            optimizer.step(lambda: F.mse_loss(net(x), y))
            assert rose(optimizer.report)
    assert "Use momentum=0." in explain(optimizer.report)


def inferred(trace, mover, algorithm="pc", nodes="ab", **others):
    """An inference that is over."""
    nodes = [Node(name, torch.zeros(1), Gaussian()) for name in nodes]
    given = {"auto": None, "age": None, "seen": None, "terms": 1.0} | others
    batch = SimpleNamespace(nodes=nodes, latent=False, guess=math.inf)
    evaluator, way = SimpleNamespace(nodes=nodes, batch=batch), schedule(algorithm)
    return SimpleNamespace(trace=trace, mover=mover, evaluator=evaluator, schedule=way, **given)


@pytest.mark.parametrize(
    ("mover", "automatic", "algorithm", "cure"),
    [
        (Descent(0.1), False, "pc", "Use gamma='auto', or gamma < 0.1."),
        (Descent(0.1), True, "pc", "since gamma was chosen: lower the learning rate."),
        (Conjugate(0.1, 0.9), True, "pc", "too far along conjugate gradients: use momentum=0."),
        (Conjugate(0.1, 0.9), True, "iepc", "Lower the learning rate, scale down what the modules"),
    ],
)
def test_a_divergence_says_what_to_change(mover, automatic, algorithm, cure):
    trace, auto = Trace(), AutoGamma(1.4, 0.9, 1.6) if automatic else None
    for a, b, loss in ((0.0, 0.0, 1.0), (5.0, 1.0, 1.0), (6.0, 20.0, 1.0), (1.0, math.inf, 2.0)):
        trace.take_in(torch.tensor(loss), torch.tensor([a, b]), 1.0, 3.0)
    message = str(divergence(inferred(trace, mover, algorithm, auto=auto, age=4)))
    assert "t = 7 the energy at value node 'b' is not finite (loss 2). No weight" in message
    assert "F rose before: the energy at value node 'b' went from 1 to 20" in message
    assert cure in message


def test_a_divergence_of_the_loss_or_of_a_sum_alone():
    """Energies may be finite when their sum no longer is."""
    told = []
    for loss, energies in ((math.nan, [1.0, 2.0]), (1.0, [2e38, 3e38])):
        trace = Trace()
        for a, b in ((1.0, [0.0, 0.0]), (1.0, [0.5, 0.1]), (loss, energies)):
            trace.take_in(torch.tensor(a), torch.tensor(b), 1.0, 1.0)
        told.append(str(divergence(inferred(trace, Descent(0.1), "pc"))))
    assert "At inference step t = 2 the loss is not finite (loss nan)" in told[0]
    assert "At inference step t = 2 the energy at value node 'b' is not finite (loss 1)" in told[1]


def test_a_divergence_of_the_sum_of_the_loss_terms_is_of_this_process():
    """The loss may be finite when its sum no longer is."""
    trace = Trace()
    for loss in (1.0, 1e38):
        trace.take_in(torch.tensor(loss), torch.zeros(2), 1.0, 64.0)
    message = str(divergence(inferred(trace, Descent(0.1), terms=64.0)))
    assert "At inference step t = 1 the loss is not finite (loss 1e+38)" in message


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
    with pytest.warns(UserWarning, match="Since batch 1 F rises within each batch") as told:
        run(wrong, loss, PATIENCE + 2)
    assert len(told) == 1
    message = str(told[0].message)
    assert float(re.search(r"Use gamma='auto', or gamma < (\S+)\.", message).group(1)) < 1
    assert re.search(r"largest at value node '\d': gamma 3 times the curvature \S+ is", message)


def test_looking_at_the_curvature_changes_nothing():
    """The curvature that the warning names is measured between two steps, without a trace."""
    runs = []
    for patience in (3, 10**6):
        net, loss = steep(2.0)
        optimizer = IPC(torch.optim.Adam(net.parameters(), 1e-3), net, gamma=1.0)
        learner = optimizer._learner
        learner.alerts = Alerts(learner.schedule, learner.auto, False, patience)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
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
    net = MLP((400, 16, 4), "relu")
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


def test_what_is_right_is_not_told():
    for given in ({}, {"momentum": 0}, {"gamma": 0.3}):
        assert wide(1.0, **given)[0] == []


@pytest.mark.parametrize("given", [{"momentum": 0}, {"gamma": 0.3}])
def test_weights_that_go_too_far_are_told_once(given):
    ((batch, message),), reports = wide(100.0, **given)
    since = batch - PATIENCE + 1
    assert all(map(rose, reports[since - 1 : batch]))
    assert not rose(reports[since - 2])
    report = reports[batch - 1]
    start, end = report.free_energy[[0, -1]]
    assert message.startswith(f"Since batch {since} F rises within each batch (in this one from ")
    assert f"from {start:.3g} to {end:.3g}): the energy at value node '1' went" in message
    t = int(report.free_energy.diff().argmax())
    before, after = report.energy[t : t + 2, 0]
    leap = f"value node '1' went from {before:.3g} to {after:.3g} between evaluations {t + 1} and"
    assert leap in message
    assert leap in explain(report)
    assert "Use gamma" not in message  # it is far from its limit
    assert "; the limit is 2. Lower the learning rate, scale down what" in message
    assert ("leave gamma, momentum and inference at their defaults" in message) == (
        "gamma" in given
    )
    assert "or take precisions='spiking' where the nodes form a chain" in message


def test_a_loss_that_is_pushed_up_is_told_only_where_energies_exceed_it():
    """F begins below zero there, and weights that lower the loss raise it to that in any case."""
    told, reports = wide(1.0, IEPC, beta=-0.3, lr=1e-3)
    assert all(map(rose, reports))
    assert told == []
    assert "It rose" not in explain(reports[-1])
    ((batch, message), (_, further)), reports = wide(1.0, lr=0.3, epochs=3, beta=-0.1)
    assert further.startswith("The training loss is ")
    assert batch == PATIENCE
    assert all(report.free_energy[-1] > 0 for report in reports)
    assert message.startswith("Since batch 1 F rises within each batch")
    assert "It rose" in explain(reports[-1])


def test_a_loss_below_zero_is_told_as_any_other():
    net = MLP((6, 8, 3)).double()
    x, y = torch.randn(16, 6).double(), torch.randn(16, 3).double()
    optimizer = frozen(PC, net, gamma=3.0)
    with pytest.warns(UserWarning, match="F rises within each batch .in this one from -"):
        run(optimizer, lambda: F.mse_loss(net(x), y) - 1e3, PATIENCE)


@pytest.mark.parametrize(("algorithm", "gamma"), [*product((IPC, PC), (1.7, 2.0, 2.3))])
def test_a_gamma_near_its_limit_is_named(algorithm, gamma):
    ((batch, message),), reports = wide(1.0, algorithm, gamma=gamma, gamma_decay=1.0, lr=0.0)
    assert all(map(rose, reports))
    assert batch == PATIENCE
    found = re.search(r"times the curvature (\S+) is (\S+); the limit is 2\.", message)
    curvature, times = map(float, found.groups())
    assert times == pytest.approx(gamma * curvature, rel=0.05)
    least = float(re.search(r"Use gamma='auto', or gamma < (\S+)\.", message).group(1))
    assert least == pytest.approx(1.4 / curvature, rel=0.05)
    assert wide(1.0, algorithm, gamma=0.9 * least, gamma_decay=1.0, lr=0.0)[0] == []
    assert "learning rate" not in message  # the look has found what is to blame


@pytest.mark.filterwarnings("default")
def test_each_model_is_told_once_with_python_s_own_filters():
    net, loss = steep(1.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(2):
            run(frozen(IPC, net, T=2), loss, 3)
    assert ["never reach" in str(each.message) for each in said] == [True, True]


def alerts(first, ends, patience=3):
    """What is said of batches of the same ends of F, after one that begins at `first`."""
    net, loss = steep(1.0)
    optimizer = frozen(PC, net, gamma=0.1)
    optimizer.step(loss)
    report, told = optimizer.report, Alerts(optimizer._learner.schedule, None, False, patience)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for start, end in [(first, first - 1), *ends]:
            trace = Trace(free=[torch.tensor(start), torch.tensor(end)])
            energies, none = torch.tensor([[start], [end]]), torch.zeros(2)
            of = replace(report, loss=none, energies=energies, pulls=(1.0, 1.0), nodes=["1"])
            told.after(inferred(trace, Descent(0.1), nodes=""), of)
    return [str(each.message) for each in said]


def test_a_small_f_may_rise():
    """Data that are known by heart, whose F any step raises."""
    assert alerts(100.0, [(0.1, 0.9)] * 20) == []
    assert len(alerts(100.0, [(0.1, 1.1)] * 20)) == 1
    assert alerts(100.0, [(3.0, 2.0), (2.0, 3.0), (2.0, 3.0)] * 5) == []  # not on end


def test_where_the_curvature_is_not_known_f_is_told_all_the_same():
    (said,) = alerts(100.0, [(1.0, 2.0)] * 3)
    assert said.startswith("Since batch 2 F rises within each batch")
    assert said.endswith(". Use gamma='auto', or gamma < 0.1.")


@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_an_optimizer_of_the_values_that_raises_f_is_named(algorithm):
    torch.manual_seed(0)
    net, x, y = MLP((4, 8, 8, 3)), torch.randn(5, 4), torch.randn(5, 3)
    optimizer = algorithm(
        torch.optim.SGD(net.parameters(), 0.0),
        net,
        inference=lambda values: torch.optim.SGD(values, 2.5),
    )
    with pytest.warns(UserWarning, match="lower the rate of the optimizer that inference=") as told:
        run(optimizer, lambda: F.mse_loss(net(x), y), PATIENCE + 2)
    assert len(told) == 1
    assert "gamma" not in str(told[0].message)


def test_spiking_precisions_help_where_they_are_named():
    """They take one step of full weight from each error, which no later one takes back."""
    plain, spiking = (
        wide(100.0, lr=1e-3, epochs=4, **given)[1]
        for given in ({"momentum": 0}, {"precisions": "spiking"})
    )
    ends = [float(torch.stack([r.loss[0] for r in run[-19:]]).mean()) for run in (plain, spiking)]
    assert ends[1] < 0.7 * ends[0]


def test_the_loss_is_named_where_it_rises():
    report = replace(
        wide(1.0, epochs=1)[1][0],
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
    with pytest.warns(UserWarning, match="all 5 value nodes have energy zero .* no value moved. g"):
        frozen(PC, net, gamma=gamma).step(loss)


@pytest.mark.parametrize(("algorithm", "lowest"), [(PC, 9), (PC, 2), (IPC, 9), (IPC, 2), (EPC, 9)])
def test_precisions_of_zero_are_told(algorithm, lowest):
    net, loss = steep(1.0)
    optimizer = frozen(algorithm, net, precisions=lambda depth, t: float(depth >= lowest))
    with pytest.warns(UserWarning, match=r"energy zero .*: precisions= gave some or all") as w:
        optimizer.step(loss)
    assert not any("gamma" in str(told.message) for told in w)


@pytest.mark.parametrize("given", ["x", 3, torch.ones(1)])
def test_only_what_has_a_report_is_explained(given):
    with pytest.raises(ConfigError, match=r"explain\(report\): expected a StepReport, .*, got "):
        explain(given)


def test_what_has_a_report_is_explained():
    net, loss = steep(1.0)
    optimizer = frozen(PC, net, gamma=0.1)
    assert explain(optimizer) == explain(None)
    optimizer.step(loss)
    assert explain(optimizer) == explain(optimizer.report) != explain(None)
    assert explain(PCStrategy("pc")) == explain(None)


def test_a_loss_of_zero_moves_nothing_and_says_nothing():
    net = MLP((3, 4, 2))
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
    assert f"the curvature {report.curvature:.3g} is" in lines[1]
    assert "next to the loss (depth 1)" in lines[2]
    assert "(depth 5)" in lines[2]
    shares = report.energy_by_depth
    assert list(shares) == [1, 2, 3, 4, 5]
    assert sum(shares.values()) == pytest.approx(1)
    by_hand = report.energy[-1] / report.energy[-1].sum()
    assert list(shares.values()) == pytest.approx(by_hand.flip(0).tolist())
    net, loss = steep()
    wrong = frozen(PC, net, gamma=3.0)
    run(wrong, loss, 2)
    assert re.search(
        r"It rose: the energy at value node '\d' went .* \d\. Lower gamma\.", explain(wrong.report)
    )


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
    assert str(error.value).endswith("or gamma < 1.2.")
    with pytest.warns(UserWarning, match=r"the limit is 3\. Use gamma='auto', or gamma < 0\.42"):
        run(optimizer(3.3 / 5, 30), loss, PATIENCE)
    automatic = frozen(PC, net, momentum=0.5, value_nodes="linear")
    automatic.step(loss)
    assert automatic.report.momentum == 0.5
    assert "the limit is 3." in explain(automatic.report)
