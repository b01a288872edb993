"""Deep modules learn with all defaults: Adam, 200 batches, all the same 64 samples."""

from statistics import median

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from lightning_pc.optim import IPC, PredictiveCoding
from tests.compare import twin
from tests.engine.modules import MLP
from tests.engine.tiny import bert
from tests.marks import mostly_slow


def mlp():
    x, y = torch.randn(64, 64), torch.randint(0, 4, (64,))
    model = MLP((64, *[64] * 9, 4))
    return model, lambda: F.cross_entropy(model(x), y)


def resnet():
    config = hf.ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=4,
    )
    model = hf.ResNetForImageClassification(config)
    x, y = torch.randn(64, 1, 12, 12), torch.randint(0, 4, (64,))
    return model, lambda: model(pixel_values=x, labels=y).loss


def sentences():
    model = bert(num_labels=4)
    ids, y = torch.randint(0, 30, (64, 4)), torch.randint(0, 4, (64,))
    return model, lambda: model(input_ids=ids, labels=y).loss


@pytest.mark.filterwarnings("ignore:In the first batch no error reached")
@pytest.mark.parametrize("seed", mostly_slow(range(3), 0))
@pytest.mark.parametrize("make", mostly_slow([mlp, resnet, sentences], mlp))
@pytest.mark.parametrize(("kind", "rate"), [(PredictiveCoding, 3e-3), (IPC, 1e-3)])
def test_learns_with_all_defaults(kind, rate, make, seed):
    torch.manual_seed(seed)
    model, loss = make()
    optimizer = kind(torch.optim.Adam(model.parameters(), rate), model.train())
    start, losses = twin(model), [optimizer.step(loss).item()]
    while len(losses) < 200 and max(losses[-20:]) > 0.05 * losses[0]:  # well learned: enough
        losses.append(optimizer.step(loss).item())
    # Single steps of iPC may leap, and which of them do is a matter of rounding.
    assert median(losses[-20:]) < 0.2 * losses[0]
    still = [
        name
        for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True)
        if torch.equal(p, q)
    ]
    assert still == []  # errors came all the way up
