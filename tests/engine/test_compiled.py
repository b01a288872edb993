"""Compiled steps: the numbers of steps as they are, and a word where they are not compiled."""

from __future__ import annotations

import gc
import shutil
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lightning_pc.stages.compiled
from lightning_pc import PCStrategy, explain
from lightning_pc.energies import Entrywise
from lightning_pc.errors import ConfigError, DivergenceError
from lightning_pc.nodes.energies import Gaussian
from lightning_pc.optim import EPC, IPC, PC, ZIL, PredictiveCoding
from tests.compare import far, twin
from tests.engine.lightning_problems import Module, data, loader, trainer
from tests.engine.modules import MLP
from tests.engine.stacks import CLOSE, STACKS, adamw, batches, deep, made, sgd, train
from tests.marks import mostly_slow

#: Runs what was traced, uncompiled: what a compiler does to it is the compiler's own.
TRACED = {"backend": "eager"}
pytestmark = pytest.mark.filterwarnings("ignore:T=5 inference steps never reach")

ROWS = {
    "ipc, SGD, side by side": (IPC, sgd, {"gamma": 0.3, "parallel": True}),
    "ipc, AdamW": (IPC, adamw, {"gamma": 0.3, "T": 5, "parallel": False}),
    "pc, side by side": (PC, adamw, {"parallel": True}),
    "pc, two betas": (PC, adamw, {"gamma": 0.3, "beta": (0.3, -0.3), "parallel": False}),
}
DRAW = [name for name in STACKS if "dropout" in name]


def compiler_of(pc):
    return pc._learner.compiler


FEW = [("tanh", "ipc, AdamW"), ("tanh", "pc, two betas"), ("blocks", "pc, side by side")]
FEW += [("two kinds", "ipc, SGD, side by side"), ("blocks", "ipc, AdamW")]
TABLE = mostly_slow([(m, r) for m in STACKS for r in ROWS if m not in DRAW], *FEW)


@pytest.mark.parametrize("case", TABLE)
def test_the_same_numbers(case):
    module, row = case
    make, nodes = STACKS[module].make, STACKS[module].value_nodes
    door, optimizer, settings = ROWS[row]
    one, other = made(make), made(make)
    start = twin(one)
    before = train(one, door, optimizer, 6, value_nodes=nodes, **settings)
    after = train(other, door, optimizer, 6, value_nodes=nodes, compile=TRACED, **settings)
    assert compiler_of(after).programs >= 2
    assert far(other, one, entry=0.01)[0] < CLOSE
    assert far(start, one)[0] > 1e4 * CLOSE
    assert torch.allclose(before.report.energy, after.report.energy, rtol=1e-8, atol=1e-14)
    assert before.report.learned == after.report.learned
    assert f"{compiler_of(after).programs} kinds of inference steps are compiled" in explain(after)


@pytest.mark.parametrize("module", DRAW)
def test_draws_are_told_and_run_as_they_are(module):
    make, nodes = STACKS[module].make, STACKS[module].value_nodes
    one, other = made(make), made(make)
    train(one, PC, adamw, 3, value_nodes=nodes)
    with pytest.warns(UserWarning, match=r"run as they are, not compiled. '.*' draws"):
        after = train(other, PC, adamw, 3, value_nodes=nodes, compile=True)
    assert not compiler_of(after).programs
    assert far(other, one)[0] == 0


@pytest.mark.parametrize("row", ["ipc, SGD, side by side", "pc, side by side"])
def test_a_compiler_of_torchs_own(row):
    door, optimizer, settings = ROWS[row]
    one, other = made(deep), made(deep)
    train(one, door, optimizer, 4, **settings)
    after = train(other, door, optimizer, 4, compile={"backend": "aot_eager"}, **settings)
    assert compiler_of(after).programs >= 2
    assert far(other, one, entry=0.01)[0] < CLOSE


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
def test_the_default_compiler():
    one, other = (made(lambda: MLP([6, 8, 8, 4])) for _ in range(2))
    train(one, PC, adamw, 4)
    after = train(other, PC, adamw, 4, compile=True)
    assert compiler_of(after).programs == 3
    assert far(other, one, entry=0.01)[0] < CLOSE


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("parallel", [True, False])
def test_values_that_are_kept(parallel, optimizer):
    one, other = made(deep), made(deep)
    x, y = batches(1)[0]
    for model, how in ((one, {}), (other, {"compile": TRACED})):
        kept = {"gamma": 0.2, "reset": "never", "T": 4, "parallel": parallel}
        pc = IPC(optimizer(model.parameters()), model, **kept, **how)
        for _ in range(6):
            pc.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
    assert compiler_of(pc).programs == 2
    assert far(other, one)[0] < CLOSE


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


def missing(graph, inputs):
    raise RuntimeError("there is no compiler\nand a long text")


def hooked(model):
    model[0].register_forward_hook(lambda m, i, o: o.register_hook(lambda g: 0.5 * g) and None)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def applied(model):
    model[0].register_forward_hook(lambda m, i, o: Doubled.apply(o))


def parameter_hook(model):
    model[0].weight.register_hook(lambda g: 0.5 * g)


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


class Scaled(Entrywise):
    """It holds a tensor, which may change."""

    name = "scaled"

    def __init__(self):
        self.scale = torch.tensor(2.0)

    def energy(self, x, mu):
        return self.scale * (x - mu).square()


def test_an_energy_that_holds_a_tensor():
    one, other = made(deep), made(deep)
    energies = {"3": Scaled()}
    train(one, PC, adamw, 4, energies=energies, gamma=0.1)
    with pytest.warns(UserWarning, match="'scaled' is given a Tensor, which may change"):
        after = train(other, PC, adamw, 4, energies=energies, gamma=0.1, compile=TRACED)
    assert not compiler_of(after).programs
    assert far(other, one)[0] == 0


NOT = {
    "no compiler": (lambda model: None, {"backend": missing}, "there is no compiler"),
    "hook": (hooked, TRACED, "There is a hook on what 'linear' gives"),
    "function": (applied, TRACED, "'Doubled.apply' has a backward of its own"),
    "parameter": (parameter_hook, TRACED, "There is a hook on a parameter of shape"),
}


@pytest.mark.parametrize("why", NOT)
def test_where_not(why):
    prepare, how, match = NOT[why]
    one, other = made(deep), made(deep)
    prepare(one)
    prepare(other)
    train(one, PC, adamw, 4)
    with pytest.warns(UserWarning, match=match) as said:
        after = train(other, PC, adamw, 4, compile=how)
    assert len(said) == 1
    assert "long text" not in str(said[0].message)
    assert not compiler_of(after).programs
    assert far(other, one)[0] == 0


def test_weights_do_not_move_on_what_is_not_finite():
    model = made(deep)
    x, y = batches(1)[0]
    pc = PC(sgd(model.parameters()), model, compile=TRACED, gamma=0.3)
    for _ in range(3):
        pc.step(lambda: F.cross_entropy(model(x), y))
    before = twin(model)
    with torch.no_grad():
        model[-1].weight.mul_(1e200)
        before[-1].weight.mul_(1e200)
    with pytest.raises(DivergenceError):
        pc.step(lambda: F.cross_entropy(model(x), y))
    assert far(model, before)[0] == 0


def test_shorter_floats():
    """Autocast is part of a call."""
    models = [MLP([6, 16, 16, 4]) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, how in zip(models, ({}, {"compile": TRACED}), strict=True):
        pc = PC(sgd(model.parameters()), model, gamma=0.3, **how)
        for x, y in batches(6):
            with torch.autocast("cpu", torch.bfloat16):
                pc.step(lambda: F.cross_entropy(model(x.float()), y))  # noqa: B023
    assert compiler_of(pc).programs == 3
    assert far(models[1], models[0])[0] < 1e-5


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"compile": 3}, "expected True, False or a dict of torch.compile's arguments"),
        ({"compile": {"backend": "nope"}}, "Invalid backend"),
        ({"compile": {"typo": 1}}, "typo"),
        ({"compile": {"mode": "fast"}}, "fast"),
        ({"compile": {}, "algorithm": "auto"}, "auto sends gradients from stage to stage"),
        ({"compile": True, "algorithm": "auto"}, "auto sends gradients from stage to stage"),
        ({"compile": True, "algorithm": "ipc"}, "Give gamma a number"),
        ({"compile": True, "algorithm": "pc", "precisions": "spiking"}, "one stage runs at a time"),
    ],
)
def test_a_wrong_argument(given, why):
    model = made(deep)
    with pytest.raises(ConfigError, match=why):
        PredictiveCoding(sgd(model.parameters()), model, **{"algorithm": "pc", **given})


@pytest.mark.parametrize("door", [EPC, ZIL])
def test_algorithms_that_are_not_compiled(door):
    model = made(deep)
    with pytest.raises(ConfigError, match="Use 'ipc' or 'pc'"):
        door(sgd(model.parameters()), model, compile=True)


@pytest.mark.parametrize("algorithm", ["pc", "ipc"])
def test_the_trainer_accumulates_and_clips(algorithm):
    found = []
    for how in ({}, {"compile": TRACED}):
        torch.manual_seed(0)
        module = Module(net=MLP([5, 7, 7, 3]))
        batches_at_once = 2 if algorithm == "pc" else 1
        options = {"accumulate_grad_batches": batches_at_once, "gradient_clip_val": 0.1}
        strategy = PCStrategy(algorithm, gamma=0.3, **how)
        trainer(strategy, max_epochs=2, **options).fit(module, loader(data(40)))
        found.append(module.net)
    assert strategy._learner.compiler.programs >= 3
    assert far(found[1], found[0])[0] < 1e-5
