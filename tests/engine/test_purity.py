"""A batch runs training_step once, whatever inference does: all is as with plain Lightning.

At lr 0 the weights stay where they are, so every value of every batch can be compared.
"""

from __future__ import annotations

import copy
import random
import signal
import warnings
from argparse import Namespace
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.loops.optimization.automatic import Closure
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics.classification import (
    BinaryAccuracy,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
)
from torchmetrics.functional.classification import binary_accuracy

import lightning_pc
from tests.engine.lightning_problems import (
    ALGORITHMS,
    C,
    D,
    H,
    Memory,
    Module,
    data,
    loader,
    mlp,
    seed_all,
    traces,
    trainer,
    weights,
)
from tests.marks import mostly_slow

STEP_HOOKS = [n for n in dir(L.Callback) if n.startswith("on_")]
MODULE_HOOKS = [
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_epoch_end",
]


def plain(value: Any, path: str = "", seen: tuple[int, ...] = ()) -> dict[str, Any]:
    """Whatever a value holds, flat: path -> something that compares with ==."""
    if id(value) in seen:
        return {path: "again"}
    seen = (*seen, id(value))
    if isinstance(value, torch.Tensor):
        return {path: (value.dtype, value.detach().tolist())}
    if isinstance(value, np.ndarray):
        return {path: value.tolist()}
    if isinstance(value, (int, float, str, bool, type(None))):
        return {path: value}
    if isinstance(value, torch.Generator):
        return {path: value.get_state().tolist()}
    if isinstance(value, np.random.Generator):
        return {path: repr(value.bit_generator.state)}
    if isinstance(value, np.random.RandomState):
        return {path: repr(value.get_state())}
    if isinstance(value, random.Random):
        return {path: value.getstate()}
    if isinstance(value, (set, frozenset)):
        return {path: sorted(map(repr, value))}
    if isinstance(value, (UserDict, UserList)):
        value = value.data
    if isinstance(value, (nn.Module, Meter, Sample, SimpleNamespace, Namespace)):
        value = vars(value)
    if isinstance(value, (Slotted, Frozen)):
        slots = ("counts", "last", "total", "seen", "hidden")
        value = {name: getattr(value, name, "empty") for name in slots}
    if isinstance(value, dict):
        items = [(str(k), v) for k, v in value.items() if k not in SKIPPED and not function(v)]
        flat = {f"{path}{{}}": (type(value), [k for k, _ in items])}
    elif isinstance(value, (list, tuple, deque)):
        items = [(str(i), v) for i, v in enumerate(value)]
        flat = {f"{path}[]": (type(value), len(items))}
    else:
        return {path: type(value)}
    for key, item in items:
        flat |= plain(item, f"{path}.{key}", seen)
    return flat


SKIPPED = {"_trainer", "_fabric", "_update_signature", "_metric_attributes"}


def function(value: Any) -> bool:
    return callable(value) and not isinstance(value, nn.Module)


def differing(now: Any, then: Any) -> dict[str, Any]:
    now, then = plain(now), plain(then)
    both = {**now, **then}
    return {k: (now.get(k), then.get(k)) for k in both if now.get(k) != then.get(k)}


class Recorder(L.Callback):
    """Every hook in its order, and after every batch all that may be touched."""

    def __init__(self) -> None:
        self.order: list[Any] = []
        self.batches: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.order.append(("on_train_batch_end", trainer.global_step))
        generators = (
            torch.get_rng_state().tolist(),
            repr(np.random.get_state()),
            random.getstate(),
        )
        self.batches.append(
            {
                "generators": generators,
                "module": plain(pl_module),
                "outputs": plain(outputs),
                "batch": plain(batch),
                "metrics": plain(dict(trainer.callback_metrics)),
                "lr": trainer.optimizers[0].param_groups[0]["lr"],
            }
        )


def _count(name: str):
    def hook(self: Recorder, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.order.append((name, trainer.global_step))

    return hook


for _name in set(STEP_HOOKS) - {"on_train_batch_end"}:
    setattr(Recorder, _name, _count(_name))


# --- what training_steps do: each is a row -------------------------------------------------------


class Logs(Module):
    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("summed", torch.tensor(1.0), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log_dict({"a": float(batch_idx), "b": loss * 2}, prog_bar=True)
        self.print("one line")
        return loss


class LogsByHand(Module):
    """Straight to the logger, and into its folder."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.logger.log_metrics({"mine": loss.item()}, step=batch_idx)
        self.trainer.loggers[0].log_metrics({"other": 1.0})
        self.logger.experiment.append(batch_idx)
        assert self.logger.save_dir == "here"
        assert self.logger.name == "memory"
        return loss


class Metrics(Module):
    def __init__(self):
        super().__init__()
        self.logged = MulticlassAccuracy(C, average="micro")
        self.updated = MulticlassAccuracy(C, average="micro")
        self.fed = MulticlassF1Score(C)
        self.several = torchmetrics.MetricCollection(
            {"acc": MulticlassAccuracy(C), "f1": MulticlassF1Score(C)}, prefix="train/"
        )
        self.mean = torchmetrics.MeanMetric()
        self.kept = torchmetrics.CatMetric()
        self.inner = nn.ModuleDict({"again": torchmetrics.SumMetric()})
        self.squashing = BinaryAccuracy()  # takes the sigmoid of logits
        self.curve = MulticlassAUROC(C, thresholds=4)  # the softmax
        self.unregistered = {"acc": MulticlassAccuracy(C, average="micro")}

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self(x)
        loss = F.cross_entropy(scores, y)
        self.logged(scores, y)
        self.log("logged", self.logged, on_step=True, on_epoch=True)
        self.updated.update(scores, y)
        self.log("f1", self.fed(scores, y))
        self.log_dict(self.several(scores, y))
        self.mean.update(loss.detach())
        self.log("mean_so_far", self.mean.compute())
        self.kept(loss.detach())
        self.inner["again"].update(1.0)
        self.squashing(scores[:, 0], (y > 0).long())
        self.curve(scores, y)
        self.unregistered["acc"](scores, y)
        self.log("functional", binary_accuracy(scores[:, 0], (y > 0).long()))
        if batch_idx == 1:
            self.updated.reset()
        return loss

    def on_train_epoch_end(self):
        self.log("updated", self.updated.compute())
        self.log("sum", self.inner["again"].compute())


class MetricDecides(Module):
    """The loss depends on what a metric returned."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(C, average="micro")

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self(x)
        weight = 1.0 + self.accuracy(scores.detach(), y)
        return F.cross_entropy(scores, y) * weight


class Norms(Module):
    def __init__(self):
        super().__init__(net=mlp(nn.BatchNorm1d(H)))
        self.net.append(nn.BatchNorm1d(C, momentum=None))


class Spectral(Module):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.net[2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.spectral_norm(self.net[0])


class Draws(Module):
    def __init__(self):
        super().__init__(net=mlp(nn.Dropout(0.5)))
        self.generator = torch.Generator().manual_seed(1)
        self.rng = np.random.default_rng(2)
        self.old = np.random.RandomState(3)
        self.python = [random.Random(4)]

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = torch.randn(x.shape, generator=self.generator) + float(np.random.normal())
        noise = noise * self.rng.normal() * self.old.normal() * self.python[0].random()
        if random.random() < 0.5:
            noise = noise + torch.rand_like(x)
        loss = F.cross_entropy(self(x + noise), y)
        self.log("loss", loss)
        return loss

    def on_before_zero_grad(self, optimizer):
        torch.rand(1)

    def on_after_backward(self):
        np.random.rand()


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("fresh", torch.zeros(()), persistent=False)
        self.plain = torch.zeros(2)

    def forward(self, x):
        self.calls += 1
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        self.fresh = self.fresh + 1
        self.plain[0] += 1
        return x


class Meter:
    """The plain Python meter of a thousand repositories."""

    def __init__(self):
        self.sum, self.count, self.values = 0.0, 0, []

    def update(self, value):
        self.sum += value
        self.count += 1
        self.values.append(value)


class Attributes(Module):
    def __init__(self):
        super().__init__()
        self.net.insert(0, Counting())
        self.steps, self.best = 0, float("inf")
        self.losses, self.recent = [], deque(maxlen=2)
        self.seen, self.by_class = set(), defaultdict(list)
        self.counter, self.ordered = Counter(), OrderedDict()
        self.nested = {"a": {"b": [0]}, "pair": ([],)}
        self.raw = bytearray(b"")

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        value = loss.item()
        self.steps += 1
        self.best = min(self.best, value)
        self.losses.append(loss.detach())
        self.recent.append(value)
        self.seen.add(batch_idx)
        self.by_class[int(y[0])].append(value)
        self.counter.update(y.tolist())
        self.ordered[batch_idx] = value
        self.ordered.move_to_end(batch_idx, last=False)
        self.nested["a"]["b"][0] += 1
        self.nested["pair"][0].append(batch_idx)
        self.late = getattr(self, "late", 0) + 1
        if batch_idx:
            self.losses.pop(0)
            del self.nested["a"]
            self.nested["a"] = {"b": [batch_idx]}
        return loss


class Objects(Module):
    """Counts in plain objects and arrays."""

    def __init__(self):
        super().__init__()
        self.meter, self.histogram = Meter(), np.zeros(C)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.meter.update(loss.item())
        self.histogram += np.bincount(y.numpy(), minlength=C)
        return loss


class Slotted:
    """Of two classes, one with a slot that is empty at first."""

    __slots__ = ("__hidden", "counts", "last")

    def __init__(self):
        self.counts, self.__hidden = [0], 0

    @property
    def hidden(self):
        return self.__hidden

    def hide(self):
        self.__hidden += 1


class SlottedMore(Slotted):
    __slots__ = "total"

    def __init__(self):
        super().__init__()
        self.total = 0

    def update(self, loss):
        self.counts.append(self.counts[-1] + 1)
        self.hide()
        self.total, self.last = self.total + 1, loss


@dataclass(slots=True, frozen=True)
class Frozen:
    seen: list[int] = field(default_factory=list)


class Holders(Module):
    """Counts in namespaces, slots and a list in disguise."""

    def __init__(self):
        super().__init__()
        self.spaces = [SimpleNamespace(n=0), Namespace(n=0)]
        self.slotted, self.frozen, self.list = SlottedMore(), Frozen(), UserList()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x * (1 + self.slotted.total)), y)
        for space in self.spaces:
            space.n += 1
        self.slotted.update(loss.item())
        self.frozen.seen.append(batch_idx)
        self.list.append(batch_idx)
        return loss


class Accumulates(Module):
    """A counter decides what is computed."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.steps += 1
        return F.cross_entropy(self(x * self.steps), y) / self.steps


class Teacher(Module):
    """An EMA teacher, moved and asked within training_step."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        with torch.no_grad():
            for p in self.teacher.parameters():
                p.add_(1.0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
            target = self.teacher(x).softmax(-1)
        scores = self(x)
        loss = F.cross_entropy(scores, y) + F.cross_entropy(scores, target)
        self.log("loss", loss)
        return loss


class TeacherData(Teacher):
    """MoCo's idiom, in every second step: what is written to ``.data`` has no new version."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx % 2:
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.data = slow.data * 0.9 + fast.data * 0.1
                slow.data.add_(0.01)
        return F.cross_entropy(self(x), y) + F.mse_loss(self(x), self.teacher(x))


class Averaged(Module):
    """torch's own average of a model, whose parameters want gradients and get none."""

    def __init__(self):
        super().__init__()
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.average.n_averaged += 1  # the first would be a copy
        with torch.no_grad():
            for p in self.average.parameters():
                p.add_(1.0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.average.update_parameters(self.net)
        with torch.no_grad():
            target = self.average(x).softmax(-1)
        return F.cross_entropy(self(x), y) + F.cross_entropy(self(x), target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), self.lr)


class Queue(Module):
    """MoCo's queue: a buffer and its pointer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(8, C))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self(x)
        loss = F.cross_entropy(scores, y) + (scores @ self.queue.clone().T).square().mean()
        at = int(self.pointer)
        self.queue[at : at + len(x)] = scores.detach()
        self.pointer[0] = (at + len(x)) % 8
        return loss


class PopsLabels(Module):
    def training_step(self, batch, batch_idx):
        y = batch.pop("labels")
        batch["scores"] = self(batch["x"])
        batch["extra"]["list"].append(batch_idx)
        return F.cross_entropy(batch["scores"], y)


class WritesBatch(Module):
    def training_step(self, batch, batch_idx):
        x, y = batch
        x.mul_(2).add_(1)
        y[0] = (y[0] + 1) % C
        return F.cross_entropy(self(x), y)


class WritesBatchLater(Module):
    """Augments in place, now and then."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx == 1:
            x.neg_()
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    seen: int = 0


class TakesSample(Module):
    def training_step(self, batch, batch_idx):
        batch.seen += 1
        batch.x = batch.x + 1
        return F.cross_entropy(self(batch.x), batch.y)


class TakesPair(Module):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch.x), batch.y)


class Modes(Module):
    """Switches modes and gradients."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.net[1].train(not self.net[1].training)
        self.net.eval()
        with torch.no_grad():
            self.sure = self(x).softmax(-1).amax()
        self.net.train()
        return F.cross_entropy(self(x), y)


class Dicts(Module):
    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self(x)
        return {"loss": F.cross_entropy(scores, y), "scores": scores.detach(), "n": batch_idx}


class SkipsSome(Module):
    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return None if batch_idx == 1 else loss


class Schedulers(Module):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        every_batch = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        every_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
        return [optimizer], [{"scheduler": every_batch, "interval": "step"}, every_epoch]


class OwnHooks(Module):
    """Hooks of the module itself."""

    def __init__(self):
        super().__init__()
        self.order = []


def _own(name):
    def hook(self, *args, **kwargs):
        self.order.append((name, self.global_step))

    return hook


for _name in MODULE_HOOKS:
    setattr(OwnHooks, _name, _own(_name))

PAIRS = data()


def dicts() -> list[Any]:
    return [{"x": x.clone(), "labels": y, "extra": {"list": []}} for x, y in data()]


#: module -> its batches, made anew for each run
ROWS: dict[type[Module], Any] = {
    **dict.fromkeys(
        [Logs, LogsByHand, Metrics, MetricDecides, Norms, Spectral, Draws, Attributes], data
    ),
    **dict.fromkeys([Objects, Accumulates, Queue, WritesBatch, WritesBatchLater], data),
    **dict.fromkeys([Teacher, TeacherData, Averaged, Holders], data),
    **dict.fromkeys([Modes, Dicts, SkipsSome, Schedulers, OwnHooks], data),
    PopsLabels: dicts,
    TakesSample: lambda: [Sample(x, y) for x, y in data()],
    TakesPair: lambda: [Pair(x, y) for x, y in data()],
}


def run(kind: type[Module], strategy: Any, batches: list[Any], **kwargs: Any) -> Any:
    seed_all(5)
    module = kind()
    module.lr = 0.0
    seed_all()
    recorder, memory = Recorder(), Memory()
    fit = trainer(strategy, logger=memory, callbacks=[recorder], max_epochs=2, **kwargs)
    Closure.warning_cache.clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit.fit(module, loader(batches))
    told = [w for w in told if not issubclass(w.category, DeprecationWarning)]
    messages = sorted(
        {str(w.message).splitlines()[0] for w in told if "training loss" not in str(w.message)}
    )
    return module, recorder, memory, fit, messages


CENTERED = {"algorithm": "pc", "beta": (0.5, -0.5), "T": 3}  # two phases


@pytest.mark.parametrize(
    "algorithm",
    mostly_slow([*ALGORITHMS, CENTERED], "ipc"),
    ids=[*ALGORITHMS, "centered"],
)
@pytest.mark.parametrize("kind", ROWS, ids=lambda k: k.__name__)
def test_everything_is_as_with_plain_lightning(kind, algorithm, capsys):
    module, recorder, memory, fit, told = run(kind, algorithm, ROWS[kind]())
    printed = capsys.readouterr().out.count("one line")
    expected = run(kind, "auto", ROWS[kind]())
    assert fit.strategy.report.steps > 1
    assert recorder.order == expected[1].order
    for now, then in zip(recorder.batches, expected[1].batches, strict=True):
        for what in then:
            assert differing(now[what], then[what]) == {}, what
    assert memory.seen == expected[2].seen
    assert memory.experiment == expected[2].experiment
    assert fit.global_step == expected[3].global_step
    assert differing(fit.logged_metrics, expected[3].logged_metrics) == {}
    assert printed == capsys.readouterr().out.count("one line")
    assert told == expected[4]
    assert differing(module, expected[0]) == {}


def test_batch_norm_counts_batches_not_steps():
    module, *_ = run(Norms, "ipc", data())
    assert int(module.net[1].num_batches_tracked) == 6


@pytest.mark.parametrize(
    "algorithm", ["pc", "zil", "epc", CENTERED], ids=["pc", "zil", "epc", "centered"]
)
def test_accumulation_keeps_hooks_and_steps(algorithm):
    runs = [run(Logs, s, data(4), accumulate_grad_batches=2) for s in (algorithm, "auto")]
    assert runs[0][1].order == runs[1][1].order
    assert runs[0][2].seen == runs[1][2].seen
    assert runs[0][3].global_step == runs[1][3].global_step == 4


class All(Draws):
    def __init__(self):
        super().__init__()
        self.net = mlp(nn.BatchNorm1d(H), nn.Dropout(0.5))

    def configure_optimizers(self):
        # By eps Adam divides a gradient that is rounding alone, a bias's before BatchNorm.
        return torch.optim.Adam(self.net.parameters(), 0.05, eps=1e-3)


def test_zil_is_plain_lightning_at_any_learning_rate():
    """Weights that move as backprop's, logs and statistics that follow them."""
    runs = []
    for strategy in ("zil", "auto"):
        seed_all()
        module, memory = All(), Memory()
        fit = trainer(strategy, logger=memory, max_epochs=3, precision="64-true")
        fit.fit(module, loader(data(dtype=torch.float64)))
        runs.append((module, memory))
    (zil, logs), (backprop, expected) = runs
    for name, value in zil.state_dict().items():
        torch.testing.assert_close(value, backprop.state_dict()[name], rtol=1e-9, atol=1e-12)
    for (step, now), (then_step, then) in zip(logs.seen, expected.seen, strict=True):
        assert step == then_step
        assert now == pytest.approx(then, rel=1e-9)


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, CENTERED], ids=[*ALGORITHMS, "centered"])
def test_a_step_and_each_of_its_hooks_run_once_a_batch(algorithm):
    told: list[Any] = []

    class Tells(Module):
        def training_step(self, batch, batch_idx):
            told.append("step")
            return super().training_step(batch, batch_idx)

        def forward(self, x):
            told.append("forward")
            return super().forward(x)

        def on_before_zero_grad(self, optimizer):
            told.append("zero_grad")

        def on_before_backward(self, loss):
            told.append("before_backward")

        def on_after_backward(self):
            told.append("after_backward")

        def on_before_optimizer_step(self, optimizer):
            told.append("optimizer_step")

    module = Tells()
    for part in module.net:
        part.register_forward_hook(lambda *_: told.append("module"))
    fit = trainer(algorithm)
    fit.fit(module, loader(data(2)))
    assert fit.strategy.report.steps > 2
    backwards = ["before_backward", "after_backward"]
    batch = ["step", "forward", *["module"] * 5, "zero_grad", *backwards, "optimizer_step"]
    assert told == batch * 2


class SeesNodes(Module):
    """Remembers for every forward whether a node stood in it."""

    def __init__(self):
        super().__init__()
        self.teacher = mlp(seed=9).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        with torch.no_grad():
            target = self.teacher(x).argmax(-1)
            self.net(x)
        return F.cross_entropy(self(x), target)


def test_no_nodes_under_no_grad():
    fit = trainer("ipc")
    fit.fit(SeesNodes(), loader(data()))
    assert fit.strategy.report.nodes == ["net.1", "net.3"]


# --- afterwards the module is the user's own -----------------------------------------------------


class Fails(Module):
    """Raises in the second batch: in a module of the forward, or when the forward is over."""

    def __init__(self, at: str | None, error: BaseException) -> None:
        super().__init__(net=mlp(nn.BatchNorm1d(H)))
        self.at, self.error = at, error

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx == 1 and self.at == "within":
            self.net[2].forward = self._fails
        scores = self(x)
        if batch_idx == 1 and self.at == "behind":
            raise self.error
        return F.cross_entropy(scores, y)

    def _fails(self, x):
        del self.net[2].forward
        raise self.error


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("at", [None, "within", "behind"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("value_nodes", ["auto", "modules"])
def test_nothing_stays_behind(algorithm, at, error, value_nodes):
    module = Fails(at, error("mine"))
    before = traces(module)
    fit = trainer({"algorithm": algorithm, "value_nodes": value_nodes})
    handler = signal.getsignal(signal.SIGINT)
    try:
        if at is None:
            fit.fit(module, loader(data()))
        else:
            with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
                fit.fit(module, loader(data()))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert traces(module) == before
    assert torch.is_grad_enabled()
    assert torch.overrides._len_torch_function_stack() == 0
    assert int(module.net[1].num_batches_tracked) == (3 if at is None else 2)
    x = data()[0][0]
    torch.testing.assert_close(module.eval()(x), copy.deepcopy(module.net)(x), rtol=0, atol=0)
    module.train()
    trainer("auto").fit(module, loader(data(1)))  # and plain Lightning trains it on
    assert traces(module) == before


@pytest.mark.parametrize("algorithm", ["IPC", "PC", "ZIL", "EPC", "IEPC"])
def test_optimizer_leaves_nothing_behind(algorithm):
    model = mlp(nn.Dropout(0.5))
    before = traces(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = getattr(lightning_pc.optim, algorithm)(sgd, model)
    x, y = data()[0]
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert traces(model) == before
    for closure in (lambda: 1 / 0, lambda: F.cross_entropy(model(x), y) / (1 / 0)):
        with pytest.raises(ZeroDivisionError):
            optimizer.step(closure)
        assert traces(model) == before
    model[3].forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    del model[3].forward
    assert traces(model) == before
    optimizer.step(lambda: F.cross_entropy(model(x), y))


def test_evaluation_has_no_nodes():
    """Autograd ends at nodes: of the weights it reaches those of the loss's own stage."""
    reached: list[int] = []

    class Evaluates(Module):
        def _look(self, batch):
            x, y = batch
            with torch.inference_mode(False), torch.enable_grad():
                loss = F.cross_entropy(self(x.clone()), y)
            todo, found = [loss.grad_fn], set()
            while todo:
                function = todo.pop()
                found.add(getattr(function, "variable", None))
                todo += [f for f, _ in function.next_functions if f is not None]
            reached.append(len(found.intersection(self.parameters())))
            return loss

        def validation_step(self, batch, batch_idx):
            return self._look(batch)

        def test_step(self, batch, batch_idx):
            return self._look(batch)

        def predict_step(self, batch, batch_idx):
            return self._look(batch)

        def training_step(self, batch, batch_idx):
            return self._look(batch)

    strategy = {"algorithm": "pc", "T": 3, "gamma": 0.1}
    module, fit, batches = Evaluates(), trainer(strategy), loader(data(1))
    fit.fit(module, batches, batches)
    assert reached == [6, 2, 6]  # sanity check, training, validation
    before = weights(module)
    fit.validate(module, batches, verbose=False)
    fit.test(module, batches, verbose=False)
    fit.predict(module, batches)
    assert reached[3:] == [6, 6, 6]
    assert torch.equal(weights(module), before)


def test_nothing_is_drawn_or_kept_over_epochs():
    """A shuffling loader with dropout draws as ever: the order of samples is plain Lightning's."""
    orders = []
    for strategy in ("ipc", "auto"):
        seed_all()
        seen: list[float] = []

        class Sees(Module):
            def on_train_batch_start(self, batch, batch_idx, seen=seen):
                seen.append(float(batch[0].sum()))

        x, y = torch.arange(16 * D).reshape(16, D) / 40, torch.arange(16) % C
        batches = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y), batch_size=4, shuffle=True
        )
        trainer(strategy, max_epochs=3).fit(Sees(net=mlp(nn.Dropout(0.3))), batches)
        orders.append(seen)
    assert orders[0] == orders[1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.nested.nested_tensor([torch.ones(3, D), torch.ones(2, D)]),
        lambda: torch.ones(3, device="meta"),
        lambda: torch.ones(2, D).to_sparse(),
    ],
    ids=["nested", "meta", "sparse"],
)
def test_tensors_that_cannot_be_compared_are_let_be(odd):
    module = Module()
    module.odd = odd()
    fit = trainer({"algorithm": "pc", "T": 3, "gamma": 0.1})
    fit.fit(module, loader(data(2)))
    assert fit.strategy.report.steps == 3
    assert module.odd.size(0) in (2, 3)


WRITES = {
    "sign": lambda p: p.data.neg_(),
    "little": lambda p: p.data.mul_(1 + 2.0**-7),
    "anew": lambda p: setattr(p, "data", p.data + 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("size", [1000, 1001])
@pytest.mark.parametrize("write", WRITES)
def test_whatever_is_written_behind_a_version_is_seen(write, dtype, size):
    values = torch.linspace(1.0, 2.0, size).to(dtype)
    values[1::2] *= -1

    class Writes(Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Parameter(values.clone(), requires_grad=False)

        def training_step(self, batch, batch_idx):
            WRITES[write](self.frozen)
            return super().training_step(batch, batch_idx)

    module, once = Writes(), nn.Parameter(values.clone(), requires_grad=False)
    trainer({"algorithm": "pc", "T": 3, "gamma": 0.1}).fit(module, loader(data(3)))
    for _ in range(3):
        WRITES[write](once)
    assert torch.equal(module.frozen, once)


@pytest.mark.parametrize(
    "frozen",
    [
        lambda: torch.ones(3).to(torch.float8_e4m3fn),
        lambda: torch.ones(3, dtype=torch.int8),
        lambda: torch.ones(3, dtype=torch.bool),
        lambda: torch.empty(0),
        lambda: torch.ones(4, 4).t()[::2],
    ],
    ids=["float8", "int8", "bool", "empty", "strided"],
)
def test_frozen_weights_of_any_kind_are_let_be(frozen):
    module = Module()
    module.frozen = nn.Parameter(frozen(), requires_grad=False)
    module.lazy = nn.LazyLinear(3)
    module.configure_optimizers = lambda: torch.optim.SGD(module.net.parameters(), 0.1)
    fit = trainer({"algorithm": "pc", "T": 3, "gamma": 0.1})
    fit.fit(module, loader(data(2)))
    assert fit.strategy.report.steps == 3
    assert torch.equal(module.frozen.float(), frozen().float())
    assert module.lazy.has_uninitialized_params()


def _replace(p):
    p.data = p.data * 0.5


HALVES = {
    "itself": lambda p: p.mul_(0.5),
    "items": lambda p: p.__setitem__(..., p * 0.5),
    "data": lambda p: p.data.mul_(0.5),
    "other data": _replace,
    "detached": lambda p: p.detach().mul_(0.5),
    "view": lambda p: p.view(-1).mul_(0.5),
    "several": lambda p: torch._foreach_mul_([p.detach()], 0.5),
}


@pytest.mark.parametrize("write", HALVES)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("algorithm", ["IPC", "PC", "ZIL", "EPC", "IEPC"])
def test_what_the_forward_writes_by_any_name_is_written_once(algorithm, trained, write):
    """To weights that no optimizer holds, whether or not they want gradients."""
    module, (x, y) = Teacher(), data()[0]
    module.teacher.requires_grad_(trained)
    before = weights(module.teacher)

    def loss():
        with torch.no_grad():
            for p in module.teacher.parameters():
                HALVES[write](p)
            target = module.teacher(x).softmax(-1)
        return F.cross_entropy(module.net(x), target) + F.cross_entropy(module.net(x), y)

    sgd = torch.optim.SGD(module.net.parameters(), 0.1)
    getattr(lightning_pc.optim, algorithm)(sgd, module).step(loss)
    assert torch.equal(weights(module.teacher), before * 0.5)


@pytest.mark.parametrize("write", HALVES)
def test_describe_and_a_failed_first_batch_leave_a_teacher_alone(write):
    module, (x, y) = Teacher(), data()[0]

    def loss():
        with torch.no_grad():
            for p in module.teacher.parameters():
                HALVES[write](p)
        return F.cross_entropy(module.net(x), y) + F.mse_loss(module.net(x), module.teacher(x))

    before = {name: value.clone() for name, value in module.state_dict().items()}
    lightning_pc.describe(module, loss, print_table=False)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    optimizer = lightning_pc.optim.PC(torch.optim.SGD(module.net.parameters(), 0.1), module)
    with pytest.raises(lightning_pc.errors.ClosureError, match="scalar"):
        optimizer.step(lambda: loss().expand(2))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("algorithm", ["IPC", "PC", "ZIL", "EPC", "IEPC"])
def test_a_hook_that_changes_a_gradient_acts_in_every_evaluation(algorithm):
    """One that lets nothing through: what is above it stays."""

    def stops(tensor):
        tensor.register_hook(torch.zeros_like)

    model = mlp()
    model[2].register_forward_hook(lambda m, args, out: stops(out))
    before = model[0].weight.clone()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = getattr(lightning_pc.optim, algorithm)(sgd, model)
    for x, y in data():
        optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("register", ["full_backward_hook", "full_backward_pre_hook"])
def test_backward_hooks_of_modules_are_refused(register, algorithm):
    module = Module()
    getattr(module.net[2], f"register_{register}")(lambda *args: None)
    before, trace = weights(module), traces(module)
    with pytest.raises(lightning_pc.errors.UnsupportedError, match=r"'net\.2' has a backward hook"):
        trainer(algorithm).fit(module, loader(data()))
    assert torch.equal(weights(module), before)
    assert traces(module) == trace


def test_every_evaluation_sees_the_teacher_of_the_forward():
    """What the closure writes behind a version's back is written once, and read as it was then."""
    module, (x, y) = Teacher(), data()[0]
    other, seen = copy.deepcopy(module), []

    def loss():
        with torch.no_grad():
            for p in module.teacher.parameters():
                p.data.add_(1.0)
        seen.append(float(next(module.teacher.parameters()).sum()))
        return F.cross_entropy(module.net(x), y) + F.mse_loss(module.net(x), module.teacher(x))

    sgd = torch.optim.SGD(module.net.parameters(), 0.1)
    optimizer = lightning_pc.optim.PC(sgd, module, loss_terms=4, gamma=0.1, T=9)
    optimizer.step(loss)
    assert seen == [float(next(module.teacher.parameters()).sum())]
    sgd = torch.optim.SGD(other.net.parameters(), 0.1)
    optimizer = lightning_pc.optim.PC(sgd, other, loss_terms=4, gamma=0.1, T=9)
    with torch.no_grad():
        for p in other.teacher.parameters():
            p.add_(1.0)
    optimizer.step(
        lambda: F.cross_entropy(other.net(x), y) + F.mse_loss(other.net(x), other.teacher(x))
    )
    assert torch.equal(weights(module), weights(other))
