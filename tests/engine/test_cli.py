"""python -m lightning_pc: LightningCLI that knows the strategies."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from lightning_pc import PCStrategy
from lightning_pc.cli import main
from lightning_pc.precisions import Spiking
from tests.engine.lightning_problems import ALGORITHMS, Module, data, loader


class Net(Module):
    """A model with one argument."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)


class Data(L.LightningDataModule):
    """Three batches."""

    def train_dataloader(self) -> Any:
        return loader(data())


QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def config(tmp_path: Path, **kwargs: Any) -> str:
    content = {
        "seed_everything": 1,
        "trainer": {**QUIET, "default_root_dir": str(tmp_path), **kwargs},
        "model": {"class_path": f"{__name__}.Net"},
        "data": {"class_path": f"{__name__}.Data"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_class_path(tmp_path):
    arguments = {"algorithm": "pc", "T": 4, "gamma": 0.2, "value_nodes": ["net.1", "net.3"]}
    strategy = {"class_path": "lightning_pc.PCStrategy", "init_args": arguments}
    cli = main(["fit", "-c", config(tmp_path, strategy=strategy)])
    assert isinstance(cli.trainer.strategy, PCStrategy)
    report = cli.trainer.strategy.report
    assert (report.algorithm, report.steps) == ("pc", 4)
    assert report.nodes == ["net.1", "net.3"]
    assert cli.trainer.strategy.settings.gamma == 0.2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_registered_names(algorithm, tmp_path):
    cli = main(["fit", "-c", config(tmp_path, strategy=algorithm)])
    assert cli.trainer.strategy.report.algorithm == algorithm


@pytest.mark.parametrize(
    ("overrides", "check"),
    [
        (["--trainer.strategy.init_args.T=5"], lambda s: s.settings.T == 5),
        (["--trainer.strategy.init_args.gamma=0.3"], lambda s: s.settings.gamma == 0.3),
        (["--trainer.strategy.init_args.algorithm=pc"], lambda s: s.settings.algorithm == "pc"),
        (["--trainer.strategy.init_args.value_nodes=linear"], lambda s: len(s.report.nodes) == 2),
        (["--trainer.strategy.init_args.value_nodes=[net.2]"], lambda s: s.report.depth == 1),
        (["--trainer.strategy.init_args.loss_terms=4"], lambda s: s.report.loss_terms == 4),
        (
            ["--trainer.strategy.init_args.softmax_energy=gaussian"],
            lambda s: s.settings.softmax_energy == "gaussian",
        ),
        (
            ["--trainer.strategy.init_args.precisions=spiking"],
            lambda s: s.settings.precisions == "spiking",
        ),
        (["--trainer.strategy.init_args.precisions=2"], lambda s: s.settings.precisions == 2.0),
        (
            [
                "--trainer.strategy.init_args.precisions=lightning_pc.precisions.Spiking",
                "--trainer.strategy.init_args.precisions.init_args.rest=0.01",
            ],
            lambda s: s.settings.precisions == Spiking(0.01),
        ),
        (
            [
                "--trainer.strategy.init_args.algorithm=pc",
                "--trainer.strategy.init_args.beta=[0.5, -0.5]",
            ],
            lambda s: s.settings.betas == (0.5, -0.5) and s.report.steps == 16,
        ),
        (["--trainer.strategy.init_args.beta=-0.5"], lambda s: s.settings.betas == (-0.5,)),
        (
            [
                "--trainer.strategy.init_args.inference=torch.optim.Adam",
                "--trainer.strategy.init_args.inference.init_args.lr=0.02",
            ],
            lambda s: s.report.gamma == 0.02 and s.report.momentum == 0,
        ),
    ],
    ids=lambda v: v[0].split(".")[-1] if isinstance(v, list) else "",
)
def test_overrides(overrides, check, tmp_path):
    strategy = {"class_path": "lightning_pc.PCStrategy", "init_args": {"algorithm": "ipc"}}
    cli = main(["fit", "-c", config(tmp_path, strategy=strategy), *overrides])
    assert check(cli.trainer.strategy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gama": 0.1}, "gama"),
        ({"T": "many"}, "many"),
        ({"T": 2.5}, "2.5"),
        ({"algorithm": "backprop"}, "backprop"),
        ({"reset": "sometimes"}, "sometimes"),
        ({"precisions": "spikes"}, "'spikes': expected one of 'constant'"),
        ({"beta": 0.0}, "beta=0.0: expected the loss's factor"),
        ({"algorithm": "pc", "beta": [0.3, 0.0]}, "beta=(0.3, 0.0): expected the loss's factor"),
        ({"nudging": "centered"}, "nudging"),
        ({"T": "auto"}, "auto"),
        ({"T": 0}, "T=0: expected a whole number"),
        ({"gamma": -1.0}, "gamma=-1.0: expected a positive"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, capsys):
    strategy = {"class_path": "lightning_pc.PCStrategy", "init_args": arguments}
    path = config(tmp_path, strategy=strategy)
    with pytest.raises((SystemExit, ValueError, RuntimeError)) as caught:
        main(["fit", "-c", path])
    assert message in capsys.readouterr().err + str(caught.value)


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--trainer.strategy.help=lightning_pc.PCStrategy"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for argument in ("algorithm", "T", "gamma", "gamma_decay", "value_nodes", "reset"):
        assert f"--trainer.strategy.{argument} " in text
    for argument in ("momentum", "loss_terms", "softmax_energy", "precisions", "beta", "inference"):
        assert f"--trainer.strategy.{argument} " in text
    assert "Trains a LightningModule with predictive coding" in text
    assert "Inference steps per batch" in text
    assert "Inference rate, positive" in text
    assert "default: auto" in text
    assert "Untyped" not in text


@pytest.mark.parametrize(
    "arguments",
    [
        {"T": 3},
        {"value_nodes": ["net.1"]},
        {"value_nodes": "net.1"},
        {"value_nodes": ["net.1", "net.[02]"]},
        {
            "algorithm": "ipc",
            "gamma": 0.25,
            "momentum": 0.5,
            "reset": "never",
            "loss_terms": 6.0,
            "beta": 0.5,
        },
        {"algorithm": "pc", "gamma": "auto", "momentum": "conjugate", "beta": [0.5, -0.5]},
        {
            "algorithm": "pc",
            "inference": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}},
        },
        {"algorithm": "ipc", "precisions": "spiking"},
        {"algorithm": "ipc", "precisions": 0.5},
        {"precisions": {"class_path": "lightning_pc.precisions.Constant"}},
    ],
    ids=str,
)
def test_the_saved_config_runs_again(arguments, tmp_path):
    strategy = {"class_path": "lightning_pc.PCStrategy", "init_args": arguments}
    cli = main(["fit", "-c", config(tmp_path, strategy=strategy, logger=True)])
    saved = Path(cli.trainer.log_dir) / "config.yaml"
    again = main(["fit", "-c", str(saved)])
    first, second = (c.trainer.strategy for c in (cli, again))
    assert second.report.nodes == first.report.nodes
    assert second.report.steps == first.report.steps
    assert str(again.config.fit.trainer.strategy) == str(cli.config.fit.trainer.strategy)


def test_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning_pc", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("lightning_pc", run_name="__main__")
    assert caught.value.code == 0
    assert "fit" in capsys.readouterr().out
