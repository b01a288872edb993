"""describe: the rows are right, and it leaves no trace."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from lightning_pc import PCStrategy, describe
from lightning_pc.errors import ClosureError, ConfigError
from lightning_pc.optim import EPC
from tests.engine.modules import CNN, Dropped
from tests.engine.problems import images, vectors
from tests.engine.tiny import TINY


class Noisy(nn.Module):
    """Draws from every generator, and counts, appends and averages."""

    def __init__(self):
        super().__init__()
        self.body = CNN()
        self.calls, self.seen = 0, []
        self.generator = torch.Generator()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen.append(x.shape)
        self.mean += x.mean()
        noise = torch.randn(x.shape, generator=self.generator) * random.random()
        return self.body(F.dropout(x + noise * np.random.rand(), 0.2))


def state(model):
    return [
        {k: v.clone() for k, v in model.state_dict().items()},
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        torch.get_rng_state(),
        [m.__dict__["_buffers"].keys() for m in model.modules()],
        [m.training for m in model.modules()],
    ]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("given", ["tensor", "tuple", "mapping", "closure"])
def test_leaves_no_trace(given):
    model, (x, y) = Noisy(), images(3)
    batch = {
        "tensor": x,
        "tuple": (x,),
        "mapping": {"x": x},
        "closure": lambda: F.cross_entropy(model(x), y),
    }[given]
    before = state(model)
    generators = model.generator.get_state(), np.random.get_state()[1].copy(), random.getstate()
    description = describe(model, batch, print_table=False)
    assert same(state(model), before)
    assert torch.equal(model.generator.get_state(), generators[0])
    assert (np.random.get_state()[1] == generators[1]).all()
    assert random.getstate() == generators[2]
    assert model.calls == len(model.seen) == 1  # what leaves torch is not undone
    assert [row.name for row in description.rows] == ["body.2", "body.6"]


def test_rows():
    model, (x, y) = Dropped(), vectors(5)
    description = describe(model, lambda: F.cross_entropy(model(x), y), print_table=False)
    first, second = description.rows
    assert (first.name, first.shape, first.energy, first.parents) == ("2", (5, 9), "gaussian", ())
    assert (second.name, second.shape, second.parents) == ("6", (5, 7), ("2",))
    assert [row.depth for row in description.rows] == [2, 1]
    assert [row.parameters for row in description.rows] == [6 * 9 + 9, 9 * 7 + 7]
    assert description.loss_parameters == 7 * 4 + 4
    assert (description.depth, description.T) == (2, 2)
    assert description.passed_over == []
    assert repr(description) == "Description(nodes=2, depth=2, T=2)"


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "resnet", "vit", "albert"])
def test_every_parameter_that_the_loss_depends_on_has_a_stage(name):
    tiny = TINY[name]
    model, batch = tiny.make(), tiny.draw()
    description = describe(model, lambda: model(**batch).loss, algorithm="ipc", print_table=False)
    model(**batch).loss.backward()
    reached = sum(p.numel() for p in model.parameters() if p.grad is not None)
    staged = description.loss_parameters + sum(row.parameters for row in description.rows)
    assert staged >= reached  # tied weights and residual streams count in several stages
    names = [row.name for row in description.rows]
    assert len(names) == len(set(names))
    assert all(parent in names for row in description.rows for parent in row.parents)
    energies = {row.energy for row in description.rows if "softmax" in row.name}
    assert energies <= {"categorical"}


def test_algorithm_and_T():
    model, (x, _) = Dropped(), vectors(5)
    assert describe(model, x, algorithm="zil", print_table=False).T == 3
    assert describe(model, x, algorithm="epc", print_table=False).T == 8
    assert describe(model, x, algorithm="pc", T=5, print_table=False).T == 5
    with pytest.raises(ConfigError, match="unknown"):
        describe(model, x, algorithm="bp")


def test_settings_of_a_strategy_or_an_optimizer():
    model, (x, _) = Dropped(), vectors(5)
    strategy = PCStrategy("zil", value_nodes="linear")
    optimizer = EPC(torch.optim.SGD(model.parameters(), 0.1), model, T=5, value_nodes="linear")
    expected = [row.name for row in describe(model, x, value_nodes="linear").rows]
    assert expected != [row.name for row in describe(model, x).rows]
    for how, T in ((strategy, 3), (optimizer, 5)):
        found = describe(model, x, how, print_table=False)
        assert ([row.name for row in found.rows], found.T) == (expected, T)
        found = describe(model, x, how, algorithm="pc", T=7, print_table=False)
        assert ([row.name for row in found.rows], found.T) == (expected, 7)
    assert optimizer.report is None
    with pytest.raises(ConfigError, match=r"expected a PCStrategy or an optimizer .*, got str"):
        describe(model, x, "pc")
    with pytest.raises(ConfigError, match=r"describe has no argument steps="):
        describe(model, x, steps=3)
    for given in (x, None, Dropped):
        with pytest.raises(ConfigError, match=r"describe\(model, batch.*expected the nn\.Module"):
            describe(given, model)


def test_no_loss_at_all():
    class Silent(nn.Module):
        def forward(self, x):
            return {"ids": x.argmax(1)}

    model = nn.Sequential(nn.Linear(6, 5), Silent())
    with pytest.raises(ClosureError, match="closure that returns the"):
        describe(model, vectors(3)[0])


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_a_narrow_terminal(width):
    tiny = TINY["bert"]
    model, batch = tiny.make(), tiny.draw()
    description = describe(model, lambda: model(**batch).loss, print_table=False)
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(description)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "value nodes, depth" in text
