"""reset="never": values that live from call to call, for full batches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pc.errors import ConfigError, DivergenceError, RecordingError
from lightning_pc.optim import IPC, ZIL
from tests.compare import far, relative, twin
from tests.engine.modules import MLP
from tests.engine.problems import ce, vectors


def dropped():
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Dropout(0.5), *MLP((7, 6, 5, 4)))


MODELS = {"mlp": lambda: MLP((6, 7, 6, 5, 4)), "relu": lambda: MLP((6, 7, 6, 4), "relu")}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("calls", [[1] * 12, [4] * 3, [6, 6]])
@pytest.mark.parametrize(
    ("name", "momentum"), [("mlp", 0.0), ("relu", 0.0), ("dropout", 0.0), ("mlp", 0.7)]
)
def test_many_calls_are_one_long_one(name, momentum, calls, optimizer):
    """Values keep their velocity as well."""
    model = (dropped if name == "dropout" else MODELS[name])().double()
    other, start = twin(model), twin(model)
    x, y = vectors(8)
    x = x.double()
    lr = 0.05 if optimizer is torch.optim.SGD else 1e-3
    kwargs = {"gamma": 0.2, "gamma_decay": 1, "momentum": momentum}
    torch.manual_seed(3)
    IPC(optimizer(other.parameters(), lr), other, T=sum(calls), **kwargs).step(
        lambda: ce(other, x, y)
    )
    torch.manual_seed(3)
    many = IPC(optimizer(model.parameters(), lr), model, T=calls[0], reset="never", **kwargs)
    for _ in calls:
        many.step(lambda: ce(model, x, y))
        torch.randn(5)  # masks were drawn once; what others draw does not matter
    assert far(model, start)[0] > 1e-3
    assert far(model, other)[0] < 1e-9


WAYS = {
    "gamma_decay": {"gamma": 1.9, "gamma_decay": 0.5},
    "adam": {"inference": lambda values: torch.optim.Adam(values, 0.05)},
    "momentum of an optimizer": {
        "inference": lambda values: torch.optim.SGD(values, 0.3, momentum=0.6)
    },
    "precisions by step": {"gamma": 0.3, "precisions": lambda depth, t: 1.0 / (1 + t)},
}


@pytest.mark.parametrize("calls", [[1] * 12, [4] * 3])
@pytest.mark.parametrize("way", WAYS)
def test_what_moves_the_values_goes_on_from_call_to_call(way, calls):
    model = MLP((6, 7, 6, 4)).double()
    other, start = twin(model), twin(model)
    x, y = vectors(8)
    for net, steps in ((other, [12]), (model, calls)):
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        optimizer = IPC(sgd, net, T=steps[0], reset="never", **WAYS[way])
        for _ in steps:
            optimizer.step(lambda net=net: ce(net, x.double(), y))
    assert far(model, start)[0] > 1e-3
    assert far(model, other)[0] < 1e-9


def test_an_automatic_gamma_of_values_that_are_kept_does_not_fade():
    """In one long batch F rises now and then, and each time would take a tenth of it."""
    model, (x, y) = MLP((6, 7, 4)), vectors(8)
    optimizer = IPC(torch.optim.AdamW(model.parameters(), 0.1), model, T=4, reset="never")
    for _ in range(60):
        optimizer.step(lambda: ce(model, x, y))
    assert optimizer.report.gamma == pytest.approx(optimizer._learner.auto.gamma)


def test_a_parameter_that_is_not_reached_yet_takes_no_step():
    model = MLP((6, 7, 6, 5, 4)).double()
    before, (x, y) = twin(model), vectors(8)
    sgd = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)
    optimizer = IPC(sgd, model, T=1, reset="never")
    for t in range(4):
        optimizer.step(lambda: ce(model, x.double(), y))
        for depth, layer in enumerate((6, 4, 2, 0)):
            still = torch.equal(model[layer].weight, before[layer].weight)
            assert still == (depth > t)


def test_the_loss_returned_is_that_of_the_values():
    model = MLP((6, 7, 4)).double()
    x, y = vectors(8)
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.0), model, T=2, reset="never")
    losses = [optimizer.step(lambda: ce(model, x.double(), y)).item() for _ in range(4)]
    value = optimizer.values["1"].detach()
    plain = ce(model, x.double(), y).item()
    assert losses[0] == pytest.approx(plain, rel=1e-12)
    assert losses[3] < losses[2] < losses[1] < losses[0]  # weights are still: values moved
    given = F.cross_entropy(model[2](torch.tanh(value)), y).item()
    optimizer.step(lambda: ce(model, x.double(), y))
    assert optimizer.report.loss[0].item() == pytest.approx(given, rel=1e-12)


def test_batch_norm_moves_once_a_call():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = vectors(8)
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.01), model, T=3, reset="never")
    for call in range(1, 4):
        optimizer.step(lambda: ce(model, x.double(), y))
        assert model[1].num_batches_tracked == call


@pytest.mark.parametrize("rows", [5, 9])
def test_another_shape_is_an_error_that_names_reset(rows):
    model = MLP((6, 7, 4)).double()
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model, reset="never")
    x, y = vectors(8)
    optimizer.step(lambda: ce(model, x.double(), y))
    before = twin(model)
    a, b = vectors(rows)
    with pytest.raises(RecordingError, match="reset="):
        optimizer.step(lambda: ce(model, a.double(), b))
    assert far(model, before)[0] == 0
    optimizer.step(lambda: ce(model, x.double(), y))


def test_fresh_values_each_batch_is_the_default():
    model = MLP((6, 7, 4)).double()
    x, y = vectors(8)
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model, T=3)
    optimizer.step(lambda: ce(model, x.double(), y))
    first = optimizer.values["1"]
    optimizer.step(lambda: ce(model, x.double(), y))
    assert optimizer.values["1"] is not first
    assert relative(optimizer.report.energy[0], torch.ones(1)) == 1  # t = 0 has no energy


def test_zil_refuses_it():
    model = MLP((6, 7, 4))
    with pytest.raises(ConfigError, match="zil"):
        ZIL(torch.optim.SGD(model.parameters(), 0.1), model, reset="never")


def test_after_a_divergence_values_are_made_anew():
    model = MLP((6, 7, 4)).double()
    x, y = vectors(8)
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model, T=3, reset="never")
    scale = [1.0]
    closure = lambda: scale[0] * ce(model, x.double(), y)  # noqa: E731
    optimizer.step(closure)
    scale[0] = float("nan")
    with pytest.raises(DivergenceError):
        optimizer.step(closure)
    scale[0] = 1.0
    optimizer.step(closure)
    assert optimizer.report.energy[0].sum() == 0  # t = 0 again: values stand at their predictions


def test_a_skipped_batch_leaves_no_report():
    model = MLP((6, 7, 4))
    x, y = vectors(8)
    optimizer = IPC(torch.optim.SGD(model.parameters(), 0.1), model)
    optimizer.step(lambda: ce(model, x, y))
    assert optimizer.step(lambda: None) is None
    assert optimizer.report is None
    assert optimizer.values == {}
