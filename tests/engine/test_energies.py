"""Node energies: against formulas written out, and one attention through all its guises."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc import describe
from lightning_pc.energies import (
    Bernoulli,
    Categorical,
    Entrywise,
    Gaussian,
    Huber,
    Laplace,
    register,
)
from lightning_pc.errors import ConfigError, PlacementError
from lightning_pc.losses import squared_error
from lightning_pc.nn import Latent
from lightning_pc.nodes.energies import Free, MaskedGaussian
from lightning_pc.optim import IPC, PC, PredictiveCoding
from tests.compare import far, relative, twin
from tests.engine.modules import MLP
from tests.engine.oracle import Explicit

LOWEST = torch.finfo(torch.float64).min


def pair(shape=(3, 4, 5)):
    x, mu = torch.randn(2, *shape, dtype=torch.float64)
    return x.requires_grad_(), mu.requires_grad_()


def kl(x, mu, dim):
    p, q = x.softmax(dim), mu.softmax(dim)
    return p * (p / q).log()


def two_classes(p, q):
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


@register
class Needy(Entrywise):
    name = "needy"

    def __init__(self, number):
        self.number = number

    def energy(self, x, mu):
        return self.number * (x - mu).square()


class Flat(Entrywise):
    name = "flat"

    def energy(self, x, mu):
        return (x - mu).square().mean()


class Prior(Entrywise):
    name = "prior"

    def energy(self, x, mu):
        return x.abs().sqrt() if x.numel() else x


@register
class Cauchy(Entrywise):
    name = "cauchy of a test"

    def energy(self, x, mu):
        return torch.log1p((x - mu).square())


FORMULAS = {
    "gaussian": (Gaussian(), lambda x, mu: 0.5 * (x - mu) ** 2),
    "gaussian_logits": (MaskedGaussian(), lambda x, mu: 0.5 * (x - mu) ** 2),
    "categorical": (Categorical(-1), lambda x, mu: kl(x, mu, -1)),
    "categorical-1": (Categorical(1), lambda x, mu: kl(x, mu, 1)),
    "temperature": (Categorical(-1, 2.5), lambda x, mu: kl(x / 2.5, mu / 2.5, -1)),
    "precision": (Gaussian(3.0), lambda x, mu: 1.5 * (x - mu) ** 2),
    "laplace": (Laplace(0.5), lambda x, mu: (x - mu).abs() / 0.5),
    "huber": (Huber(0.7), lambda x, mu: F.huber_loss(x, mu, reduction="none", delta=0.7)),
    "bernoulli": (Bernoulli(), lambda x, mu: two_classes(x.sigmoid(), mu.sigmoid())),
    "own": (Cauchy(), lambda x, mu: torch.log1p((x - mu) ** 2)),
    "free": (Free(), lambda x, mu: 0.0 * x * mu),
    "of values alone": (Prior(), lambda x, mu: x.abs().sqrt() + 0.0 * mu),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 6)])
def test_value_and_gradients_equal_the_formula(name, shape):
    energy, formula = FORMULAS[name]
    x, mu = pair(shape)
    each = formula(x, mu).reshape(shape[0], -1).sum(1)
    dx, dmu = torch.autograd.grad(each.sum(), (x, mu))
    x, mu, each = x.detach(), mu.detach(), each.detach()
    samples = zip(x.split(1), mu.split(1), each, strict=True)
    for one, prediction, expected in samples:
        torch.testing.assert_close(energy.evaluate(one, prediction, 1.0).total, expected)
    own = energy.evaluate(x, mu, 0.25)
    torch.testing.assert_close((own.dmu, own.total), (0.25 * dmu, each.sum()))
    torch.testing.assert_close(own.own(), 0.25 * dx)


def test_categorical_gradients_are_those_of_the_paper():
    x, mu = (v.detach() for v in pair())
    p, q = x.softmax(-1), mu.softmax(-1)
    dmu, dx, _ = Categorical(-1).evaluate(x, mu, 1.0)
    divergence = (p * (p / q).log()).sum(-1, keepdim=True)
    torch.testing.assert_close(dmu, q - p)
    torch.testing.assert_close(dx, p * ((p / q).log() - divergence))


@pytest.mark.parametrize("energy", [Categorical(-1), MaskedGaussian()])
@pytest.mark.parametrize("low", [-math.inf, LOWEST, 0.6 * LOWEST])
def test_masked_logits_take_no_part(energy, low):
    x, mu = (v.detach() for v in pair((2, 6)))
    few = energy.evaluate(x[:, :4], mu[:, :4], 1.0)
    x[:, 4:], mu[:, 4:] = low, low
    dmu, total = (slopes := energy.evaluate(x, mu, 1.0)).dmu.clone(), slopes.total
    dx = slopes.own()
    for whole, part in ((dx, few.own()), (dmu, few.dmu)):
        torch.testing.assert_close(whole[:, :4], part)
        assert (whole[:, 4:] == 0).all()
    torch.testing.assert_close(total, few.total)
    mu[0], x[0] = low, low  # a row that sees nothing at all
    assert all(g is None or g.isfinite().all() for g in energy.evaluate(x, mu, 1.0))


def test_probabilities_that_underflow_are_no_nan():
    x = torch.tensor([[0.0, -2000.0, -2000.0]], dtype=torch.float64)
    dmu, dx, total = Categorical(-1).evaluate(x, -x, 1.0)
    assert all(g.isfinite().all() for g in (dx, dmu, total))


D, H, L, N = 8, 2, 5, 4


class Attention(nn.Module):
    """The same weights through torch's composites and written out; `guise` says which."""

    def __init__(self, guise, mask=None, dropout=0.0, causal=False):
        super().__init__()
        self.mha = nn.MultiheadAttention(D, H, dropout, batch_first=True)
        self.head = nn.Linear(D, 3)
        nn.init.normal_(self.mha.in_proj_bias)
        self.guise, self.mask, self.dropout, self.causal = guise, mask, dropout, causal

    def forward(self, x):
        return self.head(x + self.attended(x)).transpose(1, 2)

    def attended(self, x):
        mask = self.mask
        if self.guise.startswith("mha"):
            if mask is not None and mask.dtype == torch.bool:
                mask = ~mask  # True is masked there
            if self.causal:
                mask = torch.ones(L, L, dtype=torch.bool).triu(1)
            return self.mha(x, x, x, attn_mask=mask, need_weights=self.guise == "mha-weights")[0]
        projected = F.linear(x, self.mha.in_proj_weight, self.mha.in_proj_bias)
        q, k, v = (
            part.view(len(x), L, H, D // H).transpose(1, 2) for part in projected.chunk(3, -1)
        )
        if self.guise == "sdpa":
            h = F.scaled_dot_product_attention(
                *(q, k, v, mask), dropout_p=self.dropout, is_causal=self.causal
            )
        else:
            logits = q @ k.transpose(-2, -1) / math.sqrt(D // H)
            low = -math.inf if self.guise == "eager" else torch.finfo(x.dtype).min
            if self.causal:
                mask = torch.ones(L, L, dtype=torch.bool).tril()
            if mask is not None and mask.dtype == torch.bool:
                logits = logits.masked_fill(~mask, low)
            elif mask is not None:
                logits = logits + mask.clamp_min(low)
            h = F.dropout(logits.softmax(-1), self.dropout) @ v
        return self.mha.out_proj(h.transpose(1, 2).flatten(2))


GUISES = ("eager", "eager-finfo", "sdpa", "mha", "mha-weights")
SEEN = torch.rand(L, L, generator=torch.Generator().manual_seed(3)) > 0.4
SEEN |= torch.eye(L, dtype=torch.bool)
VARIANTS = {
    "plain": {},
    "bool": {"mask": SEEN},
    "float": {"mask": torch.where(SEEN, 0.3, -math.inf).double()},
    "causal": {"causal": True},
    "dropout": {"dropout": 0.4},
    "all": {"dropout": 0.2, "mask": SEEN},
}


def train(model, batches, algorithm=IPC, steps=6, **kwargs):
    optimizer = algorithm(
        torch.optim.SGD(model.parameters(), 0.3), model, T=steps, gamma=0.5, gamma_decay=1, **kwargs
    )
    for i, (x, y) in enumerate(batches):
        torch.manual_seed(i)
        optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    return optimizer


def draw(count=2):
    return [(torch.randn(N, L, D).double(), torch.randint(0, 3, (N, L))) for _ in range(count)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("algorithm", [IPC, PC])
def test_one_attention_in_all_its_guises(variant, algorithm):
    torch.manual_seed(5)
    first, batches = Attention("eager", **VARIANTS[variant]).double(), draw()
    trained, start = {}, twin(first)
    for guise in GUISES:
        model = twin(first)
        model.guise = guise
        optimizer = train(model, batches, algorithm)
        (node,) = optimizer.report.nodes
        assert optimizer.report.peak_energy[node] > 0
        (value,) = optimizer.values.values()
        trained[guise] = model, value.detach().view(N, H, L, L).softmax(-1)
        (row,) = describe(model, batches[0][0], algorithm="ipc", print_table=False).rows
        assert row.energy == "categorical"
    model, value = trained.pop("eager")
    assert far(model, start)[0] > 1e-2
    for guise, (other, own) in trained.items():
        assert far(other, model)[0] < 1e-9, guise
        assert relative(own, value) < 1e-9, guise


@pytest.mark.parametrize("low", ["eager", "eager-finfo", "sdpa"])
def test_a_masked_logit_does_not_move(low):
    model = Attention(low, mask=SEEN).double()
    optimizer = train(model, draw(1))
    (value,) = optimizer.values.values()
    floor = -math.inf if low != "eager-finfo" else LOWEST
    assert (value[..., ~SEEN] == floor).all()
    assert value[..., SEEN].isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_query_that_sees_nothing():
    """torch's own attention gives it zeros; nothing becomes NaN and the others learn the same."""
    mask = SEEN.clone()
    mask[2] = False
    model, batches = Attention("sdpa", mask=mask).double(), draw()
    plain = F.cross_entropy(model(batches[0][0]), batches[0][1])
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.3), model)
    for x, y in batches:
        loss = optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        if x is batches[0][0]:
            assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.report.energy.isfinite().all()


class Grouped(nn.Module):
    """More query heads than key heads."""

    def __init__(self, guise):
        super().__init__()
        self.q, self.kv, self.head = nn.Linear(D, 8), nn.Linear(D, 8), nn.Linear(8, 3)
        self.guise = guise

    def forward(self, x):
        q = self.q(x).view(len(x), L, 4, 2).transpose(1, 2)
        k, v = (h.view(len(x), L, 2, 2).transpose(1, 2) for h in self.kv(x).chunk(2, -1))
        if self.guise == "eager":
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            causal = torch.ones(L, L, dtype=torch.bool).tril()
            logits = (0.7 * q @ k.transpose(-2, -1)).masked_fill(~causal, -math.inf)
            h = torch.softmax(logits, dim=-1) @ v
        else:
            h = F.scaled_dot_product_attention(
                *(q, k, v), is_causal=True, scale=0.7, enable_gqa=True
            )
        return self.head(h.transpose(1, 2).flatten(2)).transpose(1, 2)


@pytest.mark.parametrize("softmax_energy", ["categorical", "gaussian"])
def test_grouped_queries(softmax_energy):
    eager, batches = Grouped("eager").double(), draw()
    sdpa = twin(eager)
    sdpa.guise = "sdpa"
    for model in (eager, sdpa):
        optimizer = train(model, batches, softmax_energy=softmax_energy)
        assert max(optimizer.report.peak_energy.values()) > 0
    assert far(eager, sdpa)[0] < 1e-9


@pytest.mark.parametrize("spelling", ["functional", "tensor", "module", "torch", "log"])
def test_softmax_however_it_is_spelt(spelling):
    class Soft(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.soft = nn.Linear(D, 6), nn.Linear(6, 3), nn.Softmax(dim=-1)

        def forward(self, x):
            h = self.a(x)
            p = {
                "functional": lambda: F.softmax(h, dim=-1),
                "tensor": lambda: h.softmax(-1),
                "module": lambda: self.soft(h),
                "torch": lambda: torch.softmax(input=h, dim=-1),
                "log": lambda: F.log_softmax(h, -1).exp(),
            }[spelling]()
            return self.b(p).transpose(1, 2)

    def written_out(model, at, x, y):
        out = model.b(at(model.a(x), dim=-1).softmax(-1)).transpose(1, 2)
        return F.cross_entropy(out, y, reduction="sum"), y.numel()

    model, batches, explicit = Soft().double(), draw(), Explicit(written_out)
    reference = twin(model)
    optimizer = train(model, batches)
    for batch in batches:
        explicit.batch(reference, batch, 0.5, 6, 0.3, True)
    (value,) = optimizer.values.values()
    assert relative(value.detach(), explicit.values[0].detach()) < 1e-9
    assert far(model, reference)[0] < 1e-9
    assert min(optimizer.report.peak_energy.values()) > 0


# Energies of some nodes -------------------------------------------------------------------------


def by_hand(net, x, y, energies, T, gamma):
    """Values and last gradients by autograd of F, all at once."""
    first, _, second, _, last = net
    h = [first(x).detach()]
    h.append(second(torch.tanh(h[0])).detach())
    for t in range(T):
        h = [value.detach().requires_grad_() for value in h]
        means = first(x), second(torch.tanh(h[0]))
        free = 0.5 * (last(torch.tanh(h[1])) - y).square().sum()
        for energy, value, mu in zip(energies, h, means, strict=True):
            free = free + energy(value, mu).sum()
        if t < T - 1:
            moves = torch.autograd.grad(free, h)
            h = [value - gamma * move for value, move in zip(h, moves, strict=True)]
    return torch.autograd.grad(free / len(x), [*net.parameters()])


@pytest.mark.parametrize("name", ["laplace", "huber", "bernoulli", "precision", "own"])
def test_a_node_with_an_energy_of_its_own(name):
    energy, formula = FORMULAS[name]
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)]
    net, x, y = nn.Sequential(*layers).double(), torch.randn(6, 4).double(), torch.randn(6, 3)
    expected = by_hand(net, x, y, [lambda x, mu: 0.5 * (x - mu) ** 2, formula], 7, 0.05)
    how = {"gamma": 0.05, "T": 7, "energies": {"3": energy}, "parallel": False}
    learner = PC(torch.optim.SGD(net.parameters(), 0.0), net, **how)
    learner.step(lambda: squared_error(net(x), y.double()))
    for p, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert describe(net, lambda: squared_error(net(x), y.double()), learner, print_table=False)


@pytest.mark.parametrize(
    ("energies", "kinds"),
    [
        ({"tanh": "huber"}, ["huber", "huber"]),
        ({"tanh#2": "huber"}, ["gaussian", "huber"]),
        ({"tanh": "huber", "tanh#2": "laplace"}, ["huber", "laplace"]),
    ],
)
def test_a_module_that_is_called_twice(energies, kinds):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.tanh, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.tanh(self.w(self.tanh(self.w(x)))))

    net = Twice()
    learner = PC(torch.optim.SGD(net.parameters(), 0.1), net, energies=energies)._learner
    learner.begin(lambda: squared_error(net(torch.ones(2, 4)), torch.ones(2, 4)), lambda loss: loss)
    assert [node.energy.name for node in learner.waiting.batch.nodes] == kinds


def test_names_and_sparse_causes():
    """A Laplace prior leaves causes at zero that a Gaussian one spreads over all."""

    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.z, self.w = Latent(12), nn.Linear(12, 8, bias=False)

        def forward(self, n):
            return self.w(self.z(n))

    torch.manual_seed(0)
    model, y = Sparse().double(), torch.randn(20, 8).double()
    small = {}
    for name in ("gaussian", "laplace"):
        learner = PC(
            torch.optim.SGD(model.parameters(), 0.0),
            model,
            **{"energies": {"z": name}, "gamma": 0.02, "T": 300},
        )
        learner.step(lambda: squared_error(model(20), y))
        small[name] = float((learner.values["z"].abs() < 0.05).float().mean())
    assert small["laplace"] > 3 * small["gaussian"]


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        ({"energies": {"1": "gausian"}}, ConfigError, "'1' is given 'gausian': expected one of"),
        ({"energies": {"1": 3}}, ConfigError, "is given 3"),
        ({"energies": "huber"}, ConfigError, "expected a dict"),
        ({"energies": {1: "huber"}}, ConfigError, "expected a dict of node names"),
        ({"energies": {"1": "needy"}}, ConfigError, "'needy' needs arguments"),
        ({"energies": {"1": Flat()}}, ConfigError, r"Flat.energy gave \(\): expected the energy"),
        ({"energies": {"1": "huber"}, "algorithm": "epc"}, ConfigError, "Gaussian energies alone"),
        ({"energies": {"1": "huber"}, "algorithm": "zil"}, ConfigError, "Gaussian energies alone"),
        ({"energies": {"2": "huber"}}, PlacementError, "no value node is named '2'"),
    ],
)
def test_a_wrong_energy(given, error, why):
    net = MLP((4, 5, 3))

    def learn():
        how = {"algorithm": "pc", **given}
        learner = PredictiveCoding(torch.optim.SGD(net.parameters(), 0.1), net, **how)
        learner.step(lambda: squared_error(net(torch.ones(2, 4)), torch.ones(2, 3)))

    with pytest.raises(error, match=why):
        learn()


@pytest.mark.parametrize("make", [Gaussian, Huber, Laplace, lambda n: Categorical(-1, n)])
@pytest.mark.parametrize("number", [0, -1.0, "1", True, float("nan")])
def test_a_wrong_number(make, number):
    with pytest.raises(ConfigError, match="expected a positive number"):
        make(number)


def test_a_name_is_given_once():
    class Other(Entrywise):
        name = "huber"

        def energy(self, x, mu):
            return x - mu

    class Nameless(Entrywise):
        def energy(self, x, mu):
            return x - mu

    with pytest.raises(ConfigError, match="named 'huber' already"):
        register(Other)
    with pytest.raises(ConfigError, match="give it a name"):
        register(Nameless)
    assert register(Cauchy) is Cauchy


def test_rounding_has_no_force():
    """Side by side a prediction may differ by rounding from the value that it was."""
    x = 3 * torch.rand(4, 5)
    slopes = Laplace().evaluate(x, x * (1 + 1e-7), 1.0)
    assert not slopes.dmu.any()
    assert not slopes.total
    trained = []
    for parallel in (False, True):
        torch.manual_seed(0)
        layers = [m for _ in range(6) for m in (nn.Linear(6, 6), nn.Tanh())]
        net = nn.Sequential(*layers, nn.Linear(6, 3)).double()
        places = {str(2 * i + 1): "laplace" for i in range(6)}
        how = {"energies": places, "gamma": 0.05, "parallel": parallel}
        learner = PC(torch.optim.SGD(net.parameters(), 0.1), net, **how)
        for seed in range(4):
            x = torch.randn(5, 6, generator=torch.manual_seed(seed)).double()
            learner.step(lambda: squared_error(net(x), x[:, :3]))  # noqa: B023
        trained.append(net)
    assert far(trained[1], trained[0])[0] < 1e-9


def test_masked_logits_by_name():
    """As softmax_energy="gaussian"."""

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v, self.o = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            logits = self.q(x).masked_fill(torch.arange(5) == 2, -torch.inf)
            return self.o(logits.softmax(-1) * self.v(x))

    found = []
    for how in ({"softmax_energy": "gaussian"}, {"energies": {"softmax": "gaussian"}}):
        torch.manual_seed(0)
        net = Attends().double()
        x = torch.randn(6, 4).double()
        learner = PC(torch.optim.SGD(net.parameters(), 0.1), net, gamma=0.1, **how)
        learner.step(lambda: squared_error(net(x), x[:, :3]))  # noqa: B023
        found.append(net)
    assert far(found[1], found[0])[0] == 0


def test_logits_that_are_large():
    x, mu = torch.tensor([19.9]).double(), torch.tensor([20.1]).double()
    p, q = (-x).double().sigmoid(), (-mu).double().sigmoid()  # of the other class
    exact = p * (p / q).log() + (1 - p) * torch.log1p((q - p) / (1 - q))
    assert float(Bernoulli().evaluate(x, mu, 1.0).total) == pytest.approx(float(exact), abs=1e-14)


def test_a_built_in_is_not_replaced():
    made = type("Laplace", (Entrywise,), {"name": "laplace", "energy": lambda self, x, mu: x - mu})
    with pytest.raises(ConfigError, match="named 'laplace' already"):
        register(made)
