"""PC, iPC and ePC against explicit equations: NumPy by hand, and F written out for autograd."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc.optim import EPC, IEPC, IPC, PC
from tests.engine.oracle import ErrorCoordinates, Explicit, Oracle, cross_entropy, squared_error
from tests.engine.problems import MLP, far, relative, twin

SIZES = (8, 8, 5)  # ragged last batch
LOSSES = {  # name -> the user's loss, the oracle's, terms M of a batch of n with 4 outputs
    "ce": (F.cross_entropy, cross_entropy, lambda n: n),
    "ce_sum": (
        lambda o, y: F.cross_entropy(o, y, reduction="sum") / len(y),
        cross_entropy,
        lambda n: n,
    ),
    "mse": (F.mse_loss, squared_error, lambda n: 4 * n),
    "mse_sum": (
        lambda o, y: F.mse_loss(o, y, reduction="sum") / len(y),
        squared_error,
        lambda n: n,
    ),
}


def batches(loss):
    for n in SIZES:
        x = torch.randn(n, 6, dtype=torch.float64)
        yield x, torch.randint(0, 4, (n,)) if loss.startswith("ce") else torch.randn(n, 4).double()


def compare(model, share, algorithm, f, loss, gamma, gamma_decay, lr, T, momentum=0.0):
    linears = list(dict.fromkeys(m for m in model.modules() if isinstance(m, nn.Linear)))
    user_loss, own_loss, terms = LOSSES[loss]
    oracle = Oracle(
        [m.weight.detach().numpy().copy() for m in linears],
        [m.bias.detach().numpy().copy() for m in linears],
        *(f, own_loss, lr, gamma, T, algorithm is IPC, gamma_decay, share, momentum),
    )
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    sgd = torch.optim.SGD(model.parameters(), lr)
    given = {"gamma": gamma, "gamma_decay": gamma_decay, "momentum": momentum}
    optimizer = algorithm(sgd, model, T=T, **given)
    for x, y in batches(loss):
        value = optimizer.step(lambda x=x, y=y: user_loss(model(x), y))
        oracle.batch(x.numpy(), y.numpy(), terms(len(x)))
        assert optimizer.report.loss_terms == pytest.approx(terms(len(x)))
        assert optimizer.report.steps == T
        assert value.item() == pytest.approx(oracle.losses[0], rel=1e-12)
        for own, node in zip(oracle.values, optimizer.values.values(), strict=True):
            assert relative(node.detach(), torch.from_numpy(own)) < 1e-9
        np.testing.assert_allclose(optimizer.report.loss, oracle.losses, rtol=1e-9)
        np.testing.assert_allclose(optimizer.report.energy, oracle.energies, rtol=1e-7, atol=1e-16)
        assert optimizer.report.gamma == pytest.approx(oracle.used_gamma, rel=1e-12)
    for own, module in zip(oracle.weights, linears, strict=True):
        assert relative(module.weight.detach(), torch.from_numpy(own)) < 1e-9
    for own, module in zip(oracle.biases, linears, strict=True):
        assert relative(module.bias.detach(), torch.from_numpy(own)) < 1e-9
    end = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert relative(end, start) > 0.01  # it learned something to compare
    return oracle


@pytest.mark.parametrize("gamma_decay", [1.0, 0.9])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("f", ["tanh", "relu"])
@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_equals_explicit_equations(algorithm, f, loss, gamma_decay):
    model = MLP((6, 7, 5, 4), f).double()
    lr = 0.1 * (4 if loss == "mse" else 1)
    compare(model, None, algorithm, f, loss, 0.2, gamma_decay, lr, 6)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("gamma_decay", [1.0, 0.9])
@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_momentum_equals_explicit_equations(algorithm, gamma_decay, momentum):
    model = MLP((6, 7, 5, 5, 4), "tanh").double()
    oracle = compare(model, None, algorithm, "tanh", "ce", 0.8, gamma_decay, 0.1, 12, momentum)
    if momentum == 0.9 and gamma_decay < 1:
        assert oracle.used_gamma < 0.8  # it overshoots, and both play together


@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_gamma_decays_where_the_energy_rises(algorithm):
    """At this gamma the energy does rise, so that the decay of the equations above is tried."""
    model = MLP((6, 7, 5, 4), "tanh").double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    oracle = compare(model, None, algorithm, "tanh", "ce", 1.2, 0.9, 0.05, 9)
    assert oracle.used_gamma < 1.2 * 0.9


@pytest.mark.parametrize("share", [[0, 1, 1, 1, 2], [0, 1, 0, 1, 2], [0, 1, 2, 1]])
@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_shared_weights_equal_explicit_equations(algorithm, share):
    """A weight that moves for a low layer moves the prediction of a high one at once."""
    first, wide = nn.Linear(6, 4), [nn.Linear(4, 4) for _ in range(2)]
    if share[2:3] == [0]:
        first = nn.Linear(6, 6)
        wide = [nn.Linear(6, 6), nn.Linear(6, 4)]
    parts = [first, *wide]
    model = nn.Sequential(*itertools.chain(*((parts[i], nn.Tanh()) for i in share)))[:-1].double()
    compare(model, share, algorithm, "tanh", "ce", 0.2, 1.0, 0.3, 8)


class Skips(nn.Module):
    """The second nonlinearity reads a sum that runs around the first."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        h = self.a(x)
        return self.c((h + self.b(h.tanh())).relu())

    def explicit(self, at, x, y):
        h = self.a(x)
        return self.tail(at(h + self.b(torch.tanh(at(h)))), y)

    def tail(self, h, y):
        return F.cross_entropy(self.c(torch.relu(h)), y, reduction="sum"), len(y)


class Deep(nn.Module):
    """A multilayer perceptron."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.run(x, lambda mu: mu)

    def run(self, x, at):
        for layer in self.layers:
            x = at(layer(x)).tanh()
        return self.head(x)

    def explicit(self, at, x, y):
        return F.cross_entropy(self.run(x, at), y, reduction="sum"), len(y)


class LongSkip(nn.Module):
    """The first node is read by the loss too: its neighbours' errors come before their depth."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        values = [self.layers[0](x).tanh()]
        for layer in self.layers[1:]:
            values.append(layer(values[-1]).tanh())
        return self.head(values[-1] + values[0])

    def explicit(self, at, x, y):
        values = [at(self.layers[0](x)).tanh()]
        for layer in self.layers[1:]:
            values.append(at(layer(values[-1])).tanh())
        return F.cross_entropy(self.head(values[-1] + values[0]), y, reduction="sum"), len(y)


class Recurrent(nn.Module):
    """An LSTM cell by hand: gates, and a state that runs around them."""

    def __init__(self):
        super().__init__()
        self.gates, self.head = nn.Linear(2 + 3, 12), nn.Linear(3, 4)

    def forward(self, x):
        return self.run(x, lambda mu: mu)

    def run(self, x, at):
        h = c = x.new_zeros(len(x), 3)
        for step in x.split(2, 1):
            i, f, o, g = self.gates(torch.cat([step, h], 1)).chunk(4, 1)
            c = at(f).sigmoid() * c + at(i).sigmoid() * at(g).tanh()
            h = at(o).sigmoid() * at(c).tanh()
        return self.head(h)

    def explicit(self, at, x, y):
        return F.cross_entropy(self.run(x, at), y, reduction="sum"), len(y)


class Towers(nn.Module):
    """Two towers of different depth into one head."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 5)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        deep = self.c(self.b(x[:, 3:]).tanh()).tanh()
        return self.head(torch.cat([self.a(x[:, :3]).tanh(), deep], 1))

    def explicit(self, at, x, y):
        deep = at(self.c(at(self.b(x[:, 3:])).tanh())).tanh()
        both = torch.cat([at(self.a(x[:, :3])).tanh(), deep], 1)
        return F.cross_entropy(self.head(both), y, reduction="sum"), len(y)


class ConvNorm(nn.Module):
    """A node's prediction couples the samples of a batch through BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.next = (
            nn.Conv2d(1, 3, 2, bias=False),
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 4, 2),
        )
        self.relu, self.pool, self.head = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Linear(4, 4)

    def forward(self, x):
        h = self.relu(self.norm(self.conv(x)))
        return self.head(self.relu(self.next(self.pool(h))).mean((2, 3)))

    def explicit(self, at, x, y):
        h = self.conv(x)
        centred = h - h.mean((0, 2, 3), keepdim=True)
        h = centred / (centred.pow(2).mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        h = at(h * self.norm.weight.view(3, 1, 1) + self.norm.bias.view(3, 1, 1))
        h = at(self.next(F.max_pool2d(torch.relu(h), 2)))
        out = self.head(torch.relu(h).mean((2, 3)))
        return F.cross_entropy(out, y, reduction="sum"), len(y)


class Attends(nn.Module):
    """F_KL at the attention logits, a Gaussian node behind it; the loss is a mean over tokens."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = x + F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.head(F.gelu(self.o(h))).transpose(1, 2)

    def explicit(self, at, x, y):
        logits = at(self.q(x) @ self.k(x).transpose(1, 2) / 2, dim=-1)
        h = at(self.o(x + logits.softmax(-1) @ self.v(x)))
        out = self.head(F.gelu(h)).transpose(1, 2)
        return F.cross_entropy(out, y, reduction="sum", ignore_index=-100), int((y >= 0).sum())


def tokens(n):
    y = torch.randint(0, 3, (n, 5))
    return torch.randn(n, 5, 4).double(), y.masked_fill(torch.rand(n, 5) < 0.3, -100)


GRAPHS = {
    "deep": (Deep, lambda n: (torch.randn(n, 6).double(), torch.randint(0, 4, (n,)))),
    "skips": (Skips, lambda n: (torch.randn(n, 6).double(), torch.randint(0, 4, (n,)))),
    "long skip": (LongSkip, lambda n: (torch.randn(n, 6).double(), torch.randint(0, 4, (n,)))),
    "recurrent": (Recurrent, lambda n: (torch.randn(n, 6).double(), torch.randint(0, 4, (n,)))),
    "towers": (Towers, lambda n: (torch.randn(n, 6).double(), torch.randint(0, 4, (n,)))),
    "conv": (ConvNorm, lambda n: (torch.randn(n, 1, 7, 7).double(), torch.randint(0, 4, (n,)))),
    "attention": (Attends, tokens),
}


@pytest.mark.parametrize("algorithm", [PC, IPC, EPC, IEPC])
@pytest.mark.parametrize("graph", GRAPHS)
def test_any_graph_equals_its_free_energy_written_out(graph, algorithm):
    make, draw = GRAPHS[graph]
    model = make().double()
    other, lr, T = twin(model), 0.05, 6
    written_out = ErrorCoordinates if algorithm in (EPC, IEPC) else Explicit
    explicit = written_out(lambda m, at, *batch: m.explicit(at, *batch))
    optimizer = algorithm(
        torch.optim.SGD(model.parameters(), lr), model, T=T, gamma=0.2, gamma_decay=1
    )
    start = twin(model)
    for n in SIZES:
        x, y = draw(n)
        optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        explicit.batch(other, (x, y), 0.2, T, lr, algorithm in (IPC, IEPC))
        for own, node in zip(explicit.values, optimizer.values.values(), strict=True):
            assert relative(node.detach(), own.detach()) < 1e-9
    assert far(model, other)[0] < 1e-9
    assert far(model, start)[0] > 0.01
