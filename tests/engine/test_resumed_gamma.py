"""gamma="auto" is saved with the run: what goes on from a checkpoint is the same run."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_pc import RandomState
from lightning_pc.inference.curvature import LARGEST
from lightning_pc.optim import EPC, IPC, PC
from tests.engine.lightning_problems import Module, data, loader, mlp, seed_all, trainer
from tests.engine.modules import MLP, Dropped
from tests.engine.problems import classifier, vectors

ALGORITHMS = [PC, IPC, EPC]
every = pytest.mark.parametrize("algorithm", ALGORITHMS)


def steep(net):
    """With weights so large that gamma is what the curvature makes of it, below its limit."""
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3.0)
    return net


def train(model, optimizer, batches, start, end):
    for i in range(start, end):
        x, y = batches[i % len(batches)]
        torch.manual_seed(i)
        optimizer.step(classifier(model, x, y))


@pytest.mark.parametrize(
    ("algorithm", "how"),
    [*((a, "state_dict") for a in ALGORITHMS), (IPC, "deepcopy"), (PC, "pickle")],
)
def test_a_saved_run_goes_on_to_the_bit(algorithm, how):
    """Stopped between two looks; without the state the run would be another."""
    batches = [vectors(12) for _ in range(4)]

    def made():
        torch.manual_seed(8)
        model = steep(Dropped())
        return model, algorithm(torch.optim.Adam(model.parameters(), 0.02), model)

    whole, optimizer = made()
    train(whole, optimizer, batches, 0, 20)
    model, half = made()
    train(model, half, batches, 0, 5)
    if how == "state_dict":
        other, again = made()
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        again.load_state_dict(copy.deepcopy(half.state_dict()))
        assert not [k for k in model.state_dict() if "pc" in k or "gamma" in k]
    elif how == "deepcopy":
        other, again = copy.deepcopy((model, half))
    else:
        other, again = pickle.loads(pickle.dumps((model, half)))
    assert again.state_dict()["lightning_pc"] == half.state_dict()["lightning_pc"]
    assert half.state_dict()["lightning_pc"]["gamma"] < LARGEST
    train(other, again, batches, 5, 20)
    assert again.state_dict()["lightning_pc"] == optimizer.state_dict()["lightning_pc"]
    for one, same in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    forgetful = algorithm(half.optimizer, model)
    train(model, forgetful, batches, 5, 20)
    assert not torch.equal(next(whole.parameters()), next(model.parameters()))


@every
def test_states_of_plain_optimizers_and_of_given_gammas(algorithm, evaluated):
    """A plain state leaves the automatic gamma alone, an automatic one a given gamma."""
    model, (x, y) = MLP((6, 9, 7, 4)), vectors(12)
    optimizer = algorithm(torch.optim.Adam(model.parameters(), 0.01), model)
    for _ in range(5):
        optimizer.step(classifier(model, x, y))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(copy.deepcopy(optimizer.optimizer.state_dict()))
    assert optimizer.state_dict()["lightning_pc"] == saved["lightning_pc"]

    fixed = algorithm(torch.optim.Adam(model.parameters(), 9.0), model, gamma=0.05, gamma_decay=1)
    fixed.load_state_dict(saved)
    assert fixed.param_groups[0]["lr"] == 0.01
    evaluated.clear()
    fixed.step(classifier(model, x, y))
    assert len(evaluated) == fixed.report.steps
    assert fixed.report.gamma == 0.05
    assert "lightning_pc" not in fixed.state_dict()


class Masks(Module):
    """Dropout, so that a resumed run needs the generators as well."""

    def __init__(self):
        super().__init__(net=steep(mlp(nn.Dropout(0.5))))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


@pytest.mark.parametrize("algorithm", ["pc", "ipc", "epc"])
@pytest.mark.parametrize("then", ["automatic", "state lost", "gamma given"])
def test_a_resumed_trainer_goes_on_to_the_bit(algorithm, then, tmp_path):
    def fitted(epochs, gamma="auto", ckpt=None):
        seed_all(1 if ckpt is None else 99)
        module = Masks()
        saves = ModelCheckpoint(tmp_path, save_last=True, filename="{epoch}", save_top_k=-1)
        fit = trainer(
            {"algorithm": algorithm, "gamma": gamma},
            max_epochs=epochs,
            callbacks=[saves, RandomState()],
            enable_checkpointing=True,
        )
        fit.fit(module, loader(data(5)), ckpt_path=ckpt)
        state = fit.strategy.optimizer_state(fit.optimizers[0]).get("lightning_pc")
        return module, state, fit

    whole, state, _ = fitted(4)
    checkpoint = tmp_path / "epoch=1.ckpt"
    assert state["evaluations"] == 160
    assert state["gamma"] < LARGEST
    if then == "state lost":
        saved = torch.load(checkpoint, weights_only=True)
        del saved["optimizer_states"][0]["lightning_pc"]
        torch.save(saved, checkpoint)
    resumed, again, fit = fitted(4, 0.05 if then == "gamma given" else "auto", checkpoint)
    pairs = zip(resumed.parameters(), whole.parameters(), strict=True)
    same = [torch.equal(p, q) for p, q in pairs]
    if then == "automatic":
        assert all(same)
        assert again == state
    else:
        assert not any(same)
        assert fit.global_step == 20
    if then == "gamma given":
        assert again is None
        assert fit.strategy.report.curvature is None
