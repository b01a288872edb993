"""Where value nodes stand, and how a user is told where they cannot."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc import describe
from lightning_pc.errors import ClosureError, ConfigError, PlacementError
from lightning_pc.optim import EPC, IPC, PC, ZIL, PredictiveCoding
from tests.compare import far, twin
from tests.engine.modules import CNN, LSTM, MLP, Dropped, Residual, Thrice
from tests.engine.problems import ce, images, vectors
from tests.engine.tiny import TINY


def rows(model, batch, value_nodes="auto", **kwargs):
    return describe(model, batch, value_nodes=value_nodes, print_table=False, **kwargs)


def names(model, batch, value_nodes="auto"):
    return [row.name for row in rows(model, batch, value_nodes).rows]


X = torch.zeros(3, 6)
PLACES = {  # name -> module, value_nodes, the nodes
    "auto": (lambda: MLP((6, 5, 5, 4)), "auto", ["1", "3"]),
    "nonlinearities": (lambda: MLP((6, 5, 5, 4)), "nonlinearities", ["1", "3"]),
    "linear": (lambda: MLP((6, 5, 5, 4)), "linear", ["0", "2"]),
    "modules": (lambda: MLP((6, 5, 5, 4)), "modules", ["0", "2"]),
    "blocks": (Residual, "blocks", ["layers.0", "layers.1", "layers.2"]),
    "name": (Residual, "layers.1", ["layers.1"]),
    "inner name": (Residual, "layers.1.a", ["layers.1.a"]),
    "regex": (Residual, r"layers\.[02]\.b", ["layers.0.b", "layers.2.b"]),
    "type": (Residual, nn.ReLU, [f"layers.{i}.act{n}" for i in range(3) for n in ("", "#2")]),
    "callable": (Residual, lambda name, m: name.endswith("1"), ["layers.1"]),
    "list": (Residual, ["stem", r"layers\.2", nn.ReLU], None),
    "preset and name": (lambda: MLP((6, 5, 5, 4)), ["auto", "2"], ["1", "2", "3"]),
    "shared": (Thrice, "auto", ["tanh", "tanh#2", "tanh#3"]),
    "shared, named": (Thrice, "shared", ["shared", "shared#2", "shared#3"]),
}


@pytest.mark.parametrize("name", PLACES)
def test_places(name):
    make, value_nodes, expected = PLACES[name]
    found = names(make(), X, value_nodes)
    if expected is None:
        assert {"stem", "layers.2", "layers.0.act", "layers.2.act#2"} <= set(found)
    else:
        assert found == expected


def test_modules_are_the_leaves_that_hold_parameters():
    found = names(CNN(), images(2)[0], "modules")
    assert found == ["0", "1", "4", "5"]
    assert names(CNN(), images(2)[0], "linear") == ["0", "4"]


def test_conv1d_of_transformers_is_linear():
    tiny = TINY["gpt2"]
    found = names(tiny.make(), tiny.draw(), "linear")
    assert "transformer.h.0.mlp.c_fc" in found
    assert "lm_head" not in found


BAD = {  # value_nodes -> what the message must say
    "layers.7": r"matches no module of Residual.*'layers\.\d'",
    "layer": r"'layer' matches no module.*'layers",
    "autoo": r"'autoo' matches no module.*'auto'",
    nn.Conv2d: r"matches no module.*'Linear'",
    lambda name, module: False: r"matches no module",
    "(": r"valid regular expression",
    3: r"expected a preset",
}


@pytest.mark.parametrize(
    "entry", BAD, ids=["none", "part", "typo", "class", "rule", "regex", "number"]
)
def test_an_entry_that_matches_nothing(entry):
    for value_nodes in (entry, ["stem", entry]):
        with pytest.raises((PlacementError, ConfigError), match=BAD[entry]):
            rows(Residual(), X, value_nodes)


def test_empty():
    with pytest.raises(ConfigError, match="empty"):
        rows(Residual(), X, [])


class Odd(nn.Module):
    """Places at which no node can stand."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.never, self.functional = nn.Linear(6, 6), nn.Linear(6, 6)
        self.ids, self.side = nn.Flatten(0), nn.Linear(6, 6)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        self.ids((x > 0).long())
        self.side(x)
        h = torch.relu(self.frozen(x))
        h = F.linear(h, self.functional.weight)
        return self.sigmoid(self.head(torch.tanh(self.a(h))))


WRONG = {  # value_nodes -> error
    "never": r"'never'.*never (called|fired)",
    "functional": r"'functional'.*never",
    "ids": r"'ids' .*no floating-point tensor",
    "frozen": r"'frozen'.*frozen above",
    "head": r"'head'.*an output",
    "sigmoid": r"'sigmoid'.*an output",
    "side": r"'side'.*not read by the loss",
}


@pytest.mark.parametrize("entry", WRONG)
@pytest.mark.parametrize("others", [[], ["auto"], ["a"]])
def test_naming_a_place_where_no_node_can_stand(entry, others):
    model = Odd()
    before = twin(model)
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model, value_nodes=[entry, *others])
    state = torch.get_rng_state()
    with pytest.raises(PlacementError, match=WRONG[entry]):
        optimizer.step(lambda: F.mse_loss(model(X), torch.ones(3, 4)))
    assert far(model, before)[0] == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_outputs_and_frozen_parts_are_passed_over():
    model = Odd()
    table = rows(model, lambda: F.mse_loss(model(X), torch.ones(3, 4)))
    assert [row.name for row in table.rows] == ["tanh"]
    why = {row.name: row.why for row in table.passed_over}
    assert why["relu"].startswith("frozen above")
    assert why["sigmoid"].startswith("an output")


def test_no_node_at_all():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model)
    with pytest.raises(PlacementError, match=r"No value node stands.*value_nodes='modules'"):
        optimizer.step(lambda: ce(model, *vectors(3)))
    for told in ("linear", "modules"):
        assert rows(model, X, told).rows[0].name == "0"


# One node for a composite nonlinearity. ----------------------------------------------------------


class Swish(nn.Module):
    """A module within a module, and an input that is read twice."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.Identity(), nn.Sigmoid())

    def forward(self, x):
        return x * self.gate(1.5 * x)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x) ** 3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * torch.tanh(x) ** 2 * (1 - torch.tanh(x) ** 2)


class Cube(nn.Module):
    def forward(self, x):
        return _Cube.apply(x)


class InPlace(nn.Module):
    """Writes to its input, without an underscore in sight."""

    def forward(self, x):
        x *= 2.0
        return torch.relu_(x)


class MishByHand(nn.Module):
    def forward(self, x):
        return x * torch.tanh(torch.log1p(torch.exp(x)))


def hf_activation(name):
    from transformers.activations import ACT2FN

    return lambda: ACT2FN[name]


COMPOSITES = {
    "swish": Swish,
    "function": Cube,
    "in place": InPlace,
    "mish": MishByHand,
    **{name: hf_activation(name) for name in ("gelu_new", "quick_gelu", "gelu_fast", "mish")},
    **{name: hf_activation(name) for name in ("relu2", "laplace", "gelu_python", "linear")},
}


class Around(nn.Module):
    """A nonlinearity whose input is also handed on by a skip, and is looked at afterwards."""

    def __init__(self, act):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.act = act

    def forward(self, x):
        h = self.a(x)
        view = h[:, :3]
        y = self.act(h)
        return self.head(self.b(y) + F.pad(view, (0, 3)) + 0.5 * h)


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_composite_activation_is_one_node_at_its_input(name):
    model = nn.Sequential(nn.Linear(6, 5), COMPOSITES[name](), nn.Linear(5, 4)).double()
    x, y = vectors(4)
    if name == "linear":  # an identity is no nonlinearity
        with pytest.raises(PlacementError, match="No value node"):
            rows(model, x.double())
        return
    assert names(model, x.double()) == ["1"]
    zil(model, x.double(), y)


def zil(model, x, y):
    """One step of Z-IL equals one of backprop, twice; the second knows what the first learned."""
    other = twin(model)
    optimizer = ZIL(torch.optim.SGD(model.parameters(), 0.1), model)
    plain = torch.optim.SGD(other.parameters(), 0.1)
    for _ in range(3):
        loss = optimizer.step(lambda: ce(model, x, y))
        plain.zero_grad()
        expected = ce(other, x, y)
        expected.backward()
        plain.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert far(model, other)[0] < 1e-9


ACTS = {
    "relu module": lambda: nn.ReLU(inplace=True),
    "relu": lambda: F.relu,
    "relu(inplace)": lambda: lambda h: F.relu(h, inplace=True),
    "relu_": lambda: torch.relu_,
    "h.relu_()": lambda: lambda h: h.relu_(),
    "leaky_relu_": lambda: lambda h: F.leaky_relu_(h, 0.2),
    "leaky_relu(h, 0.2, True)": lambda: lambda h: F.leaky_relu(h, 0.2, True),
    "elu_": lambda: F.elu_,
    "silu": lambda: nn.SiLU(inplace=True),
    "hardtanh": lambda: nn.Hardtanh(inplace=True),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "sigmoid_": lambda: lambda h: h.sigmoid_(),
    "clamp_": lambda: lambda h: h.clamp_(min=0),
    "clamp_(0)": lambda: lambda h: h.clamp_(0),
    "clip_": lambda: lambda h: h.clip_(min=0),
    "torch.clip": lambda: lambda h: torch.clip(h, 0.0),
    "threshold_": lambda: lambda h: F.threshold_(h, 0.1, 0.0),
    "on a view": lambda: lambda h: (h[:, :4].relu_(), h)[1],
    "on a whole view": lambda: lambda h: h.view(-1).relu_().view_as(h),
    "own module": InPlace,
    "swish": Swish,
    "keyword": lambda: lambda h: torch.tanh(input=h),
}


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("T", [1, 3])
def test_an_aliased_activation_input_is_what_the_plain_module_sees(name, T):
    """At T = 1 the values equal their predictions, so that iPC is backprop of the last stage."""
    act = ACTS[name]()
    model = Around(None).double()
    model.act = act
    x, y = vectors(4)
    x = x.double()
    other = twin(model)
    expected = ce(other, x, y)
    expected.backward()
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model, T=T, gamma=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # T = 1 does not reach layer a
        optimizer.step(lambda: ce(model, x, y))
    assert optimizer.report.loss[0].item() == pytest.approx(expected.item(), rel=1e-12)
    assert len(optimizer.report.nodes) == 1
    if T == 1:
        for layer in ("head", "b"):
            pair = getattr(model, layer), getattr(other, layer)
            torch.testing.assert_close(
                pair[0].weight, pair[1].weight - 0.1 * pair[1].weight.grad, rtol=1e-9, atol=1e-12
            )
    else:  # values barely moved: each evaluation is an ordinary forward of the moved weights
        before = twin(model)
        with torch.no_grad():
            now = ce(before, x, y)
        torch.manual_seed(0)
        optimizer.step(lambda: ce(model, x, y))
        assert optimizer.report.loss[0].item() == pytest.approx(now.item(), rel=1e-12)


def test_an_in_place_chain_equals_backprop():
    for act in (InPlace, lambda: nn.ELU(inplace=True), Swish):
        model = nn.Sequential(
            *(nn.Linear(6, 5), act(), nn.Linear(5, 5), act(), nn.Dropout(0.0), nn.Linear(5, 4))
        ).double()
        x, y = vectors(4)
        zil(model, x.double(), y)


# Outputs that are no tensor. ---------------------------------------------------------------------


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        return {"one": self.a(x), "two": (self.b(x), x.argmax(1)), "none": None}


class Outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = Several(), nn.Linear(5, 4)

    def forward(self, x):
        h = self.inner(x)
        assert h["none"] is None
        assert h["two"][1].dtype == torch.int64
        return self.head(h["one"].tanh() * h["two"][0])


def test_tuple_and_dict_outputs_hold_a_node_each():
    model, (x, y) = Outputs().double(), vectors(4)
    found = rows(model, lambda: ce(model, x.double(), y), "inner").rows
    assert [row.name for row in found] == ["inner[0]", "inner[1]"]
    assert [row.parameters for row in found] == [35, 35]
    optimizer = ZIL(torch.optim.SGD(model.parameters(), 0.1), model, value_nodes="inner")
    other = twin(model)
    ce(other, x.double(), y).backward()
    optimizer.step(lambda: ce(model, x.double(), y))
    for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad, rtol=1e-9, atol=1e-12, msg=n)


def test_lstm_named():
    model = LSTM()
    found = rows(model, torch.zeros(3, 5, dtype=torch.long), ["lstm", "fc"])
    assert [row.name for row in found.rows] == ["lstm[0]", "fc"]
    assert {row.why for row in found.passed_over} == {"not read by the loss"}


# What changes from batch to batch. ---------------------------------------------------------------


class Cells(nn.Module):
    """A cell in a loop, without a nonlinearity of its own."""

    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Layers(nn.Module):
    """Two recurrent layers and a head."""

    def __init__(self, kind):
        super().__init__()
        self.one, self.two = kind(3, 5, batch_first=True), kind(5, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.two(self.one(x)[0])[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_modules_need_no_naming(kind):
    torch.manual_seed(0)
    model = (Cells if issubclass(kind, nn.RNNCellBase) else Layers)(kind)
    x, y = torch.randn(8, 4, 3), torch.randint(2, (8,))
    found = names(model, lambda: ce(model, x, y))
    assert found
    assert all(name.startswith(("cell", "one", "two")) for name in found)
    with pytest.raises(PlacementError, match="No value node stands"):
        rows(model, lambda: ce(model, x, y), value_nodes="nonlinearities")
    start, optimizer = (
        twin(model),
        PredictiveCoding(torch.optim.SGD(model.parameters(), 0.1), model),
    )
    optimizer.step(lambda: ce(model, x, y))
    assert not any(map(torch.equal, model.parameters(), start.parameters()))


def test_unfreezing_in_mid_run_is_noticed():
    model = MLP((6, 5, 5, 4)).double()
    model[0].requires_grad_(False)
    x, y = vectors(4)
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model)
    before = twin(model)
    optimizer.step(lambda: ce(model, x.double(), y))
    assert optimizer.report.nodes == ["3"]
    assert torch.equal(model[0].weight, before[0].weight)
    model[0].requires_grad_(True)
    optimizer.step(lambda: ce(model, x.double(), y))
    assert optimizer.report.nodes == ["1", "3"]
    assert not torch.equal(model[0].weight, before[0].weight)
    model[0].requires_grad_(False)
    optimizer.step(lambda: ce(model, x.double(), y))
    assert optimizer.report.nodes == ["3"]


def test_a_head_that_is_swapped_in_mid_run_is_noticed():
    model = MLP((6, 5, 5, 4))
    x, y = vectors(4)
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model, value_nodes="linear")
    optimizer.step(lambda: ce(model, x, y))
    model[2] = MLP((5, 6, 5), "relu")
    optimizer.step(lambda: ce(model, x, y))
    assert optimizer.report.nodes == ["0", "2.0", "2.2"]


class Forks(nn.Module):
    """Takes another path, of other depth, at every other batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        h = torch.tanh(self.a(x))
        if self.calls % 2:
            h = torch.relu(self.b(h))
        return self.head(h)


@pytest.mark.parametrize("algorithm", [IPC, PC, ZIL, EPC])
def test_control_flow_is_followed(algorithm):
    model, (x, y) = Forks(), vectors(4)
    optimizer = algorithm(torch.optim.SGD(model.parameters(), 0.1), model)
    for nodes in (["tanh", "relu"], ["tanh"], ["tanh", "relu"]):
        before = twin(model)
        optimizer.step(lambda: ce(model, x, y))
        assert optimizer.report.nodes == nodes
        assert optimizer.report.depth == len(nodes)
        assert torch.equal(model.b.weight, before.b.weight) == (len(nodes) == 1)
    assert model.calls == 3


class Routes(nn.Module):
    """Which rows go through the expert depends on the values."""

    def __init__(self):
        super().__init__()
        self.a, self.expert, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        rows = h[:, 0] > 0
        out = h.clone()
        out[rows] = torch.relu(self.expert(h[rows]))
        return self.head(out)


@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_rows_go_where_they_went_in_the_forward(algorithm):
    """Masks are constants of the batch, however far values move."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), Routes())
    x, y = vectors(32)
    before = twin(model)
    optimizer = algorithm(torch.optim.SGD(model.parameters(), 0.05), model, T=8, gamma=0.5)
    optimizer.step(lambda: ce(model, x, y))
    assert "2.relu" in optimizer.values
    assert all(moved.norm() > 0 for moved in optimizer.values.values())
    parts = model[2].children(), before[2].children()
    assert min(far(m, o)[0] for m, o in zip(*parts, strict=True)) > 0


class CustomLinear(torch.autograd.Function):
    """A fused layer, as kernels libraries have them."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


def test_a_weight_inside_an_autograd_function_is_seen():
    """Or the only hidden node would be taken for an output, in silence."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 5), nn.Linear(5, 4, bias=False)

        def forward(self, x):
            return CustomLinear.apply(torch.tanh(self.a(x)), self.head.weight)

    model, (x, y) = Fused().double(), vectors(4)
    assert names(model, x.double()) == ["tanh"]
    zil(model, x.double(), y)


def test_describe_of_what_a_module_cannot_be_called_with():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(ClosureError, match=r"Sequential with the batch.*lambda: loss_fn"):
        describe(net, (torch.randn(2, 4), torch.zeros(2)))


def test_a_function_that_is_named():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(PlacementError, match="node of a function that is called there has no"):
        describe(net, torch.randn(2, 4), value_nodes=["0.gelu"])
    with pytest.raises(PlacementError, match="A module's name stands for all of its calls"):
        describe(net, torch.randn(2, 4), value_nodes=["1#2"])
    with pytest.raises(PlacementError, match=r"Near misses: '0', '1', '2'\.$"):
        describe(net, torch.randn(2, 4), value_nodes=["nowhere.gelu"])


def test_describe_prints_a_table(capsys):
    describe(Dropped(), X)
    printed = capsys.readouterr().out
    assert "value node" in printed
    assert "gaussian" in printed


def test_a_preset_wins_over_a_module_of_its_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            for block in self.blocks:
                x = torch.tanh(block(x))
            return self.head(self.linear(x))

    x = torch.randn(3, 4)

    def nodes(entry):
        return [row.name for row in describe(Named(), x, value_nodes=entry, print_table=False).rows]

    assert nodes("blocks") == ["blocks.0", "blocks.1"]
    assert nodes("linear") == ["blocks.0", "blocks.1", "linear"]
    assert nodes("(linear)") == ["linear"]


def test_two_callables_are_two_entries():
    model = MLP((3, 4, 2))
    model.spare = nn.Linear(3, 4)
    model.forward = lambda x: nn.functional.linear(torch.tanh(model[0](x)), model[2].weight)
    entries = [lambda name, m: name == "spare", lambda name, m: name == "0"]
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model, value_nodes=entries)
    with pytest.raises(PlacementError, match="never called"):
        optimizer.step(lambda: model(torch.randn(2, 3)).square().mean())


def test_a_call_that_raises_and_is_caught_hides_nothing():
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError

    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.broken, self.act = nn.Linear(3, 4), Broken(), Doubled()
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            h = self.a(x)
            try:
                self.broken(h)
            except ValueError:
                h = self.act(h)
            return self.head(h)

    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * torch.tanh(x)

    model = Tries()
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model)
    for _ in range(2):
        optimizer.step(lambda: nn.functional.mse_loss(model(torch.ones(2, 3)), torch.ones(2, 2)))
    assert optimizer.report.nodes == ["act"]
