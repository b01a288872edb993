from functools import partial

import pytest
import torch

from lightning_pc.inference.movers import Descent
from lightning_pc.nodes.following import Following
from lightning_pc.optim import IPC
from lightning_pc.stages.local import LocalErrors
from lightning_pc.stages.through import ThroughErrors


@pytest.fixture(autouse=True)
def _small_and_seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def mostly_slow(cases, *quick):
    """The cases of a test, all but the ``quick`` ones marked as slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def never_looks(optimizer):
    """Its automatic gamma, of which a look is long past and the next one far ahead."""
    auto = optimizer._learner.auto
    auto.anew, auto.evaluations = False, 1000
    auto.looked_at = auto.evaluations
    return auto


class Plain(Descent):
    """The paper's descent, which takes itself for one that is chosen automatically."""

    own_rates = True


@pytest.fixture
def plain():
    """Values go down the gradient at the gamma that is given here."""

    def optimizer(net, lr, gamma, **given):
        made = IPC(torch.optim.SGD(net.parameters(), lr), net, gamma_decay=1.0, **given)
        made._learner._mover = lambda *_: Plain(gamma)
        never_looks(made).gamma = gamma
        return made

    return optimizer


@pytest.fixture(params=["cpu", "device"])
def follows(request):
    """`Following` with and without waiting for numbers, as on a device: moves are times zero."""
    return partial(Following, waits=request.param == "cpu")


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
