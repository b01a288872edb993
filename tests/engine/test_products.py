"""Matrix multiplications of an update, all and in a row: Table 4 of Salvatori et al. 2024."""

import pytest
import torch
from torch import nn

from lightning_pc import describe
from tests.engine.modules import MLP
from tests.engine.problems import classifier


def counted(net, loss, **settings):
    found = describe(net, loss, print_table=False, **settings)
    return found.step, found.update, found.backprop


def perceptron(layers):
    net = MLP((5, *[7] * (layers - 1), 4))
    return net, classifier(net, torch.randn(3, 5), torch.randint(4, (3,)))


@pytest.mark.parametrize("L", [2, 3, 6, 10])
def test_table_4(L):
    one, backprop = (2 * L - 1, 2), (2 * L - 1, 2 * L - 1)
    assert counted(*perceptron(L), algorithm="ipc") == (one, one, backprop)
    T = 12
    assert counted(*perceptron(L), algorithm="pc", T=T) == (one, ((2 * L - 1) * T, 2 * T), backprop)
    zil = ((2 * L - 1) * (L - 1), 2 * (L - 1))
    assert counted(*perceptron(L), algorithm="zil") == (one, zil, backprop)


def test_error_coordinates_wait_for_the_whole_network():
    step, update, backprop = counted(*perceptron(5), algorithm="auto")
    assert step == backprop == (9, 9)
    assert update == (18, 18)


class Beside(nn.Module):
    """Two layers beside each other, one below both."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 4)

    def forward(self, x):
        return self.c(torch.tanh(self.a(x)) + torch.tanh(self.b(x)))


def test_what_stands_side_by_side_counts_once():
    net, x = Beside(), torch.randn(3, 5)
    step, _, backprop = counted(net, lambda: net(x).square().mean(), algorithm="ipc")
    # Three predictions; back to both values the same product.
    assert step == (4, 2)
    assert backprop == (4, 3)


def test_convolutions_and_recurrent_nets():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten())
    x = torch.randn(2, 1, 5, 5)
    step, _, backprop = counted(net, lambda: net(x).square().mean(), algorithm="ipc")
    assert (step, backprop) == ((3, 2), (3, 3))
    lstm = nn.LSTM(4, 8)
    both = nn.ModuleList([lstm, nn.Linear(8, 2)])
    step, _, backprop = counted(
        both,
        lambda: both[1](lstm(torch.ones(6, 2, 4))[0]).square().mean(),
        algorithm="ipc",
        value_nodes=["0"],
    )
    # The inputs' product, six of the state, the head's, and back to the value.
    assert step == (9, 6)
    assert backprop == (9, 8)


def test_the_table_tells(capsys):
    net, loss = perceptron(3)
    describe(net, loss, algorithm="ipc")
    told = "matrix products of an update: 5, 2 in a row; backprop: 5, 5 in a row"
    assert told in capsys.readouterr().out
