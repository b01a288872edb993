"""A Gaussian energy whose variances are learned: closed forms, states, refusals."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pc import PCStrategy, infer
from lightning_pc.energies import LearnedGaussian
from lightning_pc.errors import ConfigError
from lightning_pc.inference.curvature import diagonal
from lightning_pc.langevin import Langevin
from lightning_pc.losses import squared_error
from lightning_pc.nn import Latent
from lightning_pc.nodes.energies import Gaussian, MaskedGaussian
from lightning_pc.nodes.node import Node
from lightning_pc.optim import IPC, PC, PredictiveCoding
from tests.engine.modules import MLP


def regression(count=2000):
    """Targets with another noise in each unit."""
    torch.manual_seed(0)
    x, w = torch.randn(count, 8).double(), torch.randn(4, 8).double()
    noise = torch.tensor([1.4, 1.7, 2.0, 3.0]).double()
    return x, x @ w.T + noise * torch.randn(count, 4).double()


def open_head():
    """A linear layer, whose output is a node, and the identity, which rests."""
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4, bias=False)).double()
    nn.init.eye_(net[1].weight)
    return net


@pytest.mark.parametrize("kind", [PC, IPC])
@pytest.mark.parametrize("count", [1, 3])
def test_the_maximum_likelihood_of_noise_that_differs_by_unit(kind, count):
    """F's variance of a target is 1 + variance: together that of the residuals."""
    (x, y), net, energy = regression(), open_head(), LearnedGaussian()
    how = {"value_nodes": ["0"], "energies": {"0": energy}, "T": 20, "gamma": 0.3}
    optimizer = kind(torch.optim.SGD(net[0].parameters(), 0.5), net, **how)
    for _ in range(200 // count):
        for some, target in zip(x.chunk(count), y.chunk(count), strict=True):
            optimizer.step(lambda x=some, y=target: squared_error(net(x), y))
    with torch.no_grad():
        found = (y - net(x)).square().mean(0) - 1
    # Of parts of the data it is a running mean over about 20 of them.
    torch.testing.assert_close(energy.variance, found, rtol=2e-3 if count == 1 else 0.1, atol=0)
    torch.testing.assert_close(energy.precision, 1 / energy.variance)
    assert energy.batches == 200 // count * count


def test_one_step_by_hand():
    """Variance v, error e = (y - mu) / (1 + v) * v after long inference, curvature 1 + 1 / v."""
    (x, y), net, energy = regression(50), open_head(), LearnedGaussian(momentum=0.3)
    energy.variance = torch.tensor([0.5, 1.0, 2.0, 4.0]).double()
    before, mu = energy.variance.clone(), net[0](x).detach()
    how = {"value_nodes": ["0"], "energies": {"0": energy}, "T": 400, "gamma": 0.3}
    PC(torch.optim.SGD(net[0].parameters(), 0.0), net, **how).step(lambda: squared_error(net(x), y))
    error = (y - mu) * before / (1 + before)
    expected = error.square().mean(0) + 1 / (1 + 1 / before)
    torch.testing.assert_close(energy.variance, 0.7 * before + 0.3 * expected)
    torch.testing.assert_close(energy.pull, torch.ones(4).double())


def test_units_that_are_correlated():
    """Entry by entry: v = E[e^2] + 1 / (1 / v + (W'W)_uu), where maximum likelihood has all W'W."""
    torch.manual_seed(0)
    w, true = torch.randn(24, 3).double() / 3, torch.tensor([0.5, 1.5, 4.0]).double()
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 24, bias=False)).double()
    net[0].weight.data.zero_()
    net[1].weight.data.copy_(w)
    x = torch.ones(4000, 2).double()
    y = (true.sqrt() * torch.randn(4000, 3).double()) @ w.T + torch.randn(4000, 24).double()
    energy = LearnedGaussian()
    how = {"value_nodes": ["0"], "energies": {"0": energy}, "T": 60}
    optimizer = PC(torch.optim.SGD(net[0].parameters(), 0.0), net, **how)
    for _ in range(150):
        optimizer.step(lambda: squared_error(net(x), y))
    found = energy.variance.diag()
    errors = y @ torch.linalg.inv(w @ found @ w.T + torch.eye(24).double()) @ w @ found
    curvature = 1 / energy.variance + (w.T @ w).diag()
    expected = errors.square().mean(0) + 1 / curvature
    torch.testing.assert_close(energy.variance, expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize(("shape", "dim"), [((6, 5), -1), ((6, 3, 5), 1), ((6, 3, 2, 2), -3)])
def test_energy_and_gradients(shape, dim):
    energy = LearnedGaussian(dim=dim)
    x, mu = torch.randn(shape).double(), torch.randn(shape).double()
    energy.fit("1", x)
    energy.variance = torch.rand(shape[dim]).double() + 0.5
    sizes = [1] * len(shape)
    sizes[dim] = -1
    x.requires_grad_()
    mu.requires_grad_()
    free = 0.7 * 0.5 * ((x - mu).square() / energy.variance.view(sizes)).sum()
    dx, dmu = torch.autograd.grad(free, (x, mu))
    slopes = energy.evaluate(x.detach(), mu.detach(), 0.25, 0.7)
    torch.testing.assert_close(slopes.total, free.detach())
    torch.testing.assert_close(slopes.own(), 0.25 * dx)
    torch.testing.assert_close(slopes.dmu, 0.25 * dmu)


def test_the_diagonal_of_a_curvature():
    """On average over the signs; exact where the curvature is diagonal."""
    torch.manual_seed(0)
    half = torch.randn(6, 6).double()
    matrix, x = half @ half.T, torch.randn(1, 6).double().requires_grad_()
    node = Node("1", x, Gaussian())

    def evaluate():
        node.gradient = 0.5 * (node.x.detach() @ matrix)

    found = []
    for seed in range(2000):
        evaluate()
        at = node.gradient
        found.append(diagonal([node], evaluate, 2.0, seed)[0])
        assert node.gradient is at
    mean = torch.cat(found).mean(0)
    spread = torch.cat(found).std(0) / 2000**0.5
    assert ((mean - matrix.diag()).abs() < 4.5 * spread).all()
    matrix = matrix.diag().diag()
    evaluate()
    torch.testing.assert_close(diagonal([node], evaluate, 2.0, 0)[0][0], matrix.diag())


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Tanh()),
            *(nn.Flatten(), nn.Linear(64, 3)),
        )

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("kind", [PC, IPC])
def test_hidden_units_channels_and_buffers(kind):
    """The two evaluations more leave the module alone, and gradients, values, generators."""
    torch.manual_seed(0)
    one = Images()
    other, left = copy.deepcopy(one), []
    for net, energies in ((one, {}), (other, {"net.2": LearnedGaussian(dim=1)})):
        optimizer = kind(torch.optim.SGD(net.parameters(), 0.1), net, energies=energies)
        torch.manual_seed(1)
        x, y = torch.randn(8, 1, 8, 8), torch.randint(3, (8,))
        optimizer.step(lambda net=net, x=x, y=y: nn.functional.cross_entropy(net(x), y))
        left.append([*net.state_dict().values(), *optimizer.values.values(), torch.rand(1)])
        left[-1] += [p.grad for p in net.parameters()]
    assert len(energies["net.2"].variance) == 6
    assert float((energies["net.2"].variance - 1).abs().min()) > 0
    for found, expected in zip(*left, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("T", range(1, 8))
@pytest.mark.parametrize(("kind", "moves"), [(PC, -1), (IPC, 0)])
def test_values_that_have_not_moved_teach_nothing(kind, moves, T):
    """Of depth d they move first at t = d - 1; pc moves none at its last step."""
    net = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh())))
    net.append(nn.Linear(4, 4))
    energies = {str(n): LearnedGaussian() for n in range(1, 12, 2)}
    optimizer = kind(torch.optim.SGD(net.parameters(), 0.1), net, energies=energies, T=T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step(lambda: squared_error(net(torch.ones(2, 4)), torch.ones(2, 4)))
    batches = [energy.batches for energy in energies.values()]
    assert batches == [int(depth <= T + moves) for depth in range(6, 0, -1)]


@pytest.mark.filterwarnings("ignore:T=1")
def test_what_is_not_finite_teaches_nothing():
    (x, y), net, energy = regression(10), open_head(), LearnedGaussian()
    how = {"value_nodes": ["0"], "energies": {"0": energy}, "T": 1, "gamma": 1e200}
    IPC(torch.optim.SGD(net[0].parameters(), 0.0), net, **how).step(
        lambda: squared_error(net(x), y)
    )
    assert energy.batches == 0
    assert torch.equal(energy.variance, torch.ones(4).double())


def test_samples_hold_the_posterior_variance_already():
    (x, y), net, energy = regression(2000), open_head(), LearnedGaussian()
    how = {"value_nodes": ["0"], "energies": {"0": energy}, "T": 400}
    torch.manual_seed(0)
    optimizer = PC(
        torch.optim.SGD(net[0].parameters(), 0.5),
        net,
        inference=lambda values: Langevin(values, lr=0.02),
        **how,
    )
    for _ in range(60):
        optimizer.step(lambda: squared_error(net(x), y))
    with torch.no_grad():
        found = (y - net(x)).square().mean(0) - 1
    torch.testing.assert_close(energy.variance, found, rtol=0.1, atol=0.1)


def test_the_report_tells_what_followed_all_the_same():
    net = MLP((4, 4, 4))
    told = []
    for energies in ({}, {"1": LearnedGaussian()}):
        optimizer = IPC(torch.optim.SGD(net.parameters(), 0.0), net, energies=energies)
        optimizer.step(lambda: squared_error(net(torch.ones(2, 4)), torch.ones(2, 4)))
        told.append(optimizer.report.followed)
    assert told == [{"1": 1.0}] * 2


@pytest.mark.parametrize("how", [{"reset": "never"}, {"parallel": True}])
def test_kept_values_and_layers_side_by_side(how):
    """Of like layers those that learn stand alone."""
    net = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh())))
    net.append(nn.Linear(4, 4))
    net, x = net.double(), torch.randn(3, 4).double()
    energies = {"3": LearnedGaussian()}
    for _ in range(2):
        how |= {"energies": energies, "T": 9, "gamma": 0.1}
        optimizer = IPC(torch.optim.SGD(net.parameters(), 0.1), net, **how)
        optimizer.step(lambda: squared_error(net(x), x))
        assert sorted(optimizer.values) == sorted(f"{2 * i + 1}" for i in range(6))
    assert energies["3"].batches == 2


def test_causes_whose_spread_is_learned():
    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.causes, self.w = Latent(3), nn.Linear(3, 12, bias=False)

        def forward(self, count):
            return self.w(self.causes(count))

    torch.manual_seed(0)
    net, energy = Generator().double(), LearnedGaussian()
    spread = torch.tensor([0.5, 1.5, 4.0]).double()
    with torch.no_grad():  # columns that do not overlap
        net.w.weight.copy_(torch.eye(3).repeat_interleave(4, 0))
    data = net.w(spread.sqrt() * torch.randn(5000, 3).double()).detach()
    data += torch.randn_like(data)
    optimizer = PC(
        torch.optim.SGD(net.parameters(), 0.0), net, energies={"causes": energy}, T=30, gamma=0.15
    )
    for _ in range(100):
        optimizer.step(lambda: squared_error(net(5000), data))
    torch.testing.assert_close(energy.variance, spread, rtol=0.1, atol=0)


class Regressor(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = MLP((8, 4, 4))

    def training_step(self, batch, _):
        return squared_error(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("gamma", [0.1, "auto"])
def test_a_resumed_run_goes_on_to_the_bit(gamma, tmp_path):
    x, y = regression(40)
    data = DataLoader(TensorDataset(x.float(), y.float()), 10)
    energies, ends = [LearnedGaussian() for _ in range(2)], []

    def fit(energy, epochs, path=None):
        net = Regressor()
        trainer = pl.Trainer(
            strategy=PCStrategy("pc", gamma=gamma, energies={"net.1": energy}),
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        trainer.fit(net, data, ckpt_path=path)
        return net, trainer

    ends.append(fit(energies[0], 4)[0])
    _, trainer = fit(energies[1], 2)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    resumed = LearnedGaussian()
    ends.append(fit(resumed, 4, path)[0])
    assert resumed.batches == energies[0].batches == 16
    assert torch.equal(resumed.variance, energies[0].variance)
    assert all(map(torch.equal, ends[0].parameters(), ends[1].parameters()))
    alone = torch.load(path, weights_only=True)["optimizer_states"][0]["lightning_pc"]
    assert torch.equal(alone["energies"]["net.1"]["variance"], energies[1].variance)


def test_by_name_and_its_state():
    x, y = regression(10)
    net = open_head()
    how = {"value_nodes": ["0"], "energies": {"0": "learned_gaussian"}}
    optimizer = PC(torch.optim.SGD(net[0].parameters(), 0.1), net, **how)
    other = PC(torch.optim.SGD(net[0].parameters(), 0.1), net, **how)
    optimizer.step(lambda: squared_error(net(x), y))
    state = optimizer.state_dict()["lightning_pc"]["energies"]["0"]
    assert state["batches"] == 1
    assert other.state_dict()["lightning_pc"]["energies"]["0"]["variance"] is None
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found = other.state_dict()["lightning_pc"]["energies"]["0"]
    assert found["batches"] == 1
    assert torch.equal(found["variance"], state["variance"])
    assert torch.equal(found["pull"], state["pull"])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.tanh, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.tanh(self.w(self.tanh(self.w(x)))))


def wide():
    energy = LearnedGaussian()
    energy.variance = torch.ones(7)
    return energy


SHARED = LearnedGaussian()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"energies": {"tanh": LearnedGaussian()}}, "'tanh' and 'tanh#2' learn one variance"),
        ({"energies": {"tanh": SHARED, "tanh#2": SHARED}}, "a LearnedGaussian of its own"),
        (
            {"energies": {"tanh#2": wide()}},
            r"7 units, but axis dim=-1 of its values \(2, 4\) has 4",
        ),
        ({"energies": {"tanh#2": LearnedGaussian(dim=2)}}, "dim=2 is no axis of units"),
        ({"energies": {"tanh#2": LearnedGaussian(dim=0)}}, "dim=0 is no axis of units"),
        ({"energies": {"tanh#2": LearnedGaussian(dim=-2)}}, "dim=-2 is no axis of units"),
        ({"energies": {"tanh#2": "learned_gaussian"}, "precisions": 2.0}, "leave out precisions="),
        ({"energies": {"tanh#2": wide()}, "compile": True, "gamma": 0.1}, "compile="),
        (
            {"energies": {"tanh#2": wide()}, "beta": (0.3, -0.3), "algorithm": "pc"},
            "two phases",
        ),
        ({"energies": {"tanh#2": "learned_gaussian"}, "algorithm": "epc"}, "Use 'pc' or 'ipc'"),
    ],
)
def test_a_wrong_place(given, why):
    net = Twice()
    before = copy.deepcopy(net.state_dict())

    def learn():
        optimizer = PredictiveCoding(
            torch.optim.SGD(net.parameters(), 0.1), net, **{"algorithm": "ipc", **given}
        )
        optimizer.step(lambda: squared_error(net(torch.ones(2, 4)), torch.ones(2, 4)))

    with pytest.raises(ConfigError, match=why):
        learn()
    assert all(map(torch.equal, net.state_dict().values(), before.values()))


def test_attention_has_no_variance_to_learn():
    with pytest.raises(ConfigError, match="Use 'gaussian' or 'categorical' there"):
        LearnedGaussian().instead_of(MaskedGaussian())


@pytest.mark.parametrize("number", [0, -0.1, 1.5, "1", True, float("nan")])
def test_a_wrong_number(number):
    with pytest.raises(ConfigError, match=r"expected a number in \(0, 1\]"):
        LearnedGaussian(number)
    with pytest.raises(ConfigError, match="expected a whole number"):
        LearnedGaussian(dim=0.5)


def test_inference_alone_learns_nothing():
    (x, y), net, energy = regression(10), open_head(), LearnedGaussian()

    def found(energies):
        return infer(
            net, lambda: squared_error(net(x), y), value_nodes=["0"], energies=energies
        ).values["0"]

    energy.variance = torch.tensor([0.5, 1.0, 2.0, 4.0]).double()
    mu = net[0](x).detach()
    expected = mu + (y - mu) * energy.variance / (1 + energy.variance)
    torch.testing.assert_close(found({"0": energy}), expected)
    assert energy.batches == 0
    for fresh in ("learned_gaussian", LearnedGaussian()):
        with pytest.raises(ConfigError, match="variances at '0' have not been learned"):
            found({"0": fresh})


def test_a_name_stands_for_a_new_one_in_each_learner():
    x, y = regression(10)
    states = []
    settings = {"value_nodes": ["0"], "energies": {"0": "learned_gaussian"}}
    for _ in range(2):
        net = open_head()
        optimizer = PC(torch.optim.SGD(net[0].parameters(), 0.0), net, **settings)
        optimizer.step(lambda net=net: squared_error(net(x), y))
        states.append(optimizer.state_dict()["lightning_pc"]["energies"]["0"]["batches"])
    assert states == [1, 1]


def test_fewer_calls_in_a_later_batch():
    """Names must be those of nodes of some batch so far."""

    class Loop(Twice):
        def forward(self, x, times=2):
            for _ in range(times):
                x = self.tanh(self.w(x))
            return self.head(x)

    net, energy = Loop(), LearnedGaussian()
    optimizer = PC(torch.optim.SGD(net.parameters(), 0.1), net, energies={"tanh#2": energy})
    for times in (2, 3, 1):
        optimizer.step(lambda n=times: squared_error(net(torch.ones(2, 4), n), torch.ones(2, 4)))
    assert energy.batches == 2
