"""Values of iPC go along with predictions that the weights' own steps have moved too far."""

import itertools
import math

import pytest
import torch
from conftest import never_looks
from problems import MLP, classifier, relative, vectors
from torch import nn

from lightning_pc.inference.curvature import LARGEST
from lightning_pc.insight.explain import explain
from lightning_pc.nodes.energies import Categorical, Gaussian, MaskedGaussian
from lightning_pc.nodes.following import Following
from lightning_pc.optim import IEPC, IPC, PC


def trained(net, scale, batches=12, kind=IPC, lr=3e-3, too_far=0.03, **given):
    """The reports of some batches of the same images, ``scale`` times as large."""
    torch.manual_seed(0)
    x, y = vectors(32)
    adam = torch.optim.Adam(net.parameters(), lr)
    optimizer, reports = kind(adam, net, **given), []
    if optimizer._learner.auto:
        optimizer._learner.auto.too_far = too_far
    for _ in range(batches):
        optimizer.step(classifier(net, scale * x.abs(), y))
        reports.append(optimizer.report)
    return reports


def net(inplace=False):
    torch.manual_seed(1)
    sizes = (vectors(1)[0].shape[1], 16, 16)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU(inplace))]
    return nn.Sequential(*layers, nn.Linear(16, 4))


def by_hand(net, x, y, T, gamma, lr):
    """iPC of two tanh layers with hand-written gradients; how often each value went along."""
    (W1, b1), (W2, b2), (W3, b3) = (
        [p.detach().clone() for p in net[i].parameters()] for i in (0, 2, 4)
    )
    B, share, times = len(x), min(1.0, gamma / LARGEST), [0, 0]
    values, before, most = [None, None], [None, None], None

    def follow(node, mu, t):
        if t == 0:
            values[node] = mu.clone()
        if t < 2 - node:  # the first step at which its error may not be zero
            return
        x, was = values[node], before[node]
        if was is not None:
            rise = 0.5 * (x - mu).square().sum() - 0.5 * (x - was).square().sum()
            move = mu - was
            if rise > most and move.square().sum() <= 0.1 * x.square().sum():
                e = x - was
                nearer = ((move * e).sum(1) / e.square().sum(1).clamp_min(1e-300)).clamp(0, 1)
                values[node] = x + share * (move - nearer[:, None] * e)
                times[node] += 1
        before[node] = mu

    for t in range(T):
        mu1 = x @ W1.T + b1
        follow(0, mu1, t)
        mu2 = values[0].tanh() @ W2.T + b2
        follow(1, mu2, t)
        out = values[1].tanh() @ W3.T + b3
        if t == 0:
            most = 0.03 * 0.5 * (out - y).square().sum()
        (x1, x2), g = values, out - y
        e1, e2 = x1 - mu1, x2 - mu2
        d1, d2 = (1 - v.tanh().square() for v in (x1, x2))
        values[:] = [x1 - gamma * (e1 - d1 * (e2 @ W2)), x2 - gamma * (e2 + d2 * (g @ W3))]
        for (W, b), delta, a in (
            ((W3, b3), g, x2.tanh()),
            ((W2, b2), -e2, x1.tanh()),
            ((W1, b1), -e1, x),
        ):
            W -= lr * delta.T @ a / B
            b -= lr * delta.sum(0) / B
    return (W1, b1, W2, b2, W3, b3), times


@pytest.mark.parametrize("gamma", [0.2, 0.5])
def test_weights_are_those_of_hand_written_gradients(plain, gamma):
    """At gamma 0.2 values go 0.4 of the way along, at 0.5 all of it."""
    torch.manual_seed(2)
    net = MLP((6, 8, 8, 3)).double()
    x, y = 30 * torch.randn(16, 6).double(), torch.randn(16, 3).double()
    expected, times = by_hand(net, x, y, T=8, gamma=gamma, lr=0.01)
    assert all(0 < n < 6 for n in times)  # they went along at some evaluations and stayed at some
    optimizer = plain(net, 0.01, gamma, T=8, loss_terms=16)
    optimizer.step(lambda: 0.5 * (net(x) - y).square().sum() / 16)
    assert list(optimizer.report.followed.values()) == times
    for ours, theirs in zip(net.parameters(), expected, strict=True):
        assert relative(ours, theirs) < 1e-12


def test_f_does_not_leap_with_inputs_thirty_times_as_large():
    """Where values stay, the weights' steps raise a node's energy to many times all of F.

    In the first batches: from then on rounding decides in which one F leaps.
    """

    def leap(reports):
        return max(float(r.energy.diff(dim=0).amax() / r.free_energy[0]) for r in reports[:3])

    reports = trained(net(), 30.0, batches=30, lr=1e-2)
    assert all(set(report.followed) == {"1", "3"} for report in reports)
    stayed = trained(net(), 30.0, batches=30, lr=1e-2, too_far=math.inf)
    assert not any(report.followed for report in stayed)
    assert leap(stayed) > 4 * leap(reports)
    assert float(reports[-1].loss[0]) < 0.5 * float(stayed[-1].loss[0])


def test_values_stay_where_weights_go_their_way():
    reports = trained(net(), 1.0, lr=1e-4)
    assert not any(report.followed for report in reports)
    stayed = trained(net(), 1.0, lr=1e-4, too_far=math.inf)
    assert torch.equal(reports[-1].energies, stayed[-1].energies)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (IPC, {"gamma": 0.3}),
        (IPC, {"gamma": 0.3, "momentum": "conjugate"}),
        (IPC, {"momentum": 0}),
        (IPC, {"precisions": "spiking"}),
        (PC, {}),
        (IEPC, {}),
    ],
)
def test_only_ipc_of_which_all_is_automatic_lets_values_go_along(kind, given):
    mine = trained(net(), 30.0, kind=kind, **given)
    assert not any(report.followed for report in mine)
    ready = trained(net(), 30.0, kind=kind, too_far=-1.0, **given)  # they'd go at each chance
    assert torch.equal(mine[-1].energies, ready[-1].energies)


def test_activations_in_place_make_no_difference():
    """They overwrite the prediction that the next one is compared with."""
    one, other = net(), net(inplace=True)
    reports = trained(one, 30.0)
    assert any(report.followed for report in reports)
    assert [r.followed for r in trained(other, 30.0)] == [r.followed for r in reports]
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_look_at_the_curvature_leads_no_value_along(monkeypatch):
    """It moves values to and fro, and its predictions are no weights' doing."""
    calls, moved = [], Following.moved
    monkeypatch.setattr(Following, "moved", lambda self, *a: calls.append(self) or moved(self, *a))

    def evaluations(looks):
        model = net()
        adam = torch.optim.Adam(model.parameters(), 1e-3)
        optimizer = IPC(adam, model, reset="never", momentum="conjugate")
        x, y = vectors(8)
        for _ in range(3):
            never_looks(optimizer).anew = looks
            optimizer.step(classifier(model, x, y))
        return len(calls), optimizer._learner.auto.looks

    without, looked = evaluations(False), evaluations(True)
    assert (without[1], looked[1]) == (0, 3)
    assert looked[0] == 2 * without[0] > 0


@pytest.mark.parametrize(("bears", "goes"), [(1.4, True), (1.6, False)])
def test_what_counts_is_what_the_move_adds(bears, goes, follows):
    """From an energy of 0.5 to one of 2 is 1.5, weighted."""
    along, x = follows(torch.tensor(2 * bears), 0.5), torch.full((1, 1), 10.0)
    for mu in (9.0, 8.0):
        prediction = torch.full((1, 1), mu)
        total = Gaussian().evaluate(x, prediction, 1.0, 2.0).total
        along.moved(x, prediction, Gaussian(), 2.0, total)
    assert float(x) == (9.5 if goes else 10.0)
    assert int(along.times) == goes


def went(follows, x, before, mu, energy=None, bears=0.0):
    """The value after its prediction has moved from ``before`` to ``mu``."""
    along, energy, x = follows(torch.tensor(bears), 1.0), energy or Gaussian(), x.clone()
    for prediction in (before, mu):
        total = energy.evaluate(x, prediction, 1.0).total
        along.moved(x, prediction, energy, 1.0, total)
    return x


def two(row, off=0.0, masked=()):
    """A row, and one whose prediction is ``off``: 4 before and 13 after makes all go along by 9."""
    return torch.tensor([[*row, *masked], [90.0, 40.0 - off, *masked]])


@pytest.mark.parametrize(
    ("mu", "followed"),
    [
        ((8.0, 0.0), (0.0, 0.0)),  # the error was 10, of which 8 have been learned
        ((13.0, 0.0), (3.0, 0.0)),  # all of it, and 3 more
        ((-5.0, 0.0), (-5.0, 0.0)),
        ((4.0, 12.0), (0.0, 12.0)),
    ],
)
@pytest.mark.parametrize("layout", ["bd", "btd", "tbd"])
def test_what_brings_a_prediction_nearer_is_not_followed(mu, followed, layout, follows):
    """Each row by itself, however tokens lie; the last one's error is 4 and grows by 9."""
    lie = {
        "bd": lambda v: v,
        "btd": lambda v: torch.stack([v, v]),
        "tbd": lambda v: torch.stack([v, v]).transpose(0, 1),
    }[layout]
    x, before, after = two((10.0, 0.0)), two((0.0, 0.0), 4.0), two(mu, 13.0)
    expected = two((10.0 + followed[0], followed[1]), 9.0)
    assert torch.equal(went(follows, *map(lie, (x, before, after))), lie(expected))


def test_a_long_move_is_long_be_it_followed_or_not(follows):
    """10 of 10 would be learned, but its square is more than a tenth of the value's."""
    x, before, after = (torch.tensor([v]) for v in ((10.0, 40.0), (0.0, 40.0), (10.0, 51.0)))
    assert torch.equal(went(follows, x, before, after), x)
    assert not torch.equal(went(follows, x * 3, before + x * 2, after + x * 2), x * 3)


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 0, 3)])
def test_values_of_any_shape(shape, follows):
    x = torch.full(shape, 10.0)
    after = went(follows, x, x, x - 1)
    assert torch.equal(after, x - 1)


def test_masked_logits_go_nowhere(follows):
    mu = torch.tensor([[100.0, 100.0, -math.inf]])
    after = went(follows, mu, mu, mu + torch.tensor([0.0, 10.0, 0.0]), Categorical())
    assert after.tolist() == [[100.0, 110.0, -math.inf]]


@pytest.mark.parametrize("mask", [-math.inf, torch.finfo(torch.float32).min])
def test_masked_logits_make_no_value_long(mask, follows):
    mu = torch.tensor([[1.0, 1.0, mask]])
    moved = torch.tensor([[1.0, 100.0, mask]])
    assert torch.equal(went(follows, mu, mu, moved, Categorical()), mu)


def test_of_logits_all_is_followed(follows):
    """An offset is no error of theirs."""
    x, before = torch.tensor([[101.0, 99.0]]), torch.tensor([[91.0, 89.0]])
    after = torch.tensor([[101.0, 92.0]])
    assert torch.equal(went(follows, x, before, after, Categorical()), x + after - before)


def test_a_logit_that_is_masked_later_takes_nothing_with_it(follows):
    """A move of infinity times no share would be nan; its error is nobody's."""
    x, before = two((10.0, 10.0), masked=[4.0]), two((10.0, 6.0), 4.0, masked=[1.0])
    after = two((10.0, 8.0), 13.0, masked=[-math.inf])
    assert torch.equal(
        went(follows, x, before, after, MaskedGaussian()), two((10.0, 10.0), 9.0, masked=[4.0])
    )
    x = torch.tensor([[0.0, 1.0, 2.0]])
    after = torch.tensor([[0.0, 1.0, -math.inf]])
    assert torch.equal(went(follows, x, x, after, Categorical(), bears=1e9), x)


def test_it_is_explained_and_what_helps_is_named():
    report = trained(net(), 30.0)[0]
    said = explain(report)
    assert "Values went along with their predictions: '1', " in said
    assert "(2 in all)." in said
    assert "went along" not in explain(trained(net(), 1.0, lr=1e-4)[-1])


@pytest.mark.filterwarnings("ignore:Since batch")
@pytest.mark.parametrize("shift", [-1e3, 0.0, 1e3])
def test_a_loss_is_as_large_as_it_is_far_from_zero(shift):
    """Three percent of F, whose sign a constant in the loss may change; of none, of nothing."""
    model = net()
    x, y = vectors(32)
    optimizer = IPC(torch.optim.Adam(model.parameters(), 1e-2), model)
    went = 0
    for _ in range(10):
        loss = classifier(model, 30 * x.abs(), y)
        optimizer.step(lambda loss=loss: loss() + shift)
        went += sum(optimizer.report.followed.values())
    assert (went > 0) == (shift == 0)


def test_a_weight_that_stages_share_has_moved_a_prediction_before_its_error_arrives():
    """Such a value's prediction at the start is what the first one is compared with."""
    torch.manual_seed(1)

    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer, self.head = (nn.Linear(*s) for s in ((6, 8), (8, 8), (8, 4)))

        def forward(self, x):
            h = self.stem(x)
            for _ in range(4):
                h = h + self.layer(torch.tanh(h))
            return self.head(torch.tanh(h))

    model = Looped()
    x, y = vectors(16)
    optimizer = IPC(torch.optim.Adam(model.parameters(), 0.03), model, T=3)
    optimizer.step(classifier(model, x[:, :6], y))
    report = optimizer.report
    later = [name for name, depth in zip(report.nodes, report.depths, strict=True) if depth > 1]
    assert set(later) & set(report.followed)  # at t = 2, their first evaluation and the last of all


def test_a_call_with_kept_values_starts_anew():
    """What moved its predictions may be another batch; what it counts is its own."""
    model = net()
    adam = torch.optim.SGD(model.parameters(), 0.0)
    optimizer = IPC(adam, model, reset="never", momentum="conjugate", T=4)
    x, y = vectors(8)
    for scale in (30.0, 31.0, 33.0):
        optimizer.step(classifier(model, scale * x, y))
        assert optimizer.report.followed == {}


def test_energies_that_weigh_more_share_more(monkeypatch):
    """Of F as a whole ten times as large gamma is a tenth, and values move as before."""
    made = []
    monkeypatch.setattr(
        "lightning_pc.inference.begin.Following", lambda *a: made.append(Following(*a))
    )
    for times in (4.0, 40.0):
        model = net()
        sgd = torch.optim.SGD(model.parameters(), 0.0)
        optimizer = IPC(sgd, model, precisions=times, beta=times)
        optimizer.step(classifier(model, *vectors(16)))
    shares = made[0].share, made[-1].share
    assert shares[1] == pytest.approx(shares[0], rel=1e-3)
    assert 0 < shares[0] < 1


def test_values_of_convolutions_stay():
    """Their predictions would take too much memory to keep."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU())
    model.append(nn.Linear(8, 4))
    optimizer = IPC(torch.optim.Adam(model.parameters(), 1e-3), model)
    optimizer._learner.auto.too_far = -1.0  # whatever it adds to the energy
    optimizer.step(classifier(model, torch.randn(5, 1, 6, 6), torch.arange(5) % 4))
    assert optimizer.report.nodes == ["1", "4"]
    assert list(optimizer.report.followed) == ["4"]
