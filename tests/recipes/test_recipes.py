"""The recipes: every YAML runs, pairs differ in little, the demo works, and iPC really learns."""

from __future__ import annotations

import difflib
import gzip
import json
import statistics
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_pc.cli import main as lightning_pc_main
from recipes import study
from recipes.digits import demo
from recipes.digits.data import Digits

RECIPES = Path(study.__file__).parent
#: The others are run by the tests of their recipes.
YAMLS = [p for name in ("digits", "mnist") for p in sorted((RECIPES / name).glob("*.yaml"))]
IDS = [path.relative_to(RECIPES).as_posix() for path in YAMLS]


@pytest.fixture
def mnist_dir(tmp_path):
    """MNIST's four files, with a few random digits in them."""
    folder, rng = tmp_path / "mnist", np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 300), ("t10k", 100)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        for kind, header, array in (
            ("images-idx3", struct.pack(">4i", 2051, count, 28, 28), images),
            ("labels-idx1", struct.pack(">2i", 2049, count), labels),
        ):
            packed = gzip.compress(header + array.tobytes())
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(packed)
    return folder


def tiny(folder):
    return [f"--data.data_dir={folder}", "--data.val_size=100", "--data.checksums=false"]


def test_recipes_exist():
    assert {"digits/bp.yaml", "digits/ipc.yaml", "mnist/bp.yaml", "mnist/ipc.yaml"} <= set(IDS)


@pytest.mark.parametrize("path", YAMLS, ids=IDS)
def test_yaml_runs(path, mnist_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_pc"])
    extra = tiny(mnist_dir) if path.parent.name == "mnist" else []
    cli = lightning_pc_main(["fit", "-c", str(path), "--trainer.fast_dev_run=2", *extra])
    assert cli.trainer.global_step >= 2
    strategy = cli.trainer.strategy
    if path.stem == "bp":
        assert not hasattr(strategy, "report")
    else:
        assert strategy.report.algorithm == path.stem
        assert strategy.report.nodes == ["layers.2", "layers.4"]


@pytest.mark.parametrize(
    "path", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: p.relative_to(RECIPES).as_posix()
)
def test_yaml_states_its_command(path):
    if path.parent.name == "sweeps":
        command = f"python -m recipes.{path.parents[1].name}.sweep --where row={path.stem}"
    else:
        command = f"python -m lightning_pc fit -c recipes/{path.relative_to(RECIPES).as_posix()}"
    assert command in path.read_text()


@pytest.mark.parametrize("path", [p for p in YAMLS if p.stem != "bp"])
def test_yamls_differ_in_a_handful_of_lines(path):
    ours, backprop = (
        [line for line in p.read_text().splitlines() if not line.startswith("#")]
        for p in (path, path.with_name("bp.yaml"))
    )
    changed = [
        line for line in difflib.ndiff(backprop, ours) if line[0] == "+" and line[2:] != "\n"
    ]
    lost = [line for line in difflib.ndiff(backprop, ours) if line[0] == "-"]
    assert len(changed) <= 8, changed
    assert len(lost) <= 2, lost


def test_digits_split_is_fixed_stratified_and_disjoint():
    splits = [{}, {}]
    for split in splits:
        data = Digits()
        data.setup("fit")
        split.update(data.splits)
    for name, size in (("train", 1077), ("val", 360), ("test", 360)):
        (images, labels), (same, _) = splits[0][name].tensors, splits[1][name].tensors
        assert len(images) == size
        assert torch.equal(images, same)
        shares = torch.bincount(labels, minlength=10) / size
        assert (shares - 0.1).abs().max() < 0.01
    rows = {name: {tuple(row.tolist()) for row in s.tensors[0]} for name, s in splits[0].items()}
    assert not rows["train"] & rows["test"]
    assert not rows["train"] & rows["val"]
    assert not rows["val"] & rows["test"]


def test_batches_are_fetched_by_index():
    data = Digits(batch_size=64)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(labels) for _, labels in batches] == [64] * 16 + [1077 - 16 * 64]
    images, labels = data.splits["train"].tensors
    seen = torch.cat([x for x, _ in batches])
    assert torch.equal(seen.sum(0), images.sum(0)) or torch.allclose(seen.sum(0), images.sum(0))
    assert torch.equal(torch.bincount(torch.cat([y for _, y in batches])), torch.bincount(labels))


def test_demo_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo"])
    demo.main(["--epochs", "1", "--results", str(tmp_path)])
    for name in ("energy", "learning"):
        assert (tmp_path / f"digits_{name}.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for word in ("backprop", "PC", "iPC", "Z-IL", "test accuracy", "energy", "digits_energy.png"):
        assert word in printed
    assert "GPU available" not in printed


def test_study_writes_its_record(tmp_path, monkeypatch, mnist_dir):
    monkeypatch.setattr(sys, "argv", ["study"])
    out = tmp_path / "results.json"
    args = [*tiny(mnist_dir), "--trainer.max_epochs=1"]
    study.main(["mnist", "--seeds", "2", f"--out={out}", *args])
    written = json.loads(out.read_text())
    assert set(written["algorithms"]) == {"bp", "pc", "ipc"}
    assert written["algorithms"]["ipc"]["seeds"] == [0, 1]
    assert written["command"].startswith("python -m recipes.study mnist --seeds 2")


@pytest.mark.parametrize(
    "path",
    [RECIPES / name / "results.json" for name in ("digits", "mnist")],
    ids=lambda p: p.parent.name,
)
def test_committed_results_are_of_these_yamls(path):
    for name, figures in json.loads(path.read_text())["algorithms"].items():
        assert figures["config"] == f"recipes/{path.parent.name}/{name}.yaml"
        assert (RECIPES.parent / figures["config"]).exists()
        mean = statistics.fmean(figures["test_accuracy"])
        assert figures["test_accuracy_mean"] == pytest.approx(mean, abs=1e-2)


@pytest.mark.slow
def test_ipc_learns_digits_as_well_as_backprop(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study"])
    paths = [RECIPES / "digits" / f"{name}.yaml" for name in ("bp", "ipc")]
    results = study.study(paths, 3, ["--trainer.max_epochs=15"])
    backprop, ipc = (
        statistics.fmean(run.test_accuracy for run in results[name]) for name in ("bp", "ipc")
    )
    assert backprop > 90
    assert ipc >= backprop - 0.5
    for run in results["ipc"]:
        assert run.first_report is not None
        assert run.first_report.steps == 8
        assert min(run.first_report.peak_energy.values()) > 0
