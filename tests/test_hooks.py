"""Hooks between gradients and optimizer step: `on_after_backward`, `on_before_optimizer_step`."""

from __future__ import annotations

import contextlib
import copy

import lightning as L
import pytest
import torch
from lightning_problems import ALGORITHMS, Module, data, loader, trainer
from torch import nn


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_are_there_for_hooks(algorithm):
    norms = []

    class Looks(Module):
        def on_after_backward(self):
            norms.append([p.grad is not None for p in self.parameters()])

    trainer(algorithm).fit(Looks(), loader(data(2)))  # looking is no change
    assert norms == [[True] * 6] * 2


def in_place(model):
    next(model.parameters()).grad.zero_()


def behind(model):
    next(model.parameters()).grad.data.mul_(0)  # raises no version


def anew(model):
    first = next(model.parameters())
    first.grad = torch.zeros_like(first)


@pytest.mark.parametrize("clip", [None, 10.0])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("where", "change"),
    [("module", in_place), ("callback", behind), ("callback", anew), ("early", anew)],
)
def test_gradients_that_a_hook_changes(where, change, algorithm, clip):
    """At every step of `pc`, `zil` and `epc`; of `ipc` and `iepc` at the last, which is said."""

    class Changes(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            change(module)

    class ChangesItself(Module):
        def on_before_optimizer_step(self, optimizer):
            change(self)

    class ChangesEarly(Module):
        def on_after_backward(self):
            change(self)

    module = {"module": ChangesItself, "early": ChangesEarly}.get(where, Module)()
    before = next(module.parameters()).detach().clone()
    callbacks = [Changes()] if where == "callback" else None
    fit = trainer(algorithm, callbacks=callbacks, gradient_clip_val=clip)
    several = algorithm in ("ipc", "iepc")
    says = f"before the last of the steps that {algorithm} takes"
    with pytest.warns(UserWarning, match=says) if several else contextlib.nullcontext() as told:
        fit.fit(module, loader(data(3)))
    assert not several or sum("has changed gradients" in str(each.message) for each in told) == 1
    assert "_clip_gradients" not in vars(fit.precision_plugin)
    stood = torch.equal(next(module.parameters()), before)
    assert stood == (not several)


def test_hooks_that_change_no_gradient():
    """A norm that is taken by clipping to nothing, and a copy of the module."""
    copies = []

    class Norms(Module):
        def on_before_optimizer_step(self, optimizer):
            nn.utils.clip_grad_norm_(self.parameters(), 1e9)
            copies.append(copy.deepcopy(self))

    module = Norms()
    trainer("ipc").fit(module, loader(data()))  # a warning would be an error
    assert len(copies) == len(data())
    assert set(vars(copies[-1])) == set(vars(module))
