"""Compiled steps: the numbers of steps as they are, and a word where they are not compiled."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from lightning_pc import PCStrategy, explain
from lightning_pc.energies import Entrywise
from lightning_pc.errors import ConfigError, DivergenceError
from lightning_pc.optim import EPC, IPC, PC, ZIL, PredictiveCoding
from tests.compare import far, twin
from tests.engine.compiling import ROWS, TRACED, compiler_of, hooked, parameter_hook
from tests.engine.lightning_problems import Module, data, loader, trainer
from tests.engine.modules import MLP
from tests.engine.stacks import CLOSE, STACKS, adamw, batches, deep, made, sgd, train
from tests.marks import mostly_slow

pytestmark = pytest.mark.filterwarnings("ignore:T=5 inference steps never reach")
DRAW = [name for name in STACKS if "dropout" in name]


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


def missing(graph, inputs):
    raise RuntimeError("there is no compiler\nand a long text")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def applied(model):
    model[0].register_forward_hook(lambda m, i, o: Doubled.apply(o))


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
