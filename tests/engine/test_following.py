"""Values of iPC follow what their predictions move by, the less the more stages are in a row."""

import itertools
import math

import pytest
import torch
from torch import nn

from lightning_pc.inference.movers import Descent
from lightning_pc.insight.explain import explain
from lightning_pc.nodes.energies import Categorical, Gaussian, MaskedGaussian
from lightning_pc.nodes.node import Node
from lightning_pc.optim import IEPC, IPC, PC
from tests.compare import relative
from tests.engine.inside import never_looks
from tests.engine.modules import MLP, Skipping, UNet
from tests.engine.problems import classifier, vectors


def net(inplace=False):
    torch.manual_seed(1)
    sizes = (vectors(1)[0].shape[1], 16, 16)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU(inplace))]
    return nn.Sequential(*layers, nn.Linear(16, 4))


def trained(net, scale, batches=12, kind=IPC, lr=3e-3, **given):
    """The reports of some batches of the same images, ``scale`` times as large."""
    torch.manual_seed(0)
    x, y = vectors(32)
    adam = torch.optim.Adam(net.parameters(), lr)
    optimizer, reports = kind(adam, net, **given), []
    for _ in range(batches):
        optimizer.step(classifier(net, scale * x.abs(), y))
        reports.append(optimizer.report)
    return reports


def automatic(net, lr, gamma, **given):
    """iPC whose automatic rate is ``gamma``."""
    optimizer = IPC(torch.optim.SGD(net.parameters(), lr), net, gamma_decay=1.0, **given)
    never_looks(optimizer).gamma = gamma
    return optimizer


def aside(move, error):
    """What of a move does not bring a row nearer to its value; what overshoots is no nearer."""
    nearer = ((move * error).sum(1) / error.square().sum(1).clamp_min(1e-300)).clamp(0, 1)
    return move - nearer[:, None] * error


def chain_by_hand(net, x, y, T, gamma, lr):
    """iPC of three tanh layers with hand-written gradients, whose values follow by 2 / 3."""
    pairs = [[p.detach().clone() for p in layer.parameters()] for layer in list(net)[::2]]
    values, before = [], []
    for t in range(T):
        mus, at = [], x
        for node, (W, b) in enumerate(pairs[:-1]):
            mu = at @ W.T + b
            if t == 0:
                values.append(mu.clone())
            else:
                values[node] = values[node] + 2 / 3 * aside(
                    mu - before[node], values[node] - before[node]
                )
            mus.append(mu)
            at = values[node].tanh()
        before = mus
        g = at @ pairs[-1][0].T + pairs[-1][1] - y
        errors = [v - mu for v, mu in zip(values, mus, strict=True)]
        below = [*(-e for e in errors[1:]), g]
        slopes = [
            e + (1 - v.tanh().square()) * (d @ W)
            for e, v, d, (W, _) in zip(errors, values, below, pairs[1:], strict=True)
        ]
        reads = [x, *(v.tanh() for v in values)]
        stretch = math.sqrt(1.4 / gamma) - 1
        long = max(gamma, 1 / max(stretch, 1.0) ** 2)
        depths = (3, 2, 1)
        values = [
            v - (long if t and depth == t + 1 else gamma) * s
            for v, s, depth in zip(values, slopes, depths, strict=True)
        ]
        for (W, b), delta, read in zip(pairs, [-errors[0], *below], reads, strict=True):
            W -= lr * delta.T @ read / len(x)
            b -= lr * delta.sum(0) / len(x)
    return itertools.chain(*pairs)


@pytest.mark.parametrize("gamma", [0.1, 0.35, 0.5])
def test_weights_of_a_chain_are_those_of_hand_written_gradients(gamma):
    """The first step of a value that an error has just reached is a longer one as well."""
    torch.manual_seed(2)
    sizes = (6, 8, 8, 8)
    net = nn.Sequential(*(m for s in itertools.pairwise(sizes) for m in (nn.Linear(*s), nn.Tanh())))
    net.append(nn.Linear(8, 3)).double()
    x, y = torch.randn(16, 6).double(), torch.randn(16, 3).double()
    expected = chain_by_hand(net, x, y, T=8, gamma=gamma, lr=0.03)
    optimizer = automatic(net, 0.03, gamma, T=8, loss_terms=16)
    optimizer.step(lambda: 0.5 * (net(x) - y).square().sum() / 16)
    assert optimizer.report.followed == dict.fromkeys(("1", "3", "5"), 2 / 3)
    for ours, theirs in zip(net.parameters(), expected, strict=True):
        assert relative(ours, theirs) < 1e-12


def residual_by_hand(net, x, y, T, gamma, lr):
    """iPC of two branches with hand-written gradients, whose values follow by all of it.

    Values go down the gradient.
    """
    (W0, b0), (W1, b1), (W2, b2), (W3, b3) = (
        [p.detach().clone() for p in layer.parameters()]
        for layer in (net.stem, *net.branches, net.head)
    )
    B, root = len(x), 2**0.5
    values, before = [None, None], [None, None]

    def follow(node, mu, t):
        x, was = values[node], before[node]
        values[node] = mu.clone() if t == 0 else x + aside(mu - was, x - was)
        before[node] = mu

    for t in range(T):
        h0 = x @ W0.T + b0
        follow(0, h0, t)
        a1 = values[0].tanh()
        h1 = h0 + (a1 @ W1.T + b1) / root
        follow(1, h1, t)
        a2 = values[1].tanh()
        h2 = h1 + (a2 @ W2.T + b2) / root
        g = h2 @ W3.T + b3 - y
        e1, e2 = values[0] - h0, values[1] - h1
        stream = g @ W3
        values[:] = [
            values[0] - gamma * (e1 + (1 - a1.square()) * ((stream - e2) @ W1) / root),
            values[1] - gamma * (e2 + (1 - a2.square()) * (stream @ W2) / root),
        ]
        for (W, b), delta, a in (
            ((W3, b3), g, h2),
            ((W2, b2), stream / root, a2),
            ((W1, b1), (stream - e2) / root, a1),
            ((W0, b0), stream - e1 - e2, x),
        ):
            W -= lr * delta.T @ a / B
            b -= lr * delta.sum(0) / B
    return W0, b0, W3, b3, W1, b1, W2, b2


@pytest.mark.parametrize("gamma", [0.2, 0.5])
def test_weights_of_a_residual_network_are_those_of_hand_written_gradients(gamma, monkeypatch):
    torch.manual_seed(2)
    net = Skipping(2, outputs=3).double()
    x, y = torch.randn(16, 6).double(), torch.randn(16, 3).double()
    expected = residual_by_hand(net, x, y, T=8, gamma=gamma, lr=0.03)
    optimizer = automatic(net, 0.03, gamma, T=8, loss_terms=16)
    monkeypatch.setattr("lightning_pc.learner.mover_of", lambda *_: Descent(gamma))
    optimizer.step(lambda: 0.5 * (net(x) - y).square().sum() / 16)
    for ours, theirs in zip(net.parameters(), expected, strict=True):
        assert relative(ours, theirs) < 1e-12


class Behind(Skipping):
    """Something nonlinear behind the last block: the loss reads one node alone."""

    def forward(self, x):
        return self.head(torch.tanh(super().forward(x)))


class Watched(nn.Module):
    """A chain whose loss reads every layer."""

    def __init__(self):
        super().__init__()
        sizes = (6, 8, 8, 8, 4)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x):
        penalty = 0.0
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
            penalty = penalty + x.square().mean(1, keepdim=True)
        return self.layers[-1](x) + penalty


class Words(Skipping):
    """Values of three axes."""

    def forward(self, x):
        return super().forward(torch.stack([x, -x], 1)).mean(1)


@pytest.mark.parametrize(
    ("make", "share"),
    [
        (lambda: Skipping(1), 1),
        (lambda: Skipping(3), 1),
        (lambda: Words(2), 1),
        (lambda: Behind(3, outputs=8), 1),
        (Watched, 2 / 3),
        (lambda: MLP((6, 8, 8, 4)), 1),
        (lambda: MLP((6, *[8] * 10, 4)), 2 / 10),
    ],
)
def test_the_more_stages_are_in_a_row_the_less_values_follow(make, share):
    """Connections that skip stages make the row shorter."""
    model = make()
    x, y = vectors(16)
    optimizer = IPC(torch.optim.Adam(model.parameters(), 1e-5), model)
    optimizer.step(classifier(model, x, y))
    assert set(optimizer.report.followed) == set(optimizer.report.nodes)
    assert set(optimizer.report.followed.values()) == {share}


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (IPC, {"gamma": 0.3}),
        (IPC, {"momentum": 0}),
        (IPC, {"precisions": "spiking"}),
        (IPC, {"reset": "never"}),
        (PC, {}),
        (IEPC, {}),
    ],
)
def test_only_ipc_of_which_all_is_automatic_lets_values_follow(kind, given, monkeypatch):
    followed = []
    monkeypatch.setattr(Node, "follow", lambda self, share: followed.append(self))
    assert not any(report.followed for report in trained(net(), 1.0, kind=kind, **given))
    assert not followed
    trained(net(), 1.0)
    assert followed


def test_activations_in_place_make_no_difference():
    """They overwrite the prediction that the next one is compared with."""
    one, other = net(), net(inplace=True)
    trained(one, 3.0)
    trained(other, 3.0)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_nothing_to_infer_moves_nothing():
    """Adam would make whole steps of rounding."""
    model, (x, _) = MLP((6, 8, 8, 8, 4)), vectors(12)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = IPC(torch.optim.Adam(model.parameters(), 0.01), model)
    optimizer.step(lambda: nn.functional.mse_loss(model(x), model(x).detach()))
    assert set(optimizer.report.peak_energy.values()) == {0.0}
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)


def test_f_does_not_leap_with_inputs_thirty_times_as_large():
    """Where values stay, the weights' steps raise a node's energy to many times all of F.

    In the first batches: from then on rounding decides in which one F leaps.
    """

    def leap(reports):
        return max(float(r.energy.diff(dim=0).amax() / r.free_energy[0]) for r in reports[:3])

    reports = trained(net(), 30.0, batches=30)
    stayed = trained(net(), 30.0, batches=30, momentum=0)
    assert leap(stayed) > 4 * leap(reports)
    assert float(reports[-1].loss[0]) < 0.5 * float(stayed[-1].loss[0])


def went(x, before, mu, energy, share=1.0):
    """The value after its prediction has moved from ``before`` to ``mu``."""
    node = Node("n", before.clone().requires_grad_(), energy)
    node.follow(share)
    node.x.data.copy_(x)
    node.evaluate(mu, 1.0)
    return node.x.detach()


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 0, 3), (2, 3, 2, 2)])
def test_values_of_any_shape(shape):
    """An error of nothing leaves all of the move."""
    x = torch.full(shape, 10.0)
    assert torch.equal(went(x, x, x - 1, Gaussian(), 0.5), x - 0.5)


@pytest.mark.parametrize(
    ("mu", "followed"),
    [
        ((8.0, 0.0), (0.0, 0.0)),  # the error was 10, of which 8 have been learned
        ((13.0, 0.0), (3.0, 0.0)),  # all of it, and 3 more
        ((-5.0, 0.0), (-5.0, 0.0)),
        ((4.0, 12.0), (0.0, 12.0)),
    ],
)
def test_what_brings_a_row_nearer_is_not_followed(mu, followed):
    """Each row by itself."""
    x, before = torch.tensor([[10.0, 0.0], [90.0, 40.0]]), torch.tensor([[0.0, 0.0], [90.0, 36.0]])
    after = went(x, before, torch.tensor([[*mu], [90.0, 27.0]]), Gaussian())
    assert after.tolist() == [[10.0 + followed[0], followed[1]], [90.0, 31.0]]


@pytest.mark.parametrize("energy", [Categorical(), MaskedGaussian()])
@pytest.mark.parametrize("mask", [-math.inf, torch.finfo(torch.float32).min, -1e9])
def test_masked_logits_go_nowhere(energy, mask):
    before = torch.tensor([[100.0, 100.0, mask]])
    mu = before + torch.tensor([0.0, 10.0, 0.0])
    assert went(before, before, mu, energy, 0.5).tolist() == [[100.0, 105.0, mask]]


def test_a_logit_that_is_masked_later_takes_nothing_with_it():
    x, mu = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 2.0, -math.inf]])
    assert went(x, x, mu, Categorical()).tolist() == [[0.0, 2.0, 2.0]]


def test_it_is_explained():
    said = explain(trained(net(), 1.0)[0])
    assert "Values followed their predictions: '1', " in said
    assert "(2 in all)." in said
    assert "followed" not in explain(trained(net(), 1.0, momentum=0)[0])


def test_the_first_prediction_that_is_met_may_have_moved():
    """A weight that stages share moves it before an error arrives: the start is what counts."""
    node = Node("n", torch.zeros(2, 3, requires_grad=True), Gaussian())
    node.follow(1.0)
    assert node.evaluate(torch.ones(2, 3), 1.0).total == 0
    assert torch.equal(node.x.detach(), torch.ones(2, 3))


@pytest.mark.slow
def test_deep_residual_networks_learn():
    """Where values stay, those of all nodes below hold the weights of each stage back."""

    def losses(**given):
        torch.manual_seed(0)
        model = Skipping(24, width=16, outputs=3)
        x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
        optimizer = IPC(torch.optim.Adam(model.parameters(), 3e-4), model, **given)
        return [float(optimizer.step(classifier(model, x, y))) for _ in range(25)]

    along, stayed = losses(), losses(momentum=0)
    assert along[0] == stayed[0]
    assert along[0] - along[-1] > 1.3 * (stayed[0] - stayed[-1])


def reached(edges):
    """The autograd nodes that gradients from there run through, but for leaves."""
    found, left = set(), [edge.node for edge in edges]
    while left:
        node = left.pop()
        if node not in found and "AccumulateGrad" not in node.name():
            found.add(node)
            left += [above for above, _ in node.next_functions if above is not None]
    return found


@pytest.mark.parametrize("make", [UNet, lambda: net(inplace=True)])
def test_pieces_share_nothing_where_activations_write_in_place(make):
    """What a prediction held before it was written to is no part of the graph below it."""
    torch.manual_seed(0)
    model = make()
    x = torch.randn(2, 1, 8, 8) if isinstance(model, UNet) else torch.randn(2, 6)
    how = {"reset": "never", "gamma": 0.05, "loss_terms": 2}
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model, **how)
    optimizer.step(lambda: model(x).square().mean())
    optimizer._learner.begin(lambda: model(x).square().mean(), lambda loss: loss)
    batch = optimizer._learner.waiting.batch
    edges = [[batch.site(n).edge for n in piece.nodes] for piece in batch.graph.pieces]
    each = [reached([edge for edge in those if edge is not None]) for those in edges]
    assert sum(map(bool, each)) > 1
    for one, other in itertools.combinations(each, 2):
        assert not one & other


def test_values_that_are_kept_where_activations_write_in_place():
    """All pieces run at the first step of the second batch, each on its own graph."""
    torch.manual_seed(0)
    model, x = UNet(), torch.randn(2, 1, 8, 8)
    how = {"reset": "never", "gamma": 0.05, "loss_terms": 2}
    learner = PC(torch.optim.SGD(model.parameters(), 0.1), model, **how)
    for _ in range(8):
        learner.step(lambda: model(x).square().mean())
