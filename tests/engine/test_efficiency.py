"""What a step computes and holds: counted, not timed."""

from collections import Counter

import torch
import torch.nn.functional as F

from lightning_pc.optim import IPC, PC
from tests.engine.inside import matrix_products
from tests.engine.modules import MLP


def test_a_value_step_computes_no_weight_gradient():
    torch.manual_seed(0)
    x, y, layers = torch.randn(6, 8), torch.randint(0, 3, (6,)), 5
    counts = {}
    for T in (9, 10):  # beyond the depth, so that every node moves in the additional step
        net = MLP((*[8] * 5, 3))
        optimizer = PC(torch.optim.SGD(net.parameters(), 0.1), net, T=T)
        counts[T] = matrix_products(optimizer, lambda net=net: F.cross_entropy(net(x), y))
    # every layer but the first, which no value is above of: its prediction stays as it was
    assert counts[10] - counts[9] == (layers - 1) + (layers - 1)


def test_an_ipc_step_costs_what_backprop_costs():
    torch.manual_seed(0)
    x, y, layers = torch.randn(6, 8), torch.randint(0, 3, (6,)), 5
    counts = {}
    for T in (9, 10):
        net = MLP((*[8] * 5, 3))
        optimizer = IPC(torch.optim.SGD(net.parameters(), 0.1), net, T=T)
        counts[T] = matrix_products(optimizer, lambda net=net: F.cross_entropy(net(x), y))
    assert counts[10] - counts[9] == layers + (layers - 1) + layers


def test_pc_reaches_each_weight_once_a_batch():
    net = MLP((*[8] * 5, 3))
    seen = Counter()
    for name, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.update([name]))
    optimizer = PC(torch.optim.SGD(net.parameters(), 0.1), net)
    optimizer.step(lambda: F.cross_entropy(net(torch.randn(6, 8)), torch.randint(0, 3, (6,))))
    assert seen == Counter(dict(net.named_parameters()).keys())
