"""Parents, depths, stages; who is reached when; nothing moves where there is nothing to do."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc import describe
from lightning_pc.optim import EPC, IPC, PC, ZIL
from tests.compare import far, twin
from tests.engine.modules import MLP, Residual, Thrice, Tied, Towers, Transformer
from tests.engine.problems import ce, sequences, vectors


class Heads(nn.Module):
    """A trunk with two heads, of which one is deeper."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        self.near, self.far = nn.Linear(5, 4), MLP((5, 3, 4))

    def forward(self, x):
        h = self.trunk(x)
        return self.near(h) + self.far(h)


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.head(torch.relu(self.b(h)) + h)


class Gradless(nn.Module):
    """A node whose reading stage is cut off by no_grad and detach."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        h = torch.tanh(self.a(x))
        with torch.no_grad():
            teacher = torch.relu(self.b(h))
        lost = torch.sigmoid(self.c(h)).detach()
        return self.head(h + teacher + lost)


GRAPHS = {  # name -> module, {node: (parents, depth, parameters)}, the loss's parameters
    "chain": (
        lambda: MLP((6, 5, 3, 4)),
        {"1": ([], 2, 6 * 5 + 5), "3": (["1"], 1, 5 * 3 + 3)},
        3 * 4 + 4,
    ),
    "skip": (Skip, {"tanh": ([], 1, 35), "relu": (["tanh"], 1, 30)}, 24),
    "towers": (
        Towers,
        {"tanh": ([], 2, 20), "tanh#2": (["tanh"], 1, 30), "tanh#3": ([], 1, 20)},
        44,
    ),
    "heads": (Heads, {"trunk.1": ([], 1, 35), "far.1": (["trunk.1"], 1, 18)}, 24 + 16),
    "shared": (
        Thrice,
        {"tanh": ([], 3, 42), "tanh#2": (["tanh"], 2, 42), "tanh#3": (["tanh#2"], 1, 42)},
        28,
    ),
    "gradless": (Gradless, {"tanh": ([], 1, 42)}, 42),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_parents_depths_and_stages(name):
    make, nodes, own = GRAPHS[name]
    table = describe(make(), torch.zeros(3, 6), algorithm="ipc", print_table=False)
    assert {r.name: (list(r.parents), r.depth, r.parameters) for r in table.rows} == nodes
    assert table.loss_parameters == own
    assert table.depth == max(depth for _, depth, _ in nodes.values())
    assert max(8, table.depth + 1) == table.T


def test_a_residual_stream_without_nodes_is_crossed_in_one_stage():
    model, (x, y) = Transformer(dropout=0.0), sequences(3)
    table = describe(model, lambda: ce(model, x, y), print_table=False)
    assert len(table.rows) == 4
    assert table.depth == 1
    deep = describe(model, lambda: ce(model, x, y), value_nodes="blocks", print_table=False)
    assert [row.depth for row in deep.rows] == [2, 1]
    names = [f"encoder.layers.0.{n}" for n in ("self_attn.softmax", "relu")]
    assert [row.name for row in table.rows][:2] == names
    assert table.rows[0].shape == (3, 2, 5, 5)


@pytest.mark.filterwarnings("ignore:In the first batch no error reached")
@pytest.mark.parametrize("layers", [9, 12])
def test_default_T_follows_the_depth(layers):
    model = MLP((6, *[5] * layers, 4))
    x, y = vectors(4)
    for algorithm, T in ((IPC, layers + 1), (PC, layers + 1), (ZIL, layers + 1), (EPC, 8)):
        optimizer = algorithm(torch.optim.SGD(model.parameters(), 1e-3), model)
        optimizer.step(lambda: ce(model, x, y))
        assert optimizer.report.steps == T
        assert optimizer.report.depth == layers


@pytest.mark.parametrize("algorithm", [IPC, PC])
def test_an_error_that_fades_on_its_way_is_told_once(algorithm):
    torch.manual_seed(0)
    model = MLP((6, *[5] * 12, 4))
    x, y = vectors(4)
    optimizer = algorithm(torch.optim.SGD(model.parameters(), 1e-3), model, gamma=1e-3)

    def three_steps():
        for _ in range(3):
            optimizer.step(lambda: ce(model, x, y))

    with pytest.warns(UserWarning, match="no error reached") as told:
        three_steps()
    assert len(told) == 1
    silent = [name for name, peak in optimizer.report.peak_energy.items() if peak == 0]
    assert silent
    assert silent[0] in str(told[0].message)
    wider = algorithm(torch.optim.SGD(model.parameters(), 1e-3), model, gamma=0.5)
    wider.step(lambda: ce(model, x, y))  # no warning, which would be an error
    assert all(peak > 0 for peak in wider.report.peak_energy.values())


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.5),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 6])
def test_what_is_not_reached_takes_no_step(T, optimizer):
    """Weights of a stage move from the step on at which an error reaches it, and stay bitwise."""
    model = MLP((6, 5, 5, 5, 4)).double()
    before, (x, y) = twin(model), vectors(4)
    wrapped = OPTIMIZERS[optimizer](model.parameters())
    steps = {name: 0 for name, _ in model.named_parameters()}

    def count(opt, args, kwargs):
        for name, p in model.named_parameters():
            steps[name] += p.grad is not None

    wrapped.register_step_pre_hook(count)
    optimizer = IPC(wrapped, model, T=T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step(lambda: ce(model, x.double(), y))
    for depth, layer in enumerate((6, 4, 2, 0)):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            updates = max(0, T - depth)
            p = model.get_parameter(name)
            assert steps[name] == optimizer.report.learned[name] == updates
            assert torch.equal(p, before.get_parameter(name)) == (updates == 0)
            assert (p in wrapped.state) == (updates > 0)


def test_pc_learns_once_with_all_that_is_reached():
    model, (x, y) = MLP((6, 5, 5, 5, 4)), vectors(4)
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)
    optimizer.step(lambda: ce(model, x, y))
    assert set(optimizer.report.learned.values()) == {1}


@pytest.mark.parametrize("algorithm", [IPC, PC])
def test_too_small_a_T_warns_once_with_names_and_remedy(algorithm):
    model, (x, y) = MLP((6, 5, 5, 5, 4)), vectors(4)
    optimizer = algorithm(torch.optim.SGD(model.parameters(), 0.1), model, T=2)
    with pytest.warns(UserWarning, match="T=2 ") as caught:
        optimizer.step(lambda: ce(model, x, y))
    optimizer.step(lambda: ce(model, x, y))  # silent, or the suite's filter makes it an error
    assert len(caught) == 1
    message = str(caught[0].message)
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert name in message
    assert "4.weight" not in message
    enough = int(re.search(r"T=(\d+) reaches all", message).group(1))
    assert enough == 4
    before = twin(model)
    optimizer = algorithm(torch.optim.SGD(model.parameters(), 0.1), model, T=enough)
    optimizer.step(lambda: ce(model, x, y))
    old = before.parameters()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True))


def test_a_weight_shared_by_stages_is_reached_by_the_lowest():
    model, (x, y) = Thrice(), vectors(4)
    before = twin(model)
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model, T=2)
    optimizer.step(lambda: ce(model, x, y))  # depth 3, yet no warning: all weights learn
    assert optimizer.report.learned["shared.weight"] == 1
    assert not torch.equal(model.shared.weight, before.shared.weight)


def test_tied_embeddings_learn_at_every_step():
    model, (x, y) = Tied(), sequences(4)
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model)
    optimizer.step(lambda: ce(model, x, y))
    assert optimizer.report.learned["embedding.weight"] == 8
    assert "head.weight" not in optimizer.report.learned


MINIMA = {"mlp": lambda: MLP((6, 5, 5, 4)), "residual": Residual, "towers": Towers, "heads": Heads}


@pytest.mark.parametrize("algorithm", [IPC, PC, ZIL, EPC])
@pytest.mark.parametrize("name", MINIMA)
def test_nothing_moves_at_the_minimum(name, algorithm):
    model = MINIMA[name]()
    before, x = twin(model), torch.randn(5, 6)
    target = model(x).detach()
    chain = {"residual": "blocks", "heads": "trunk"}.get(name, "auto")
    value_nodes = chain if algorithm is ZIL else "auto"
    sgd = torch.optim.SGD(model.parameters(), 0.5)
    optimizer = algorithm(sgd, model, value_nodes=value_nodes)
    for _ in range(3):
        assert optimizer.step(lambda: F.mse_loss(model(x), target)).item() == 0
    assert all(map(torch.equal, model.parameters(), before.parameters()))
    assert optimizer.report.energy.abs().max() == 0


def test_forwards_and_backwards_outside_of_a_step_are_ordinary():
    """Training and evaluation forwards outside of a step are the module's own."""
    model, (x, y) = MLP((6, 5, 4)).double(), vectors(4)
    x = x.double()
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model)
    optimizer.step(lambda: ce(model, x, y))
    optimizer.zero_grad()
    other = twin(model)
    ce(model, x, y).backward()
    ce(other, x, y).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)
    assert far(model, other)[0] == 0


PENALTIES = {
    "squares": lambda model: 1e-2 * sum(p.pow(2).sum() for p in model.parameters()),
    "norms": lambda model: torch.stack([p.norm() for p in model.parameters()]).mean(),
    "l1 of one": lambda model: -(1e-2 * model[0].weight).abs().sum() / 3,
}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_a_penalised_weight_is_reached_when_its_error_is(algorithm, penalty):
    """Its gradient is that of the penalty, too, from then on."""
    start, (x, y) = MLP((6, 7, 5, 4)).double(), vectors(8)
    x = x.double()
    found = {}
    for weight in (0.0, 1.0):
        model = twin(start)
        optimizer = algorithm(torch.optim.SGD(model.parameters(), 0.0), model, T=5, gamma=0.3)

        def loss(model=model, weight=weight):
            return ce(model, x, y) + weight * PENALTIES[penalty](model)

        def plain(model=model):
            return ce(model, x, y)

        optimizer.step(loss if weight else plain)
        found[weight] = (optimizer.report.learned, [p.grad for p in model.parameters()])
    assert found[1.0][0] == found[0.0][0]
    assert found[0.0][0]["0.weight"] == (1 if algorithm is PC else 3)
    model = twin(start)
    PENALTIES[penalty](model).backward()
    for (_, grads), sign in ((found[0.0], 1.0), (found[1.0], -1.0)):
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = sign * grad + (0.0 if parameter.grad is None else parameter.grad)
    assert all(p.grad.abs().max() < 1e-12 for p in model.parameters())


ADDED = {
    "added": lambda model, x, y, penalty: ce(model, x, y) + penalty,
    "stacked": lambda model, x, y, penalty: torch.stack([ce(model, x, y), penalty]).sum(),
    "to each": lambda model, x, y, penalty: (
        F.cross_entropy(model(x), y, reduction="none") + penalty
    ).mean(),
}


@pytest.mark.filterwarnings("ignore:Cannot read off")
@pytest.mark.parametrize("added", ADDED)
def test_a_penalty_hides_no_weight_that_never_learns(added):
    model, (x, y) = MLP((6, 7, 6, 5, 4)), vectors(8)
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model, T=2, loss_terms=8)
    with pytest.warns(UserWarning, match=r"never reach 4 parameters.*0\.weight"):
        optimizer.step(lambda: ADDED[added](model, x, y, PENALTIES["squares"](model)))
    assert optimizer.report.learned["0.weight"] == 0


def test_a_loss_on_the_way_is_no_penalty():
    """What the second loss reads comes from the batch, though no node stands above it."""
    model, (x, y) = MLP((6, 7, 5, 4)), vectors(8)

    def loss():
        h = model[0](x)
        return ce(model[1:], h, y) + F.mse_loss(h, torch.ones(8, 7), reduction="sum") / 8

    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.01), model, T=5)
    optimizer.step(loss)
    assert optimizer.report.learned["0.weight"] == 5
    assert optimizer.report.learned["2.weight"] == 4


def test_what_only_a_penalty_reads_learns_at_once():
    """The logarithm of a variance, which weighs the loss and is penalised."""
    model, (x, y) = MLP((6, 7, 5, 4)), vectors(8)
    model.register_parameter("log_var", nn.Parameter(torch.zeros(())))
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model, T=5)
    optimizer.step(lambda: ce(model, x, y) * torch.exp(-model.log_var) + model.log_var)
    assert optimizer.report.learned["log_var"] == 5


def test_zil_with_a_penalty_is_backprop():
    model, (x, y) = MLP((6, 7, 5, 4)).double(), vectors(8)
    other, x = twin(model), x.double()
    ZIL(torch.optim.SGD(model.parameters(), 0.1), model).step(
        lambda: ce(model, x, y) + PENALTIES["squares"](model)
    )
    sgd = torch.optim.SGD(other.parameters(), 0.1)
    (ce(other, x, y) + PENALTIES["squares"](other)).backward()
    sgd.step()
    assert far(model, other)[0] < 1e-12
