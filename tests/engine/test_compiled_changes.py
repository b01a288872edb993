"""Compiled steps follow what changes from batch to batch, and what no trace sees."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lightning_pc.stages.compiled
from lightning_pc.nodes.energies import Gaussian
from lightning_pc.optim import IPC, PC
from tests.compare import far
from tests.engine.compiling import ROWS, TRACED, compiler_of, hooked, parameter_hook
from tests.engine.modules import MLP
from tests.engine.stacks import CLOSE, adamw, batches, deep, made, sgd, train

pytestmark = pytest.mark.filterwarnings("ignore:T=5 inference steps never reach")


class Told(nn.Module):
    """Its forward has numbers, masks and weights of its own in it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 4)
        self.factor, self.tied = 1.0, False
        self.register_buffer("mask", torch.ones(7))

    def forward(self, x):
        h = torch.tanh(self.a(x)) * self.mask
        h = torch.tanh(self.b(h) + self.factor * h)
        if self.tied:
            h = torch.tanh(self.b(h))
        return self.c(h)


def told(change, compile, steps=12, door=PC, optimizer=adamw, batch=batches, **settings):
    """Trains a model that changes before each batch."""
    model = made(Told)
    pc = door(optimizer(model.parameters()), model, compile=compile, **settings)
    for number, (x, y) in enumerate(batch(steps)):
        change(model, number)
        pc.step(lambda: F.cross_entropy(model(x), y, ignore_index=-100))  # noqa: B023
    return model, pc


def new_number(model, number):
    model.factor = 0.5 + number % 3


def new_mask(model, number):
    model.mask = (torch.rand(7, generator=torch.manual_seed(number)) < 0.6).double()


def tied_then(model, number):
    model.tied = number > 5


def replaced(model, number):
    model.b.weight.data = model.b.weight.data.clone() * 1.01


def another_layout(model, number):
    weight = model.b.weight.data
    model.b.weight.data = weight.t().contiguous().t() if number % 2 else weight.contiguous()


def frozen_then(model, number):
    model.b.requires_grad_(number < 6)


def halved(model, number):
    model.b.weight.data.mul_(0.5)


CHANGES = [new_number, new_mask, tied_then, replaced, another_layout, frozen_then, halved]


@pytest.mark.parametrize("door", [PC, IPC])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_from_batch_to_batch_is_followed(change, door):
    how = {"door": door, "gamma": 0.3}
    (one, _), (other, after) = told(change, False, **how), told(change, TRACED, **how)
    assert compiler_of(after).programs
    assert far(other, one)[0] < CLOSE


def test_another_number_of_terms_is_the_same_program():
    """A mean over tokens that are not left out."""

    def left_out(n):
        for number, (x, y) in enumerate(batches(n)):
            y[: number % 4] = -100
            yield x, y

    how = {"gamma": 0.3, "T": 8, "batch": left_out}
    (one, _), (other, after) = (told(new_mask, c, **how) for c in (False, TRACED))
    assert compiler_of(after).programs == 3  # errors at one value, at two, and the last step
    assert far(other, one)[0] < CLOSE


def test_batches_of_other_sizes():
    def sizes(n):
        return [batches(1, 3 + number % 3)[0] for number in range(n)]

    how = {"gamma": 0.3, "batch": sizes}
    (one, _), (other, after) = (told(new_mask, c, **how) for c in (False, TRACED))
    assert compiler_of(after).programs == 3 * 3
    assert far(other, one)[0] < CLOSE


def test_too_many_forms():
    def another(model, number):
        model.factor = number / 100

    with pytest.warns(UserWarning, match="More than 8 batches on end were of another form"):
        other, after = told(another, TRACED, 24, gamma=0.3)
    one, _ = told(another, False, 24, gamma=0.3)
    assert len(compiler_of(after)._forms) == 8
    assert compiler_of(after).programs == 0
    assert far(other, one)[0] < CLOSE


def test_more_forms_than_are_compiled():
    def another(model, number):
        model.factor = number // 2 / 10

    with pytest.warns(UserWarning, match="This is another form than 8 that are compiled"):
        other, after = told(another, TRACED, 20, gamma=0.3, T=3, value_nodes=["b"])
    one, _ = told(another, False, 20, gamma=0.3, T=3, value_nodes=["b"])
    assert compiler_of(after).programs == 8 * 2
    assert far(other, one)[0] < CLOSE


class Packed(nn.Module):
    """What its recurrent layer is told of lengths no trace sees."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.LSTM(6, 5), nn.Linear(5, 3)

    def forward(self, n):
        x = torch.randn(3, 5, 4, generator=torch.manual_seed(n)).double()
        lengths = (5, 3, 3) if n < 4 else (5, 4, 2)
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        h = PackedSequence(torch.tanh(self.a(packed.data)), packed.batch_sizes)
        return self.c(self.b(h)[1][0][-1])


class Reads(nn.Module):
    """Calls to which a tensor gives a number or an index."""

    def __init__(self, call):
        super().__init__()
        self.a, self.b, self.call = nn.Linear(6, 7), nn.Linear(7, 4), call
        self.register_buffer("n", torch.tensor(0))

    def forward(self, n):
        x = torch.randn(3, 6, generator=torch.manual_seed(n)).double()
        h = torch.tanh(self.a(x))
        return self.b(self.call(self, torch.tanh(h), n))


def in_place(model, h, n):
    model.n.fill_(n % 3)
    return h * h[:, model.n :].sum(1, keepdim=True)


READ = {
    "packed": Packed,
    "alpha": lambda: Reads(lambda m, h, n: torch.add(h, h, alpha=torch.tensor(n / 9))),
    "elu": lambda: Reads(lambda m, h, n: F.elu(h, torch.tensor(n / 9))),
    "index": lambda: Reads(lambda m, h, n: h * h[:, torch.tensor(n % 3)].unsqueeze(1)),
    "split": lambda: Reads(
        lambda m, h, n: h * torch.tensor_split(h, torch.tensor([1 + n % 2]))[0].mean()
    ),
    "slice in place": lambda: Reads(in_place),
    "sign of zero": lambda: Reads(lambda m, h, n: torch.copysign(h, -0.0 if n % 2 else 0.0)),
}


@pytest.mark.parametrize("row", ["ipc, SGD, side by side", "pc, two betas"])
@pytest.mark.parametrize("kind", READ)
def test_numbers_that_calls_take_out_of_tensors(kind, row):
    """A trace would hold those of one batch."""
    door, optimizer, settings = ROWS[row]
    settings = settings | {"parallel": "auto"}
    one, other = made(READ[kind]), made(READ[kind])
    for model, how in ((one, {}), (other, {"compile": TRACED})):
        pc = door(optimizer(model.parameters()), model, loss_terms=3, **settings, **how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for n in range(9):
                pc.step(lambda: model(n).square().sum() / 3)  # noqa: B023
    assert far(other, one)[0] < CLOSE


def test_a_number_that_stays_in_a_trace_is_found_in_the_next_batch(monkeypatch):
    """Even where no rule foresaw it."""
    factor = [1.0]
    evaluate = Gaussian.evaluate

    def hidden(self, x, mu, scale, weight=1.0):
        slopes = evaluate(self, x, mu, scale, weight)
        return slopes._replace(dmu=slopes.dmu * factor[0])

    monkeypatch.setattr(Gaussian, "evaluate", hidden)
    found = []
    for how in ({}, {"compile": TRACED}):
        model = made(lambda: MLP([6, 7, 7, 4]))
        pc = PC(adamw(model.parameters()), model, gamma=0.3, **how)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for number, (x, y) in enumerate(batches(5)):
                factor[0] = 1.0 if number < 2 else 0.5
                pc.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
        found.append(model)
    assert "A trace of a step leaves another gradient" in str([str(w.message) for w in said])
    assert far(found[1], found[0])[0] == 0


@pytest.mark.parametrize("late", [parameter_hook, hooked])
def test_hooks_that_come_later(late):
    one, other = made(deep), made(deep)
    for model, how in ((one, {}), (other, {"compile": TRACED})):
        pc = PC(adamw(model.parameters()), model, **how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number, (x, y) in enumerate(batches(6)):
                if number == 3:
                    late(model)
                pc.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
    assert far(other, one)[0] == 0


def test_a_compiler_that_fails_later():
    calls = [0]

    def fails(graph, inputs):
        def run(*args):
            calls[0] += 1
            if calls[0] > 12:
                raise RuntimeError("a guard")
            return graph.forward(*args)

        return run

    one, other = made(deep), made(deep)
    train(one, PC, adamw, 6)
    with pytest.warns(UserWarning, match="RuntimeError: a guard"):
        after = train(other, PC, adamw, 6, compile={"backend": fails})
    assert compiler_of(after).programs == 0
    assert far(other, one)[0] < CLOSE


@pytest.mark.parametrize("parallel", [True, False])
def test_no_batch_is_kept_alive(parallel):
    model, seen = made(deep), []
    pc = PC(adamw(model.parameters()), model, gamma=0.3, parallel=parallel, compile=TRACED)

    def learn(x, y):
        pc.step(lambda: F.cross_entropy(model(x), y))
        seen.extend(map(weakref.ref, (x, *pc.values.values())))

    for number in range(5):
        learn(*batches(5)[number])
    each = len(seen) // 5
    gc.collect()
    assert compiler_of(pc).programs
    assert not [ref for ref in seen[: 4 * each] if ref() is not None]


def test_factors_that_never_return(monkeypatch):
    monkeypatch.setattr(lightning_pc.stages.compiled, "KINDS", 20)

    def weight(depth, t):
        return 1.0 + 0.5 / (1 + t)

    model = made(lambda: MLP([6, 7, 4]))
    x, y = batches(1)[0]
    how = {"reset": "never", "gamma": 0.1, "T": 5, "precisions": weight, "compile": TRACED}
    pc = IPC(sgd(model.parameters()), model, **how)

    def learn():
        for _ in range(10):
            pc.step(lambda: F.cross_entropy(model(x), y))

    with pytest.warns(UserWarning, match="others in each batch"):
        learn()


def test_numbers_that_are_read_on_the_way():
    """CTC takes the lengths out of tensors: a trace would hold those of one batch."""
    torch.manual_seed(0)
    models = made(lambda: MLP([6, 8, 8, 5])), made(lambda: MLP([6, 8, 8, 5]))

    def ctc(model, x, lengths):
        log_p = model(x).log_softmax(-1)
        return F.ctc_loss(log_p, torch.ones(4, 3).long(), lengths, lengths // 4)

    for model, how in zip(models, ({}, {"compile": TRACED}), strict=True):
        pc = PC(adamw(model.parameters()), model, gamma=0.1, loss_terms=4, **how)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for number in range(6):
                x = torch.randn(12, 4, 6, generator=torch.manual_seed(number)).double()
                lengths = torch.tensor([12, 10, 8, 8 + number % 4])
                pc.step(lambda: ctc(model, x, lengths))  # noqa: B023
    assert "not compiled" in str([str(w.message) for w in said])
    assert not compiler_of(pc).programs
    assert far(models[1], models[0])[0] == 0
