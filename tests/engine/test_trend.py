"""A training loss that rises is told of; one that falls, or is noise alone, is not."""

import itertools
import math
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.tuner import Tuner
from sklearn.datasets import load_digits
from torch import nn

from lightning_pc import explain
from lightning_pc.insight.trend import LONG, MANY, ON_END, Trend
from lightning_pc.langevin import Langevin
from lightning_pc.optim import EPC, IPC, PC, ZIL, PredictiveCoding
from recipes.parity.tasks import TASKS
from tests.engine.lightning_problems import Module, data, loader, trainer
from tests.engine.modules import MLP


def of(losses):
    """The batch after which a series has risen first; None if it never has."""
    trend = Trend()
    for number, loss in enumerate(losses, 1):
        trend.take_in(loss)
        if trend.risen:
            return number
    return None


def noise(count, seed, size=0.2):
    draw = random.Random(seed)
    return [size * draw.gauss(0, 1) for _ in range(count)]


def test_means():
    """Of the first 20 each counts the same, later each twentieth; by hand."""
    trend, losses = Trend(), [*map(float, range(25))]
    for loss in losses:
        trend.take_in(loss)
    assert trend.first == pytest.approx(9.5)
    mean = 9.5
    for loss in losses[MANY:]:
        mean += (loss - mean) / MANY
    assert trend.mean == pytest.approx(mean)
    assert trend.least == pytest.approx(9.5)
    assert str(trend).startswith(
        "The training loss is 14.5 over the last 20 batches; it was 9.5 over the first 20"
    )


@pytest.mark.parametrize("seed", range(10))
def test_what_has_not_risen(seed):
    wiggle = noise(1500, seed)
    assert of(1.0 + w for w in wiggle) is None  # learns nothing more
    assert of((1 + w) * (0.05 + 0.99**n) for n, w in enumerate(wiggle)) is None
    assert of(1e-6 * (1 + w) for w in wiggle) is None
    assert of(-5 + w for w in wiggle) is None  # a log-likelihood
    # Learned by heart, with one bad batch in a hundred.
    assert of(0.98**n + (n % 100 == 99) * 0.5 for n in range(1500)) is None


@pytest.mark.parametrize("seed", range(10))
def test_what_has_risen(seed):
    wiggle = noise(600, seed)
    assert of(1.0 + w + 0.005 * n for n, w in enumerate(wiggle)) < 200
    fallen = [(1 + w) * max(0.2, 0.97**n) for n, w in enumerate(wiggle[:300])]
    back = [0.2 + w / 5 + 0.004 * n for n, w in enumerate(wiggle[300:])]
    assert 300 + ON_END <= of(fallen + back) < 500
    assert of([1.0] * MANY + [1.01] * 300) is None  # by 1 %
    assert of([1.0] * MANY + [1.1] * 300) is not None


@pytest.mark.parametrize("seed", range(10))
def test_a_rise_below_the_noise_of_a_batch(seed):
    """All batches together tell it: 7 standard errors after 600."""
    assert of(2.0 + w + 0.001 * n for n, w in enumerate(noise(600, seed, 0.6))) is not None


def test_a_line_by_least_squares():
    trend, losses = Trend(), noise(50, 0)
    for loss in losses:
        trend.take_in(loss)
    numbers = torch.arange(50.0, dtype=torch.float64)
    ones = torch.stack([torch.ones(50, dtype=torch.float64), numbers], 1)
    y = torch.tensor(losses, dtype=torch.float64)
    inverse = torch.linalg.inv(ones.T @ ones)
    fit = inverse @ ones.T @ y
    error = ((y - ones @ fit).square().sum() / 48 * inverse[1, 1]).sqrt()
    assert trend._line() == pytest.approx((float(fit[1]), float(error)), rel=1e-9)


def stuck(losses, guess):
    """The batch after which a series is stuck first; None if it never is."""
    trend = Trend()
    for number, loss in enumerate(losses, 1):
        trend.take_in(loss, guess)
        if trend.stuck:
            return number
    return None


@pytest.mark.parametrize("seed", range(10))
def test_what_is_stuck_above_a_guess(seed):
    guess, wiggle = math.log(10), noise(300, seed)
    above = [2.5 + 0.0005 * n + w for n, w in enumerate(wiggle)]
    assert LONG + ON_END - 1 <= stuck(above, guess) < 250
    assert stuck(above, math.inf) is None  # no guess is known
    assert stuck(above[: LONG + ON_END - 2], guess) is None  # too early
    assert stuck([2.35 + w / 4 for w in wiggle], guess) is None  # by 2 %
    assert stuck([4.0 - 0.002 * n + w for n, w in enumerate(wiggle)], guess) is None  # it falls
    back = [max(2.5, 2.7 - 0.006 * abs(n - 50)) + w for n, w in enumerate(wiggle[:150])]
    assert stuck([2.4] * 20 + back, guess) is not None  # it rises, and falls again no lower


def guessed(loss_of, *logits):
    """The guess of a batch whose loss is that of a linear layer's output."""
    torch.manual_seed(0)
    model = MLP((4, 8, 12))
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.0), model, loss_terms=6)
    optimizer.step(lambda: loss_of(model(torch.randn(6, 4)).view(6, *logits)))
    return optimizer.report.trend.guess


def test_what_a_guess_has():
    """The loss itself, where it is known: that of an output of zeros."""
    y, chances, weight = torch.randint(3, (6,)), torch.rand(6, 12), torch.rand(12)
    known = [
        (lambda z: F.cross_entropy(z, y), (12,)),
        (lambda z: F.cross_entropy(z, y[:, None].expand(6, 4)), (3, 4)),
        (lambda z: F.cross_entropy(z, y, label_smoothing=0.1), (12,)),
        (lambda z: F.cross_entropy(z, y, ignore_index=1), (12,)),
        (lambda z: F.nll_loss(z.log_softmax(1), y), (12,)),
        (lambda z: F.binary_cross_entropy_with_logits(z, chances), (12,)),
    ]
    for loss_of, size in known:
        assert guessed(loss_of, *size) == pytest.approx(float(loss_of(torch.zeros(6, *size))))
    unknown = [
        lambda z: F.cross_entropy(z, y, weight=weight),
        lambda z: F.cross_entropy(z, chances),
        lambda z: F.cross_entropy(z, y) / 2,
        lambda z: F.cross_entropy(z, y, reduction="sum"),
        lambda z: F.cross_entropy(z, y) + F.mse_loss(z, chances),
        lambda z: F.binary_cross_entropy_with_logits(z, chances, pos_weight=weight),
        lambda z: F.mse_loss(z, chances),
    ]
    for loss_of in unknown:
        assert math.isinf(guessed(loss_of, 12))


@pytest.mark.parametrize(
    ("algorithm", "cure"),
    [
        ("pc", "PredictiveCoding(optimizer, model). Else try another learning rate."),
        ("zil", "at best. A guess among all classes has 2.48. Try another learning rate."),
    ],
)
def test_a_loss_that_is_no_better_than_a_guess(algorithm, cure):
    torch.manual_seed(0)
    model = MLP((4, 8, 12))
    nn.init.normal_(model[2].weight, std=2.0)
    optimizer = PredictiveCoding(
        torch.optim.SGD(model.parameters(), 0.0), model, algorithm=algorithm
    )
    x, y = torch.randn(64, 4), torch.randint(12, (64,))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(LONG + ON_END):
            optimizer.step(lambda: F.cross_entropy(model(x), y))
    (said,) = [str(w.message) for w in told if "training loss" in str(w.message)]
    assert said.endswith(cure)
    assert explain(optimizer).endswith("Verdict: no better than a guess.")


def test_it_rises_on_end():
    assert of([1.0] * MANY + ([2.0] * 8 + [0.0] * 30) * 5) is None


def train(kind, batches=150, rate=1e-3, later=None, **settings):
    """Random labels, new ones in each batch; after 50 batches at another learning rate."""
    torch.manual_seed(0)
    model = MLP((16, 64, 64, 8))
    optimizer = kind(torch.optim.Adam(model.parameters(), 1e-3), model, **settings)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for n in range(batches):
            optimizer.param_groups[0]["lr"] = later if later and n > 50 else rate
            x, y = torch.randn(64, 16), torch.randint(8, (64,))
            optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    return [str(w.message) for w in told if "training loss" in str(w.message)], explain(optimizer)


@pytest.mark.parametrize(("kind", "rate"), [(PC, 5e-3), (EPC, 5e-3), (IPC, 1e-3)])
def test_weights_that_explain_noise(kind, rate):
    told, explained = train(kind, rate=rate)
    assert len(told) == 1
    assert "weights grow to explain it: use auto, which is PCStrategy()" in told[0]
    assert explained.endswith("Verdict: weights explain noise.")


@pytest.mark.parametrize("rate", [1e-3, 5e-3])
@pytest.mark.parametrize("kind", [PredictiveCoding, ZIL])
def test_healthy(kind, rate):
    """But there is nothing to learn, so that the loss does not fall."""
    told, explained = train(kind, rate=rate)
    assert not told
    assert explained.endswith("Verdict: the loss has not fallen.")


@pytest.mark.parametrize("kind", [PredictiveCoding, ZIL])
def test_a_learning_rate_that_is_too_large(kind):
    told, explained = train(kind, later=0.3)
    assert len(told) == 1
    assert told[0].endswith("Lower the learning rate, unless the task has become harder.")
    assert explained.endswith("Verdict: lower the learning rate.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("Markov chain, GPT", IPC),
        ("Markov chain, GPT", PC),
        ("digits, 60 % random labels", PC),
        ("Markov chain, GPT", PredictiveCoding),
        ("digits, 60 % random labels", PredictiveCoding),
    ],
)
def test_noisy_text_and_labels(task, kind):
    """Nothing un-learns in silence, and the default does not."""
    torch.manual_seed(0)
    made = TASKS[task][1](None)
    torch.manual_seed(0)
    net, losses = made.make().train(), []
    optimizer = kind(torch.optim.AdamW(net.parameters(), 1e-3), net)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for x, y in itertools.islice(made.stream(0), 150):
            losses.append(float(optimizer.step(lambda x=x, y=y: made.loss(net(x), y))))
    risen = [w for w in told if "training loss" in str(w.message)]
    assert bool(risen) is (kind is not PredictiveCoding)
    if not risen:
        assert sum(losses[-20:]) < 0.98 * sum(losses[:20])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
            for _ in range(3)
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PC, IPC])
def test_wrong_labels_are_told_within_150_batches(kind):
    """Most seeds are; which ones may depend on the processor."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    y = torch.where(torch.rand(len(y)) < 0.6, torch.randint(0, 10, (len(y),)), y)
    risen = 0
    for seed in range(4):
        torch.manual_seed(seed)
        model, order = Residual(), torch.Generator().manual_seed(seed)
        optimizer = kind(torch.optim.Adam(model.parameters(), 1e-3), model)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(150):
                some = torch.randperm(1500, generator=order)[:64]
                optimizer.step(lambda: F.cross_entropy(model(x[some]), y[some]))  # noqa: B023
        risen += any("training loss" in str(w.message) for w in told)
    assert risen >= 2


def test_a_state_of_an_older_version_begins_anew():
    model = MLP((4, 8, 4))
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)
    for _ in range(25):
        optimizer.step(lambda: F.cross_entropy(model(torch.randn(8, 4)), torch.randint(4, (8,))))
    state = optimizer.state_dict()
    for name in ("loss_recent", "loss_squares", "loss_products"):
        del state["lightning_pc"][name]
    optimizer.load_state_dict(state)
    assert optimizer._learner.alerts.trend == Trend()


def test_a_resumed_run_remembers_how_it_began():
    model = MLP((4, 8, 4))
    first, second = (PC(torch.optim.SGD(model.parameters(), 0.1), model) for _ in range(2))
    for _ in range(25):
        first.step(lambda: F.cross_entropy(model(torch.randn(8, 4)), torch.randint(4, (8,))))
    second.load_state_dict(first.state_dict())
    assert second._learner.alerts.trend == first._learner.alerts.trend


def test_a_learning_rate_finder_raises_the_loss_on_purpose():
    module = Module()
    fit = trainer("pc", max_epochs=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = Tuner(fit).lr_find(module, loader(data(300)), max_lr=30.0, num_training=150)
    assert found.results["loss"][-1] > 2 * found.results["loss"][0]
    assert [str(w.message) for w in told if "training loss" in str(w.message)] == []


def test_samples_raise_the_energy_by_design():
    told, explained = train(PC, batches=15, T=20, inference=Langevin)
    assert not told
    assert "It rose" not in explained
    assert explained.endswith("Verdict: healthy so far.")


@pytest.mark.parametrize("rounded", [True, False])
def test_bfloat16_rounds_the_little_that_auto_moves(rounded):
    """And no rise of F is seen in that."""
    torch.manual_seed(0)
    model = MLP((16, 64, 4))
    optimizer = PredictiveCoding(torch.optim.Adam(model.parameters(), 1e-3), model)
    x, y = torch.randn(64, 16), torch.randint(4, (64,))
    for number in range(60):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            optimizer.step(lambda: F.cross_entropy(model(x), y))
        verdict = "healthy" if number >= 19 else "healthy so far"
        assert explain(optimizer).endswith(f"Verdict: {verdict}.")
    assert not optimizer._learner.auto.fine


def test_a_unit_that_is_off_is_reached_all_the_same():
    model = MLP((4, 8, 4), "relu")
    nn.init.constant_(model[0].bias, -100.0)
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)
    with pytest.warns(UserWarning, match="energy zero"):
        optimizer.step(lambda: F.cross_entropy(model(torch.randn(8, 4)), torch.randint(4, (8,))))
    assert "No error reached: '1'" in explain(optimizer)
    assert explain(optimizer).endswith("Verdict: no error reaches some nodes.")


def test_a_loss_that_is_nothing_asks_for_no_error():
    model = MLP((4, 8, 1))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)
    optimizer.step(lambda: F.mse_loss(model(torch.randn(8, 4)), torch.zeros(8, 1)))
    assert explain(optimizer).endswith("Verdict: healthy so far.")


def test_a_leap_is_forgotten_after_20_batches():
    """A mean that remembered it would say that a loss of 0.1 is no better than a guess."""
    trend = Trend()
    for number in range(150):
        trend.take_in(1e4 if number == 110 else 0.1, guess=2.3)
        if number > 130:
            assert str(trend).startswith("The training loss is 0.1 over the last 20 batches")
            assert not trend.stuck
            assert not trend.risen
    assert trend.mean > 50


def test_a_loss_that_does_not_fall_is_not_healthy():
    _, explained = train(IPC, rate=1e-12, batches=120)
    assert explained.endswith("Verdict: the loss has not fallen.")
    assert "at best" in explained


def test_nodes_that_no_error_reaches():
    _, explained = train(PC, T=2, batches=2)
    assert explained.endswith("Verdict: nodes unreached.")


def test_a_rise_within_the_batch():
    _, explained = train(PC, gamma=3.0, batches=1)
    assert explained.endswith("Verdict: F rises within the batch.")
