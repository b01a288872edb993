"""Side by side weights stand in rows: whatever users and optimizers do to them is followed."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc.errors import DivergenceError
from lightning_pc.optim import IPC, PC
from tests.compare import far
from tests.engine.inside import count_gradients
from tests.engine.stacks import CLOSE, OPTIMIZERS, batches, deep, linears, made, sgd, train

pytestmark = pytest.mark.filterwarnings("ignore:T=5 inference steps never reach")


def memories(model):
    return [(p.data_ptr(), p.stride(), p.untyped_storage().nbytes()) for p in model.parameters()]


@pytest.mark.parametrize("door", [IPC, PC])
def test_weights_are_in_their_own_memory_afterwards(door, tmp_path):
    model = made(deep)
    before, objects = memories(model), [*map(id, model.parameters())]
    pc = train(model, door, sgd, 2, parallel=True, gamma=0.3)
    assert pc.report.side_by_side
    assert memories(model) == before
    assert [*map(id, model.parameters())] == objects
    torch.save(model[2].state_dict(), tmp_path / "layer.pt")
    alone = nn.Linear(7, 7).double()
    torch.save(alone.state_dict(), tmp_path / "alone.pt")
    assert (tmp_path / "layer.pt").stat().st_size == (tmp_path / "alone.pt").stat().st_size


def test_also_after_a_divergence():
    model = made(deep)
    before = memories(model)
    pc = IPC(torch.optim.SGD(model.parameters(), 1e9), model, parallel=True, gamma=0.5, T=30)
    x, y = batches(1)[0]

    def on():
        for _ in range(30):
            pc.step(lambda: F.cross_entropy(model(x), y))

    with pytest.raises(DivergenceError, match=r"At inference step t = \d+ .*'\d+'"):
        on()
    assert memories(model) == before


# What users do to weights between steps --------------------------------------------------------


def assign(model, draw):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def load(model, draw):
    model.load_state_dict({n: v + 0.01 * draw.random() for n, v in model.state_dict().items()})


def there_and_back(model, draw):
    model.float().double()


def replace(model, draw):
    for p in model.parameters():
        p.data = p.data.clone() + 0.01


def freeze(model, draw):
    for p in draw.choice(linears(model)).parameters():
        p.requires_grad_(not p.requires_grad)


def tie(model, draw):
    like = [m for m in linears(model) if m.in_features == m.out_features]
    a, b = draw.sample(like, 2)
    a.weight = b.weight


def share_memory(model, draw):
    like = [m for m in linears(model) if m.in_features == m.out_features]
    a, b = draw.sample(like, 2)
    if a.weight is not b.weight:
        a.weight.data = b.weight.data


def hook(model, draw):
    draw.choice(linears(model)).weight.register_hook(lambda gradient: 0.5 * gradient)


def transpose(model, draw):
    layer = draw.choice(linears(model))
    layer.weight.data = layer.weight.data.t().contiguous().t()


def nothing(model, draw):
    pass


CHANGES = [assign, load, there_and_back, replace, freeze, tie, share_memory, hook, transpose]


@pytest.mark.parametrize("seed", range(50))
def test_weights_never_go_stale(seed):
    draw = random.Random(seed)
    width, layers = draw.choice([3, 6]), draw.choice([6, 8])
    kind = draw.choice(["sgd", "momentum", "adam"])
    changes = [draw.choice([nothing, *CHANGES]) for _ in range(6)]
    trained = []
    for parallel in (False, True):
        chosen = random.Random(seed)
        model = made(lambda: deep(width, layers), seed)
        for t, (x, y) in enumerate(batches(6)):
            # An optimizer is made anew, since some changes replace the parameters.
            optimizer = {
                "sgd": lambda p: torch.optim.SGD(p, 0.02, weight_decay=0.01),
                "momentum": lambda p: torch.optim.SGD(p, 0.02, momentum=0.5),
                "adam": lambda p: torch.optim.AdamW(p, 1e-3),
            }[kind](model.parameters())
            pc = IPC(optimizer, model, gamma=0.3, T=11, parallel="auto" if parallel else False)
            for _ in range(2):
                pc.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
            changes[t](model, chosen)
            if chosen.random() < 0.3:
                model = copy.deepcopy(model)
        trained.append(model)
    assert far(trained[1], trained[0])[0] < CLOSE


def test_a_hook_on_a_parameter_runs_as_often():
    counts = []
    for parallel in (False, "auto"):
        model, seen = made(lambda: deep(layers=8)), []
        model[4].weight.register_hook(seen.append)
        model[6].bias.register_post_accumulate_grad_hook(seen.append)
        train(model, IPC, sgd, 3, parallel=parallel, gamma=0.3)
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


def test_a_weight_that_is_not_contiguous_and_a_fused_optimizer():
    trained = []
    for parallel in (False, "auto"):
        model = made(lambda: deep(layers=8))
        for layer in linears(model):
            layer.weight.data = layer.weight.data.t().contiguous().t()
        train(model, IPC, OPTIMIZERS["fused"], 4, parallel=parallel, gamma=0.3)
        trained.append(model)
    assert far(trained[1], trained[0], entry=0.01)[0] < CLOSE


def clips(parameters):
    parameters = [*parameters]
    optimizer = torch.optim.SGD(parameters, 0.02)
    step = optimizer.step

    def clipped(closure=None):
        nn.utils.clip_grad_norm_(parameters, 0.01)
        return step(closure)

    optimizer.step = clipped
    return optimizer


class Keeps(torch.optim.Optimizer):
    """Holds on to a parameter's memory."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.memories = [p.data for p in self.param_groups[0]["params"]]

    def step(self, closure=None):
        for p, memory in zip(self.param_groups[0]["params"], self.memories, strict=True):
            if p.grad is not None:
                memory.sub_(p.grad, alpha=0.02)


@pytest.mark.parametrize("optimizer", [clips, Keeps])
def test_an_optimizer_with_ways_of_its_own(optimizer):
    one, side = made(deep), made(deep)
    train(one, IPC, optimizer, 4, parallel=False, gamma=0.3)
    assert train(side, IPC, optimizer, 4, parallel=True, gamma=0.3).report.side_by_side
    assert far(side, one)[0] < CLOSE


def test_a_scheduler_of_the_rate_leaves_steps_in_place(monkeypatch):
    def optimizer(parameters):
        made = torch.optim.SGD(parameters, 0.01)
        torch.optim.lr_scheduler.StepLR(made, 1)
        return made

    stored = count_gradients(monkeypatch)
    train(made(deep), IPC, optimizer, parallel=True, gamma=0.3, T=20)
    assert stored[0] < 200


def test_kept_values_leave_nothing_behind():
    model = made(lambda: deep(layers=8))
    how = {"reset": "never", "momentum": "conjugate", "gamma": 0.2, "T": 2}
    pc = PC(sgd(model.parameters()), model, **how)
    x, y = batches(1)[0]
    for _ in range(8):
        pc.step(lambda: F.cross_entropy(model(x), y))
    assert pc.report.side_by_side
    assert len(pc._learner._kept._moving) <= 4
