"""Values of iPC always go along where connections skip all stages: the loss reads every node."""

import itertools
import math

import pytest
import torch
from problems import MLP, Skipping, classifier, relative, vectors
from torch import nn

from lightning_pc.nodes.energies import Gaussian
from lightning_pc.nodes.following import TOO_FAR
from lightning_pc.optim import IPC


def by_hand(net, x, y, T, gamma, lr):
    """iPC of two branches with hand-written gradients; how often each value went along."""
    (W0, b0), (W1, b1), (W2, b2), (W3, b3) = (
        [p.detach().clone() for p in layer.parameters()]
        for layer in (net.stem, *net.branches, net.head)
    )
    B, root, times = len(x), 2**0.5, [0, 0]
    values, before = [None, None], [None, None]

    def follow(node, mu, t):
        if t == 0:
            values[node] = mu.clone()
        else:
            x, was = values[node], before[node]
            if (mu - was).norm() ** 2 <= 0.1 * x.norm() ** 2:
                e = x - was
                learned = ((mu - was) * e).sum(1) / e.square().sum(1).clamp_min(1e-300)
                values[node] = mu + (1 - learned.clamp(0, 1)[:, None]) * e
                times[node] += 1
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
    return (W0, b0, W3, b3, W1, b1, W2, b2), times


@pytest.mark.parametrize(("gamma", "lr"), [(0.2, 0.03), (0.5, 0.03), (0.1, 0.3)])
def test_weights_of_a_residual_network_are_those_of_hand_written_gradients(plain, gamma, lr):
    """All of every move is followed, be gamma small; but for long moves, as at rate 0.3."""
    torch.manual_seed(2)
    net = Skipping(2, outputs=3).double()
    x, y = torch.randn(16, 6).double(), torch.randn(16, 3).double()
    expected, times = by_hand(net, x, y, T=8, gamma=gamma, lr=lr)
    assert (times == [7, 7]) == (lr < 0.1)
    optimizer = plain(net, lr, gamma, T=8, loss_terms=16)
    optimizer.step(lambda: 0.5 * (net(x) - y).square().sum() / 16)
    assert list(optimizer.report.followed.values()) == times
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


class Images(nn.Module):
    """Values of four axes, and behind them, of two."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1)
        self.branch, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x[:, None, :, None])
        x = (x + self.conv(torch.tanh(x))).mean((2, 3))
        return self.head(x + self.branch(torch.tanh(x)))


@pytest.mark.parametrize(
    ("make", "always"),
    [
        (lambda: Skipping(3), ["tanh", "tanh#2", "tanh#3"]),
        (lambda: Skipping(1), []),  # there is nothing to skip
        (lambda: Behind(3, outputs=8), []),
        (Watched, []),
        (lambda: MLP((6, 8, 8, 4)), []),
        (lambda: Words(2), ["tanh", "tanh#2"]),
        (Images, ["tanh#2"]),
    ],
)
def test_values_always_go_along_where_connections_skip_all_stages(make, always):
    model = make()
    x, y = vectors(16)
    adam = torch.optim.Adam(model.parameters(), 1e-5)
    optimizer = IPC(adam, model)
    optimizer.step(classifier(model, x, y))
    report = optimizer.report
    assert report.followed == dict.fromkeys(always, 7)


def test_a_value_that_always_goes_along_does_so_whatever_its_energy(follows):
    """A move that only brings the prediction nearer, by 4 of 10, and one that is all error."""
    for before, after, expected in ((0.0, 4.0, 10.0), (0.0, -2.0, 8.0), (10.0, 12.0, 12.0)):
        along, x = follows(torch.tensor(1e9), 1.0, always=True), torch.full((1, 1), 10.0)
        x = torch.cat([x, torch.full((1, 1), 90.0)])  # a long row, which the move leaves alone
        along.follow(x, torch.tensor([[before], [90.0]]), Gaussian())
        assert float(x[0]) == 10.0  # the first prediction has not moved
        along.follow(x, torch.tensor([[after], [90.0]]), Gaussian())
        assert x.flatten().tolist() == [expected, 90.0]
        assert int(along.times) == 1


@pytest.mark.slow
def test_deep_residual_networks_learn():
    """Where values stay, those of all nodes below hold the weights of each stage back."""

    def losses(too_far):
        torch.manual_seed(0)
        model = Skipping(24, width=16, outputs=3)
        x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
        optimizer = IPC(torch.optim.Adam(model.parameters(), 3e-4), model)
        optimizer._learner.auto.too_far = too_far
        return [float(optimizer.step(classifier(model, x, y))) for _ in range(25)]

    along, stayed = losses(TOO_FAR), losses(math.inf)
    assert along[0] == stayed[0]
    assert along[0] - along[-1] > 1.3 * (stayed[0] - stayed[-1])
