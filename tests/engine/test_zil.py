"""Z-IL equals backprop: the strongest test of nodes, graph and stages together."""

import ast
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_pc.errors import ChainError
from lightning_pc.optim import ZIL
from tests.compare import far, twin
from tests.engine.modules import MLP, Transformer
from tests.engine.problems import (
    PROBLEMS,
    Problem,
    ce,
    sequences,
)
from tests.engine.tiny import TINY


def tiny_loss(model, batch):
    return model(**batch).loss


PLACEMENT = r"value_nodes=(\[.*?\]|'.*?')"


class Gated(nn.Module):
    """A functional softmax, a GLU and a prelu in a chain."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(4, 5), nn.Linear(5, 4)
        self.slope = nn.Parameter(torch.tensor(0.3))
        self.d = nn.Linear(4, 4)

    def forward(self, x):
        h = F.softmax(self.b(F.glu(self.a(x))), dim=1)
        return self.d(F.prelu(self.c(h), self.slope))


class Viewed(nn.Module):
    """In-place activations on views: of all of a tensor, and through a transpose."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.act(self.a(x).unsqueeze(1))
        h = torch.tanh_(self.b(h).transpose(1, 2))
        return self.head(h.squeeze(-1))


def compare(model, value_nodes, batches, loss, lr=1e-2, **kwargs):
    """Trains the module with Z-IL and its twin with backprop; the trained weights are equal."""
    model = model.double().train()
    other, start = twin(model), twin(model)
    optimizer = ZIL(torch.optim.Adam(model.parameters(), lr), model, value_nodes=value_nodes)
    plain = torch.optim.Adam(other.parameters(), lr)
    for i, batch in enumerate(batches):
        torch.manual_seed(i)
        value = optimizer.step(lambda batch=batch: loss(model, *batch))
        torch.manual_seed(i)
        expected = loss(other, *batch)
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)
        plain.zero_grad()
        expected.backward()
        plain.step()
    error, name = far(model, other, lr)  # lr: how far one Adam step moves an entry
    assert error < 1e-6, name
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
    assert far(model, start)[0] > 1e-3
    assert optimizer.report.steps == optimizer.report.depth + 1
    return optimizer.report


def some(problem, sizes=(6, 6, 6, 4)):
    torch.manual_seed(7)
    return [problem.doubles(n) for n in sizes]


CHAINS = {  # name -> problem, value_nodes, depth
    "mlp": (PROBLEMS["mlp"], "auto", 3),
    "mlp-mse": (PROBLEMS["squared error"], "auto", 2),
    "mlp-linear": (Problem(lambda: MLP((6, 7, 5, 4), "silu")), "linear", 2),
    "cnn": (PROBLEMS["cnn"], "auto", 2),
    "cnn-modules": (PROBLEMS["cnn"], "modules", 4),
    "dropout": (PROBLEMS["dropout"], "auto", 2),
    "gated": (Problem(Gated), "auto", 3),
    "views": (Problem(Viewed), "auto", 2),
    "residual": (PROBLEMS["residual"], "blocks", 3),
    "residual-names": (PROBLEMS["residual"], ["stem", r"layers\.\d"], 4),
    "transformer": (PROBLEMS["transformer"], "blocks", 2),
    "transformer-prenorm": (PROBLEMS["transformer, prenorm"], nn.TransformerEncoderLayer, 2),
    "shared": (PROBLEMS["shared"], "auto", 3),
    "tied": (PROBLEMS["tied"], "auto", 2),
    "lstm": (PROBLEMS["lstm"], PROBLEMS["lstm"].value_nodes, 2),
}


@pytest.mark.parametrize("name", CHAINS)
def test_equals_backprop(name):
    problem, value_nodes, depth = CHAINS[name]
    report = compare(problem.make(), value_nodes, some(problem), problem.loss)
    assert report.depth == depth


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "gpt2", "resnet", "llama", "convnext"])
def test_hugging_face_blocks_equal_backprop(name):
    tiny = TINY[name]
    batch = (tiny.draw(torch.float64),)
    compare(tiny.make(), "blocks", [batch] * 3, tiny_loss)


NO_CHAINS = {  # name -> problem, a node that is read twice
    "residual": (PROBLEMS["residual"], r"layers\.\d\.act"),
    "unet": (PROBLEMS["unet"], "act"),
    "transformer": (
        Problem(lambda: Transformer(layers=3), sequences),
        r"encoder\.layers\.\d.*",
    ),
}


@pytest.mark.parametrize("name", NO_CHAINS)
def test_no_chain_is_an_error_whose_placement_works(name):
    problem, culprit = NO_CHAINS[name]
    model, batches = problem.make().double(), some(problem)
    before = twin(model)
    optimizer = ZIL(torch.optim.Adam(model.parameters(), 1e-2), model)
    with pytest.raises(ChainError, match=f"'{culprit}(#\\d+)?' is read by ") as error:
        optimizer.step(lambda: ce(model, *batches[0]))
    assert far(model, before)[0] == 0
    works = ast.literal_eval(re.search(PLACEMENT, str(error.value)).group(1))
    assert len(works) >= 1
    compare(problem.make(), works, batches, ce)


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "vit", "convnext", "bart", "t5"])
def test_no_chain_of_hugging_face_names_a_placement_that_works(name):
    tiny = TINY[name]
    model, batch = tiny.make(torch.float64), tiny.draw(torch.float64)
    optimizer = ZIL(torch.optim.Adam(model.parameters(), 1e-2), model)
    with pytest.raises(ChainError, match="is read by") as error:
        optimizer.step(lambda: tiny_loss(model, batch))
    works = ast.literal_eval(re.search(PLACEMENT, str(error.value)).group(1))
    report = compare(tiny.make(), works, [(batch,)] * 2, tiny_loss)
    assert report.depth > 1


class Recurrent(nn.Module):
    """One module, called again and again, each call with a skip around it."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(3):
            x = x + torch.tanh(self.shared(x))
        return self.head(x)


def test_says_so_where_no_placement_makes_a_chain():
    model, x = Recurrent().double(), torch.randn(3, 4).double()
    optimizer = ZIL(torch.optim.SGD(model.parameters(), 0.1), model)
    with pytest.raises(ChainError, match="No placement at module outputs"):
        optimizer.step(lambda: F.mse_loss(model(x), x))


layer = st.tuples(
    st.integers(1, 6),  # width
    st.sampled_from([nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Softplus]),
    st.booleans(),  # in place where it can be
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    convs=st.lists(layer, max_size=2),
    linears=st.lists(layer, max_size=3),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    placement=st.sampled_from(["auto", "linear", "modules"]),
)
def test_random_chains_equal_backprop(convs, linears, sizes, placement):
    if not convs and not linears:
        linears = [(3, nn.Tanh, False)]
    torch.manual_seed(0)
    modules, channels = [], 2

    def activation(kind, in_place):
        return kind(inplace=True) if in_place and kind in (nn.ReLU, nn.SiLU) else kind()

    for width, kind, in_place in convs:
        modules += [nn.Conv2d(channels, width, 3, padding=1), activation(kind, in_place)]
        channels = width
    modules.append(nn.Flatten())
    channels *= 9
    for width, kind, in_place in linears:
        modules += [nn.Linear(channels, width), activation(kind, in_place)]
        channels = width
    model = nn.Sequential(*modules, nn.Linear(channels, 4))
    batches = [(torch.randn(n, 2, 3, 3).double(), torch.randint(0, 4, (n,))) for n in sizes]
    report = compare(model, placement, batches, ce)
    assert report.depth == len(convs) + len(linears)
