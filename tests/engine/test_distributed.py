"""Two processes with gloo against one with all of their data, and where they are refused."""

import copy
import fcntl
import json
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn

from lightning_pc import PCDDPStrategy, PCShardedStrategy, hosts
from lightning_pc.energies import LearnedGaussian
from lightning_pc.errors import ClosureError, ConfigError
from lightning_pc.nn import Latent
from lightning_pc.optim import IEPC, IPC, PC
from tests.engine.lightning_problems import D, Module, mlp
from tests.engine.ranks import (
    BURST,
    GIVEN,
    SAME,
    STEPS,
    TRAININGS,
    Adam,
    Part,
    Routed,
    Words,
    fit,
    parts,
    words,
)

HERE = Path(__file__).parent
#: Processes talk to each other on this machine alone, whatever it is called.
LOOP = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


def launched(script, folder, count=2):
    """Runs a script in several processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    where = str(HERE.parents[1])
    env = {**os.environ, "PYTHONPATH": where, "OMP_NUM_THREADS": "1", **LOOP}
    done = subprocess.run(
        [*run, f"--nproc_per_node={count}", str(script), str(folder)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Name of a training -> what each of two processes has found.

    Workers that run tests side by side share it: the first one makes it, the others wait.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = tmp_path_factory.getbasetemp().parent / f"ranks-{run}"
    if run is None:
        folder = tmp_path_factory.mktemp("ranks")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            launched(HERE / "ranks.py", folder)
            (folder / "done").touch()
    return {n: [torch.load(folder / f"{n}-{rank}.pt") for rank in range(2)] for n in TRAININGS}


@pytest.mark.parametrize("name", TRAININGS)
def test_processes_agree(found, name):
    one, other = found[name]
    assert one["seen"] == other["seen"]
    for key, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][key])
        assert weight.isfinite().all()


@pytest.mark.parametrize("name", SAME)
def test_as_one_process_with_all_data(found, name, tmp_path):
    expected = TRAININGS[name](tmp_path)
    assert found[name][0]["seen"] == expected["seen"]
    close = {"rtol": 1e-9, "atol": 1e-11}
    if name == "transformed":  # its loss is computed in float32
        close = {"rtol": 1e-5, "atol": 1e-8}
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(found[name][0]["weights"][key], weight, **close)


@pytest.mark.parametrize("name", ["synced pc", "synced ipc", "synced zil"])
def test_norms_that_meet_keep_statistics_of_the_whole_batch(found, name, tmp_path):
    expected = TRAININGS[name](tmp_path)["buffers"]
    assert len(expected) == 4
    for one in found[name]:
        torch.testing.assert_close(one["buffers"], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["scaled", "scaled pc"])
def test_a_batch_that_overflows_in_one_process_is_left_out_in_all(found, name):
    rest = [batch for number, batch in enumerate(parts()) if number != BURST]
    settings = {"T": 8, **GIVEN} if name == "scaled pc" else GIVEN
    expected = fit(Part(), "ipc" if name == "scaled" else "pc", batches=rest, **settings)
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(found[name][0]["weights"][key], weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "times"),
    [
        *[("pc", STEPS), ("zil", STEPS), ("ipc", 8 * STEPS), ("conjugate", STEPS)],
        *[("accumulated", 7), ("wrapped pc", STEPS), ("wrapped ipc", 8 * STEPS)],
        *[("fabric ipc", 8 * STEPS), ("transformed", 36)],
    ],
)
def test_gradients_are_exchanged_once_for_each_update(found, name, times):
    assert [one["exchanged"] for one in found[name]] == [times, times]


def averaged(net, optimizer, steps, loss, **how):
    """The mean of what two networks learn by pc, each from its own part."""
    for step in range(steps):
        gradients = []
        for rank in range(2):
            own = copy.deepcopy(net)
            pc = PC(torch.optim.SGD(own.parameters(), 0.0), own, **GIVEN, **how)
            pc.step(lambda own=own, rank=rank, step=step: loss(own, step, rank))
            gradients.append([p.grad for p in own.parameters()])
        for p, *each in zip(net.parameters(), *gradients, strict=True):
            there = [gradient for gradient in each if gradient is not None]
            p.grad = sum(there) / 2 if there else None
        optimizer.step()
    return dict(net.named_parameters())


def test_the_mean_of_means_of_unequal_counts(found):
    module = Words()
    ids = words(3)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    expected = averaged(module, optimizer, 3, lambda m, step, rank: m.loss(ids[step], rank), T=8)
    for key, weight in found["words"][0]["weights"].items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-9, atol=1e-11)


def test_branches_that_one_process_alone_takes(found):
    module = Adam(net=Routed().double())
    start, batches = copy.deepcopy(module.net), parts()
    optimizer = module.configure_optimizers()

    def loss(own, step, rank):
        own.net.rank = rank
        x, y = batches[step]
        return F.cross_entropy(own.net(x[rank]), y[rank])

    expected = averaged(module, optimizer, STEPS, loss)
    weights = found["routed"][0]["weights"]
    for key, weight in weights.items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-9, atol=1e-11)
    for number, moves in enumerate([True, True, True, False]):  # the last is nobody's
        same = torch.equal(weights[f"net.branches.{number}.weight"], start.branches[number].weight)
        assert same is not moves


@pytest.mark.parametrize(("name", "kind"), [("routed ipc", IPC), ("routed iepc", IEPC)])
def test_branches_at_each_of_several_updates(found, name, kind):
    """At a tiny rate the updates add up: to the mean of what both learn alone."""
    x, y = parts(1)[0]
    start, moved = Routed().double(), []
    for rank in range(2):
        own = copy.deepcopy(start)
        own.rank = rank
        learner = kind(torch.optim.SGD(own.parameters(), 1e-8), own, T=8, **GIVEN)
        learner.step(lambda own=own, rank=rank: F.cross_entropy(own(x[rank]), y[rank]))
        moved.append([p - q for p, q in zip(own.parameters(), start.parameters(), strict=True)])
    for (key, begun), *each in zip(start.named_parameters(), *moved, strict=True):
        update = found[name][0]["weights"][f"net.{key}"] - begun
        torch.testing.assert_close(update, sum(each) / 2, rtol=1e-5, atol=1e-16)


def test_buffers_are_those_of_the_first_process(found):
    one, other = (each["buffers"] for each in found["apart"])
    assert len(one) == STEPS
    assert all(map(torch.equal, one, other))
    assert not torch.equal(one[1], one[2])


def test_all_take_as_many_steps_as_the_deepest(found):
    """Eight nodes in a row: depth + 1 and not 8, the usual number."""
    assert {steps for steps, _ in found["depths pc"][0]["seen"]} == {9}


@pytest.mark.parametrize("name", ["wrapped pc", "wrapped ipc", "wrapped zil"])
def test_a_wrapped_network_reduces_by_itself_again_afterwards(found, name):
    assert [one["told"] for one in found[name]] == ["True", "True"]


def test_a_batch_that_one_process_skips(found):
    for one in found["skips"]:
        assert one["told"].startswith("ClosureError: Some processes have no loss for this batch")
        assert len(one["seen"]) == 3


def test_a_loss_that_is_not_finite_in_one_process(found):
    one, other = (each["told"] for each in found["not finite"])
    assert "F is not finite on another process. No weight has moved on it." in one
    assert "the loss is not finite (loss nan). No weight has moved on it." in other


def test_a_resumed_run_goes_on_to_the_bit(found):
    for one in found["resumed"]:
        assert all(map(torch.equal, one["weights"].values(), one["resumed"].values()))


@pytest.mark.parametrize("name", [n for n in TRAININGS if n.startswith("sharded ")])
def test_shards_learn_what_whole_weights_do(found, name):
    for shards, whole in zip(found[name], found[name.removeprefix("sharded ")], strict=True):
        assert shards["seen"] == whole["seen"]
        assert shards["told"] == whole["told"]
        for key, weight in shards["weights"].items():
            torch.testing.assert_close(weight, whole["weights"][key], rtol=1e-9, atol=1e-11)


def test_each_process_has_its_share_and_resumes(found):
    one, other = found["shared out"]
    count = sum(weight.numel() for weight in one["weights"].values())
    assert one["moments"] + other["moments"] == count
    assert abs(one["moments"] - other["moments"]) < count / 5
    for each in (one, other):
        assert len(each["scores"]) == 6  # two before training, two after each epoch
        assert each["scores"][-1] < each["scores"][0]
        assert each["used"] == (True, True, True, True)
        for kind in ("folder", "file", "without shards"):
            for weight, again in zip(each["weights"].values(), each[kind].values(), strict=True):
                torch.testing.assert_close(weight, again, rtol=1e-12, atol=0)


def processes(monkeypatch, wrapped):
    """As if two ran."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(hosts, "DDP", wrapped)


class Wrapped(nn.Module):
    """Stands for DistributedDataParallel."""

    def __init__(self, module, **flags):
        super().__init__()
        self.module, self.process_group = module, None
        self.require_backward_grad_sync = self.require_forward_param_sync = True
        vars(self).update(flags)

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"process_group": object()}, "a process group of its own"),
        ({"static_graph": True}, "leave it out"),
        ({"_comm_hooks": [print]}, "a communication hook"),
    ],
)
def test_wrappers_that_are_refused(flags, why, monkeypatch):
    processes(monkeypatch, Wrapped)
    net = mlp()
    optimizer, whole = PC(torch.optim.SGD(net.parameters(), 0.1), net), Wrapped(net, **flags)
    x, y = torch.randn(4, D), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ConfigError, match=why):
        optimizer.step(lambda: F.cross_entropy(whole(x), y))


def test_processes_that_learn_by_themselves_are_told(monkeypatch):
    processes(monkeypatch, Wrapped)
    net, other = mlp(), mlp()
    optimizer = PC(torch.optim.SGD(net.parameters(), 0.1), net)
    x, y = torch.randn(4, D), torch.zeros(4, dtype=torch.long)
    with pytest.warns(
        UserWarning, match="2 processes run, and each learns by itself: PC has met no"
    ):
        optimizer.step(lambda: F.cross_entropy(net(x) + 0 * Wrapped(other)(x).detach(), y))


def test_a_batch_that_is_skipped_before_the_processes_meet(monkeypatch):
    processes(monkeypatch, Wrapped)
    net = mlp()
    optimizer, whole = PC(torch.optim.SGD(net.parameters(), 0.1), net), Wrapped(net)
    x, y = torch.randn(4, D), torch.zeros(4, dtype=torch.long)
    with pytest.warns(UserWarning, match="learns by itself"):
        optimizer.step(lambda: None)
    with pytest.raises(ClosureError, match="skipped a batch before"):
        optimizer.step(lambda: F.cross_entropy(whole(x), y))
    assert whole.require_backward_grad_sync


def test_callbacks_that_need_whole_weights():
    precision = SimpleNamespace(precision="32-true")
    callbacks = [StochasticWeightAveraging(1e-2)]
    trainer = SimpleNamespace(callbacks=callbacks, precision_plugin=precision)
    strategy = PCShardedStrategy("pc")
    strategy.connect(Module())
    with pytest.raises(
        MisconfigurationException, match=r"StochasticWeightAveraging.*PCDDPStrategy"
    ):
        strategy.setup(trainer)


SCRIPT = """
import sys
import lightning.pytorch as pl
import torch
import lightning_pc
from tests.engine.lightning_problems import Module, data, loader

if __name__ == "__main__":
    how = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(
        strategy="ipc_ddp", accelerator="cpu", devices=2, max_epochs=1,
        enable_checkpointing=False, **how,
    )
    module = Module()
    trainer.fit(module, loader(data(6)))
    torch.save(module.state_dict(), f"{sys.argv[1]}/{trainer.global_rank}.pt")
"""


RECIPE = """
import sys
from recipes.efficiency import devices

devices.WARM, devices.BATCHES, devices.ROUNDS = 1, 2, 1
devices.NETWORKS = {"mlp": devices.NETWORKS["mlp"]}
sys.argv = ["devices", "--write", f"{sys.argv[1]}/figures.json"]
devices.main()
"""


def test_the_recipe_of_two_processes_against_one(tmp_path):
    script = tmp_path / "recipe.py"
    script.write_text(RECIPE)
    launched(script, tmp_path)
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["algorithm"] for row in rows] == ["pc", "ipc", "zil", "auto"]
    assert all(row["faster"] > 0 for row in rows)
    assert rows[1]["megabytes"] == pytest.approx(8 * rows[0]["megabytes"], rel=0.1)


@pytest.mark.slow
def test_the_trainer_starts_the_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), **LOOP}
    subprocess.run([sys.executable, str(script), str(tmp_path)], env=env, check=True, timeout=300)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(map(torch.equal, one.values(), other.values()))


def test_names():
    for name in ("pc_auto", "ipc", "pc", "zil", "epc", "iepc"):
        for ending, kind in (("ddp", PCDDPStrategy), ("sharded", PCShardedStrategy)):
            made = StrategyRegistry.get(f"{name}_{ending}")
            assert isinstance(made, kind)
            assert made.settings.algorithm == name.removeprefix("pc_")
    assert repr(PCDDPStrategy("pc", T=9)).startswith("PCDDPStrategy('pc', T=9)")


@pytest.mark.parametrize("kind", [PCDDPStrategy, PCShardedStrategy])
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"algorithm": "ipcc"}, "ipcc"),
        ({"T": 0}, "T=0: expected a whole number"),
        ({"gama": 0.1}, "Strategy has no argument gama=. Did you mean gamma=?"),
        ({"process_group_backend": "glo"}, "'glo': expected None or one of"),
        ({"timeout": 5}, "timeout=5: expected a datetime.timedelta"),
    ],
)
def test_wrong_arguments(kind, arguments, why):
    with pytest.raises(MisconfigurationException, match=re.escape(why)):
        kind(**arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "why"),
    [
        (PCDDPStrategy, {"find_unused_parameters": True}, "is not needed: leave it out"),
        (PCShardedStrategy, {"tensor_parallel_size": 2}, "has no tensor_parallel_size: all"),
    ],
)
def test_arguments_of_lightnings_own_strategies(kind, arguments, why):
    with pytest.raises(MisconfigurationException, match=why):
        kind(**arguments)


class Causes(nn.Module):
    def __init__(self):
        super().__init__()
        self.causes = Latent(3, samples=8)


@pytest.mark.parametrize(
    ("net", "settings", "why"),
    [
        (Causes(), {}, r"values of \['net.causes'\], Latents with samples="),
        (mlp(), {"energies": {"net.1": LearnedGaussian()}}, r"variances at \['net.1'\]"),
        (nn.Embedding(3, 4, sparse=True), {}, r"gradients of \['net'\] are sparse"),
    ],
)
def test_what_each_process_would_learn_by_itself(net, settings, why, monkeypatch):
    monkeypatch.setattr(PCDDPStrategy, "world_size", 2)
    strategy = PCDDPStrategy("pc", timeout=timedelta(seconds=30), **settings)
    strategy.model = Module(net=net)
    with pytest.raises(MisconfigurationException, match=why):
        strategy.configure_ddp()
