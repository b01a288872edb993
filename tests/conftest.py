import pytest
import torch

from lightning_pc.inference.movers import Descent
from lightning_pc.optim import IPC
from lightning_pc.stages.local import LocalErrors
from lightning_pc.stages.through import ThroughErrors


@pytest.fixture(autouse=True)
def _small_and_seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Plain(Descent):
    """The paper's descent, which takes itself for one that is chosen automatically."""

    own_rates = True


@pytest.fixture
def plain(monkeypatch):
    """Values go down the gradient at the gamma that is given here."""
    monkeypatch.setattr(
        "lightning_pc.learner.conjugate", lambda gamma, decay, *rest: Plain(gamma, decay)
    )
    monkeypatch.setattr("lightning_pc.inference.curvature.AutoGamma.due", lambda self: False)

    def optimizer(net, lr, gamma, **given):
        made = IPC(torch.optim.SGD(net.parameters(), lr), net, gamma_decay=1.0, **given)
        made._learner.auto.gamma = gamma
        return made

    return optimizer


@pytest.fixture(params=["cpu", "device"])
def anywhere(request, monkeypatch):
    """With and without waiting for numbers, as on a device, where moves happen times zero."""
    if request.param == "device":
        monkeypatch.setattr("lightning_pc.nodes.following._waits", lambda total: False)


@pytest.fixture
def evaluated(monkeypatch):
    """What evaluators were asked for, an entry for each evaluation."""
    asked = []
    for kind in (LocalErrors, ThroughErrors):
        run = kind.__call__
        monkeypatch.setattr(
            kind, "__call__", lambda self, a, run=run: asked.append(a) or run(self, a)
        )
    return asked
