"""What padding does: nothing at masked keys, and hardly anything in the rows of padded queries."""

from __future__ import annotations

import pytest
import torch
from transformers import BertForMaskedLM

from lightning_pc.optim import IPC, PC
from tests.compare import twin
from tests.engine.tiny import STILL, V, bert

LENGTH = 7


def scaled(scale=1.0, **options):
    """In float64, whose rounding is far below all that these tests tell apart."""
    torch.manual_seed(0)
    net = bert(BertForMaskedLM, max_position_embeddings=512, **STILL, **options).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale if parameter.dim() == 2 else 1.0)
    return net


def sentences(*lengths):
    mask = torch.tensor([[1] * n + [0] * (LENGTH - n) for n in lengths])
    ids = torch.randint(3, V, mask.shape) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def gradients(wrapper, net, batch, **options):
    own = twin(net)
    given = {"gamma": 0.1, "gamma_decay": 1, "T": 8}
    optimizer = wrapper(torch.optim.SGD(own.parameters(), 0.0), own, **given | options)
    optimizer.step(lambda: own(**batch).loss)
    return {n: p.grad for n, p in own.named_parameters() if p.grad is not None}


def one_by_one(wrapper, net, batch, **options):
    """The gradient of the whole batch, from each sentence alone and without its padding."""
    lengths = batch["attention_mask"].sum(1).tolist()
    total = {}
    for i, n in enumerate(lengths):
        alone = {name: value[i : i + 1, :n] for name, value in batch.items()}
        for name, grad in gradients(wrapper, net, alone, **options).items():
            total[name] = total.get(name, 0) + grad * (n / sum(lengths))
    return total


def difference(one, other):
    """Length of the difference, against the length of the whole gradient."""
    assert one.keys() == other.keys()
    squares = [(one[n] - other[n]).square().sum() for n in one]
    return float((sum(squares) / sum(g.square().sum() for g in one.values())).sqrt())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("places", ["auto", "blocks"])
@pytest.mark.parametrize("wrapper", [PC, IPC])  # whose weights stay where they are
def test_sentences_of_one_length_learn_as_if_alone(wrapper, places, attention):
    net = scaled(6.0, attn_implementation=attention)
    batch = sentences(LENGTH, LENGTH, LENGTH)
    together = gradients(wrapper, net, batch, value_nodes=places)
    assert difference(together, one_by_one(wrapper, net, batch, value_nodes=places)) < 1e-12


@pytest.mark.parametrize("gamma", [{"gamma": "auto"}, {"gamma": 0.5, "gamma_decay": 0.9}])
def test_a_gamma_that_looks_at_the_batch_couples_its_sentences(gamma):
    net, batch = scaled(), sentences(LENGTH, LENGTH, LENGTH)
    together, alone = (f(PC, net, batch, **gamma) for f in (gradients, one_by_one))
    assert 1e-3 < difference(together, alone) < 0.3


@pytest.mark.parametrize(
    ("places", "scale", "least", "most"),
    [("auto", 1.0, 0, 1e-7), ("auto", 3.0, 0, 1e-4), ("auto", 6.0, 1e-5, 5e-3),
     ("blocks", 1.0, 0, 2e-4), ("blocks", 6.0, 1e-4, 1e-2)],
)  # fmt: skip
def test_the_rows_of_padded_queries_add_a_little(places, scale, least, most):
    """They are values like all others: theirs err where they attend to values that have moved.

    Backprop has no such term, since no loss follows from them. So it is not 0, but by far less
    than 1e-5 of the gradient at a BERT's first weights, where nodes are at the default places.
    """
    net, batch = scaled(scale), sentences(3, 7, 5, 7)
    together = gradients(PC, net, batch, value_nodes=places)
    alone = one_by_one(PC, net, batch, value_nodes=places)
    assert least <= difference(together, alone) < most


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("wrapper", [PC, IPC])
def test_masked_keys_have_no_energy_and_do_not_move(wrapper, attention):
    net, batch = scaled(6.0, attn_implementation=attention), sentences(3, 7, 5, 7)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 9)}
    found = []
    for given in (batch, other):  # the padding says something else
        own = twin(net)
        optimizer = wrapper(torch.optim.SGD(own.parameters(), 0.0), own, gamma=0.1, T=8)
        optimizer.step(lambda own=own, given=given: own(**given).loss)
        logits = next(x for name, x in optimizer.values.items() if "attention" in name)
        masked = (batch["attention_mask"] == 0)[:, None, None, :].expand_as(logits)
        assert masked.any()
        assert float(logits.softmax(-1)[masked].max()) == 0
        real = batch["attention_mask"].bool()
        found.append(logits.transpose(1, 2)[real][:, :, :3])  # of real queries, at real keys
    assert torch.allclose(*found, atol=1e-5)
