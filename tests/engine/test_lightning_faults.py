"""Runs that fail in the middle: nothing stays behind, and they can go on."""

from __future__ import annotations

import copy
import errno
import io
import os
import signal

import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.utilities.memory import is_oom_error
from torch.utils.data import DataLoader, _utils
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from lightning_pc.stages.local import LocalErrors
from tests.engine.by_hand import SETTINGS, Ends, Net, by_hand, each_algorithm, same
from tests.engine.lightning_problems import data, loader, traces, trainer, weights

# --- faults --------------------------------------------------------------------------------------


class Fails:
    """A data set whose second sample cannot be had."""

    def __init__(self, dies: bool) -> None:
        self.dies = dies

    def __len__(self):
        return 3

    def __getitem__(self, number):
        if number == 1 and self.dies:
            os._exit(1)
        if number == 1:
            raise ValueError("no such sample")
        return data()[number]


def assert_clean(module, before, start):
    """Nothing of ours is left, and it learns on from there."""
    assert traces(module) == before
    for p in module.parameters():
        assert p.grad is None or not p.grad.requires_grad
    assert torch.overrides._len_torch_function_stack() == 0
    assert torch.is_grad_enabled()
    same(weights(module), start)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    for algorithm in SETTINGS:
        again, hand = copy.deepcopy(other), copy.deepcopy(other)
        trainer(SETTINGS[algorithm]).fit(again, loader(data()))
        same(weights(again), by_hand(algorithm, data(), hand)[-1])


@each_algorithm
@pytest.mark.parametrize("dies", [False, True])
def test_a_worker_that_fails(dies, algorithm, monkeypatch, graphs):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    module = Net()
    before = traces(module)
    batches = DataLoader(Fails(dies), batch_size=None, num_workers=1, prefetch_factor=1)
    error, told = (RuntimeError, "exited unexpectedly") if dies else (ValueError, "no such sample")
    fit = trainer(SETTINGS[algorithm])
    with pytest.raises(error, match=told):
        fit.fit(module, batches)
    assert fit.global_step <= 1
    hand = by_hand(algorithm, module.batches)
    assert graphs() == 0
    assert_clean(module, before, hand[-1] if hand else weights(Net()))


ERRORS = {
    "interrupt": (KeyboardInterrupt, SystemExit),
    "memory": (torch.OutOfMemoryError, torch.OutOfMemoryError),
}


@each_algorithm
@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.filterwarnings("ignore:::lightning_pc")  # the T of the loop by hand is too small
def test_inference_that_breaks_off(name, algorithm, monkeypatch, tmp_path, graphs):
    """In the middle of the second batch: iPC has moved weights by then, PC and Z-IL have not.

    A checkpoint of that moment has the weights of that moment.
    """
    error, raised = ERRORS[name]
    module, whole, asked_twice = Net(), LocalErrors.__call__, []

    def breaks(self, asked):
        asked_twice.append(asked.t == 2)
        if sum(asked_twice) == 2:
            raise error("CUDA out of memory.")
        return whole(self, asked)

    before, handler = traces(module), signal.getsignal(signal.SIGINT)
    saves = pl_callbacks.OnExceptionCheckpoint(tmp_path, "broken")
    fit = trainer(SETTINGS[algorithm], callbacks=[saves], enable_checkpointing=True)
    monkeypatch.setattr(LocalErrors, "__call__", breaks)
    try:
        with pytest.raises(raised) as told:
            fit.fit(module, loader(data()))
        message, found = str(told.value), is_oom_error(told.value)
        del told  # and the frames that it holds
    finally:
        signal.signal(signal.SIGINT, handler)
        monkeypatch.undo()
    assert fit.state.status == "interrupted"
    if name == "memory":  # the device's own words first
        assert message.startswith("CUDA out of memory.")
        assert "The largest is 'net.1' [4, 7], 0.000107 MiB" in message
        assert found  # so that a search for the batch size goes on
    assert fit.strategy.report is None
    saved = torch.load(tmp_path / "broken.ckpt", weights_only=True)
    assert all(map(torch.equal, saved["state_dict"].values(), module.state_dict().values()))
    assert saved["global_step"] == 1
    hand = Net()
    first = by_hand(algorithm, data(1), hand)[-1]
    if algorithm == "ipc":
        monkeypatch.setitem(SETTINGS, "ipc", SETTINGS["ipc"] | {"T": 2})
        (first,) = by_hand("ipc", data()[1:2], hand)
        monkeypatch.undo()
    assert graphs() == 0
    assert_clean(module, before, first)


class Raises(Net):
    """Between the second batch's forward and its inference."""

    raises = True

    def on_before_backward(self, loss):
        if self.raises and len(self.seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")


@each_algorithm
def test_a_hook_that_fails_before_inference(algorithm, monkeypatch, graphs):
    module = Raises()
    before, fit = traces(module), trainer(SETTINGS[algorithm])
    with pytest.raises(torch.OutOfMemoryError):
        fit.fit(module, loader(data()))
    monkeypatch.setattr(Raises, "raises", False)
    assert graphs() == 0
    assert_clean(module, before, by_hand(algorithm, data(1))[-1])
    assert fit.global_step == 1


@pytest.mark.parametrize("algorithm", ["ipc", "pc"])
def test_a_disk_that_is_full(algorithm, monkeypatch, tmp_path, graphs):
    """The second checkpoint is cut short; the first is whole, and the run goes on from there."""
    local = pytest.importorskip("fsspec.implementations.local").LocalFileOpener
    whole, files = local.write, []

    def write(self, content, *args):
        files.append(self)
        if len(files) > 1:
            whole(self, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, content, *args)

    module = Net()
    before, ends = traces(module), Ends()
    saves = pl_callbacks.ModelCheckpoint(tmp_path, filename="kept")
    flags = {"callbacks": [ends, saves], "enable_checkpointing": True, "max_epochs": 3}
    monkeypatch.setattr(local, "write", write)
    with pytest.raises(OSError, match="No space left"):
        trainer(SETTINGS[algorithm], **flags).fit(module, loader(data()))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["kept.ckpt"]
    assert graphs() == 0
    assert_clean(module, before, ends.batches[5])
    resumed = Net()
    trainer(SETTINGS[algorithm], max_epochs=3).fit(
        resumed, loader(data()), ckpt_path=tmp_path / "kept.ckpt"
    )
    same(weights(resumed), by_hand(algorithm, data() * 3)[-1])
