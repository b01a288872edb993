"""Random combinations of models, algorithms and settings: each trains, or is one of our errors."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_pc.errors import DivergenceError, PCError
from tests.engine.lightning_problems import Module, loader, trainer
from tests.engine.problems import PROBLEMS

NAMES = (
    *("mlp", "cnn", "dropout", "residual", "skipping", "shared", "tied", "transformer", "unet"),
    *("lstm", "one layer"),
)
SETTINGS = {
    "T": st.sampled_from([None, 1, 2, 5, 12]),
    "gamma": st.sampled_from(["auto", 0.05, 0.5, 3.0]),
    "gamma_decay": st.sampled_from([None, 0.5, 1.0]),
    "momentum": st.sampled_from([None, 0.0, 0.5, "conjugate"]),
    "value_nodes": st.sampled_from(["auto", "modules", "linear", "blocks", "nonlinearities"]),
    "softmax_energy": st.sampled_from(["categorical", "gaussian"]),
    "precisions": st.sampled_from(["constant", 0.5, "spiking"]),
    "beta": st.sampled_from([None, 0.3, -0.3, (0.3, -0.3), "auto"]),
    "until": st.sampled_from([None, 1e-3]),
    "parallel": st.sampled_from(["auto", True, False]),
    "reset": st.sampled_from(["batch", "never"]),
}


class Fuzzed(Module):
    def __init__(self, net, optimizer):
        super().__init__(net=net)
        self.kind = optimizer

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.kind(self.net.parameters(), lr=1e-3)


@st.composite
def runs(draw):
    """A model, settings of which most are as usual, and a Trainer's arguments."""
    changed = draw(st.lists(st.sampled_from([*SETTINGS]), max_size=4, unique=True))
    given = {name: draw(SETTINGS[name]) for name in changed}
    given["algorithm"] = draw(st.sampled_from(["auto", "ipc", "pc", "zil", "epc", "iepc"]))
    flags = {
        "precision": draw(st.sampled_from(["32-true", "64-true", "bf16-mixed", "bf16-true"])),
        "accumulate_grad_batches": draw(st.sampled_from([1, 1, 2])),
        "gradient_clip_val": draw(st.sampled_from([None, None, 0.1])),
    }
    optimizer = draw(st.sampled_from([torch.optim.SGD, torch.optim.AdamW]))
    return draw(st.sampled_from(NAMES)), given, flags, optimizer


def fuzz(run):
    """Whether it trained."""
    name, given, flags, optimizer = run
    problem = PROBLEMS[name]
    torch.manual_seed(0)
    module = Fuzzed(problem.make(), optimizer)
    batches = [problem.draw(4) for _ in range(3)]
    before, told = copy.deepcopy(module.state_dict()), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = None
        try:
            fit = trainer(given, **flags)
            fit.fit(module, loader(batches))
        except (PCError, MisconfigurationException) as error:
            told = error
    assert told is None or len(str(told)) > 20
    if told is None:
        assert fit.strategy.report.free_energy.isfinite().all()
    elif not isinstance(told, DivergenceError) and flags["precision"] != "bf16-true":
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor.to(before[key].dtype), before[key])
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    after = module.state_dict()
    assert list(after) == list(before)
    for key, tensor in after.items():
        assert tensor.isfinite().all()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.shape == before[key].shape
    assert all(p.requires_grad for p in module.parameters())
    copy.deepcopy(module)  # no tensor of a graph is left in it
    return told is None


SLOWLY = {"deadline": None, "suppress_health_check": [*HealthCheck], "derandomize": True}


def fuzz_many(count):
    """Each trains or says why not, and a third trains, or there is little that this shows."""
    found = []

    @settings(max_examples=count, database=None, **SLOWLY)
    @given(runs())
    def each(run):
        found.append(fuzz(run))

    each()
    assert sum(found) > len(found) / 3


def test_each_trains_or_says_why_not():
    fuzz_many(40)


@pytest.mark.slow
def test_many_more():
    fuzz_many(400)
