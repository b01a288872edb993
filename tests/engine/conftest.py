import gc

import pytest
import torch

from lightning_pc.stages.local import LocalErrors
from lightning_pc.stages.through import ThroughErrors


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


@pytest.fixture
def graphs():
    """How many tensors hold a graph of autograd, of those that the test has made."""

    def count() -> int:
        gc.collect()
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        return sum(t.grad_fn is not None for t in tensors)

    gc.freeze()
    yield count
    gc.unfreeze()
