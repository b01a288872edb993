"""Two ways to write one forward learn alike: what is written in place, hooked, kept or carried."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_pc.errors import ClosureError, RecordingError
from lightning_pc.optim import EPC, IEPC, IPC, PC, ZIL
from tests.compare import far
from tests.engine.modules import MLP
from tests.engine.problems import doubles

every = pytest.mark.parametrize("algorithm", [PC, IPC, EPC, IEPC])


def data():
    torch.manual_seed(1)
    return doubles(12)


class Written(nn.Module):
    """Three layers; a subclass writes what lies between them in one way, or in another."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.way, self.step = way, 0


def same(algorithm, kind, batches=3, **settings):
    """Both ways end at the same weights, to the rounding of float64."""
    settings = {"gamma": 0.2, "T": 6} | settings
    if algorithm is IEPC:
        settings["gamma"] = 0.01
    x, y = data()
    torch.manual_seed(0)
    one = kind(True).double()
    other = copy.deepcopy(one)
    other.way = False
    before = copy.deepcopy(one)
    for model in (one, other):
        optimizer = algorithm(torch.optim.SGD(model.parameters(), 0.1), model, **settings)
        for model.step in range(batches):
            optimizer.step(lambda model=model: F.cross_entropy(model(x), y))
    assert far(one, before)[0] > 1e-3
    assert far(one, other)[0] < 1e-12
    return one, other


class OverwrittenPrediction(Written):
    """A prediction that reads no value is written to after its value was taken."""

    def forward(self, x):
        h = self.a(x)
        p = torch.tanh(h)
        h = h.mul_(2.0) if self.way else h * 2.0
        return self.c(p) + self.c(torch.sigmoid(self.b(torch.sigmoid(h))))


class NamedResult(Written):
    """A call reads what another returned in a tuple of torch's own kind."""

    def forward(self, x):
        h = self.b(torch.tanh(self.a(x)))
        with torch.no_grad():
            ends = torch.aminmax(h, dim=1, keepdim=True)
            if self.way:
                middle = torch.stack(ends).mean(0)
            else:
                middle = torch.stack((ends.min, ends.max)).mean(0)
        return self.c(torch.tanh(h - middle))


class ListOfMine(list):
    """A class of the user's own."""


class OwnList(Written):
    """A call reads tensors in a list of the user's own class."""

    def forward(self, x):
        h = torch.tanh(self.a(x))
        parts = [h[:, :3], h[:, 3:]]
        return self.c(torch.tanh(self.b(torch.cat(ListOfMine(parts) if self.way else parts, 1))))


class MaskWritten(Written):
    """A mask is read, and narrowed afterwards; in the first batch it does not change."""

    def forward(self, x):
        alive = torch.ones(len(x), 1, dtype=torch.bool)
        h = self.b(torch.tanh(self.a(x)))
        mean = (h.detach() * alive).sum(0) / alive.sum()
        passed = h.mean(1, keepdim=True) > (-100.0 if self.step == 0 else 0.0)
        if self.way:
            alive &= passed
        else:
            alive = alive & passed
        return self.c(torch.tanh(h - mean)) * alive


class HookAfterWrite(Written):
    """A hook stands at a tensor whose last write returned nothing."""

    def hook(self, gradient):
        return -gradient

    def forward(self, x):
        h = self.a(x)
        if self.way:
            h = h.clone()
            h[:, 0] = 0.0
        else:
            h = h * torch.tensor([0.0, 1, 1, 1, 1, 1])
        h.register_hook(self.hook)
        return self.c(torch.tanh(self.b(torch.tanh(h))))


class Collected(Written):
    """What weights make is collected in memory from before, with no node between."""

    def forward(self, x):
        if self.way:
            h = torch.zeros(len(x), 6).double()
            h[:, :3] = self.a(x)[:, :3]
            h[:, 3:] += self.b(x)[:, 3:]
        else:
            h = torch.cat([self.a(x)[:, :3], self.b(x)[:, 3:]], 1)
        return self.c(torch.tanh(h))


@every
@pytest.mark.parametrize(
    "kind", [OverwrittenPrediction, NamedResult, OwnList, MaskWritten, HookAfterWrite, Collected]
)
def test_both_ways_learn_alike(algorithm, kind):
    same(algorithm, kind)


class Carried(Written):
    """The last batch's state is cut off where it is stored, or where it is used."""

    cut = staticmethod(torch.Tensor.detach)

    def __init__(self, way):
        super().__init__(way)
        self.state = None

    def forward(self, x):
        before = torch.zeros(len(x), 6).double() if self.state is None else self.state
        if self.way:
            before = self.cut(before)
        h = torch.tanh(self.a(x) + self.b(before))
        self.state = h if self.way else h.detach()
        return self.c(h)


def cloned(state):
    with torch.no_grad():
        return state.clone()


CUTS = {"detach_": torch.Tensor.detach_, "data": lambda state: state.data, "no_grad": cloned}


@every
@pytest.mark.parametrize("cut", ["detach", *CUTS])
def test_a_state_may_be_cut_off_where_it_is_used(algorithm, cut):
    kind = type("Cut", (Carried,), {"cut": staticmethod(CUTS.get(cut, torch.Tensor.detach))})
    same(algorithm, kind)


@pytest.mark.parametrize("use", [lambda s, h: h + s, lambda s, h: h + s * 2.0])
def test_a_state_that_is_not_cut_off_is_an_error(use):
    class Uncut(Carried):
        def forward(self, x):
            h = torch.tanh(self.a(x))
            h = h if self.state is None else use(self.state, h)
            self.state = self.b(h)
            return self.c(torch.tanh(self.state))

    model, (x, y) = Uncut(True).double(), data()
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ClosureError, match="before the forward began"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


def test_a_hook_fires_as_often_wherever_its_tensor_was_written():
    counts = {True: 0, False: 0}

    class Counted(HookAfterWrite):
        def hook(self, gradient):
            counts[self.way] += 1
            return super().hook(gradient)

    x, y = data()
    for way in counts:
        model = Counted(way).double()
        optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model, gamma=0.2, T=6)
        optimizer.step(lambda model=model: F.cross_entropy(model(x), y))
    assert counts[True] == counts[False] > 1


def test_a_leaf_and_then_a_parameter_are_two_forms():
    class Either(Written):
        def __init__(self, way):
            super().__init__(way)
            self.leaf = torch.zeros(6, dtype=torch.double).requires_grad_()
            self.shift = nn.Parameter(torch.zeros(6))

        def forward(self, x):
            shift = self.leaf if self.step == 0 else self.shift
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x))) + shift))

    model, (x, y) = Either(True).double(), data()
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model, gamma=0.2)
    for model.step in range(2):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert model.shift.abs().max() > 0
    assert optimizer.report.learned["shift"] == 1


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_constants_stand_beside_running_statistics(layout):
    class Graphs(Written):
        def __init__(self, way):
            super().__init__(way)
            self.norm, self.edges = nn.BatchNorm1d(6), (torch.rand(12, 12) > 0.7).double()

        def forward(self, x):
            sparse = self.edges.to_sparse() if layout == "coo" else self.edges.to_sparse_csr()
            spread = (lambda h: sparse @ h) if self.way else (lambda h: self.edges @ h)
            return self.c(torch.tanh(spread(self.norm(self.b(torch.tanh(spread(self.a(x))))))))

    same(PC, Graphs)


def test_checkpointed_blocks_run_once_where_no_node_stands_behind_them():
    runs = []

    class Block(nn.Linear):
        def forward(self, x):
            runs.append(len(x))
            return super().forward(x)

    model, (x, y) = nn.ModuleList([nn.Linear(6, 6), Block(6, 6), Block(6, 4)]).double(), data()

    def loss():
        h = checkpoint(model[1], torch.tanh(model[0](x)), use_reentrant=False)
        return F.cross_entropy(checkpoint(model[2], h, use_reentrant=False), y)

    for algorithm in (PC, IPC, ZIL, EPC):
        optimizer = algorithm(torch.optim.SGD(model.parameters(), 0.1), model)
        for _ in range(2):
            runs.clear()
            optimizer.step(loss)
            assert len(runs) == 2


def test_a_module_around_a_layer_of_another_is_no_nonlinearity():
    class Borrows(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layers = [layer]  # not registered here

        def forward(self, x):
            return torch.tanh(self.layers[0](torch.tanh(x)))

    layers = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 4)})
    model = nn.ModuleDict({"layers": layers, "r": Borrows(layers["b"])}).double()
    x, y = data()
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)
    optimizer.step(lambda: F.cross_entropy(layers["c"](model["r"](layers["a"](x))), y))
    assert optimizer.report.nodes == ["r.tanh", "r.tanh#2"]


def test_the_same_writes_give_the_same_form_whatever_memory_is_free():
    class Scratch(Written):
        def forward(self, x):
            for layer in (self.a, self.b):
                scratch = torch.zeros(len(x), 12).double()
                scratch[:, :6] = torch.tanh(layer(x))
                x = scratch[:, :6] + scratch[:, 6:]
                del scratch
            return self.c(x)

    (x, y), forms = data(), set()
    for _ in range(12):
        model = Scratch(True).double()
        optimizer = ZIL(torch.optim.SGD(model.parameters(), 0.1), model)
        optimizer.step(lambda model=model: F.cross_entropy(model(x), y))
        learner = optimizer._learner
        forms |= {len(graph.pieces) for graph in learner._recordings._graphs}
    assert len(forms) == 1


def test_two_trainings_side_by_side_leave_functions_as_they_were():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2.0

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2.0

    before, faults = vars(torch.autograd.function._SingleLevelFunction).get("apply"), []
    start = threading.Barrier(2)

    def train(seed):
        torch.manual_seed(seed)
        model = MLP((6, 6, 4)).double()
        optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)
        x, y = data()
        start.wait()
        try:
            for _ in range(20):
                optimizer.step(lambda: F.cross_entropy(Double.apply(model(x)), y))
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert vars(torch.autograd.function._SingleLevelFunction).get("apply") is before


def test_a_backward_that_adds_to_gradients_by_itself_is_an_error():
    class Reversible(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, layer):
            ctx.layer = layer
            ctx.save_for_backward(x)
            with torch.no_grad():
                return x + layer(x)

        @staticmethod
        def backward(ctx, gradient):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                torch.autograd.backward(x + ctx.layer(x), gradient)
            return x.grad, None

    model, (x, y) = Written(True).double(), data()
    before = copy.deepcopy(model.state_dict())
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)

    def loss():
        h = Reversible.apply(torch.tanh(model.a(x)), model.b)
        return F.cross_entropy(model.c(torch.tanh(h)), y)

    with pytest.raises(RecordingError, match="reversible"):
        optimizer.step(loss)
    assert all(p.grad is None for p in model.parameters())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


@every
def test_a_state_seen_without_gradients_first_is_no_constant_after(algorithm):
    class Peeks(Carried):
        def forward(self, x):
            h = torch.tanh(self.a(x))
            if self.state is not None:
                with torch.no_grad():
                    (self.state * h).sum()
                h = h + self.state
            self.state = self.b(h)
            return self.c(torch.tanh(self.state))

    model, (x, y) = Peeks(True).double(), data()
    optimizer = algorithm(torch.optim.SGD(model.parameters(), 0.1), model)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    with pytest.raises(ClosureError, match="before the forward began"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))


class Options(dict):
    """A class of the user's own that holds no tensor."""

    def __getattr__(self, name):
        return self[name]


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, options):
        ctx.by = options.by
        return x * ctx.by

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.by, None


class OwnOptions(Written):
    """A Function reads an object of the user's own."""

    def forward(self, x):
        h = torch.tanh(self.a(x))
        h = Scale.apply(h, Options(by=2.0)) if self.way else h * 2.0
        return self.c(torch.tanh(self.b(h)))


@every
def test_an_object_without_tensors_stays_what_it_is(algorithm):
    same(algorithm, OwnOptions)


def test_a_step_within_a_compiled_function_leaves_nothing_behind():
    pytest.importorskip("torch._dynamo")
    model, (x, y) = MLP((6, 6, 4)).double(), data()
    optimizer = PC(torch.optim.SGD(model.parameters(), 0.1), model)
    place = torch.autograd.function._SingleLevelFunction
    before = vars(place).get("apply")

    def fails(stance):
        raise RuntimeError("within a compiled region")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "set_stance", fails)
        with pytest.raises(RuntimeError, match="compiled region"):
            optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert vars(place).get("apply") is before
    optimizer.step(lambda: F.cross_entropy(model(x), y))


@pytest.mark.parametrize("way", [{"gamma": 2.0}, {"precisions": 4.0, "gamma": 0.5}])
def test_an_error_that_is_back_where_it_began_divides_by_nothing(way):
    model, (x, y) = MLP((6, 6, 4)).double(), data()
    optimizer = IEPC(torch.optim.SGD(model.parameters(), 0.01), model, T=4, **way)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert all(p.isfinite().all() for p in model.parameters())
