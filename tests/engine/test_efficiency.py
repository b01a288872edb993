"""What a step computes and holds: counted, not timed."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_pc.optim import IPC, PC
from recipes.efficiency import benchmark


class CountMatrixProducts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def matrix_products(optimizer, closure):
    with CountMatrixProducts() as counter:
        optimizer.step(closure)
    return counter.count


def chain(depth=4, width=8):
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def test_a_value_step_computes_no_weight_gradient():
    torch.manual_seed(0)
    x, y, layers = torch.randn(6, 8), torch.randint(0, 3, (6,)), 5
    counts = {}
    for T in (9, 10):  # beyond the depth, so that every node moves in the additional step
        net = chain()
        optimizer = PC(torch.optim.SGD(net.parameters(), 0.1), net, T=T)
        counts[T] = matrix_products(optimizer, lambda net=net: F.cross_entropy(net(x), y))
    # every layer but the first, which no value is above of: its prediction stays as it was
    assert counts[10] - counts[9] == (layers - 1) + (layers - 1)


def test_an_ipc_step_costs_what_backprop_costs():
    torch.manual_seed(0)
    x, y, layers = torch.randn(6, 8), torch.randint(0, 3, (6,)), 5
    counts = {}
    for T in (9, 10):
        net = chain()
        optimizer = IPC(torch.optim.SGD(net.parameters(), 0.1), net, T=T)
        counts[T] = matrix_products(optimizer, lambda net=net: F.cross_entropy(net(x), y))
    assert counts[10] - counts[9] == layers + (layers - 1) + layers


def test_pc_reaches_each_weight_once_a_batch():
    net = chain()
    seen = Counter()
    for name, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.update([name]))
    optimizer = PC(torch.optim.SGD(net.parameters(), 0.1), net)
    optimizer.step(lambda: F.cross_entropy(net(torch.randn(6, 8)), torch.randint(0, 3, (6,))))
    assert seen == Counter(dict(net.named_parameters()).keys())


@pytest.mark.slow
def test_memory_of_the_cnn():
    row = benchmark.measure_memory("cnn")
    assert row["nodes_mib"] > 20
    assert row["bp_peak_mib"] < row["ipc_peak_mib"] <= row["ipc_allowed_mib"]


@pytest.mark.filterwarnings("ignore:T=2 inference steps never reach")
def test_benchmark_measures_every_ratio(monkeypatch):
    tiny = (lambda: nn.Sequential(chain(), nn.Linear(3, 10)), (8,), 4, 2)
    monkeypatch.setitem(benchmark.NETWORKS, "tiny", tiny)
    row = benchmark.time_steps("tiny", rounds=1)
    noise = ("auto_share", "conjugate_share")  # differences
    assert all(value > 0 for name, value in row.items() if name not in noise)
    assert benchmark.table({"tiny": {**row, **benchmark.measure_memory("tiny")}}).row_count == 1
