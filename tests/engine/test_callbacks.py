"""EnergyMonitor logs what a step's report says."""

from __future__ import annotations

import html
import math
import re

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger

import lightning_pc.callbacks
from lightning_pc import EnergyMonitor, explain
from lightning_pc.errors import ConfigError
from lightning_pc.plots import plot_energy, plot_history
from tests.engine.lightning_problems import ALGORITHMS, Memory, Module, data, loader, trainer

SHORT = {"pc/energy", "pc/gamma", "pc/steps"}
NODES = {"pc/energy/net.1", "pc/energy/net.3"}


class Reports(Module):
    def __init__(self):
        super().__init__()
        self.reports = []

    def on_train_batch_end(self, *args):
        self.reports.append(self.trainer.strategy.report)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("per_node", [False, True])
def test_logs_every_batch(algorithm, per_node):
    memory, module = Memory(), Reports()
    fit = trainer(algorithm, logger=memory, callbacks=[EnergyMonitor(per_node=per_node)])
    fit.fit(module, loader(data(3)))
    assert len(memory.seen) == 3
    for (index, (step, logged)), report in zip(enumerate(memory.seen), module.reports, strict=True):
        assert step == index
        chosen = {"pc/curvature"} if report.curvature is not None else set()
        assert set(logged) - {"epoch"} == SHORT | chosen | (NODES if per_node else set())
        assert bool(chosen) == (algorithm != "zil")
        expected = report.energy[-1] / report.loss_terms
        assert logged["pc/energy"] == pytest.approx(float(expected.sum()), rel=1e-6)
        assert logged["pc/gamma"] == pytest.approx(report.gamma, rel=1e-6)
        assert logged["pc/steps"] == report.steps
        if chosen:
            assert logged["pc/curvature"] == pytest.approx(report.curvature, rel=1e-6)
        if per_node:
            each = [logged[f"pc/energy/{name}"] for name in report.nodes]
            assert each == pytest.approx(expected.tolist(), rel=1e-6)


def test_one_number_in_the_progress_bar():
    shown = []

    class Bar(ProgressBar):
        def on_train_batch_end(self, trainer, pl_module, *args):
            shown.append(set(self.get_metrics(trainer, pl_module)) - {"v_num"})

    fit = trainer("ipc", callbacks=[EnergyMonitor(per_node=True), Bar()], enable_progress_bar=True)
    fit.fit(Module(), loader(data(2)))
    assert shown == [{"pc/energy"}] * 2


def test_energy_is_of_use():
    """PC's node energies are positive once inference has run."""
    memory = Memory()
    trainer("pc", logger=memory, callbacks=[EnergyMonitor()]).fit(Module(), loader(data(2)))
    assert all(0 < logged["pc/energy"] < 10 for _, logged in memory.seen)


def test_any_logger_and_frequency(tmp_path):
    logger = CSVLogger(tmp_path)
    fit = trainer("ipc", logger=logger, callbacks=[EnergyMonitor()], log_every_n_steps=2)
    fit.fit(Module(), loader(data(4)))
    header, *rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert set(header.split(",")) >= SHORT
    assert len(rows) == 2


def test_without_a_logger():
    fit = trainer("ipc", callbacks=[EnergyMonitor()])
    fit.fit(Module(), loader(data(1)))
    assert set(fit.callback_metrics) == SHORT | {"pc/curvature"}


def test_batches_that_are_skipped():
    class Skips(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    memory = Memory()
    trainer("ipc", logger=memory, callbacks=[EnergyMonitor()]).fit(Skips(), loader(data(2)))
    assert [step for step, _ in memory.seen] == [1]


def test_history_is_spread_over_the_fit(tmp_path):
    picture = tmp_path / "deep" / "energy.png"
    module, monitor = Reports(), EnergyMonitor(plot=str(picture), most=4)
    trainer("pc", callbacks=[monitor], max_epochs=3).fit(module, loader(data(3)))
    assert [batch for batch, _ in monitor.history] == [0, 4, 8]
    for batch, energies in monitor.history:
        report = module.reports[batch]
        assert list(energies) == report.nodes
        expected = (report.energy[-1] / report.loss_terms).tolist()
        assert [float(e) for e in energies.values()] == pytest.approx(expected)
    assert picture.stat().st_size > 1000
    axes = plot_history(monitor.history)
    assert [line.get_label() for line in axes.lines] == module.reports[0].nodes
    assert list(axes.lines[0].get_xdata()) == [0, 4, 8]


def test_a_page_tells_what_the_run_did(tmp_path):
    page = tmp_path / "run.html"
    module, monitor = Reports(), EnergyMonitor(plot=str(page), most=4)
    trainer("ipc", callbacks=[monitor], max_epochs=3).fit(module, loader(data(3)))
    text = page.read_text()
    report = module.reports[-1]
    for sentence in explain(report).splitlines():
        assert html.escape(sentence) in text
    for name, count in report.learned.items():
        assert f"<td>{name}</td><td>{count}</td>" in text
    assert text.count("<svg") == 2
    assert not re.search(r"<script|<link|<img| src=", text)  # it needs nothing else
    assert "<p>None.</p>" in text
    with pytest.warns(UserWarning, match="never reach"):
        trainer({"algorithm": "ipc", "T": 1}, callbacks=[monitor]).fit(module, loader(data(3)))
    assert "T=1 inference steps never reach" in page.read_text()


def test_a_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setattr(lightning_pc.callbacks, "find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match=r"EnergyMonitor\(plot='a.png'\).*plots"):
        trainer("pc", callbacks=[EnergyMonitor(plot="a.png")]).fit(Module(), loader(data(1)))


@pytest.mark.parametrize("most", [0, -1, "x", None, True, math.nan])
def test_batches_that_cannot_be_remembered(most):
    with pytest.raises(MisconfigurationException, match=r"EnergyMonitor\(most=.*expected a number"):
        EnergyMonitor(most=most)


def test_a_picture_of_no_report():
    with pytest.raises(ConfigError, match=r"plot_energy\(report\): expected .*, got NoneType"):
        plot_energy(None)


def test_a_plain_strategy_has_no_energy():
    module = Module()
    before = module.net[0].weight.clone()
    with pytest.raises(MisconfigurationException, match=r"EnergyMonitor.*SingleDeviceStrategy"):
        trainer("auto", callbacks=[EnergyMonitor()]).fit(module, loader(data()))
    assert torch.equal(module.net[0].weight, before)


def test_evaluation_alone_is_fine():
    class Evaluates(Module):
        def validation_step(self, batch, batch_idx):
            self.log("val", 1.0)

    fit = trainer("auto", callbacks=[EnergyMonitor()])
    assert fit.validate(Evaluates(), loader(data()), verbose=False) == [{"val": 1.0}]


def test_the_monitor_does_not_change_training():
    runs = []
    for callbacks in ([], [EnergyMonitor(per_node=True)]):
        module = Module()
        trainer("ipc", callbacks=callbacks, max_epochs=2).fit(module, loader(data()))
        runs.append(module.net[0].weight)
    assert torch.equal(*runs)
