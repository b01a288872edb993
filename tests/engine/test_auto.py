"""auto: the loss weighs so little that weights gain nothing by explaining noise."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc import PCStrategy, explain
from lightning_pc.errors import ConfigError
from lightning_pc.inference.curvature import ROOM, AutoGamma
from lightning_pc.optim import EPC, IPC, PC, ZIL, PredictiveCoding
from recipes.parity import study
from tests.compare import gradients, relative
from tests.engine.lightning_problems import Module, data, loader, mlp
from tests.engine.modules import Residual
from tests.engine.problems import PROBLEMS, vectors


def still(model):
    return torch.optim.SGD(model.parameters(), 0.0)


@pytest.mark.parametrize("name", ["residual", "cnn", "transformer, no dropout"])
@pytest.mark.parametrize("beta", [1e-6, ROOM])
def test_its_gradient_is_that_of_backprop_to_first_order(name, beta):
    """In size as well: the learning rate of backprop is right for SGD, too."""
    torch.manual_seed(0)
    model, (x, y) = PROBLEMS[name].make().double(), PROBLEMS[name].doubles(8)
    F.cross_entropy(model(x), y).backward()
    exact = gradients(model)
    optimizer = PredictiveCoding(still(model), model, beta=beta)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert relative(gradients(model), exact) < (1e-4 if beta < ROOM else 2 * ROOM)


def linear(hidden=16):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(8, hidden, bias=False), nn.Linear(hidden, 4, bias=False))


def trained(wrap, steps=600):
    """The head's norm, and how far from least squares, of a linear network that learned noise."""
    model = linear().double()
    torch.manual_seed(0)
    x, y = torch.randn(64, 8).double(), 2 * torch.randn(64, 4).double()
    optimizer = wrap(torch.optim.SGD(model.parameters(), 0.1), model)
    for _ in range(steps):
        optimizer.step(lambda: F.mse_loss(model(x), y))
    best = torch.linalg.lstsq(x, y).solution.T
    whole = (model[1].weight @ model[0].weight).detach()
    return float(model[1].weight.detach().norm()), relative(whole, best)


class Backprop:
    def __init__(self, optimizer, model):
        self.optimizer = optimizer

    def step(self, closure):
        self.optimizer.zero_grad()
        closure().backward()
        self.optimizer.step()


def test_noise_is_not_explained_by_growing_weights():
    """0.5 r' S^-1 r falls with a larger S, where S - 1 is beta times the head's square."""

    def nodes(kind):
        return lambda optimizer, model: kind(optimizer, model, value_nodes="0")

    plain, _ = trained(Backprop)
    head, far = trained(nodes(PredictiveCoding))
    assert far < ROOM
    assert head == pytest.approx(plain, rel=0.1)
    assert trained(nodes(PC))[0] > 2 * plain
    with pytest.warns(UserWarning, match="weights grow to explain it"):
        pulled, _ = trained(nodes(partial(PredictiveCoding, beta=0.1)))
    assert pulled > 1.1 * plain  # the changing sign is what does it


def test_beta_times_the_curvature_of_the_loss():
    """d2L/de2 of the sum 0.5 * ||W e - r||^2 is W' W."""
    model = linear().double()
    with torch.no_grad():
        model[1].weight.mul_(8.0)
    x, y = torch.randn(16, 8).double(), torch.randn(16, 4).double()
    optimizer = PredictiveCoding(still(model), model, value_nodes="0")
    pulls = []
    for _ in range(3):
        optimizer.step(lambda: 0.5 * F.mse_loss(model(x), y))
        pulls.append(optimizer.report.pulls[0])
    largest = float(torch.linalg.matrix_norm(model[1].weight.detach(), 2)) ** 2
    assert largest > 2
    assert [pull * largest for pull in pulls[1:]] == pytest.approx([-ROOM, ROOM], rel=0.1)
    assert optimizer.report.curvature == pytest.approx(1 + ROOM, rel=0.01)
    assert f"weighs {optimizer.report.pulls[0]:.3g} in F" in explain(optimizer)


def test_neither_tasks_in_turn_nor_epochs_meet_one_sign():
    auto, signs = AutoGamma(0.7, 0.45, 1.0, weighs=True), []
    for _ in range(1200):
        signs.append(auto.beta / ROOM)
        auto.after(2, False)
    assert set(signs) == {1.0, -1.0}
    for period in range(1, 13):
        for start in range(period):
            assert abs(sum(signs[start::period])) <= 8


def weights_after_noise_in_every_second_batch(wrap, after=lambda optimizer, n: None):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)]
    model, target = nn.Sequential(*layers), torch.randn(8, 4) / 3
    optimizer = wrap(torch.optim.Adam(model.parameters(), 1e-3), model)
    for n in range(500):
        x = torch.randn(64, 8)
        y = torch.tanh(x @ target) + 5 * (n % 2) * torch.randn(64, 4)
        optimizer.step(lambda x=x, y=y: F.mse_loss(model(x), y))
        after(optimizer, n)
    return sum(float(p.detach().square().sum()) for p in model.parameters())


def in_turn(optimizer, n):
    auto = optimizer._learner.auto
    auto.beta = abs(auto.beta) * (-1) ** n


def test_noise_that_comes_in_turn_is_not_explained():
    """All of it would meet one sign, if that changed in turn."""
    plain = weights_after_noise_in_every_second_batch(ZIL)
    ours = weights_after_noise_in_every_second_batch(PredictiveCoding)
    assert ours == pytest.approx(plain, rel=0.03)
    assert weights_after_noise_in_every_second_batch(PredictiveCoding, in_turn) > 1.1 * plain


def test_beta_is_largest_where_the_loss_bends_little():
    auto = AutoGamma(0.7, 0.45, 1.0, weighs=True)
    auto.take_in(1.0 + 1e-3 * ROOM)
    assert auto.beta == ROOM
    auto.take_in(1.0 + 10 * ROOM)
    assert auto.beta == pytest.approx(ROOM / 10)
    auto.after(2, False)
    auto.take_in(float("nan"))
    assert auto.beta == pytest.approx(-ROOM / 10)
    auto.take_in(1.0 + ROOM)
    assert auto.beta == pytest.approx(-ROOM / 10)


def test_a_loss_that_does_not_bend():
    model = linear()
    x, sign = torch.randn(16, 8), torch.randn(16, 4)
    optimizer = PredictiveCoding(still(model), model, value_nodes="0", loss_terms=16)
    optimizer.step(lambda: (model(x) * sign).mean())
    assert optimizer.report.curvature == pytest.approx(1.0)
    assert optimizer.report.pulls == (ROOM, ROOM)


def test_a_resumed_run_goes_on_with_its_beta():
    (x, y), runs = vectors(8), []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = Residual()
        optimizer = PredictiveCoding(torch.optim.Adam(model.parameters(), 0.02), model)
        for step in range(6):
            if resumed and step == 3:
                state, weights = optimizer.state_dict(), model.state_dict()
                model = Residual()
                model.load_state_dict(weights)
                optimizer = PredictiveCoding(torch.optim.Adam(model.parameters(), 0.5), model)
                optimizer.load_state_dict(state)
            optimizer.step(lambda model=model: F.cross_entropy(20 * model(x), y))
        runs.append((optimizer.report.pulls, *model.state_dict().values()))
    assert runs[0][0] == runs[1][0] != (ROOM, ROOM)
    assert all(map(torch.equal, runs[0][1:], runs[1][1:]))


ROWS = ("backprop", "auto", "pc")


def test_wrong_labels():
    """PC explains them, and forgets what it knew of the digits."""
    jobs = [
        {"task": "digits, 60 % random labels", "lr": 1e-3, "seed": 0, "row": row} for row in ROWS
    ]
    accuracy = {job["row"]: study.run(job)["figure"] for job in jobs}
    assert accuracy["auto"] > accuracy["backprop"] - 10
    assert accuracy["pc"] < accuracy["auto"] - 10


@pytest.mark.parametrize(("before", "after"), [(EPC, PredictiveCoding), (PredictiveCoding, EPC)])
def test_a_state_of_another_beta_is_looked_at_anew(before, after):
    """The curvature in it is that of another F."""
    (x, y), model = vectors(8), Residual()
    with torch.no_grad():
        model.head.weight.mul_(20.0)
    first = before(still(model), model)
    first.step(lambda: F.cross_entropy(model(x), y))
    same, other = before(still(model), model), after(still(model), model)
    same.load_state_dict(first.state_dict())
    other.load_state_dict(first.state_dict())
    assert (same._learner.auto.anew, other._learner.auto.anew) == (False, True)


def test_both_doors(caplog):
    """By default, and with a line that says what was chosen."""
    caplog.set_level("INFO")
    batches = data(6)
    module = Module(net=mlp(nn.BatchNorm1d(7)))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fit = L.Trainer(strategy=PCStrategy(), max_epochs=1, enable_model_summary=False, **options)
    fit.fit(module, loader(batches))
    model = mlp(nn.BatchNorm1d(7))
    optimizer = PredictiveCoding(module.__class__.configure_optimizers(Module(net=model)), model)
    for x, y in batches:
        optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], value, rtol=0, atol=0)
    assert fit.strategy.report.algorithm == "auto"
    assert fit.strategy.report.pulls == optimizer.report.pulls
    assert explain(optimizer).splitlines()[1].startswith("auto took ePC. The loss weighs ")
    said = [r.getMessage() for r in caplog.records if "auto takes ePC" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("auto takes ePC with T = 2, gamma = 0.")
    assert said[0].endswith(" of changing sign, at 2 value nodes.")


def test_its_name_for_the_trainer():
    """ "auto" is Lightning's own."""
    for name, ours in (("pc_auto", True), ("auto", False)):
        strategy = L.Trainer(strategy=name, accelerator="cpu", logger=False).strategy
        assert isinstance(strategy, PCStrategy) is ours
    assert L.Trainer(strategy="pc_auto", logger=False).strategy.settings.algorithm == "auto"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (PC, {}),
        (IPC, {}),
        (EPC, {"gamma": 0.1}),
        (EPC, {"precisions": 2.0}),
        (EPC, {"reset": "never"}),
    ],
)
def test_where_beta_cannot_be_automatic(kind, settings):
    model = linear()
    with pytest.raises(ConfigError, match="beta='auto' goes by the looks"):
        kind(still(model), model, beta="auto", **settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"gamma": 0.1}, r"gamma=0\.1: auto chooses how values move by itself.*algorithm='ipc'"),
        ({"momentum": 0.5}, "momentum=0.5: auto chooses"),
        ({"gamma_decay": 0.5}, "gamma_decay=0.5: auto chooses"),
        ({"precisions": 2.0}, "precisions=2.0: auto chooses"),
        ({"gamma": 0.1, "precisions": 2.0}, "gamma=0.1, precisions=2.0: auto"),
        ({"T": 1}, "T=1 leaves the values of auto no step"),
        ({"reset": "never"}, "auto would go on learning"),
        ({"inference": torch.optim.SGD}, "by which auto learns: leave it out, or use 'pc'"),
    ],
)
def test_what_auto_chooses_itself(settings, told):
    model = linear()
    with pytest.raises(ConfigError, match=told):
        PredictiveCoding(still(model), model, **settings)


def test_the_algorithm_is_an_argument_of_the_base_alone():
    model = linear()
    named = PredictiveCoding(still(model), model, algorithm="pc", value_nodes="0", loss_terms=2)
    named.step(lambda: model(torch.ones(2, 8)).square().mean())
    assert named.report.algorithm == named.algorithm == "pc"
    assert repr(named).endswith(", algorithm='pc', value_nodes='0', loss_terms=2)")
    with pytest.raises(ConfigError, match="IPC has no argument algorithm="):
        IPC(still(model), model, algorithm="pc")
