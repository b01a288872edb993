"""How steps are compiled in tests, and hooks that stand in the way."""

from __future__ import annotations

from lightning_pc.optim import IPC, PC
from tests.engine.stacks import adamw, sgd

#: Runs what was traced, uncompiled: what a compiler does to it is the compiler's own.
TRACED = {"backend": "eager"}

ROWS = {
    "ipc, SGD, side by side": (IPC, sgd, {"gamma": 0.3, "parallel": True}),
    "ipc, AdamW": (IPC, adamw, {"gamma": 0.3, "T": 5, "parallel": False}),
    "pc, side by side": (PC, adamw, {"parallel": True}),
    "pc, two betas": (PC, adamw, {"gamma": 0.3, "beta": (0.3, -0.3), "parallel": False}),
}


def compiler_of(pc):
    return pc._learner.compiler


def hooked(model):
    model[0].register_forward_hook(lambda m, i, o: o.register_hook(lambda g: 0.5 * g) and None)


def parameter_hook(model):
    model[0].weight.register_hook(lambda g: 0.5 * g)
