"""The user's Python runs once a batch, and an incomplete recording never trains."""

import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_pc import describe
from lightning_pc.errors import ClosureError, RecordingError, UnsupportedError
from lightning_pc.optim import EPC, IEPC, IPC, PC, ZIL
from tests.compare import far, twin
from tests.engine.modules import MLP
from tests.engine.problems import doubles, sgd

every = pytest.mark.parametrize("algorithm", [PC, IPC, ZIL, EPC, IEPC])


def chain(*inner):
    layers = [nn.Linear(6, 6), nn.Tanh(), *inner, nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)]
    return nn.Sequential(*layers).double()


def equals_backprop(model, loss_of, steps=3):
    """Z-IL is backprop to rounding, so whatever a recording gets wrong shows."""
    other = twin(model)
    optimizer, plain = ZIL(sgd(model), model), sgd(other)
    for step in range(steps):
        torch.manual_seed(step)
        loss = optimizer.step(lambda: loss_of(model))
        after = torch.get_rng_state()
        torch.manual_seed(step)
        plain.zero_grad()
        expected = loss_of(other)
        expected.backward()
        plain.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        assert torch.equal(after, torch.get_rng_state())
    assert far(model, other)[0] < 1e-9
    for own, other_buffer in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(own, other_buffer, rtol=1e-9, atol=1e-12)


# The user's code runs once ------------------------------------------------------------------------


class Busy(nn.Module):
    """Counts, keeps, draws and appends."""

    def __init__(self):
        super().__init__()
        self.net = chain(nn.Dropout(0.3), nn.BatchNorm1d(6))
        self.calls, self.seen = 0, []
        self.register_buffer("average", torch.zeros(6, dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        h = self.net[:3](x)
        self.seen.append(float(h.detach().mean()))
        with torch.no_grad():
            self.average.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return self.net[3:](h)


@every
def test_everything_is_as_after_one_ordinary_step(algorithm, capsys, tmp_path):
    x, y = doubles(12)
    model = Busy()
    other, hooked = twin(model), []
    model.net[0].register_forward_hook(lambda *_: hooked.append(1))
    batches, file = iter(range(100)), tmp_path / "log.txt"
    optimizer = algorithm(sgd(model, 0.0), model)
    for _ in range(3):

        def closure():
            print("closure", next(batches))
            with file.open("a") as handle:
                handle.write("x")
            return F.cross_entropy(model(x), y)

        torch.manual_seed(1)
        optimizer.step(closure)
        after = torch.get_rng_state()
        torch.manual_seed(1)
        F.cross_entropy(other(x), y)
        assert torch.equal(after, torch.get_rng_state())
    assert model.calls == len(hooked) == len(model.seen) == 3
    assert model.seen == other.seen
    assert next(batches) == 3
    assert file.read_text() == "xxx"
    assert capsys.readouterr().out == "closure 0\nclosure 1\nclosure 2\n"
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


@every
def test_the_batch_is_changed_once(algorithm):
    model = chain()
    x, y = doubles(12)
    batch, start = {"x": x.clone(), "y": y}, x.clone()
    optimizer = algorithm(sgd(model), model)
    optimizer.step(lambda: F.cross_entropy(model(batch["x"].div_(2)), batch.pop("y")))
    assert torch.equal(batch["x"], start / 2)
    assert "y" not in batch


def test_activations_that_a_hook_collects_may_be_penalised():
    model, seen = chain(), []
    model[1].register_forward_hook(lambda m, i, o: seen.append(o))
    x, y = doubles(12)
    optimizer = IPC(torch.optim.Adam(model.parameters(), 0.01), model)
    for _ in range(3):
        optimizer.step(
            lambda: F.cross_entropy(model(x), y) + 1e-3 * sum(a.abs().mean() for a in seen)
        )
        seen.clear()
    assert min(optimizer.report.learned.values()) > 0


def test_a_state_is_carried_from_batch_to_batch_once():
    parts = nn.ModuleDict(
        {"r": nn.GRU(3, 5, batch_first=True), "f": nn.Linear(5, 5), "o": nn.Linear(5, 2)}
    )
    optimizer, moves, state = IPC(torch.optim.Adam(parts.parameters(), 0.01), parts), [], None

    def closure():
        nonlocal state
        out, h = parts["r"](torch.randn(4, 7, 3), state)
        state = h.detach()
        moves.append(1)
        return F.cross_entropy(parts["o"](torch.relu(parts["f"](out)))[:, -1], torch.arange(4) % 2)

    for _ in range(4):
        optimizer.step(closure)
    assert len(moves) == 4
    assert min(optimizer.report.learned.values()) > 0


# Forms that are hard to repeat --------------------------------------------------------------------


class Top1(nn.Module):
    """Each row goes to the expert that its gate likes best, by boolean masks."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.ModuleList(MLP((6, 5, 6), "gelu") for _ in range(3))

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        best, out = scores.argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = best == i
            if rows.any():
                out[rows] = expert(x[rows]) * scores[rows, i : i + 1]
        return out


class Refines(nn.Module):
    """Repeats a layer until it hardly changes anything."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        for _ in range(10):
            before, x = x, torch.tanh(self.layer(x))
            if float((x - before).detach().norm()) < 1.5:
                break
        return x


class Sign(torch.autograd.Function):
    """A straight-through estimator: its backward is its own."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class StraightThrough(nn.Module):
    apply_once = Sign.apply  # bound before any recording

    def forward(self, x):
        return type(self).apply_once(x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.GELU(), nn.Linear(6, 6))
        self.reentrant, self.calls = reentrant, 0

    def run(self, x):
        self.calls += 1
        return self.block(x)

    def forward(self, x):
        return checkpoint(self.run, x, use_reentrant=self.reentrant)


class InPlaceOnViews(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        h = self.a(x)
        left, right = h.chunk(2, 1)
        left = left.clone()
        left *= 2
        out = torch.cat([left, right], 1)
        out[:, :2] += 1.0
        out.view(-1)[::3].mul_(0.5)
        return out


class Clipped(nn.Module):
    """Writes to its own weight and to a buffer within the forward."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(0, dtype=torch.float64))

    def forward(self, x):
        with torch.no_grad():
            self.a.weight.clamp_(-0.2, 0.2)
            if not len(self.seen):
                self.seen.resize_(6).fill_(0.0)
            self.seen += x.mean(0)
        return self.a(x) + 0 * self.seen


HARD = {
    "top 1": Top1,
    "breaks": Refines,
    "straight through": StraightThrough,
    "checkpointed": lambda: Checkpointed(False),
    "checkpointed, reentrant": lambda: Checkpointed(True),
    "views": InPlaceOnViews,
    "clips": Clipped,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    "batch norm": lambda: nn.BatchNorm1d(6),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
}


@pytest.mark.parametrize("algorithm", [PC, IPC, EPC, IEPC])
@pytest.mark.parametrize("name", HARD)
def test_it_trains_and_runs_once(name, algorithm):
    torch.manual_seed(1)
    model = chain(HARD[name]().double())
    x, y = doubles(12)
    forwards, before = [], twin(model)
    model.register_forward_hook(lambda *_: forwards.append(1))
    optimizer = algorithm(sgd(model, 0.2), model, gamma=0.3, T=8)
    losses = [optimizer.step(lambda: F.cross_entropy(model(x), y)).item() for _ in range(12)]
    assert len(forwards) == 12
    assert losses[-1] < losses[0]
    learned = [n for n, times in optimizer.report.learned.items() if times]
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert {n for n in learned if "experts" not in n} <= set(moved)
    assert any(n.startswith("0.") for n in moved)
    assert not any("pc" in attribute for m in model.modules() for attribute in vars(m))


BACKPROP = [name for name in HARD if name not in ("top 1", "breaks")]


@pytest.mark.parametrize("name", BACKPROP)
def test_where_it_is_a_chain_zil_is_backprop(name):
    torch.manual_seed(1)
    model = chain(HARD[name]().double())
    x, y = doubles(12)
    equals_backprop(model, lambda m: F.cross_entropy(m(x), y))


def test_a_checkpoint_recomputes_nothing():
    model = chain(Checkpointed(False).double())
    x, y = doubles(12)
    optimizer = IPC(sgd(model), model)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert model[2].calls == 1
    assert "2.block.2" in optimizer.values


def test_forms_take_turns():
    """Ragged batches, a branch that is taken now and then, an unfrozen layer."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x, deep):
            x = torch.tanh(self.a(x))
            return self.c(torch.tanh(self.b(x)) if deep else x)

    model = Branches().double()
    other = twin(model)
    optimizer, plain = ZIL(sgd(model), model), sgd(other)
    for step, (n, deep) in enumerate(itertools.product((8, 5, 8, 3), (True, False))):
        x, y = doubles(n)
        trains = step > 4
        for each in (model, other):
            each.a.requires_grad_(trains)
        if not deep and not trains:
            continue
        optimizer.step(lambda x=x, y=y, deep=deep: F.cross_entropy(model(x, deep), y))
        plain.zero_grad()
        F.cross_entropy(other(x, deep), y).backward()
        plain.step()
        assert far(model, other)[0] < 1e-9


# What a recording misses --------------------------------------------------------------------------


class Hidden(nn.Module):
    """Something between two nodes that no mode sees."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is deprecated, and used

    @torch.jit.script
    def _scripted(x):
        return x * 2 + 1


def scripted(x):
    return _scripted(x)


def unseen(x):
    with torch._C.DisableTorchFunction():
        return x * 2


def smuggled(x):
    x.detach().numpy()[:] *= 2  # behind torch's back
    return x


def rescaled(x):
    return x * float(np.random.default_rng().random())  # a constant of the batch


@every
@pytest.mark.parametrize("call", [unseen, smuggled, scripted])
def test_an_incomplete_recording_never_trains(call, algorithm):
    model = chain(Hidden(call))
    x, y = doubles(12)
    before = twin(model)
    optimizer = algorithm(sgd(model), model)
    with pytest.raises(RecordingError):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert far(model, before)[0] == 0
    model[2].call = torch.tanh  # and nothing stays behind
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert min(optimizer.report.learned.values()) > 0


def test_what_leaves_torch_is_a_constant_of_the_batch():
    model = chain(Hidden(rescaled))
    x, y = doubles(12)
    optimizer = IPC(sgd(model), model)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert min(optimizer.report.learned.values()) > 0


@every
def test_gradients_inside_of_the_forward_are_refused(algorithm):
    model = chain()
    x, y = doubles(12)
    optimizer = algorithm(sgd(model), model)

    def penalty():
        inputs = x.clone().requires_grad_()
        loss = F.cross_entropy(model(inputs), y)
        return loss + torch.autograd.grad(loss, inputs, create_graph=True)[0].square().sum()

    with pytest.raises(ClosureError, match=r"torch\.autograd\.grad"):
        optimizer.step(penalty)


def test_gradients_of_another_network_are_not():
    """Adversarial inputs by a network of their own."""
    model, attacker = chain(), chain()
    x, y = doubles(12)
    optimizer = IPC(sgd(model), model)

    def closure():
        return F.cross_entropy(model(x + 0.01 * step), y)

    inputs = x.clone().requires_grad_()
    step = torch.autograd.grad(F.cross_entropy(attacker(inputs), y), inputs)[0].sign()
    optimizer.step(closure)
    assert min(optimizer.report.learned.values()) > 0


def test_describe_leaves_no_trace():
    model = Busy()
    x, _ = doubles(12)
    before, state = twin(model), torch.get_rng_state()
    found = describe(model, x, print_table=False)
    assert [row.name for row in found.rows] == ["net.1", "net.5"]
    assert torch.equal(state, torch.get_rng_state())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before.get_buffer(name)), name


# What a review found ------------------------------------------------------------------------------


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.b, self.l = nn.Linear(6, 6), nn.Linear(6, 6)
        self.h, self.g = nn.Linear(6, 4), nn.Linear(6, 4)


@pytest.mark.parametrize("algorithm", [PC, IPC])
def test_losses_take_turns_on_one_forward(algorithm):
    """Where nodes stand is not what stood there when another loss was taken."""
    model, (x, y) = Parts().double(), doubles(12)
    optimizer = algorithm(sgd(model), model, loss_terms=12)
    nodes = []
    for turn in (1, 0, 1, 0):
        z = []

        def closure(turn=turn, z=z):
            z.append(torch.sigmoid(model.l(torch.tanh(model.b(x)))))
            return F.cross_entropy(model.h(z[0]), y) if turn else z[0].square().mean()

        optimizer.step(closure)
        nodes.append(optimizer.report.nodes)
    assert nodes[0] == nodes[2] == ["tanh", "sigmoid"]
    assert nodes[1] == nodes[3] == ["tanh"]


class WritesIntoZeros(nn.Module):
    """Everyday patterns: a buffer made on the spot, filled through views."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        h, out, other = self.a(x), torch.zeros_like(x), torch.zeros(len(x), 6).double()
        out[:, 2:5] += h[:, 2:5]
        out.narrow(1, 0, 2).copy_(h[:, :2])
        other.view(-1, 3)[::2].add_(h.view(-1, 3)[::2])
        return out + other


class ReadsThenWrites(nn.Module):
    """A frozen feature is read, and then written to in place."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        feature = (x.detach() * 2 - 0.3).clone()
        q = self.a(x) + feature
        return q + F.relu(feature, inplace=True)


@pytest.mark.parametrize("make", [WritesIntoZeros, ReadsThenWrites])
def test_constants_that_are_written_to(make):
    torch.manual_seed(1)
    model, (x, y) = chain(make().double()), doubles(12)
    equals_backprop(model, lambda m: F.cross_entropy(m(x), y))


def test_a_hook_that_was_removed_is_gone():
    class Removes(nn.Module):
        def forward(self, x):
            h = x * 1.0
            h.register_hook(lambda g: g * 3).remove()
            kept = h * 1.0
            kept.register_hook(lambda g: g * 2)
            return kept

    model, (x, y) = chain(Removes()), doubles(12)
    equals_backprop(model, lambda m: F.cross_entropy(m(x), y))


def test_draws_of_the_users_own_generator_go_on():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.seen = []

        def forward(self, x):
            late = torch.normal(self.b.weight, 0.1, generator=generator)
            early = torch.normal(self.a.weight, 0.1, generator=generator)
            self.seen.append((float(late.sum()), float(early.sum())))
            return F.linear(torch.tanh(F.linear(x, early)), late)

    generator = torch.Generator()
    model, (x, y) = nn.Sequential(Noisy(), nn.Tanh(), nn.Linear(6, 4)).double(), doubles(12)
    other = twin(model)
    generator.manual_seed(0)
    for _ in range(3):
        other(x)
    generator.manual_seed(0)
    optimizer = PC(sgd(model, 0.0), model)
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert model[0].seen == other[0].seen


@pytest.mark.filterwarnings("ignore:In the first batch no error reached")
def test_draws_that_come_now_and_then_are_repeated():
    class Sometimes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, on):
            mask = (torch.rand_like(x) > 0.5).to(x) * 2 if on else torch.ones_like(x)
            ctx.save_for_backward(mask)
            return x * mask

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0], None

    class Drops(nn.Module):
        on = False

        def forward(self, x):
            return Sometimes.apply(x, self.on)

    model, (x, y) = chain(Drops()), doubles(12)
    optimizer = PC(sgd(model), model, gamma=1e-9, T=6)
    for on in (False, True):
        model[2].on = on
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        # Values hardly move, so all evaluations give one loss where all see one mask.
        assert float(optimizer.report.loss.max() - optimizer.report.loss.min()) < 1e-6


def test_a_backward_hook_of_a_module_is_refused():
    model, (x, y) = chain(), doubles(12)
    model[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="'0' has a backward hook"):
        PC(sgd(model), model).step(lambda: F.cross_entropy(model(x), y))


class Gated(nn.Module):
    """Takes a branch by `torch.cond`, after an embedding that is clipped as it is read."""

    def __init__(self):
        super().__init__()
        self.tokens, self.net = nn.Embedding(9, 6, max_norm=1.0), chain()

    def forward(self, tokens, x):
        h = self.net[0](x + self.tokens(tokens))
        h = torch.cond(x.sum() > 0, lambda h: 2.0 * h, lambda h: -h, (h,))
        return self.net[1:](h)


def test_a_clipped_embedding_and_a_branch_equal_backprop():
    (x, y), tokens = doubles(12), torch.randint(0, 9, (12,))
    model = Gated().double()
    with torch.no_grad():
        model.tokens.weight.mul_(3.0)
    equals_backprop(model, lambda net: F.cross_entropy(net(tokens, x), y))


class Caches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cache):
        if cache:
            raise ValueError("the cache is full")
        cache.append(1)
        return 2.0 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2.0 * gradient, None


def test_a_call_that_does_not_run_twice_is_an_error():
    x, y = doubles(12)
    model, cache = chain(), []
    before = twin(model)
    with pytest.raises(RecordingError, match=r"does not run a second time \(the cache is full"):
        IPC(sgd(model), model).step(
            lambda: F.cross_entropy(model[1:](Caches.apply(model[0](x), cache)), y)
        )
    assert far(model, before)[0] == 0


# Memory -------------------------------------------------------------------------------------------


class Joined(nn.Module):
    """Two values that a third stage only adds, as views or not."""

    def __init__(self, views):
        super().__init__()
        self.one, self.other, self.sum = nn.Linear(6, 6), nn.Linear(6, 6), Sum(views)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.sum(self.one(x), self.other(x))))


class Sum(nn.Module):
    def __init__(self, views):
        super().__init__()
        self.views = views

    def forward(self, u, v):
        return u.view(-1, 2, 3).flatten(1) + v.view(-1, 6) if self.views else 1.0 * u + 1.0 * v


@pytest.mark.parametrize("algorithm", [PC, IPC, EPC, IEPC])
def test_gradients_share_no_memory(algorithm):
    """Autograd gives two values that are only viewed and added one gradient's memory."""
    x, y = doubles(12)
    model = Joined(views=True).double()
    other = Joined(views=False).double()
    other.load_state_dict(model.state_dict())
    for net in (model, other):
        given = {"T": 6, "gamma": 0.2, "value_nodes": ["one", "other", "sum"]}
        optimizer = algorithm(sgd(net), net, **given)
        for _ in range(3):
            optimizer.step(lambda: F.cross_entropy(net(x), y))  # noqa: B023
    assert far(model, other)[0] < 1e-12


class Reuses(nn.Module):
    """Writes to its pre-activation once the activation has read it."""

    def __init__(self, in_place):
        super().__init__()
        self.net, self.in_place, self.now = chain(), in_place, True

    def forward(self, x):
        h = self.net[0](x)
        a = torch.tanh(h)
        if self.now:
            h = h.add_(1.0) if self.in_place else h + 1.0
        return self.net[2:](a + 0.1 * h)


@pytest.mark.parametrize("algorithm", [PC, IPC])
@pytest.mark.parametrize("since", [0, 3], ids=["always", "later"])
def test_a_value_is_not_what_was_written_to_its_prediction(algorithm, since):
    x, y = doubles(12)
    model = Reuses(in_place=True)
    other = twin(model)
    other.in_place = False
    for net in (model, other):
        optimizer = algorithm(sgd(net), net, T=6, gamma=0.2)
        for step in range(6):
            net.now = step >= since
            optimizer.step(lambda: F.cross_entropy(net(x), y))  # noqa: B023
    assert far(model, other)[0] < 1e-12


class Tagged(nn.Module):
    """Adds a sparse embedding below the first stage."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.tags = nn.Embedding(5, 6, sparse=True)

    def forward(self, x, tags):
        return self.head(torch.tanh(self.other(torch.tanh(self.one(x))) + self.tags(tags)))


def test_a_sparse_gradient_is_no_view_of_an_error():
    (x, y), tags = doubles(12), torch.randint(0, 5, (12,))
    equals_backprop(Tagged().double(), lambda net: F.cross_entropy(net(x, tags), y))


def test_a_hook_may_keep_its_gradient():
    x, y = doubles(12)
    model, kept, copies = chain(), [], []

    def forward():
        h = model[0](x)
        h.register_hook(lambda gradient: copies.append(gradient.clone()))
        h.register_hook(kept.append)
        return F.cross_entropy(model[1:](h), y)

    for _ in range(2):
        IPC(sgd(model), model, T=5, gamma=0.1).step(forward)
    assert len(kept) == len(copies) > 2
    assert all(map(torch.equal, kept, copies))


class Paths(nn.Module):
    """Writes to its pre-activation now and then, by the function or its in-place twin."""

    def __init__(self, twin):
        super().__init__()
        self.net, self.twin, self.flag = chain(), twin, False

    def forward(self, x):
        h = self.net[0](x)
        if self.twin:
            a = h.tanh_() if self.flag else h.tanh()
        else:
            a = h.tanh()
            h = h.add_(1.0) if self.flag else h
        return self.net[2:](a + 0.1 * h)


@pytest.mark.parametrize("twin", [False, True])
def test_forms_do_not_mix(twin):
    x, y = doubles(12)
    model = Paths(twin)
    energies = {}
    optimizer = PC(sgd(model, 0.0), model, T=4, gamma=0.2)
    for flag in (False, True, False, True, True, False):
        model.flag = flag
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        first = energies.setdefault(flag, optimizer.report.energy)
        torch.testing.assert_close(optimizer.report.energy, first, rtol=1e-12, atol=0.0)


@pytest.mark.filterwarnings("ignore:In the first batch no error")
def test_attention_dropout_first_met_in_eval_mode_draws_the_same_again():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.m = nn.Linear(6, 6), nn.MultiheadAttention(6, 2, 0.5, batch_first=True)
            self.o = nn.Linear(6, 4)

        def forward(self, x):
            h = self.i(x).unflatten(0, (3, 4))
            return self.o(self.m(h, h, h)[0].flatten(0, 1))

    x, y = doubles(12)
    model = Attends().double()
    optimizer = PC(sgd(model), model, T=4, gamma=1e-9, value_nodes=["i", "m"])
    for mode in (False, True):
        model.train(mode)
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert optimizer.report.energy.max() < 1e-12


class Curve(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


def test_kept_values_stand_again_in_activations_of_the_users():
    x, y = doubles(12)
    model = nn.Sequential(nn.Linear(6, 6), Curve(), nn.Linear(6, 4)).double()
    optimizer = IPC(sgd(model), model, T=3, gamma=0.1, reset="never")
    losses = [float(optimizer.step(lambda: F.cross_entropy(model(x), y))) for _ in range(4)]
    assert optimizer.report.nodes == ["1"]
    assert losses[-1] < losses[0]
