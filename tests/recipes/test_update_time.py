"""What the recipe of Fig. 6 writes out by hand ends at the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from recipes.efficiency.update_time import ByHand, backprop, ipc, network
from tests.compare import relative


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("algorithm", ["ipc", "backprop"])
def test_by_hand_ends_at_the_same_weights(algorithm, parallel):
    net = network(6, 5, 0).double()
    x, y = torch.randn(1, 5).double(), torch.randn(1, 5).double()
    by_hand, start = ByHand(net, x, y), copy.deepcopy(net)
    learn = ipc(net, x, y, parallel) if algorithm == "ipc" else backprop(net, x, y)
    for _ in range(3):
        learn()
        getattr(by_hand, algorithm)()
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    for number, layer in enumerate(layers):
        assert relative(by_hand.weight[number], layer.weight.detach()) < 1e-12
        assert relative(by_hand.bias[number], layer.bias.detach()) < 1e-12
    assert relative(layers[0].weight.detach(), start[0].weight.detach()) > 1e-6
