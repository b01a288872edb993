"""What tests see and set inside an optimizer."""

import torch
import torch.optim.sgd as torch_sgd
from torch.utils._python_dispatch import TorchDispatchMode


def never_looks(optimizer):
    """Its automatic gamma, of which a look is long past and the next one far ahead."""
    auto = optimizer._learner.auto
    auto.anew, auto.evaluations = False, 1000
    auto.looked_at = auto.evaluations
    return auto


class CountMatrixProducts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def matrix_products(optimizer, closure):
    with CountMatrixProducts() as counter:
        optimizer.step(closure)
    return counter.count


def count_gradients(monkeypatch):
    """How many parameters torch's SGD was given gradients of."""
    found, step = [0], torch_sgd.sgd

    def counted(params, grads, *args, **kwargs):
        found[0] += len(grads)
        return step(params, grads, *args, **kwargs)

    monkeypatch.setattr(torch_sgd, "sgd", counted)
    return found
