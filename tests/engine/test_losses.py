"""M, the number of terms that a loss is a mean of, read off its calls."""

import gc
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc.errors import ConfigError, DivergenceError
from lightning_pc.optim import IPC, PC
from lightning_pc.recording.losses import LossCall
from tests.compare import relative
from tests.engine.modules import MLP

N, C = 6, 4
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 3.0]).double()
Y = torch.tensor([0, 1, 2, 3, 1, 0])
SOME = torch.tensor([0, -100, 2, -100, 1, 0])
SOFT = torch.rand(N, C, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
HARD = (SOFT > 0.25).double()
SPACE = torch.arange(3).expand(N, 3)


def counted(y):
    return (y >= 0).sum().item()


LOSSES = {  # name -> loss of (outputs, rows), its number of terms
    "mean": (lambda o, i: F.cross_entropy(o, Y[i]), lambda i: len(i)),
    "module": (lambda o, i: nn.CrossEntropyLoss()(o, Y[i]), lambda i: len(i)),
    "ignore": (lambda o, i: F.cross_entropy(o, SOME[i]), lambda i: counted(SOME[i])),
    "ignore 0": (
        lambda o, i: F.cross_entropy(o, Y[i], ignore_index=0),
        lambda i: (Y[i] != 0).sum().item(),
    ),
    "weights": (
        lambda o, i: F.cross_entropy(o, Y[i], WEIGHT),
        lambda i: WEIGHT[Y[i]].sum().item(),
    ),
    "weights, ignore": (
        lambda o, i: F.cross_entropy(o, SOME[i], weight=WEIGHT),
        lambda i: WEIGHT[SOME[i][SOME[i] >= 0]].sum().item(),
    ),
    "smoothing": (
        lambda o, i: F.cross_entropy(o, SOME[i], label_smoothing=0.1),
        lambda i: counted(SOME[i]),
    ),
    "probabilities": (lambda o, i: F.cross_entropy(o, SOFT[i]), lambda i: len(i)),
    "probabilities, weights": (
        lambda o, i: F.cross_entropy(o, SOFT[i], WEIGHT),
        lambda i: len(i),
    ),
    "space": (
        lambda o, i: F.cross_entropy(o.unsqueeze(-1).expand(-1, -1, 3), SPACE[i]),
        lambda i: 3 * len(i),
    ),
    "sum / n": (
        lambda o, i: F.cross_entropy(o, Y[i], reduction="sum") / len(i),
        lambda i: len(i),
    ),
    "sum / n in place": (
        lambda o, i: F.cross_entropy(o, Y[i], reduction="sum").div_(len(i)),
        lambda i: len(i),
    ),
    "sum / counted": (
        lambda o, i: F.cross_entropy(o, SOME[i], reduction="sum") / counted(SOME[i]),
        lambda i: counted(SOME[i]),
    ),
    "size_average": (
        lambda o, i: F.mse_loss(o, SOFT[i], reduction="sum").div(3 * len(i)),
        lambda i: 3 * len(i),
    ),
    "nll": (lambda o, i: F.nll_loss(o.log_softmax(1), SOME[i]), lambda i: counted(SOME[i])),
    "mse": (lambda o, i: F.mse_loss(o, SOFT[i]), lambda i: C * len(i)),
    "mse module": (lambda o, i: nn.MSELoss()(o, SOFT[i]), lambda i: C * len(i)),
    "l1": (lambda o, i: F.l1_loss(o, SOFT[i]), lambda i: C * len(i)),
    **{
        f"{f.__name__}, weights": (
            lambda o, i, f=f: f(o, SOFT[i], weight=SOFT[i] * HARD[i]),
            lambda i: (SOFT[i] * HARD[i]).sum().item(),
        )
        for f in (F.mse_loss, F.l1_loss)  # these alone divide by them
    },
    "huber, weights": (
        lambda o, i: F.huber_loss(o, SOFT[i], weight=HARD[i]),
        lambda i: C * len(i),
    ),
    "bce, weights": (
        lambda o, i: F.binary_cross_entropy(o.sigmoid(), HARD[i], weight=SOFT[i]),
        lambda i: C * len(i),
    ),
    "huber": (lambda o, i: F.huber_loss(o, SOFT[i]), lambda i: C * len(i)),
    "smooth l1": (lambda o, i: F.smooth_l1_loss(input=o, target=SOFT[i]), lambda i: C * len(i)),
    "bce": (lambda o, i: F.binary_cross_entropy(o.sigmoid(), HARD[i]), lambda i: C * len(i)),
    "bce logits": (
        lambda o, i: F.binary_cross_entropy_with_logits(o, HARD[i], pos_weight=WEIGHT),
        lambda i: C * len(i),
    ),
    "kl batchmean": (
        lambda o, i: F.kl_div(o.log_softmax(1), SOFT[i], reduction="batchmean"),
        lambda i: len(i),
    ),
    "kl mean": (
        lambda o, i: nn.KLDivLoss()(o.log_softmax(1), SOFT[i]),
        lambda i: C * len(i),
    ),
    "poisson": (lambda o, i: F.poisson_nll_loss(o, HARD[i]), lambda i: C * len(i)),
    "margin": (lambda o, i: F.multi_margin_loss(o, Y[i]), lambda i: len(i)),
    "soft margin": (lambda o, i: F.soft_margin_loss(o, 2 * HARD[i] - 1), lambda i: C * len(i)),
    "two that agree": (
        lambda o, i: F.cross_entropy(o, Y[i]) + 0.3 * F.cross_entropy(o, Y[i], label_smoothing=0.1),
        lambda i: len(i),
    ),
    "with a penalty": (
        lambda o, i: F.cross_entropy(o, Y[i]) + 1e-3 * o.pow(2).mean(),
        lambda i: len(i),
    ),
    "one for the log": (
        lambda o, i: (F.mse_loss(o, SOFT[i]), F.l1_loss(o, SOFT[i]), F.cross_entropy(o, Y[i]))[2],
        lambda i: len(i),
    ),
}


def step(loss, rows, algorithm=PC, **kwargs):
    torch.manual_seed(0)
    model = MLP((6, 5, 5, C)).double()
    x = torch.randn(N, 6).double()[rows]
    # A large rate makes errors big enough to tell one scale from another.
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = algorithm(sgd, model, T=5, gamma=0.3, gamma_decay=1, **kwargs)
    optimizer.step(lambda: loss(model(x), rows))
    values = [value.detach() for value in optimizer.values.values()]
    return values, model, optimizer.report


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.huber_loss])
@pytest.mark.parametrize("how", ["keyword", "place"])
def test_a_weight_counts_in_every_evaluation(loss, how):
    """torch's l1_loss hands on its call without it."""

    def weighted(output, target, weight):
        if how == "place" and loss is not F.huber_loss:  # size_average, reduce, reduction
            return loss(output, target, None, None, "mean", weight)
        return loss(output, target, weight=weight)

    model, x = MLP((6, 5, 5, C)).double(), torch.randn(N, 6).double()
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.0), model, gamma=1e-3)
    optimizer.step(lambda: weighted(model(x), SOFT, SOFT * HARD))
    right = weighted(model(x), SOFT, SOFT * HARD)
    assert float(optimizer.report.loss[0]) == float(right.detach())
    assert float(optimizer.report.loss[-1]) == pytest.approx(float(right.detach()), rel=0.02)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", LOSSES)
def test_terms_and_their_effect(name):
    """Values do not feel the batch's size, and parameter gradients are those of the mean."""
    loss, terms = LOSSES[name]
    once = torch.arange(N)
    twice = torch.cat([once, once])
    values, model, report = step(loss, once)
    assert report.loss_terms == pytest.approx(terms(once), rel=1e-9)
    doubled, other, report = step(loss, twice)
    assert report.loss_terms == pytest.approx(terms(twice), rel=1e-9)
    for one, two in zip(values, doubled, strict=True):
        assert relative(two[:N], one) < 1e-12
        assert relative(two[N:], one) < 1e-12
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert relative(p.detach(), q.detach()) < 1e-12
    # A value's first move is the gradient of the sum of the terms.
    torch.manual_seed(0)
    plain = MLP((6, 5, 5, C)).double()
    x = torch.randn(N, 6).double()
    h = plain[:3](x)
    h.retain_grad()
    (loss(plain[3:](h), once) * terms(once)).backward()
    sgd = torch.optim.SGD(plain.parameters(), 0.0)
    optimizer = PC(sgd, plain, T=2, gamma=0.3)
    with pytest.warns(UserWarning, match="T=2 inference steps never reach 2"):
        optimizer.step(lambda: loss(plain(x), once))
    moved = optimizer.values["3"].detach()
    assert relative(moved, (h - 0.3 * h.grad).detach()) < 1e-12


GUESSED = {  # name -> loss, what the warning says
    "none": (
        lambda o, i: F.cross_entropy(o, Y[i], reduction="none").mean(),
        "is called with reduction='none'",
    ),
    "no call": (lambda o, i: (o - SOFT[i]).pow(2).sum(1).mean(), "calls no loss function"),
    "disagreement": (
        lambda o, i: F.cross_entropy(o, Y[i]) + F.mse_loss(o, SOFT[i]),
        "do not agree",
    ),
    "only for the log": (
        lambda o, i: (F.mse_loss(o, SOFT[i]), o.pow(2).mean())[1],
        "calls no loss function",
    ),
}


@pytest.mark.parametrize("name", GUESSED)
def test_what_cannot_be_read_is_the_batch_size_and_one_warning(name):
    loss, why = GUESSED[name]
    model, rows = MLP((6, 5, C)).double(), torch.arange(N)
    x = torch.randn(N, 6).double()
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model)
    with pytest.warns(UserWarning, match="loss_terms=") as caught:
        optimizer.step(lambda: loss(model(x), rows))
    optimizer.step(lambda: loss(model(x), rows))  # a second warning would be an error
    assert len(caught) == 1
    assert re.search(why, str(caught[0].message))
    assert optimizer.report.loss_terms == N


AVERAGES = {  # name -> loss that is a mean of means, the calls, the terms of each
    "parts of a batch": (
        lambda o, i: sum(F.cross_entropy(o[j], Y[i][j]) for j in i.split(2)) / (len(i) / 2),
        3,
        2,
    ),
    "one by one": (
        lambda o, i: torch.stack(
            [F.cross_entropy(a, b) for a, b in zip(o, Y[i], strict=True)]
        ).mean(),
        N,
        1,
    ),
    "three heads": (
        lambda o, i: sum(F.mse_loss(k * o, SOFT) for k in (1, 2, 3)) / 3,
        3,
        C * N,
    ),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_a_mean_of_means_is_doubtful(name):
    """Heads that share their samples, or parts that do not: the calls look alike."""
    loss, calls, terms = AVERAGES[name]
    model, rows = MLP((6, 5, C)).double(), torch.arange(N)
    x = torch.randn(N, 6).double()
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model)
    with pytest.warns(UserWarning, match=f"mean of {calls} loss calls") as caught:
        optimizer.step(lambda: loss(model(x), rows))
    assert f"samples (say so by loss_terms={terms})" in str(caught[0].message)
    assert f"set loss_terms={calls * terms}, or a callable" in str(caught[0].message)
    assert optimizer.report.loss_terms == terms
    given = IPC(torch.optim.SGD(model.parameters(), 0.1), model, loss_terms=terms)
    given.step(lambda: loss(model(x), rows))  # says no more


@pytest.mark.parametrize("wrapper", [PC, IPC])
def test_no_call_outlives_its_batch(wrapper):
    model, x = MLP((6, 5, C)).double(), torch.randn(N, 6).double()
    optimizer = wrapper(torch.optim.SGD(model.parameters(), 0.1), model)

    def loss():
        outputs = [k * model(x) for k in (1, 2, 3)]
        return sum(F.cross_entropy(o, Y, reduction="sum") / N for o in outputs)

    optimizer.step(loss)
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, LossCall)]


class Halts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_a_sum_that_no_gradient_comes_back_to():
    model, x = MLP((6, 5, C)).double(), torch.randn(N, 6).double()
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)

    def loss():
        output = model(x)
        halted = Halts.apply(F.cross_entropy(output, Y, reduction="sum"))
        return F.cross_entropy(output, Y) + halted

    with pytest.warns(UserWarning, match="do not agree"):
        optimizer.step(loss)


@pytest.mark.parametrize("factors", [(0.5, 0.5), (1.0, 1.0, 1.0), (0.7, 0.2, 0.1), (1.0, 0.0, 0.0)])
def test_weighted_means_and_the_mean_of_two_are_plain(factors):
    model, x = MLP((6, 5, C)).double(), torch.randn(N, 6).double()
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)

    def loss():
        output = model(x)
        return sum(f * F.cross_entropy((k + 1) * output, Y) for k, f in enumerate(factors))

    optimizer.step(loss)
    assert optimizer.report.loss_terms == N


@pytest.mark.parametrize("given", [12.0, 12, lambda: 12])
def test_given_terms_win(given):
    loss, rows = LOSSES["mean"][0], torch.arange(N)
    values, _, report = step(loss, rows, loss_terms=given)
    assert report.loss_terms == 12
    # As if the loss were the mean over twice as many terms: values move twice as far at first.
    own, _, _ = step(lambda o, i: 2 * loss(o, i), rows)
    assert relative(values[-1], own[-1]) < 1e-12


@pytest.mark.parametrize("given", [0, -1, float("nan"), True, "n"])
def test_terms_out_of_range(given):
    with pytest.raises(ConfigError, match="loss_terms"):
        step(LOSSES["mean"][0], torch.arange(N), loss_terms=given)


@pytest.mark.parametrize("given", [0.0, -3.0, float("nan")])
def test_a_callable_out_of_range(given):
    with pytest.raises(ConfigError, match="loss_terms"):
        step(LOSSES["mean"][0], torch.arange(N), loss_terms=lambda: given)


@pytest.mark.parametrize("algorithm", [IPC, PC])
def test_a_batch_without_any_term_is_an_error_by_name(algorithm):
    """torch's mean of nothing is NaN."""
    nothing = torch.full((N,), -100)
    model = MLP((6, 5, C)).double()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = algorithm(torch.optim.SGD(model.parameters(), 0.1), model)
    x = torch.randn(N, 6).double()
    with pytest.raises(DivergenceError, match="t = 0 the loss"):
        optimizer.step(lambda: F.cross_entropy(model(x), nothing))
    assert all(map(torch.equal, before, model.parameters()))


ROWS, WIDE = (5, 7, 4), torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(1)).double()
SIGNS = WIDE.sign()
MEANS = {  # a loss of outputs [5, 7, 4], by its reduction
    "soft margin": lambda o, r: F.soft_margin_loss(o, SIGNS, reduction=r),
    "hinge embedding": lambda o, r: F.hinge_embedding_loss(o, SIGNS, reduction=r),
    "margin ranking": lambda o, r: F.margin_ranking_loss(o, WIDE, SIGNS[:, :1], reduction=r),
    "triplet": lambda o, r: F.triplet_margin_loss(o, WIDE, -WIDE, reduction=r),
    "distance": lambda o, r: F.triplet_margin_with_distance_loss(o, WIDE, -WIDE, reduction=r),
    "multilabel": lambda o, r: F.multilabel_soft_margin_loss(o, (SIGNS + 1) / 2, reduction=r),
    "multi margin": lambda o, r: F.multi_margin_loss(o[0], torch.arange(7) % 4, reduction=r),
    "cosine": lambda o, r: F.cosine_embedding_loss(o[0], WIDE[1], SIGNS[0, :, 0], reduction=r),
    "gaussian": lambda o, r: F.gaussian_nll_loss(o, WIDE, WIDE.abs() + 1, reduction=r),
    "poisson": lambda o, r: F.poisson_nll_loss(o, WIDE.abs(), reduction=r),
    "broadcast": lambda o, r: F.l1_loss(o, WIDE[:1].expand(5, 7, 4), reduction=r),
}


@pytest.mark.parametrize("name", MEANS)
def test_terms_of_a_mean_are_its_sum_over_it(name):
    model = MLP((3, 4, 4)).double()
    x = torch.randn(5, 7, 3).double()
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.0), model, T=2)
    optimizer.step(lambda: MEANS[name](model(x), "mean"))
    outputs = model(x)
    terms = (MEANS[name](outputs, "sum") / MEANS[name](outputs, "mean")).item()
    assert optimizer.report.loss_terms == pytest.approx(terms, rel=1e-9)


def test_ctc_counts_sequences():
    model = MLP((3, 5, 6))
    x, targets = torch.randn(11, 4, 3), torch.randint(1, 6, (4, 3))
    lengths = torch.full((4,), 11), torch.full((4,), 3)
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.0), model, T=2)
    optimizer.step(lambda: F.ctc_loss(model(x).log_softmax(-1), targets, *lengths))
    assert optimizer.report.loss_terms == 4


@pytest.mark.parametrize("n", [6, 300])
def test_a_sum_in_bfloat16_counts_whole_terms(n):
    model = MLP((3, 4, 4)).bfloat16()
    x, y = torch.randn(6, 3).bfloat16(), torch.randint(0, 4, (6,))
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.0), model, T=2)
    optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="sum") / n)
    assert optimizer.report.loss_terms == pytest.approx(n, rel=0.01)
    if n == 6:
        assert optimizer.report.loss_terms == 6


def test_a_loss_with_an_axis_reports_scalars():
    model = MLP((3, 4, 4))
    x, y = torch.randn(6, 3), torch.randint(0, 4, (6,))
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model, T=3)
    optimizer.step(lambda: F.cross_entropy(model(x), y)[None])
    assert optimizer.report.free_energy.shape == (3,)
